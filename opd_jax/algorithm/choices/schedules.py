"""How distill_coef goes on, one function each; see `choices`.

What they may take: `coef`, distill_coef; `step`, gradient steps taken. A parameter called `to` is
where it ends.
"""

from __future__ import annotations

import jax
import optax

from opd_jax.algorithm.choices import Count, Unsigned


def linear(coef: float, step: jax.Array, *, steps: Count, to: Unsigned) -> jax.Array:
  """coef + (to - coef) min(step / steps, 1) (KDRL, 2025, arXiv 2506.02208)."""
  return optax.linear_schedule(coef, to, steps)(step)
