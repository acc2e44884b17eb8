"""Which of the tokens after it a token answers for, one function each; see `choices`.

What they may take: `total`, G_t = sum_{k >= t} discount^(k - t) r_k along the row; `signal`, r_t;
`mask`. All are zero where the mask is.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def inclusive(total: Float[Array, 'B t']) -> Float[Array, 'B t']:
  """G_t = r_t + discount r_(t+1) + ..., from the token's own reward on (Williams 1992)."""
  return total


def later(total: Float[Array, 'B t'], signal: Float[Array, 'B t']) -> Float[Array, 'B t']:
  """G_t - r_t, from the next token on: what the token's own exact term, `objective.local`, leaves
  (MiniLLM, Gu et al. 2023, arXiv 2306.08543, eq. 3)."""
  return total - signal


def later_mean(total: Float[Array, 'B t'], signal: Float[Array, 'B t'], mask: Float[Array, 'B t']
               ) -> Float[Array, 'B t']:
  """(G_t - r_t) / (number of later tokens): MiniLLM's length normalization (arXiv 2306.08543,
  eq. 5)."""
  number = jnp.sum(mask, axis=1, keepdims=True) - jnp.cumsum(mask, axis=1)
  return (total - signal) / jnp.maximum(number, 1.0)
