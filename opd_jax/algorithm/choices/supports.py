"""Over which tokens a divergence is summed, one function each; see `choices`.

They take `f`, one term of the divergence (`divergences.py`), and `student` and `teacher`, log-probs
over the vocabulary. `tail` is what becomes of the tokens outside (`support.over_tokens`).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.algorithm import support
from opd_jax.algorithm.choices import TopK

Tail = Literal['drop', 'renormalize', 'bucket', 'stop_gradient']


def full(f: support.Term, student: Float[Array, '... V'], teacher: Float[Array, '... V']
         ) -> Float[Array, '...']:
  """sum_v f(p_S(v), p_T(v)), exact (Agarwal et al. 2023, GKD, arXiv 2306.13649)."""
  return jnp.sum(f(student, teacher), axis=-1)


def sampled(f: support.Term, student: Float[Array, '... V'], teacher: Float[Array, '... V']
            ) -> Float[Array, '...']:
  """The token that the student drew, v ~ p_S (Thinking Machines Lab 2025, On-Policy Distillation).

  The loss takes its score-function weight or an estimator instead of this sum, which is the mean
  that the exact baseline wants: over everything.
  """
  return full(f, student, teacher)


def teacher_top_k(f: support.Term, student: Float[Array, 'n V'], teacher: Float[Array, 'n V'], *,
                  k: TopK, tail: Tail) -> Float[Array, 'n']:
  """sum_v f(p_S(v), p_T(v)) over the k largest p_T(v) (LSM, 2026, arXiv 2603.25562)."""
  tokens = support.top_k(jax.lax.stop_gradient(teacher), k)[1]
  return support.over_tokens(f, student, teacher, tokens, tail)


def student_top_k(f: support.Term, student: Float[Array, 'n V'], teacher: Float[Array, 'n V'], *,
                  k: TopK, tail: Tail) -> Float[Array, 'n']:
  """sum_v f(p_S(v), p_T(v)) over the k largest p_S(v) (RG-OPD, 2026, arXiv 2607.04037)."""
  tokens = support.top_k(jax.lax.stop_gradient(student), k)[1]
  return support.over_tokens(f, student, teacher, tokens, tail)


def union_top_k(f: support.Term, student: Float[Array, 'n V'], teacher: Float[Array, 'n V'], *,
                k: TopK, tail: Tail) -> Float[Array, 'n']:
  """sum_v f(p_S(v), p_T(v)) over the k largest p_T(v) and the k largest p_S(v), those of both once
  (Many Faces of OPD, 2026, arXiv 2605.11182)."""
  theirs, mine = (support.top_k(jax.lax.stop_gradient(x), k)[1] for x in (teacher, student))
  twice = jnp.any(mine[:, :, None] == theirs[:, None, :], axis=-1)
  counts = jnp.concatenate([jnp.ones_like(theirs), 1 - twice], axis=1)
  return support.over_tokens(
      f, student, teacher, jnp.concatenate([theirs, mine], axis=1), tail, counts)
