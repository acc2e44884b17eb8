"""Which places of a completion count, one function each; see `choices` and `gates`."""

from __future__ import annotations

from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.algorithm.choices import Bounds, Count


def tokens(mask: Float[Array, 'B t'], *, start: Annotated[int, Bounds(0.0)], count: Count
           ) -> Float[Array, 'B t']:
  """start <= place < start + count, places from 0 (ESR, 2026, arXiv 2605.27028)."""
  place = jnp.cumsum(mask, axis=1) - 1.0
  return mask * ((place >= start) & (place < start + count))
