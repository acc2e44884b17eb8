"""Passes over the rows of a batch in microbatches of rows alike in length, each cut to one of a few
static lengths: what is behind the ends of all its rows is not computed.

The rows of each device are sorted by the length of their completions, so that none moves to
another. What is computed is the same, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.models import layout
from opd_jax.types import Rollout

SHORTEST, MOST = 128, 4  # tokens of the shortest and number of lengths, where neither is said


def lengths_of(room: int, buckets: int) -> list[int]:
  """Lists the lengths to which completions are cut: the room, its half, its quarter, ...; so many,
  or with 0 as many as leave the shortest SHORTEST tokens, at most MOST."""
  count = buckets or next((n for n in range(MOST, 1, -1) if room >= SHORTEST << (n - 1)), 1)
  return sorted({-(-room // (1 << i)) for i in range(count)})


def split_rows(tree: Any, microbatch_rows: int) -> Any:
  """Splits leaves [B, ...] into [B / m, m, ...] for a loop over microbatches; m = 0: all rows.

  Raises:
    ValueError: m does not divide B.
  """
  rows = jax.tree.leaves(tree)[0].shape[0]
  size = microbatch_rows or rows
  if rows % size:
    raise ValueError(f'microbatch_rows={size} does not divide the {rows} rows of the batch')
  # Interleaved ([m, B/m] swapped), so that a batch sharded over devices by rows stays spread over
  # all of them in every microbatch.
  return jax.tree.map(lambda a: layout.constrain(
      a.reshape(size, rows // size, *a.shape[1:]).swapaxes(0, 1),
      (None, 'batch', *(None,) * (a.ndim - 1))), tree)


def join_rows(tree: Any) -> Any:
  """Inverts `split_rows`."""
  return jax.tree.map(
      lambda a: a.swapaxes(0, 1).reshape(a.shape[0] * a.shape[1], *a.shape[2:]), tree)


def scan_rows(f: Callable[[Any, Any], tuple[Any, Any]], carry: Any, tree: Any, rollout: Rollout, *,
              microbatch_rows: int, buckets: int) -> tuple[Any, Any, jax.Array]:
  """Folds a function over microbatches.

  Args:
    f: (carry, rows) -> (carry, arrays [m, ...]). Of arrays [m, n, ...] in and out, n counts places
      and ends where the completion's room does; rows are the tree's, some of them and cut there.
    carry: what it begins with.
    tree: arrays [B, ...], such as a `Rollout`, or what has one.
    rollout: says how long rows are.
    microbatch_rows: m; 0 for all.
    buckets: see `lengths_of`; 1 cuts nothing and sorts nothing.

  Returns:
    The last carry, the arrays [B, ...] of all rows, and the share of the completion's places, of
    those that were computed, that hold a token.
  """
  size, room = len(rollout.tokens), rollout.tokens.shape[1] - rollout.prompt_length
  size, lengths = microbatch_rows or size, lengths_of(room, buckets)
  tokens = jnp.sum(rollout.mask > 0, axis=1)
  # The place of the last token: a mask may leave some before it out.
  ends = jnp.max(jnp.arange(1, room + 1)[None] * (rollout.mask[:, -room:] > 0), axis=1)
  if len(lengths) == 1:
    carry, out = jax.lax.scan(f, carry, split_rows(tree, size))
    return carry, join_rows(out), jnp.sum(tokens) / (len(tokens) * room)

  def pick(tree, order):
    return layout.on_own_rows(lambda t, i: jax.tree.map(lambda x: x[i], t), tree, order)

  def of_length(n, carry, rows):
    def cut(x):
      return x if x.ndim == 1 else x[:, :x.shape[1] - (room - n)]

    def pad(x):
      return x if x.ndim == 1 else jnp.pad(x, [(0, 0), (0, room - n)] + [(0, 0)] * (x.ndim - 2))

    carry, out = f(carry, jax.tree.map(cut, rows))
    return carry, jax.tree.map(pad, out)

  def body(carry, xs):
    rows, longest = xs
    which = jnp.searchsorted(jnp.array(lengths), longest)
    ways = [lambda c, rows, n=n: of_length(n, c, rows) for n in lengths]
    carry, out = jax.lax.switch(which, ways, carry, rows)
    return carry, (out, jnp.array(lengths)[which] * size)

  order = layout.on_own_rows(lambda n: _alike(n, len(ends) // size), ends)
  rows = split_rows(pick((tree, ends), order), size)
  carry, (out, places) = jax.lax.scan(body, carry, (rows[0], jnp.max(rows[1], axis=1)))
  back = layout.on_own_rows(jnp.argsort, order)
  return carry, pick(join_rows(out), back), jnp.sum(tokens) / jnp.sum(places)


def _alike(lengths, microbatches):
  """Orders the rows of a device so that `split_rows` puts those alike in length together."""
  return jnp.argsort(lengths, stable=True).reshape(microbatches, -1).T.reshape(-1)
