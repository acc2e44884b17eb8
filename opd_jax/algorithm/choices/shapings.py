"""Shapings of the signal of each token, one function each; see `choices`.

What they may take: `signal`, the score-function weight of the divergence; `own` and `theirs`, the
log-probs of the token by the student and by the teacher. One that does not take the signal stands
in place of the log-ratio. A parameter called `limit` bounds the signal (`shaped_rate` is how often
that was reached).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.algorithm.choices import Positive


def clip(signal: Float[Array, 'B t'], *, limit: Positive) -> Float[Array, 'B t']:
  """x held within -limit..limit, min(max(x, -limit), limit) (MOPD, 2026, arXiv 2606.30406)."""
  return jnp.clip(signal, -limit, limit)


def log(signal: Float[Array, 'B t']) -> Float[Array, 'B t']:
  """sign(x) log(1 + |x|) (Demystifying OPD, 2026, arXiv 2607.13399)."""
  return jnp.sign(signal) * jnp.log1p(jnp.abs(signal))


def power(own: Float[Array, 'B t'], theirs: Float[Array, 'B t'], *, exponent: Positive
          ) -> Float[Array, 'B t']:
  """p_T^a - p_S^a, a = exponent, in place of log p_T - log p_S (PowerOPD, 2026, arXiv 2606.17199).
  """
  return jnp.exp(exponent * theirs) - jnp.exp(exponent * own)
