"""Low-rank adapters (Hu et al. 2021, LoRA, arXiv 2106.09685) as a kind of weight.

A linear layer's weight W becomes W + (alpha / rank) A B with W frozen, A [in, rank] random and
B [rank, out] zero at the start, so that a fresh adapter changes nothing. The model code does not
know: `nn.einsum` meets a `LoRA` leaf where it met an array. What is trained, sharded, checkpointed
and exported is a table of `ParamSpec` of its own, derived from the model's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from opd_jax.models.params import ParamSpec, flatten, unflatten
from opd_jax.types import Params

PRESETS = {  # names for the usual choices of `Settings.targets`
    'all': r'layers/.*', 'attention': r'layers/(q|k|v|o)', 'mlp': r'layers/(gate|up|down)'}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Which layers are adapted, and how.

  Attributes:
    rank: of A B, at least 1.
    alpha: the update is scaled by alpha / rank.
    targets: 'all' (every linear layer of the blocks), 'attention', 'mlp', or a regular expression
      that has to match the whole name of a parameter, such as 'layers/(q|v)'.
  """

  rank: int
  alpha: float
  targets: str = 'all'

  @property
  def scale(self) -> float:
    """alpha / rank."""
    return self.alpha / self.rank


@struct.dataclass
class LoRA:
  """A linear layer's weight with its adapter: base + scale * a b."""

  base: jax.Array  # [in..., out...], stacked ones with the layer in front
  a: jax.Array  # [in..., rank]
  b: jax.Array  # [rank, out...]
  scale: float = struct.field(pytree_node=False)
  # Of an export: the dtype to which the sum is rounded. '' computes with the parts.
  written: str = struct.field(pytree_node=False, default='')


@struct.dataclass
class Frozen:
  """What an adapter is put on. Never donated, never checkpointed, without optimizer state."""

  base: Params
  scale: float = struct.field(pytree_node=False)


def adaptable(specs: dict[str, Any]) -> dict[str, ParamSpec]:
  """Lists the parameters that can carry an adapter: the linear layers of the blocks.

  Not the embedding and the head, and not the experts and the router of a mixture (whose weights in
  transformers are no linear modules, so that PEFT would not find them).
  """
  return {name: spec for name, spec in flatten(specs).items()
          if name.startswith('layers/') and spec.hf_transpose and spec.matmul == 1
          and '{expert}' not in spec.hf_name and not name.endswith('/router')}


def split_axes(spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Tells the input and the output axes of a stacked linear layer [layer, in..., out...]."""
  fan_in = spec.hf_shape[-1]
  for i in range(1, len(spec.shape)):
    if math.prod(spec.shape[1:i + 1]) == fan_in:
      return tuple(range(1, i + 1)), tuple(range(i + 1, len(spec.shape)))
  raise ValueError(f'{spec.hf_name}: no leading axes of {spec.shape} hold its {fan_in} inputs')


def adapter_specs(specs: dict[str, Any], settings: Settings) -> dict[str, Any]:
  """Makes the table of what is trained: {'layers': {'q': {'a': ParamSpec, 'b': ParamSpec}, ...}}.

  Names and shapes of the tensors are those of a PEFT checkpoint.

  Raises:
    ValueError: bad settings; targets that match nothing, or something that carries no adapter.
  """
  if settings.rank < 1 or not 0 < settings.alpha < math.inf:
    raise ValueError(f'lora.rank={settings.rank}, lora.alpha={settings.alpha}; allowed: a rank of '
                     'at least 1, and an alpha above 0')
  can = adaptable(specs)
  try:
    pattern = re.compile(PRESETS.get(settings.targets, settings.targets))
  except re.error as e:
    raise ValueError(f'lora.targets={settings.targets!r} is no regular expression ({e}); allowed: '
                     f'{sorted(PRESETS)} or one that matches some of {sorted(can)}') from e
  names = [name for name in flatten(specs) if pattern.fullmatch(name)]
  wrong = [] if settings.targets in PRESETS else [name for name in names if name not in can]
  names = [name for name in names if name in can]
  if wrong or not names:
    raise ValueError(f'lora.targets={settings.targets!r} matches '
                     f'{wrong or "no parameter"}; allowed: {sorted(PRESETS)}, or a regular '
                     f'expression for some of {sorted(can)}')
  return unflatten({f'{name}/{part}': spec for name in names
                    for part, spec in _pair(can[name], settings.rank).items()})


def _pair(spec: ParamSpec, rank: int) -> dict[str, ParamSpec]:
  in_axes, out_axes = split_axes(spec)

  def pick(values, axes):
    return tuple(values[i] for i in axes)

  def uniform(key, shape, dtype):  # PEFT's start, Kaiming with a = sqrt(5)
    bound = spec.hf_shape[-1]**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  module = 'base_model.model.' + spec.hf_name.removesuffix('.weight')
  layers = spec.shape[:1]
  return {
      'a': ParamSpec((*layers, *pick(spec.shape, in_axes), rank),
                     ('layer', *pick(spec.axes, in_axes), None), uniform,
                     f'{module}.lora_A.weight', (rank, spec.hf_shape[1]), True, 1.0),
      'b': ParamSpec((*layers, rank, *pick(spec.shape, out_axes)),
                     ('layer', None, *pick(spec.axes, out_axes)), jax.nn.initializers.zeros,
                     f'{module}.lora_B.weight', (spec.hf_shape[0], rank), True, 1.0)}


def join(frozen: Frozen | None, trained: Params) -> Params:
  """Makes the parameters that a model computes with; `trained` itself where nothing is frozen.

  Copies nothing: base weights with an adapter become `LoRA` leaves, the others stay as they are.
  """
  if frozen is None:
    return trained
  adapters, out = flatten(trained), {}
  for name, leaf in flatten(frozen.base).items():
    adapted = f'{name}/a' in adapters
    out[name] = LoRA(leaf, adapters[f'{name}/a'], adapters[f'{name}/b'],
                     frozen.scale) if adapted else leaf
  return unflatten(out)


def low_rank(subscripts: str, x: jax.Array, weight: LoRA) -> jax.Array:
  """Computes scale * (x a) b for the einsum of x with the weight, in the dtype of x."""
  inputs, out = subscripts.split('->')
  of_x, of_weight = inputs.split(',')
  contracted = ''.join(c for c in of_weight if c not in out)
  rest = ''.join(c for c in of_weight if c in out)
  kept = ''.join(c for c in of_x if c not in contracted)
  down = jnp.einsum(f'{of_x},{contracted}z->{kept}z', x, weight.a.astype(x.dtype))
  up = jnp.einsum(f'{kept}z,z{rest}->{out}', down, weight.b.astype(x.dtype))
  return up * jnp.asarray(weight.scale, x.dtype)


def written_as(params: Params, dtype: str) -> Params:
  """Makes what an export in `dtype` holds of the parameters that `join` made, to compute with. A
  merged weight is made where it is used, so that there is no second copy of the model."""
  return jax.tree.map(
      lambda leaf: leaf.replace(written=dtype) if isinstance(leaf, LoRA) else _round(leaf, dtype),
      params, is_leaf=lambda x: isinstance(x, LoRA))


def _round(x: jax.Array, dtype: str) -> jax.Array:
  """To the numbers of another dtype. XLA may drop a cast to it and back, but not this."""
  kind = jnp.finfo(dtype)
  if jnp.finfo(x.dtype).nmant <= kind.nmant:
    return x
  return jax.lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)


def merge(weight: jax.Array | LoRA) -> jax.Array:
  """Computes base + scale * a b of a stacked weight. The sum is float32 at least, whatever the base
  is kept in: who writes it rounds once."""
  if not isinstance(weight, LoRA):
    return weight
  wide = jnp.promote_types(weight.base.dtype, jnp.float32)
  layers, rank = weight.a.shape[0], weight.a.shape[-1]
  delta = jnp.einsum('lir,lro->lio', weight.a.reshape(layers, -1, rank).astype(wide),
                     weight.b.reshape(layers, rank, -1).astype(wide),
                     precision=jax.lax.Precision.HIGHEST)  # or accelerators use bfloat16
  total = weight.base.astype(wide) + weight.scale * delta.reshape(weight.base.shape)
  return _round(total, weight.written) if weight.written else total


def merge_all(params: Params) -> Params:
  """Applies `merge` to every leaf of the parameters that `join` made."""
  return jax.tree.map(merge, params, is_leaf=lambda x: isinstance(x, LoRA))
