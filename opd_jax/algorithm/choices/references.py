"""Terms that keep the student near the reference, one function each; see `choices`.

A function gives (coef, KL of each token); the loss adds their product. What they may take:
`student` and `reference`, log-probs over the vocabulary; or `log_u`, log p_ref - log p_S of the
sampled token, which asks nothing of the vocabulary.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.algorithm import divergences
from opd_jax.algorithm.choices import Positive, estimators


def full(student: Float[Array, 'n V'], reference: Float[Array, 'n V'], *, coef: Positive
         ) -> tuple[float, Float[Array, 'n']]:
  """KL(p_S || p_ref) = sum_v p_S (log p_S - log p_ref) (StableOPD, 2026, arXiv 2604.08527)."""
  return coef, jnp.sum(divergences.reverse_kl(student, reference), axis=-1)


def k2(log_u: Float[Array, 'n'], *, coef: Positive) -> tuple[float, Float[Array, 'n']]:
  """(log u)^2 / 2 at the sampled token: the gradient of `full` in expectation (Tang & Munos 2025,
  arXiv 2506.09477)."""
  return coef, estimators.k2(log_u)


def k3(log_u: Float[Array, 'n'], *, coef: Positive) -> tuple[float, Float[Array, 'n']]:
  """u - 1 - log u at the sampled token, GRPO's (Shao et al. 2024, arXiv 2402.03300, eq. 4); its
  gradient is that of the forward KL."""
  return coef, estimators.k3(log_u)
