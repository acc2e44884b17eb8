"""Gates: which tokens count, and where the second term is; see `choices`.

A gate is a function from the mask of the tokens that are left to that of those which stay:
`windows.py`, `rows.py` and `tokens.py`, one after the other, `local.py` for `objective.local`. All
but the first may take

  mask                                  the tokens that the gates before have left, [B, T-1]
  rewards                               the verifier's, [B]
  student_logprobs, student_entropy     by the student as it was scored, [B, T-1]
  teacher_logprobs, teacher_entropy     by the teacher itself, extrapolated or not
  over_vocabulary                       (f: (log p_S, log p_T [n, V]) -> [n]) -> f of every token
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def keep_highest(score: Float[Array, '...'], among: Array, share: float) -> Float[Array, '...']:
  """Keeps the ceil(share * n) entries of highest score of the n that are `among`, and ties."""
  flat = jnp.where(among, score, -jnp.inf).reshape(-1)
  # In float32, 0.6 * 25 is above 15: without the small factor one more would be kept.
  wanted = jnp.ceil(share * jnp.sum(among) * (1.0 - 1e-6)).astype(jnp.int32)
  threshold = -jnp.sort(-flat)[jnp.maximum(wanted - 1, 0)]
  return (among & (score >= threshold)).astype(score.dtype)
