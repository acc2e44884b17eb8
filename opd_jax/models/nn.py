"""The layers that decoder-only transformers share, as functions of arrays.

Reductions (norms, softmax) are in float32 at least; under `jax_enable_x64` a float64 model stays
float64 throughout, which is what the oracle tests use.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opd_jax.models.lora import LoRA, low_rank, merge


def einsum(subscripts: str, x: Array, weight: Array | LoRA) -> Array:
  """Computes `jnp.einsum` in the dtype of the activations. Every weight of every model passes here,
  so a new kind of weight (an adapter, a quantized matrix) is a new leaf type and one case here."""
  if isinstance(weight, LoRA) and weight.written:
    weight = merge(jax.tree.map(lambda leaf: leaf[None], weight))[0]  # of one layer
  if isinstance(weight, LoRA):
    return einsum(subscripts, x, weight.base) + low_rank(subscripts, x, weight)
  return jnp.einsum(subscripts, x, weight.astype(x.dtype))


def _reduction_dtype(x: Array) -> jnp.dtype:
  return jnp.promote_types(x.dtype, jnp.float32)


def positions_of(valid: Bool[Array, 'B S']) -> Int[Array, 'B S']:
  """Counts positions from 0 at the first real token; the left padding shares position 0."""
  return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=-1) - 1, 0)


def rms_norm(x: Float[Array, '... D'], weight: Float[Array, 'D'], eps: float
             ) -> Float[Array, '... D']:
  """Computes x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), over the last axis."""
  wide = x.astype(_reduction_dtype(x))
  wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
  # Round before the gain, as the published checkpoints' own code does.
  weight = jnp.reshape(weight, (1,) * (x.ndim - 1) + weight.shape)
  return wide.astype(x.dtype) * weight.astype(x.dtype)


def offset_rms_norm(x: Float[Array, '... D'], weight: Float[Array, 'D'], eps: float
                    ) -> Float[Array, '... D']:
  """Computes `rms_norm` with the gain 1 + weight, rounded once, after it (Gemma, 2403.08295)."""
  wide = x.astype(_reduction_dtype(x))
  wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
  weight = jnp.reshape(weight, (1,) * (x.ndim - 1) + weight.shape)
  return (wide * (1.0 + weight.astype(wide.dtype))).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are lowered for contexts longer than those of pre-training.

  Attributes:
    rope_type: 'linear' divides every frequency by `factor` (Chen et al. 2023, 2306.15595); 'llama3'
      (Grattafiori et al. 2024, 2407.21783) only those whose wavelength is above the original
      context / low_freq_factor, none below context / high_freq_factor, and blends in between.
    factor: the divisor, at least 1.
    low_freq_factor, high_freq_factor, original_max_position_embeddings: of 'llama3' only.
  """

  rope_type: str
  factor: float
  low_freq_factor: float | None = None
  high_freq_factor: float | None = None
  original_max_position_embeddings: int | None = None


def _scaled(frequency: Array, scaling: RopeScaling) -> Array:
  slow = frequency / scaling.factor
  if scaling.rope_type == 'linear':
    return slow
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  turns = scaling.original_max_position_embeddings * frequency / (2 * jnp.pi)  # in the context
  kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return (1.0 - kept) * slow + kept * frequency


def rope_tables(positions: Int[Array, 'B S'], head_dim: int, theta: float, dtype: jnp.dtype,
                scaling: RopeScaling | None = None
                ) -> tuple[Float[Array, 'B S 1 h'], Float[Array, 'B S 1 h']]:
  """Makes cos and sin of position * theta^(-2i/H), i < H/2 (Su et al. 2021), for `apply_rope`."""
  wide = jnp.promote_types(dtype, jnp.float32)
  exponent = jnp.arange(0, head_dim, 2, dtype=wide) / head_dim
  frequency = 1.0 / theta**exponent
  if scaling is not None:
    frequency = _scaled(frequency, scaling)
  angle = positions.astype(wide)[:, :, None, None] * frequency.reshape(1, 1, 1, -1)
  return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def apply_rope(x: Float[Array, 'B S n H'], cos: Float[Array, 'B S 1 h'],
               sin: Float[Array, 'B S 1 h']) -> Float[Array, 'B S n H']:
  """Rotates the pairs (x[i], x[i + H/2]): the 'rotate half' layout of Hugging Face weights."""
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def swiglu(x: Float[Array, 'B S D'], gate: Array | LoRA, up: Array | LoRA,
           down: Array | LoRA) -> Float[Array, 'B S D']:
  """Computes (silu(x gate) * (x up)) down (Shazeer 2020)."""
  hidden = jax.nn.silu(einsum('bsd,df->bsf', x, gate)) * einsum('bsd,df->bsf', x, up)
  return einsum('bsf,fd->bsd', hidden, down)


def geglu(x: Float[Array, 'B S D'], gate: Array | LoRA, up: Array | LoRA,
          down: Array | LoRA) -> Float[Array, 'B S D']:
  """Computes (gelu(x gate) * (x up)) down (Shazeer 2020), with the tanh approximation of gelu."""
  hidden = jax.nn.gelu(einsum('bsd,df->bsf', x, gate), approximate=True)
  return einsum('bsf,fd->bsd', hidden * einsum('bsd,df->bsf', x, up), down)
