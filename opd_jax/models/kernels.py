"""Attention in kernels that others wrote: cuDNN's on NVIDIA by `jax.nn.dot_product_attention`, and
on TPUs the Pallas kernel "splash attention" of jax. Both are FlashAttention-2 (Dao 2023,
2307.08691).

They attend within whole rows, causally, and on a mesh every device calls them for its own rows and
heads: the partitioner does not look inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from opd_jax.models import layout

HEAD_MOST = 128  # of cuDNN on every GPU that it runs on
LANES, SPLASH_BLOCK = 128, 512


def platform() -> str:
  """Tells what the program that is being traced is for: the devices of the mesh in context, or the
  default ones; 'cpu', 'gpu' or 'tpu'."""
  device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  return jax.default_backend() if device is None else device.platform


def refusal(how: str, where: str, dtype: Any, head_dim: int, softcap: float
            ) -> tuple[str, str] | None:
  """Says (why a form of attention cannot do something, what is allowed); None where it can.

  Args:
    how: of `attention.NAMES`.
    where: the platform.
    dtype: of queries, keys and values.
    head_dim: their width.
    softcap: the bound of the scores, 0 for none.
  """
  auto, dtype = "'auto', or 'blocks', which runs everywhere", jnp.dtype(dtype)
  if how == 'splash':
    return None if where == 'tpu' else (f'it is for TPUs, and this is a {where}', auto)
  if how != 'cudnn':
    return None
  if where != 'gpu':
    return f"it is for NVIDIA's GPUs, and this is a {where}", auto
  if dtype.itemsize != 2:
    return f'it computes in 16 bits, and not in {dtype}', f"{auto}; or compute.dtype='bfloat16'"
  if head_dim > HEAD_MOST or head_dim % 8:
    return f'its heads are multiples of 8 up to {HEAD_MOST}, and not of {head_dim}', auto
  return (f'it does not bound scores, as this model does by {softcap}', auto) if softcap else None


def on_own(f: Callable[..., Array], q: Float[Array, 'B S N H'], k: Float[Array, 'B K S H'],
           v: Float[Array, 'B K S H'], valid: Bool[Array, 'B S'], decoding: bool
           ) -> Float[Array, 'B S N H']:
  """Computes f(q, k, v, valid) on each device for the rows and heads that it has."""
  mesh = layout.mesh_of_several()
  if mesh is None:
    return f(q, k, v, valid)
  rules = layout.DECODE if decoding else layout.TRAIN
  keys = layout.fit(k.shape, ('batch', 'kv_heads', None, None), rules, mesh)
  heads = keys[1]  # as many parts of query heads as of key heads
  # An axis that the specs leave out is summed over in the gradient: those of one device stay in.
  split = layout.axis_names(keys)
  rows = (*layout.axis_names(keys[:1]), *(n for n in mesh.axis_names
                                          if mesh.shape[n] == 1 and n not in split))
  keys = P(rows, *keys[1:])
  queries = P(rows, None, heads, None)
  # Kernels do not say by which axes their results differ, hence no check.
  return jax.shard_map(f, in_specs=(queries, keys, keys, P(rows, None)), out_specs=queries,
                       check_vma=False)(q, k, v, valid)


# --- cuDNN ---


@jax.custom_vjp
def _roll(x, by):
  """Rolls each row of [B, S, ...] by its own number of places towards the end."""
  places = (jnp.arange(x.shape[1])[None, :] - by[:, None]) % x.shape[1]
  return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)


# Its transpose rolls back; told so, it needs no additions.
_roll.defvjp(lambda x, by: (_roll(x, by), by), lambda by, d: (_roll(d, -by), None))


def cudnn(q: Float[Array, 'B S N H'], k: Float[Array, 'B K S H'], v: Float[Array, 'B K S H'],
          valid: Bool[Array, 'B S'], *, window: int | None, scale: float
          ) -> Float[Array, 'B S N H']:
  """Computes causal attention of rows whose valid slots are one run.

  cuDNN knows the lengths of rows and not where they begin: rows are rolled to begin at 0.
  """
  first = jnp.argmax(valid, axis=1).astype(jnp.int32)
  lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
  rolled = [_roll(x, -first) for x in (q, k.swapaxes(1, 2), v.swapaxes(1, 2))]
  out = jax.nn.dot_product_attention(
      *rolled, scale=scale, is_causal=True, query_seq_lengths=lengths,
      key_value_seq_lengths=lengths, implementation='cudnn',
      local_window_size=None if window is None else (window - 1, 0))
  return jnp.where(valid[:, :, None, None], _roll(out, first), 0)


# --- splash ---


def splash(q: Float[Array, 'B S N H'], k: Float[Array, 'B K S H'], v: Float[Array, 'B K S H'],
           valid: Bool[Array, 'B S'], *, window: int | None, scale: float, softcap: float,
           interpret: bool = False) -> Float[Array, 'B S N H']:
  """Computes causal attention; padding reads padding only, as a segment of its own.

  Lengths and heads are padded to what the kernel takes. `interpret` runs it anywhere, slowly.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as lib  # slow to import
  length, heads, width = q.shape[1:]
  block = min(SPLASH_BLOCK, -(-length // LANES) * LANES)
  long, wide = -length % block, -width % LANES
  size = length + long

  def pad(x):
    return jnp.pad(x, ((0, 0), (0, 0), (0, long), (0, wide)))

  mask = lib.LocalMask((size, size), (window - 1, 0), 0) if window else (
      lib.CausalMask((size, size)))
  sizes = lib.BlockSizes(**dict.fromkeys(
      ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv',
       'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq'), block))
  kernel = lib.make_splash_mha(
      lib.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
      attn_logits_soft_cap=softcap or None, interpret=interpret)
  # The kernel has no scale of its own; rounded once.
  q = (q * jnp.asarray(scale, jnp.promote_types(q.dtype, jnp.float32))).astype(q.dtype)
  segments = jnp.pad(valid, ((0, 0), (0, long))).astype(jnp.int32)
  out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, lib.SegmentIds(s, s)))(
      pad(q.swapaxes(1, 2)), pad(k), pad(v), segments)
  return out[:, :, :length, :width].swapaxes(1, 2)
