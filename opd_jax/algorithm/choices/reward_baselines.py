"""Baselines of the verifier's rewards, one function each; see `choices`.

They take `rewards`, a row for each prompt with the rewards of its samples.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def group_mean(rewards: Float[Array, 'g n']) -> Float[Array, 'g n']:
  """r - mean (Liu et al. 2025, Dr. GRPO, arXiv 2503.20783)."""
  return rewards - jnp.mean(rewards, axis=1, keepdims=True)


def group_mean_std(rewards: Float[Array, 'g n']) -> Float[Array, 'g n']:
  """(r - mean) / (std + 1e-4) (Shao et al. 2024, GRPO, arXiv 2402.03300, eq. 3, outcome
  supervision)."""
  centred = group_mean(rewards)
  return centred / (jnp.std(centred, axis=1, keepdims=True) + 1e-4)
