"""The device mesh, and the map from logical axes to mesh axes."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from opd_jax.models.params import ParamSpec, flatten, unflatten

MESH_AXES = ('data', 'fsdp', 'tensor', 'expert')

# Parameters are split over `fsdp` along the model width and over `tensor` along heads, feed-forward
# and vocabulary; batches over `data` and `fsdp`.
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None, 'layer': None, 'embed': 'fsdp', 'vocab': 'tensor', 'heads': 'tensor',
    'kv_heads': 'tensor', 'mlp': 'tensor', 'experts': 'expert', 'batch': ('data', 'fsdp'),
}


def make_mesh(sizes: dict[str, int], devices: list[Any] | None = None) -> Mesh:
  """Makes a mesh with the axes `MESH_AXES`; one size may be -1, for all devices that are left.

  Axes are Auto (GSPMD propagates): a user's divergence must not need sharding annotations.

  Raises:
    ValueError: sizes that do not multiply to the number of devices, with both numbers.
  """
  devices = jax.devices() if devices is None else devices
  shape = [sizes[name] for name in MESH_AXES]
  if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
    raise ValueError(f'compute.mesh={sizes}; allowed: sizes of at least 1, of which one may be -1')
  if -1 in shape:
    known = int(np.prod([n for n in shape if n != -1]))
    shape[shape.index(-1)] = max(len(devices) // known, 1)
  if int(np.prod(shape)) != len(devices):
    raise ValueError(f'compute.mesh={sizes} needs {int(np.prod(shape))} devices; allowed: sizes '
                     f'whose product is {len(devices)}, the devices that there are, of which one '
                     'may be -1')
  return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape),
                       devices=devices)


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
  """Turns logical axes into a PartitionSpec.

  Raises:
    ValueError: two axes of one array on the same mesh axis, or an unknown logical axis.
  """
  unknown = [a for a in axes if a not in RULES]
  if unknown:
    raise ValueError(f'unknown logical axes {unknown}; there are {sorted(map(str, RULES))}')
  spec = PartitionSpec(*(RULES[a] for a in axes))
  used = jax.tree.leaves(tuple(spec))
  if len(set(used)) != len(used):
    raise ValueError(f'logical axes {axes} collide on one mesh axis: {spec}')
  return spec


def replicated(mesh: Mesh) -> NamedSharding:
  """Makes the sharding of scalars and of everything small."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
  """Makes the sharding of a batch: rows over data and fsdp."""
  return NamedSharding(mesh, partition_spec(('batch',)))


def row_shards(mesh: Mesh) -> int:
  """Counts the parts into which a batch is split."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def param_shardings(specs: dict[str, Any], mesh: Mesh) -> Any:
  """Makes one NamedSharding per parameter, from its table.

  Raises:
    ValueError: an axis that its mesh axis does not divide; names the field and the parameter.
  """
  def one(name: str, spec: ParamSpec) -> NamedSharding:
    sharding = NamedSharding(mesh, partition_spec(spec.axes))
    for size, axis in zip(spec.shape, sharding.spec, strict=True):
      if axis is not None and size % mesh.shape[axis]:
        raise ValueError(f'compute.mesh.{axis}={mesh.shape[axis]} does not divide the shape '
                         f'{spec.shape} of the parameter {name} along {spec.axes}; allowed: a '
                         f'divisor of {size}')
    return sharding

  return unflatten({name: one(name, spec) for name, spec in flatten(specs).items()})


def put(tree: Any, shardings: Any) -> Any:
  """Puts host arrays on devices. Every process has the whole array and feeds only its own shard."""
  def one(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  if isinstance(shardings, NamedSharding):
    return jax.tree.map(lambda x: one(x, shardings), tree)
  return jax.tree.map(one, tree, shardings)
