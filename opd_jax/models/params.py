"""Parameters are nested dicts of arrays, described by one table of `ParamSpec` per model.

From that table come initialization, shardings (`sharding.py`), import and export (`files/`), and
the parameter count. Layers are stored stacked: a per-layer parameter has a leading axis 'layer'.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from opd_jax.types import Params

# The logical axes of parameters and batches; `layout.TRAIN` maps each to the mesh.
AXES = ('layer', 'embed', 'vocab', 'heads', 'kv_heads', 'mlp', 'experts', 'batch')


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """One parameter.

  Attributes:
    shape: of the array in memory; the first axes of a stacked parameter are layer and expert.
    axes: the logical name of each axis, resolved to mesh axes by `sharding.py`; None replicates.
    init: `jax.nn.initializers`-style function (key, shape, dtype) -> array.
    hf_name: tensor name in a Hugging Face checkpoint; '{layer}', or '{layer}' and '{expert}', mark
      a stacked parameter, whose leading axes they are, in this order.
    hf_shape: shape of that tensor (of one layer, of one expert).
    hf_transpose: whether the tensor is transposed ([out, in] to [in, out]) before the reshape.
    matmul: the share of it that each token is multiplied by, which counts in the FLOPs: 1 for a
      linear layer, k / E for E experts of which k are used, 0 for what is added or looked up.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Callable[..., jax.Array]
  hf_name: str
  hf_shape: tuple[int, ...]
  hf_transpose: bool = False
  matmul: float = 0.0

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f'{self.hf_name}: shape {self.shape} and axes {self.axes} differ in rank')
    copies = math.prod(self.shape[:self.leading])
    if math.prod(self.shape) != copies * math.prod(self.hf_shape):
      raise ValueError(f'{self.hf_name}: {self.shape} cannot be stored as {self.hf_shape}')

  @property
  def stacked(self) -> bool:
    return '{layer}' in self.hf_name

  @property
  def leading(self) -> int:
    """How many axes precede those of one tensor."""
    return self.stacked + ('{expert}' in self.hf_name)


def flatten(tree: Params) -> dict[str, Any]:
  """Turns nested dicts into {'layers/q': leaf}, in the order of the table."""
  return traverse_util.flatten_dict(tree, sep='/')


def unflatten(flat: dict[str, Any]) -> Params:
  """Inverts `flatten`."""
  return traverse_util.unflatten_dict(flat, sep='/')


def init_params(specs: dict[str, Any], key: jax.Array, dtype: Any = jnp.float32) -> Params:
  """Draws fresh parameters. Each draws from `fold_in(key, its position in the table)`."""
  flat = flatten(specs)
  return unflatten({
      name: spec.init(jax.random.fold_in(key, i), spec.shape, dtype)
      for i, (name, spec) in enumerate(flat.items())})


def abstract_params(specs: dict[str, Any], dtype: Any = jnp.float32) -> Params:
  """Describes the shapes of `init_params` without the arrays."""
  return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), specs,
                      is_leaf=lambda x: isinstance(x, ParamSpec))


def count_params(specs: dict[str, Any], matmul_only: bool = False) -> int:
  """Counts parameters; with `matmul_only`, those that multiply a token (the N of 2N)."""
  sizes = ((math.prod(s.shape), s.matmul) for s in flatten(specs).values())
  return sum(round(size * share) if matmul_only else size for size, share in sizes)
