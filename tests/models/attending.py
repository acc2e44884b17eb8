"""Rows that attend to themselves, and a form of attention held to the reference on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models import attention
from opd_jax.models.attention import Mask


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  """Draws an array."""
  return np.random.RandomState(seed).standard_normal(shape)


def rows_of(length: int, heads: int, kv_heads: int, width: int = 8, dtype: Any = jnp.float32
            ) -> tuple[jax.Array, ...]:
  """Queries, keys, values and a cotangent of three rows: whole, padded left, a run within."""
  slots = np.arange(length)[None]
  first, end = np.array([[0], [length // 3], [5]]), np.array([[length], [length], [length - 7]])
  valid = jnp.asarray((slots >= first) & (slots < end))
  q, d = (jnp.asarray(normal(3, length, heads, width, seed=s), dtype) for s in (0, 3))
  k, v = (jnp.asarray(normal(3, kv_heads, length, width, seed=s), dtype) for s in (1, 2))
  return q, k, v, jnp.where(valid[:, :, None, None], d, 0), valid


def both(f: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, d: jax.Array,
         valid: jax.Array) -> list[np.ndarray]:
  """The result where a query is valid, and the gradients; padding's result is read by nobody."""
  def read(q, k, v):
    out = jnp.where(valid[:, :, None, None], f(q, k, v), 0)
    return jnp.sum(out * d), out

  (_, out), grads = jax.jit(jax.value_and_grad(read, (0, 1, 2), has_aux=True))(q, k, v)
  return [np.asarray(x, np.float64) for x in (out, *grads)]


def same(f: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, d: jax.Array,
         valid: jax.Array, window: int | None, scale: float, softcap: float, most: float = 1e-6
         ) -> None:
  """Holds the result and the gradients of a form to the reference, and `most` of the largest."""
  mask = Mask(valid, (window,), how='reference')
  want = both(lambda *x: attention.attention(*x, mask, scale, softcap), q, k, v, d, valid)
  got = both(f, q, k, v, d, valid)
  largest = max(1.0, *(np.abs(x).max() for x in want))
  for a, b in zip(want, got, strict=True):
    assert np.isfinite(b).all()
    np.testing.assert_allclose(b, a, rtol=0, atol=most * largest)
