"""Baselines of the verifier's rewards, one function each; see `choices`.

They take `rewards`, a row for each prompt with the rewards of its samples.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def group_mean(rewards: Float[Array, 'g n']) -> Float[Array, 'g n']:
  """r - mean (Liu et al. 2025, Dr. GRPO, arXiv 2503.20783)."""
  # From the first on: the mean of equal rewards such as 0.1 is not 0.1 in float32, and of what is
  # left of them Adam would make a full step.
  shifted = rewards - rewards[:, :1]
  return shifted - jnp.mean(shifted, axis=1, keepdims=True)


def group_mean_std(rewards: Float[Array, 'g n']) -> Float[Array, 'g n']:
  """(r - mean) / (std + 1e-4) (Shao et al. 2024, GRPO, arXiv 2402.03300, eq. 3, outcome
  supervision).

  The standard deviation is the sample's, sqrt(sum (r - mean)^2 / (n - 1)), as in TRL, verl and
  Tunix; the population's would make it sqrt(n / (n - 1)) times larger. One sample alone is worth 0.
  """
  centred = group_mean(rewards)
  ddof = min(1, rewards.shape[1] - 1)
  return centred / (jnp.std(centred, axis=1, keepdims=True, ddof=ddof) + 1e-4)
