"""Baselines of the returns of distillation, one function each; see `choices`.

A baseline does not depend on the token that was drawn; a function gives the values less it. What
they may take: `values`, the returns; `mask`; `group_size`, of the rows of one prompt, which are
neighbours. One that takes `divergence`, the reverse KL of each prefix over the whole vocabulary
(times distill_coef), is applied in the loss, which alone has it, and then to the whole advantage.

Whether a baseline lowers the variance of the gradient depends on the models: measure it. The mean
of the gradient stays only where ratios are not bounded and samples not cut by top-p or top-k.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def exact(values: Float[Array, '...'], divergence: Float[Array, '...']) -> Float[Array, '...']:
  """A + KL(p_S || p_T): minus the KL is the mean of log p_T - log p_S over the student's next token
  (vOPD, 2026, arXiv 2605.07865)."""
  return values + divergence


def batch_mean(values: Float[Array, 'B t'], mask: Float[Array, 'B t']) -> Float[Array, 'B t']:
  """A - mean of A over the batch's tokens (Williams 1992); a token's own share in the mean biases
  it by one part in the number of tokens."""
  return values - jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def leave_one_out(values: Float[Array, 'B t'], mask: Float[Array, 'B t'], group_size: int
                  ) -> Float[Array, 'B t']:
  """A - mean of A over the tokens of the other samples of the same prompt, without bias (Kool et
  al. 2019, for rows)."""
  totals, counts = (jnp.sum(x, axis=1).reshape(-1, group_size) for x in (values * mask, mask))
  others, number = (jnp.sum(x, axis=1, keepdims=True) - x for x in (totals, counts))
  return values - (others / jnp.maximum(number, 1.0)).reshape(-1, 1)
