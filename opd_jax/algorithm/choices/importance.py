"""Importance weights of the policy gradient, one function each; see `choices`.

A function gives what is differentiated, whose gradient is rho A grad log p_S. What they may take:
`logprobs`, log p_S of the tokens; `advantage`, A, detached; and the ratio as one of

  logratio         log p_S / p_sampler, by the distribution that the tokens were drawn from: it
                   corrects for top-p, top-k and a mixture;
  policy_logratio  log p_S / p_sampler by the policy before those: how far that has moved.

Parameters called `low` and `high` bound the ratio, and `epsilon` is how far it may be from 1: the
metric clip_rate is how often it was outside (`bounds`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.algorithm.choices import Above1, AtLeast1, Positive, Share


def ratio(logratio: Float[Array, '...'], advantage: Float[Array, '...']) -> Float[Array, '...']:
  """rho = p_S / p_sampler (Thinking Machines Lab 2025, On-Policy Distillation)."""
  return jnp.exp(logratio) * advantage


def truncated(logprobs: Float[Array, '...'], logratio: Float[Array, '...'],
              advantage: Float[Array, '...'], *, high: AtLeast1) -> Float[Array, '...']:
  """rho = min(p_S / p_sampler, high), detached (TIS: Yao et al. 2025, Your Efficient RL Framework
  Secretly Brings You Off-Policy RL Training)."""
  ratio = jnp.exp(logratio)
  return jax.lax.stop_gradient(jnp.minimum(ratio, high)) * logprobs * advantage


def two_sided(logprobs: Float[Array, '...'], policy_logratio: Float[Array, '...'],
              advantage: Float[Array, '...'], *, low: Share, high: Above1) -> Float[Array, '...']:
  """rho = p_S / p_sampler where that is within low..high, else 0, detached (IcePop: Ling Team 2025,
  Every Step Evolves, arXiv 2510.18855)."""
  ratio = jnp.exp(policy_logratio)
  inside = (ratio >= low) & (ratio <= high)
  # The ratio is replaced, not the product: the gradient of an infinite one would be NaN.
  return jax.lax.stop_gradient(jnp.where(inside, ratio, 0.0)) * logprobs * advantage


def ppo_clip(policy_logratio: Float[Array, '...'], advantage: Float[Array, '...'], *,
             epsilon: Positive) -> Float[Array, '...']:
  """min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) (Schulman et al. 2017, PPO, arXiv 1707.06347,
  eq. 7)."""
  ratio = jnp.exp(policy_logratio)
  clipped = jnp.clip(ratio, 1.0 - epsilon, 1.0 + epsilon) * advantage
  return jnp.minimum(ratio * advantage, clipped)
