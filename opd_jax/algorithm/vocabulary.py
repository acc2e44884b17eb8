"""What needs a row of the vocabulary at each token, one chunk of tokens at a time.

Everything that does so cuts its tokens here (`_Cut`): the loss, the scorer, evaluation, gates.
`map_over_chunks` is for what nobody differentiates. `sum_over_chunks` makes the gradient of a chunk
together with its value, as fused linear cross-entropy kernels do (Hsu et al. 2024, Liger Kernel,
arXiv 2410.10989): the logits of a token are computed once, exist for one chunk only, and what is
kept for the backward pass is the gradient by the hidden states and by the head. Recomputing the
logits (`jax.checkpoint`) would cost a third more products as wide as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from opd_jax.models import layout

# (head, constants, hidden [n, ...], *arrays [n, ...]) -> (losses [n], {name: [n]})
ChunkFn = Callable[..., tuple[Array, dict[str, Array]]]


def map_over_chunks(fn: Callable[..., dict[str, Array]], chunk_tokens: int, *arrays: Any
                    ) -> dict[str, Array]:
  """Applies `fn` to chunks of arrays [B, C, ...]; its outputs [n, ...] come back as
  [B, C, ...].

  Not for what is differentiated: the rows of the vocabulary of all chunks would be kept for it.

  Args:
    fn: (*arrays [n, ...]) -> {name: [n, ...]}, for tokens in any order and of any rows.
    chunk_tokens: the largest n, at least 1.
    arrays: pytrees of [B, C, ...] (None too), the first an array.
  """
  cut = _Cut(*arrays[0].shape[:2], chunk_tokens)
  out = jax.lax.map(lambda xs: fn(*layout.rows(xs)), jax.tree.map(cut.split, arrays))
  return jax.tree.map(cut.join, out)


def sum_over_chunks(fn: ChunkFn, chunk_tokens: int, head: Any, constants: Any, hidden: Any,
                    *arrays: Any) -> tuple[Float[Array, ''], dict[str, Array]]:
  """Sums fn's losses over all tokens; its other outputs come back as [B, C].

  Differentiable in `head` and `hidden` only, and only the sum is. A chunk's gradient is made with
  its value (nothing, where nobody differentiates) and the head's is summed in float32 at least; the
  result has the parameter's dtype. Not twice differentiable.

  Args:
    fn: (head, constants, hidden [n, ...], *arrays [n, ...]) -> (losses [n], {name: [n]}), for
      tokens in any order and of any rows. It may close over what is static, not over arrays: those
      go through `constants` (a teacher's head) and `arrays`.
    chunk_tokens: the largest n, at least 1.
    head: of the student; any pytree of floating-point arrays that all tokens share.
    constants: any pytree; passed on as it is.
    hidden: final hidden states; any pytree of floating-point arrays [B, C, ...].
    arrays: pytrees of [B, C, ...] (integers and None too), cut as `hidden` is.

  Raises:
    ValueError: somebody differentiates by `constants` or `arrays`, or an output beside the sum: the
      gradient that they would get is zero, whatever fn does with them.
  """
  cut = _Cut(*jax.tree.leaves(hidden)[0].shape[:2], chunk_tokens)
  xs = (cut.real, *jax.tree.map(cut.split, (hidden, arrays)))
  total, out = _scan(fn, head, constants, *xs)
  return total, {name: cut.join(a) for name, a in out.items()}


class _Cut:
  """How [B, C] tokens are cut into chunks of equal size.

  A chunk is some positions of all rows, or of every `groups`-th row where there are more rows than
  fit. So a batch that is sharded over devices by rows stays so in each chunk, and nothing but
  the order changes. Sizes are balanced, so that as little as possible is padded.
  """

  def __init__(self, batch: int, length: int, chunk_tokens: int):
    self.batch, self.length = batch, length
    self.groups = -(-batch // chunk_tokens)
    self.rows = -(-batch // self.groups)
    self.steps = -(-length // (chunk_tokens // self.rows))
    self.positions = -(-length // self.steps)
    ones = np.pad(np.ones((batch, length), bool), self._padding())
    # Which tokens are real, [count, n]; None where all are.
    self.real = None if ones.all() else self._shuffle(ones)

  def _padding(self):
    return ((0, self.rows * self.groups - self.batch),
            (0, self.steps * self.positions - self.length))

  def _shuffle(self, a):
    a = a.reshape(self.rows, self.groups, self.steps, self.positions, *a.shape[2:])
    a = a.transpose(1, 2, 0, 3, *range(4, a.ndim))
    return a.reshape(self.groups * self.steps, self.rows * self.positions, *a.shape[4:])

  def split(self, a: Array) -> Array:
    """[B, C, ...] to [count, n, ...]. Padding repeats tokens, so that whatever is finite for all
    tokens is finite there too, and zero times it is zero."""
    if self.real is not None:
      a = jnp.pad(a, (*self._padding(), *((0, 0),) * (a.ndim - 2)), mode='edge')
    return self._shuffle(a)

  def join(self, a: Array) -> Array:
    """[count, n, ...] to [B, C, ...]."""
    more = a.shape[2:]
    a = a.reshape(self.groups, self.steps, self.rows, self.positions, *more)
    a = a.transpose(2, 0, 1, 3, *range(4, a.ndim))
    a = a.reshape(self.rows * self.groups, self.steps * self.positions, *more)
    return a[:self.batch, :self.length]


def _wide(tree):
  return jnp.promote_types(jnp.result_type(*jax.tree.leaves(tree)), jnp.float32)


def _at_work(head, hidden):
  return layout.whole_head(head, jnp.result_type(*jax.tree.leaves(hidden)))


def _chunk(fn, head, hidden, constants, real, arrays):
  losses, out = fn(head, constants, hidden, *arrays)
  if real is not None:
    losses = jnp.where(real, losses, 0.0)
  return jnp.sum(losses.astype(_wide(hidden))), out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(fn, head, constants, real, hidden, arrays):
  head = _at_work(head, hidden)

  def step(total, xs):
    real, hidden, arrays = layout.rows(xs)
    value, out = _chunk(fn, head, hidden, constants, real, arrays)
    return total + value, out

  return jax.lax.scan(step, jnp.zeros((), _wide(hidden)), (real, hidden, arrays))


def _forward(fn, *inputs):
  _, constants, _, _, arrays = inputs
  lost = _places({'constants': constants, 'arrays': arrays}, lambda x: x.perturbed)
  if lost:
    raise ValueError(
        f'sum_over_chunks has no gradient by {lost}, by which it is differentiated; allowed: '
        'jax.lax.stop_gradient of it, or a place in `head` (of all tokens) or `hidden` (of each), '
        'which are pytrees')
  head, constants, real, hidden, arrays = jax.tree.map(lambda x: x.value, inputs)
  grad_fn = jax.value_and_grad(functools.partial(_chunk, fn), argnums=(0, 1), has_aux=True)

  whole = _at_work(head, hidden)

  def step(carry, xs):
    total, d_head = carry
    real, hidden, arrays = layout.rows(xs)
    (value, out), (of_head, d_hidden) = grad_fn(whole, hidden, constants, real, arrays)
    # The gradient of a head lies as the head does.
    d_head = layout.lay_head(jax.tree.map(lambda total, x: total + x.astype(total.dtype), d_head,
                                          layout.lay_head(of_head)))
    return (total + value, d_head), (out, layout.rows(d_hidden))

  zeros = layout.lay_head(jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x)), head))
  (total, d_head), (out, d_hidden) = jax.lax.scan(
      step, (jnp.zeros((), _wide(hidden)), zeros), (real, hidden, arrays))
  return (total, out), (head, d_head, d_hidden)


def _backward(fn, residuals, cotangents):
  del fn
  head, d_head, d_hidden = residuals
  scale, of_out = cotangents
  lost = _places(of_out, lambda x: not (
      isinstance(x, SymbolicZero) or x.dtype == jax.dtypes.float0))
  if lost:
    raise ValueError(
        f'sum_over_chunks has no gradient of {lost}, which is differentiated; allowed: '
        'jax.lax.stop_gradient of it, or a place in the losses')
  if isinstance(scale, SymbolicZero):
    return (None,) * 5
  d_head = jax.tree.map(lambda x, like: (scale * x).astype(like.dtype), d_head, head)
  d_hidden = jax.tree.map(lambda x: (scale * x).astype(x.dtype), d_hidden)
  return d_head, None, None, d_hidden, None


def _places(tree, there):
  return ', '.join(jax.tree_util.keystr(path, simple=True, separator='.')
                   for path, x in jax.tree.leaves_with_path(tree) if there(x))


# Symbolic zeros say which inputs and outputs have a gradient at all.
_scan.defvjp(_forward, _backward, symbolic_zeros=True)
