"""Divergences between student and teacher, one function each; see `choices`.

Each is an f-divergence, D = sum_v p_S(v) f(u(v)) with u = p_T / p_S, f convex and f(1) = 0, and its
function gives one term of the sum,

  (log p_S(v), log p_T(v)) -> p_S(v) f(u(v)),        any shape, elementwise,

in the form that neither overflows nor cancels. The sum over a support, the weight of a
score-function estimate and the gradient all follow from it (`support.py`), so that to add a
divergence is to add a function. The contract tests pick it up from this file.

It is differentiated through the student, so write it with the student's log-probs as they come; the
caller has stopped the teacher's gradient.
"""

from __future__ import annotations

from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.algorithm import support
from opd_jax.algorithm.choices import Bounds, Share


def reverse_kl(student: Float[Array, '...'], teacher: Float[Array, '...']) -> Float[Array, '...']:
  """KL(student || teacher) = sum_v p_S (log p_S - log p_T); f = -ln u.

  Mode-seeking; the divergence of on-policy distillation (Thinking Machines Lab 2025; Gu et al.
  2023, MiniLLM, arXiv 2306.08543).
  """
  return jnp.exp(student) * (student - teacher)


def forward_kl(student: Float[Array, '...'], teacher: Float[Array, '...']) -> Float[Array, '...']:
  """KL(teacher || student) = sum_v p_T (log p_T - log p_S); f = u ln u.

  Mode-covering; classical distillation (Hinton et al. 2015), on the student's own samples in GKD
  (Agarwal et al. 2023, arXiv 2306.13649).
  """
  return jnp.exp(teacher) * (teacher - student)


def jensen_shannon(student: Float[Array, '...'], teacher: Float[Array, '...'], *,
                   alpha: Share) -> Float[Array, '...']:
  """Generalized Jensen-Shannon, b KL(T || M) + (1 - b) KL(S || M), M = b T + (1 - b) S, b = alpha.

  GKD (Agarwal et al. 2023, arXiv 2306.13649, eq. 1). It vanishes at both ends of b, which are
  therefore refused: see `scaled_jensen_shannon`.
  """
  mixture = jnp.logaddexp(jnp.log(alpha) + teacher, jnp.log1p(-alpha) + student)
  return (alpha * forward_kl(mixture, teacher) + (1.0 - alpha) * forward_kl(mixture, student))


def scaled_jensen_shannon(student: Float[Array, '...'], teacher: Float[Array, '...'], *,
                          alpha: Annotated[float, Bounds(0.0, 1.0)]) -> Float[Array, '...']:
  """JSD_b / (b (1 - b)), which goes from the forward KL (b = 0) to the reverse KL (b = 1).

  The ends are their limits: JSD_b / b -> KL(T || S) and JSD_b / (1 - b) -> KL(S || T) (Huszar 2015,
  arXiv 1511.05101).
  """
  if alpha == 0.0:
    return forward_kl(student, teacher)
  if alpha == 1.0:
    return reverse_kl(student, teacher)
  return jensen_shannon(student, teacher, alpha=alpha) / (alpha * (1.0 - alpha))


def skew_kl(student: Float[Array, '...'], teacher: Float[Array, '...'], *,
            alpha: Share) -> Float[Array, '...']:
  """KL(T || a T + (1 - a) S), a = alpha (DistiLLM, Ko et al. 2024, arXiv 2402.03898, eq. 4)."""
  mixture = jnp.logaddexp(jnp.log(alpha) + teacher, jnp.log1p(-alpha) + student)
  return forward_kl(mixture, teacher)


def skew_reverse_kl(student: Float[Array, '...'], teacher: Float[Array, '...'], *,
                    alpha: Share) -> Float[Array, '...']:
  """KL(S || (1 - a) T + a S), a = alpha (DistiLLM, arXiv 2402.03898). At most -ln a a token."""
  mixture = jnp.logaddexp(jnp.log1p(-alpha) + teacher, jnp.log(alpha) + student)
  return reverse_kl(student, mixture)


def total_variation(student: Float[Array, '...'], teacher: Float[Array, '...']
                    ) -> Float[Array, '...']:
  """sum_v |p_S - p_T| / 2 (Wen et al. 2023, f-DISTILL, arXiv 2307.15190); f = |u - 1| / 2."""
  difference = jnp.exp(student) - jnp.exp(teacher)
  return 0.5 * jnp.maximum(difference, -difference)  # whose slope at 0 is 0, and that of abs 1


def alpha_divergence(student: Float[Array, '...'], teacher: Float[Array, '...'], *,
                     alpha: Annotated[float, Bounds(-1.0, 2.0)]) -> Float[Array, '...']:
  """Amari's family, f = (u^a - 1 - a (u - 1)) / (a (a - 1)): KL(S || T) at a = 0, KL(T || S) at 1.

  (Amari 2016, Information Geometry, section 3.5, in the parametrization of Minka 2005.) Outside of
  0..1 a term p_S u^a has no bound: above e^30 it goes on along its tangent in the exponent
  (`support.split_exponent`); at the ends, p_T^2 / p_S and p_S^2 / p_T, that is a log-ratio of 30.
  """
  if alpha == 0.0:
    return reverse_kl(student, teacher) + jnp.exp(teacher) - jnp.exp(student)
  if alpha == 1.0:
    return forward_kl(student, teacher) - jnp.exp(teacher) + jnp.exp(student)
  exponent, beyond = support.split_exponent(student + alpha * (teacher - student))
  power = jnp.exp(exponent) + beyond
  linear = (1.0 - alpha) * jnp.exp(student) + alpha * jnp.exp(teacher)
  return (power - linear) / (alpha * (alpha - 1.0))


def squared_hellinger(student: Float[Array, '...'], teacher: Float[Array, '...']
                      ) -> Float[Array, '...']:
  """sum_v (sqrt p_S - sqrt p_T)^2; f = (1 - sqrt u)^2. Half the alpha-divergence at a = 1/2
  (Amari 2016)."""
  return jnp.square(jnp.exp(0.5 * student) - jnp.exp(0.5 * teacher))
