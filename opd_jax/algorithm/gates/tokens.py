"""Which tokens count, one function each; see `choices` and `gates`.

Tokens that are left out do not count in means either, but they do in baselines and returns. Ties
with the last one that is kept are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.algorithm import support
from opd_jax.algorithm.choices import Share, TopK
from opd_jax.algorithm.gates import keep_highest


def student_entropy(mask: Float[Array, 'B t'], student_entropy: Float[Array, 'B t'], *, keep: Share
                    ) -> Float[Array, 'B t']:
  """The share `keep` of the batch's tokens with the most H(p_S) = -sum_v p_S log p_S (Wang et al.
  2025, Beyond the 80/20 Rule, arXiv 2506.01939)."""
  return mask * keep_highest(student_entropy, mask > 0, keep)


def teacher_entropy(mask: Float[Array, 'B t'], teacher_entropy: Float[Array, 'B t'], *, keep: Share
                    ) -> Float[Array, 'B t']:
  """The share `keep` of the batch's tokens with the most H(p_T) = -sum_v p_T log p_T (EOPD, 2026,
  arXiv 2603.07079)."""
  return mask * keep_highest(teacher_entropy, mask > 0, keep)


def divergence(mask: Float[Array, 'B t'], teacher_logprobs: Float[Array, 'B t'],
               student_logprobs: Float[Array, 'B t'], *, keep: Share) -> Float[Array, 'B t']:
  """The share `keep` of the batch's tokens with the largest |log p_T - log p_S| (TIP, 2026, arXiv
  2604.14084)."""
  return mask * keep_highest(jnp.abs(teacher_logprobs - student_logprobs), mask > 0, keep)


def soft_or(mask: Float[Array, 'B t'], teacher_logprobs: Float[Array, 'B t'],
            student_logprobs: Float[Array, 'B t'], student_entropy: Float[Array, 'B t'], *,
            keep: Share) -> Float[Array, 'B t']:
  """The share `keep` with the largest 1 - (1 - h)(1 - d), h the student's entropy and d
  |log p_T - log p_S|, each relative to its largest value (TIP, 2026, arXiv 2604.14084)."""
  def unit(x):  # to 0..1 over the tokens that count
    return x / jnp.maximum(jnp.max(x * mask), jnp.finfo(x.dtype).tiny)

  difference = jnp.abs(teacher_logprobs - student_logprobs)
  score = 1.0 - (1.0 - unit(student_entropy)) * (1.0 - unit(difference))
  return mask * keep_highest(score, mask > 0, keep)


def teachability(mask: Float[Array, 'B t'], over_vocabulary: Callable[..., Array], *, keep: Share,
                 top_k: TopK) -> Float[Array, 'B t']:
  """The share `keep` with the largest KL(p_S || p_T) times p_T's mass on the top k of p_S: where
  the two disagree and the student could follow (TA-OPD, 2026, arXiv 2605.26844)."""
  def score(own, other):
    top = support.top_k(own, top_k)[1]
    reachable = jnp.sum(jnp.exp(jnp.take_along_axis(other, top, axis=1)), axis=1)
    return jnp.sum(jnp.exp(own) * (own - other), axis=1) * reachable

  return mask * keep_highest(over_vocabulary(score), mask > 0, keep)
