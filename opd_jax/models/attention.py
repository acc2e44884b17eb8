"""Grouped-query attention behind one function: softmax(scale q k^T) v over the keys that a query
may read, which are described and not written out (`Mask`).

There are several forms of it, which `compute.attention` picks by name or leaves to `form`:
  reference: every score at once, [B, N, S, T] in float32. For one query a row (decoding), for short
    rows, and what the others are held to.
  blocks: a block of queries and a block of keys at a time with running maxima (FlashAttention-2,
    Dao 2023, 2307.08691), in plain JAX. What is kept for the backward pass is the result and a
    number a query; the scores are computed again there. Blocks above the diagonal or beyond a
    window are not visited.
  cudnn, splash: the same as kernels, of NVIDIA and for TPUs (kernels.py).

Positions of queries and keys are slots: a window counts slots, and what is not valid (the padding)
is read by nobody. What an invalid query gets is finite, and unspecified beyond that.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opd_jax.models import kernels

AUTO, REFERENCE, BLOCKS, CUDNN, SPLASH = 'auto', 'reference', 'blocks', 'cudnn', 'splash'
NAMES = (AUTO, REFERENCE, BLOCKS, CUDNN, SPLASH)

# Up to so many tokens the scores of a row are small, and 'auto' takes the reference form; with a
# kernel at hand, up to so many.
SHORT, SHORT_WITH_KERNEL = 1024, 256
BLOCK = 512  # queries, and keys, of a block


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
  """Which of T key slots each query may read: the valid ones up to its own, within a window.

  Attributes:
    valid: of the key slots.
    windows: of the kinds of layers there are: how many slots a query sees, its own and those before
      it; None for all of them.
    kind: which of them, known now or only when the program runs.
    start: the slot of the first query. Other than 0, the queries are not all of a row.
    how: of `NAMES`.
    decoding: whether activations are laid out as decoding wants (layout.DECODE).
    again: whether the backward pass computes all scores again in the reference form.
  """

  valid: Bool[Array, 'B T']
  windows: tuple[int | None, ...] = (None,)
  kind: int | Int[Array, ''] = 0
  start: int | Int[Array, ''] = 0
  how: str = AUTO
  decoding: bool = False
  again: bool = False

  def allowed(self, queries: int) -> Bool[Array, 'B S T']:
    """Writes the mask out, of so many queries."""
    places = self.valid.shape[1]
    slots = jnp.arange(places)[None, :]
    own = self.start + jnp.arange(queries)[:, None]
    causal = slots <= own
    window = self.windows[self.kind] if isinstance(self.kind, int) else jnp.array(
        [places if w is None else w for w in self.windows])[self.kind]
    if queries == 1 and places > 1:  # of a ring: what is older is behind, all the way round
      causal = (own - slots) % places < (places if window is None else window)
    elif window is not None:
      causal &= slots > own - window
    return causal[None] & self.valid[:, None, :]

  def by_window(self, f: Callable[[int | None], Any]) -> Any:
    """Computes f of the window, which f may build a program by: of each, if it is not known yet."""
    if isinstance(self.kind, int) or len(set(self.windows)) == 1:
      return f(self.windows[self.kind if isinstance(self.kind, int) else 0])
    return jax.lax.switch(self.kind, [functools.partial(f, w) for w in self.windows])


def attention(q: Float[Array, 'B S N H'], k: Float[Array, 'B K T H'], v: Float[Array, 'B K T H'],
              mask: Mask, scale: float | None = None, softcap: float = 0.0
              ) -> Float[Array, 'B S N H']:
  """Computes attention in the form that the mask names; query head n reads key head n // (N / K).

  `scale` is 1 / sqrt(H) where none is given; a `softcap` c bounds the scores, c tanh(scores / c)
  (Gemma 2, 2408.00118). Scores are never rounded below float32.

  Raises:
    ValueError: the mask names a form that cannot do this here, see `kernels.refusal`.
  """
  scale = q.shape[-1]**-0.5 if scale is None else scale
  how = form(mask, q, k, softcap)
  if how == REFERENCE:
    run = _again if mask.again else reference
    return run(q, k, v, mask.allowed(q.shape[1]), scale, softcap)
  if how == BLOCKS:
    return mask.by_window(lambda w: blocks(q, k, v, mask.valid, w, scale, softcap))
  run = kernels.cudnn if how == CUDNN else functools.partial(kernels.splash, softcap=softcap)
  return mask.by_window(lambda w: kernels.on_own(
      functools.partial(run, window=w, scale=scale), q, k, v, mask.valid, mask.decoding))


def form(mask: Mask, q: Array, k: Array, softcap: float) -> str:
  """Picks the form: the one that the mask names, or, for 'auto', the fastest that can do it here.

  Raises:
    ValueError: see `attention`.
  """
  if q.shape[1] == 1 or not isinstance(mask.start, int) or q.shape[1] != k.shape[2]:
    return REFERENCE
  platform = kernels.platform()
  kernel = {'gpu': CUDNN, 'tpu': SPLASH}.get(platform)
  if mask.how == AUTO:
    if kernel and not kernels.refusal(kernel, platform, q.dtype, q.shape[-1], softcap):
      return REFERENCE if q.shape[1] <= SHORT_WITH_KERNEL else kernel
    return REFERENCE if q.shape[1] <= SHORT else BLOCKS
  refused = kernels.refusal(mask.how, platform, q.dtype, q.shape[-1], softcap)
  if refused:
    raise ValueError(f'attention={mask.how!r}: {refused[0]}; allowed: {refused[1]}')
  return mask.how


def reduction_dtype(x: Array) -> jnp.dtype:
  """Says in what scores, sums and maxima are: float32 at least."""
  return jnp.promote_types(x.dtype, jnp.float32)


def reference(q: Float[Array, 'B S N H'], k: Float[Array, 'B K T H'], v: Float[Array, 'B K T H'],
              allowed: Bool[Array, 'B S T'], scale: float | None = None, softcap: float = 0.0
              ) -> Float[Array, 'B S N H']:
  """Computes `attention` over the `allowed` key positions, with all scores at once.

  A query with no allowed key (left padding) gets some finite average, which nobody reads: -inf
  there would turn into NaN in the gradient.
  """
  batch, length, heads, width = q.shape
  # In the order in which the products have them: on CPU others are several times slower.
  grouped = q.reshape(batch, length, k.shape[1], heads // k.shape[1], width)
  grouped = grouped.transpose(0, 2, 3, 1, 4)
  logits = jnp.einsum('bkgsh,bkth->bkgst', grouped, k, preferred_element_type=reduction_dtype(q))
  logits = logits * (width**-0.5 if scale is None else scale)
  if softcap:
    logits = softcap * jnp.tanh(logits / softcap)
  logits = jnp.where(allowed[:, None, None], logits, jnp.finfo(logits.dtype).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
  return jnp.einsum('bkgst,bkth->bkgsh', weights, v).transpose(0, 3, 1, 2, 4).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _again(q, k, v, allowed, scale, softcap):
  return reference(q, k, v, allowed, scale, softcap)


def _again_backward(scale, softcap, kept, d_out):
  # The barrier: or the compiler finds that the scores are there already, and keeps them.
  *inputs, allowed, d_out = jax.lax.optimization_barrier((*kept, d_out))
  _, pull = jax.vjp(lambda *x: reference(*x, allowed, scale, softcap), *inputs)
  return *pull(d_out), None


# No `jax.checkpoint`: within that of a layer, whose policy keeps what it can, scores would be kept.
_again.defvjp(lambda *x: (_again(*x), x[:4]), _again_backward)


# --- blocks ---


def pairs(length: int, block: int, window: int | None) -> list[tuple[int, int]]:
  """Lists the (block of queries, block of keys) in which some query may read some key, by blocks
  of queries."""
  count = -(-length // block)
  first = [0 if window is None else max(i * block - window + 1, 0) // block for i in range(count)]
  return [(i, j) for i in range(count) for j in range(first[i], i + 1)]


def block_size(length: int, most: int = BLOCK) -> int:
  """Cuts a length into the fewest blocks of at most `most`, as even as multiples of 128 allow."""
  count = -(-length // most)
  return min(most, -(-length // (count * 128)) * 128)


def blocks(q: Float[Array, 'B S N H'], k: Float[Array, 'B K S H'], v: Float[Array, 'B K S H'],
           valid: Bool[Array, 'B S'], window: int | None, scale: float, softcap: float = 0.0,
           block: int = 0) -> Float[Array, 'B S N H']:
  """Computes causal attention of whole rows to themselves, a block of queries and keys at a time.

  Args:
    q, k, v: as in `attention`.
    valid: which slots are no padding.
    window, scale, softcap: as in `attention`.
    block: queries, and keys, of a block; 0 for what suits the length.
  """
  (batch, length, heads, width), kv_heads = q.shape, k.shape[1]
  block = block or block_size(length)
  extra = -length % block
  count = (length + extra) // block

  def cut(x):  # [B, K, ..., S, H] -> [blocks, B, K, ..., block, H]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra), (0, 0)])
    return jnp.moveaxis(x.reshape(*x.shape[:-2], count, block, width), -3, 0)

  grouped = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, width), 1, 3)
  valid = jnp.pad(valid, ((0, 0), (0, extra))).reshape(batch, count, block).swapaxes(0, 1)
  plan = Plan(length, block, window, scale, softcap)
  out = _blocks(cut(grouped), cut(k), cut(v), valid, plan)  # [blocks, B, K, G, block, H]
  out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(batch, length + extra, heads, width)
  return out[:, :length]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of `blocks` before anything runs, see there."""

  length: int
  block: int
  window: int | None
  scale: float
  softcap: float

  def scores(self, q: Array, k: Array, valid: Array, i: Array, j: Array
             ) -> tuple[Array, Array]:
    """Computes the scores of block i of queries and block j of keys, and which of them count."""
    s = jnp.einsum('bkgsh,bkth->bkgst', q, k, preferred_element_type=reduction_dtype(q))
    s = s * self.scale
    if self.softcap:
      s = self.softcap * jnp.tanh(s / self.softcap)
    own = (i * self.block + jnp.arange(self.block))[:, None]
    slots = (j * self.block + jnp.arange(self.block))[None, :]
    causal = slots <= own
    if self.window is not None:
      causal &= slots > own - self.window
    return s, (causal[None] & valid[:, None, :])[:, None, None]

  def visit(self, body: Callable[..., Any], carry: Any) -> Any:
    """Runs body(carry, i, j, first) over the pairs; `first` begins another block of queries."""
    i, j = (jnp.array(x, jnp.int32) for x in zip(
        *pairs(self.length, self.block, self.window), strict=True))
    first = jnp.diff(i, prepend=-1) > 0
    return jax.lax.scan(lambda carry, at: (body(carry, *at), None), carry, (i, j, first))[0]


def _at(x, i):
  return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(x, value, i):
  return jax.lax.dynamic_update_index_in_dim(x, value.astype(x.dtype), i, 0)


def _full(value, dtype, like):
  # Of an array, and not of its shape: it then lies where that does, and may differ by device where
  # that may, within a shard_map.
  return jnp.where(like == like, jnp.asarray(value, dtype), jnp.asarray(value, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(q, k, v, valid, plan):
  return _forward(q, k, v, valid, plan)[0]


def _forward(q, k, v, valid, plan):
  out, logs = _run(q, k, v, valid, plan)
  return out, (q, k, v, valid, out, logs)


# A custom gradient which nothing asks for: seen from a `jax.checkpoint` around it, this is one
# operation and no loop, of which a policy would keep what it can of every iteration.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _run(q, k, v, valid, plan):
  wide = reduction_dtype(q)
  least = jnp.finfo(wide).min

  def body(carry, i, j, first):
    top, total, mixed, out, logs = carry
    top = jnp.where(first, least, top)
    total, mixed = (jnp.where(first, 0.0, x) for x in (total, mixed))
    s, counts = plan.scores(_at(q, i), _at(k, j), _at(valid, j), i, j)
    new_top = jnp.maximum(top, jnp.max(jnp.where(counts, s, least), axis=-1))
    p = jnp.where(counts, jnp.exp(s - new_top[..., None]), 0.0)
    kept = jnp.exp(top - new_top)
    total = total * kept + jnp.sum(p, axis=-1)
    mixed = mixed * kept[..., None] + jnp.einsum(
        'bkgst,bkth->bkgsh', p.astype(v.dtype), _at(v, j), preferred_element_type=wide)
    # A query that reads nothing has the total 0, and then the result 0.
    some = jnp.where(total > 0, total, 1.0)
    return (new_top, total, mixed, _put(out, mixed / some[..., None], i),
            _put(logs, new_top + jnp.log(some), i))

  one, each = q[0], q[..., 0]  # a block of queries; a number a query
  return plan.visit(body, (
      _full(least, wide, each[0]), _full(0, wide, each[0]), _full(0, wide, one),
      _full(0, q.dtype, q), _full(0, wide, each)))[3:]


def _no_gradient(*_):
  raise NotImplementedError('attention in blocks has first derivatives only')


_run.defvjp(_no_gradient, _no_gradient)


def _backward(plan, kept, d_out):
  """From p = exp(s - log sum exp s) and dp = d_out v^T: ds = p (dp - sum d_out out)."""
  q, k, v, valid, out, logs = kept
  wide = reduction_dtype(q)

  def body(carry, i, j, first):
    dq_i, dq, dk, dv = carry
    dq_i = jnp.where(first, 0.0, dq_i)
    q_i, k_j, v_j, d_i = _at(q, i), _at(k, j), _at(v, j), _at(d_out, i)
    s, counts = plan.scores(q_i, k_j, _at(valid, j), i, j)
    p = jnp.where(counts, jnp.exp(s - _at(logs, i)[..., None]), 0.0)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    dv_j = product('bkgst,bkgsh->bkth', p.astype(v.dtype), d_i)
    dp = product('bkgsh,bkth->bkgst', d_i, v_j)
    inner = jnp.sum(d_i.astype(wide) * _at(out, i).astype(wide), axis=-1, keepdims=True)
    ds = p * (dp - inner) * plan.scale
    if plan.softcap:
      ds = ds * (1.0 - jnp.square(s / plan.softcap))
    ds = ds.astype(q.dtype)
    dq_i = dq_i + product('bkgst,bkth->bkgsh', ds, k_j)
    dk_j = product('bkgst,bkgsh->bkth', ds, q_i)
    return (dq_i, _put(dq, dq_i, i), _put(dk, _at(dk, j) + dk_j, j),
            _put(dv, _at(dv, j) + dv_j, j))

  _, dq, dk, dv = plan.visit(body, (
      _full(0, wide, q[0]), _full(0, q.dtype, q), _full(0, wide, k), _full(0, wide, v)))
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_blocks.defvjp(_forward, _backward)
