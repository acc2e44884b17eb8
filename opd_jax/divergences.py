"""Divergences between student and teacher over the whole vocabulary, one function each.

Every public function here is a divergence that configs can name (`objective.divergence`), and the
contract tests pick it up from this file: (student log-probs [..., V], teacher log-probs [..., V])
-> nats [...]. It is differentiated through the student, so write it with the student's log-probs
as they come; the caller has stopped the teacher's gradient. To add one, add a function.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def reverse_kl(student: Float[Array, '... V'], teacher: Float[Array, '... V']
               ) -> Float[Array, '...']:
  """KL(student || teacher) = sum_v p_S(v) (log p_S(v) - log p_T(v)).

  Mode-seeking; the divergence of on-policy distillation (Thinking Machines Lab 2025; Gu et al.
  2023, MiniLLM, arXiv 2306.08543).
  """
  return jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)


def forward_kl(student: Float[Array, '... V'], teacher: Float[Array, '... V']
               ) -> Float[Array, '...']:
  """KL(teacher || student) = sum_v p_T(v) (log p_T(v) - log p_S(v)).

  Mode-covering; classical distillation (Hinton et al. 2015), on the student's own samples in GKD
  (Agarwal et al. 2023, arXiv 2306.13649).
  """
  return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
