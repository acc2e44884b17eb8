"""Lays the weights of a model out for use: gathered in training, split again for decoding."""

from __future__ import annotations

from typing import Any

from flax import struct

from opd_jax.models import layout
from opd_jax.models.lora import LoRA, split_axes
from opd_jax.models.params import ParamSpec, flatten, unflatten
from opd_jax.types import Model, Params


@struct.dataclass
class LaidOut:
  """Parameters that `Model.for_decoding` has laid out already, before they are sampled from."""

  params: Params


def laid_out(model: Model, params: Params | LaidOut) -> Params:
  """Lays parameters out for decoding, unless that was done before."""
  return params.params if isinstance(params, LaidOut) else model.for_decoding(params)


def used(weights: dict[str, Any], specs: dict[str, ParamSpec], dtype: Any) -> dict[str, Any]:
  """Gathers the weights of one layer along the model width, in the dtype of the activations; as
  they are without a mesh of several devices."""
  if layout.mesh_of_several() is None:
    return weights
  return {name: _lay(leaf, specs[name], 1, layout.USED, dtype) for name, leaf in weights.items()}


def gathered(params: Params, specs: dict[str, Any]) -> Params:
  """Gathers all parameters along the model width, in the dtype that they have."""
  if layout.mesh_of_several() is None:
    return params
  flat = flatten(specs)
  return unflatten({name: _lay(leaf, flat[name], 0, layout.USED, leaf.dtype)
                    for name, leaf in flatten(params).items()})


def decoding(params: Params, specs: dict[str, Any], dtype: Any | None) -> Params:
  """Lays all parameters out for decoding (`layout.DECODE`): matrices in `dtype`, the vocabulary
  padded where it is split; with None, for a foreign module, in the dtypes and shapes they have."""
  flat = flatten(specs)
  return unflatten({
      name: _lay(leaf if dtype is None else _padded(leaf, flat[name]), flat[name], 0, layout.DECODE,
                 dtype or leaf.dtype) for name, leaf in flatten(params).items()})


def _padded(leaf, spec):
  return layout.pad_vocabulary(leaf, spec.axes) if 'vocab' in spec.axes else leaf


def _lay(leaf, spec, first, rules, dtype):
  """`first` is 1 for the weight of one layer, whose spec has the axis of the layers in front."""
  if not isinstance(leaf, LoRA):
    return _place(leaf, spec.axes[first:], rules, dtype if _multiplies(spec) else leaf.dtype)
  dtype = leaf.base.dtype if leaf.written else dtype  # what is merged is added up before it rounds
  (ins, outs), axes = split_axes(spec), spec.axes
  layer = axes[first:1]
  of_a = (*layer, *(axes[i] for i in ins), None)
  of_b = (*layer, None, *(axes[i] for i in outs))
  of_ab = leaf.a.dtype if leaf.written else dtype
  return leaf.replace(base=_place(leaf.base, axes[first:], rules, dtype),
                      a=_place(leaf.a, of_a, rules, of_ab), b=_place(leaf.b, of_b, rules, of_ab))


def _multiplies(spec):
  """Whether a parameter is rounded to the activations' dtype at its use, as all but gains are."""
  return len(spec.shape) - spec.leading > 1


def _place(x, axes, rules, dtype):
  x = x.astype(dtype)
  if rules is layout.DECODE:
    x = layout.constrain(x, axes, layout.MOVED)
  return layout.constrain(x, axes, rules)
