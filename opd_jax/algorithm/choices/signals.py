"""What the teacher says of a sampled token, one function each; see `choices`.

What they may take: `weight`, the score-function weight of the divergence, shaped; `own` and
`theirs`, the log-probs of the token by the student and by the teacher. One that does not take the
weight reads no divergence and no shaping.
"""

from __future__ import annotations

from jaxtyping import Array, Float


def teacher(weight: Float[Array, 'B t']) -> Float[Array, 'B t']:
  """w(u) - w(1), w = -f(u) + u f'(u), u = p_T / p_S; of the reverse KL, log p_T - log p_S.

  (Thinking Machines Lab 2025, On-Policy Distillation; any divergence: OPD+, 2026, arXiv 2606.01039)
  """
  return weight


def fixed_negative(own: Float[Array, 'B t'], theirs: Float[Array, 'B t']) -> Float[Array, 'B t']:
  """-1 where p_T < p_S, else 0: a control (2026, arXiv 2608.31046)."""
  return -(theirs < own).astype(own.dtype)
