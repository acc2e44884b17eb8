"""Where the second term, `objective.local`, is; one function each; see `choices` and `gates`.

They may also take `own_logprobs`, the student's as the signal takes them; `advantage`, that of
distillation (rewards and the exact baseline apart); `noise`, uniform in 0..1. The mask is of all
tokens that the student chose.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.algorithm.choices import Positive


def teacher_entropy(mask: Float[Array, 'B t'], teacher_entropy: Float[Array, 'B t'], *,
                    above: Positive) -> Float[Array, 'B t']:
  """H(p_T) > above, in nats (EOPD, 2026, arXiv 2603.07079)."""
  return mask * (teacher_entropy > above)


def untrusted(mask: Float[Array, 'B t'], noise: Float[Array, 'B t'],
              teacher_logprobs: Float[Array, 'B t'], own_logprobs: Float[Array, 'B t']
              ) -> Float[Array, 'B t']:
  """With probability 1 - min(p_T / p_S, 1) of the token drawn, whatever is done to the signal
  afterwards (TrOPD, 2026, arXiv 2606.01249)."""
  return mask * (noise >= jnp.exp(jnp.minimum(teacher_logprobs - own_logprobs, 0.0)))


def negative(mask: Float[Array, 'B t'], advantage: Float[Array, 'B t']) -> Float[Array, 'B t']:
  """A <= 0 (AOPD, 2026, arXiv 2605.06387)."""
  return mask * (advantage <= 0.0)
