"""Which rows count, one function each; see `choices` and `gates`."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.algorithm.choices import Share
from opd_jax.algorithm.gates import keep_highest


def correct(mask: Float[Array, 'B t'], rewards: Float[Array, 'B']) -> Float[Array, 'B t']:
  """r >= 1 (rejection sampling: Yuan et al. 2023, RFT, arXiv 2308.01825)."""
  return mask * (rewards >= 1.0)[:, None]


def wrong(mask: Float[Array, 'B t'], rewards: Float[Array, 'B']) -> Float[Array, 'B t']:
  """r < 1: rows from which there is something to learn (the complement of RFT, arXiv 2308.01825).
  """
  return mask * (rewards < 1.0)[:, None]


def reward_agrees(mask: Float[Array, 'B t'], rewards: Float[Array, 'B'],
                  teacher_logprobs: Float[Array, 'B t'], student_logprobs: Float[Array, 'B t']
                  ) -> Float[Array, 'B t']:
  """r >= 1 and the row is likelier by the teacher than by the student, or r < 1 and it is less
  likely (RG-OPD, 2026, arXiv 2607.04037)."""
  lead = jnp.sum((teacher_logprobs - student_logprobs) * mask, axis=1)
  return mask * jnp.where(rewards >= 1.0, lead > 0.0, lead < 0.0)[:, None]


def teacher_likelihood(mask: Float[Array, 'B t'], teacher_logprobs: Float[Array, 'B t'], *,
                       keep: Share) -> Float[Array, 'B t']:
  """The share `keep` of rows with the highest mean of log p_T (FiRe, 2026, arXiv 2606.02684)."""
  count = jnp.sum(mask, axis=1)
  likelihood = jnp.sum(teacher_logprobs * mask, axis=1) / jnp.maximum(count, 1.0)
  return mask * keep_highest(likelihood, count > 0, keep)[:, None]
