"""The device mesh, and the shardings of what enters and leaves programs; layout.py has the map from
logical axes to mesh axes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from opd_jax.models import layout
from opd_jax.models.params import ParamSpec, flatten, unflatten

_PADDED = ('vocab', 'batch')  # what decoding splits whatever its size, or not by its weights
SIZES = ('data', 'fsdp', 'tensor', 'expert')  # of `compute.mesh`


def make_mesh(sizes: dict[str, int], devices: list[Any] | None = None, decode_split: int = 1,
              in_order: bool = False) -> Mesh:
  """Makes a mesh with the axes `layout.MESH_AXES`.

  Axes are Auto (GSPMD propagates): a user's divergence must not need sharding annotations.

  Args:
    sizes: of the axes `SIZES`; one may be -1, for all devices that are left.
    devices: all of them by default.
    decode_split: how many neighbours along fsdp are the axis decode.
    in_order: whether devices are taken as they come: a part of all of them, which need not be a box
      of the torus.

  Raises:
    ValueError: sizes that do not multiply to the number of devices, with both numbers; devices of
      several slices; a split that does not divide.
  """
  devices = jax.devices() if devices is None else devices
  data, fsdp, tensor, expert = resolve(sizes, len(devices))
  if decode_split < 1 or fsdp % decode_split:
    raise ValueError(f'compute.decode_split={decode_split}; allowed: a divisor of '
                     f'compute.mesh.fsdp={fsdp}, or 0, which chooses one')
  slices = {getattr(device, 'slice_index', 0) for device in devices}
  if len(slices) > 1:
    raise ValueError(f'compute.mesh={sizes}: the devices are {len(slices)} slices; allowed: one, '
                     'whose devices are joined by more than the data center network')
  shape = (data, fsdp, tensor, expert)
  if in_order:
    return _mesh(np.asarray(devices), shape, decode_split)
  try:  # along the physical axes where they fit
    grid = mesh_utils.create_device_mesh(shape, devices)
  except NotImplementedError:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return _mesh(grid, shape, decode_split)


def _mesh(grid, shape, decode_split):
  data, fsdp, tensor, expert = shape
  grid = grid.reshape(data, fsdp // decode_split, decode_split, tensor, expert)
  return Mesh(grid, layout.MESH_AXES, axis_types=(AxisType.Auto,) * grid.ndim)


def decode_splits(specs: dict[str, Any], sizes: dict[str, int], devices: int) -> list[int]:
  """Lists the sizes of the axis decode over which every matrix of a table can be split, from 1 on.

  Raises:
    ValueError: see `make_mesh`.
  """
  data, fsdp, tensor, expert = resolve(sizes, devices)
  named = [s for s in flatten(specs).values()
           if any('decode' in layout.DECODE[axis] for axis in s.axes if axis not in _PADDED)]

  def fits(split):
    mesh = AbstractMesh((data, fsdp // split, split, tensor, expert), layout.MESH_AXES)
    specs = [layout.fit(s.shape, s.axes, layout.DECODE, mesh) for s in named]
    whole = [size % (expert * split) == 0 for s in named
             for size, axis in zip(s.shape, s.axes, strict=True) if axis == 'experts']
    return all(whole) and all('decode' in layout.axis_names(spec) for spec in specs)

  return [1] + [n for n in range(2, fsdp + 1) if fsdp % n == 0 and named and fits(n)]


def resolve(sizes: dict[str, int], devices: int) -> tuple[int, ...]:
  """Puts what is left of so many devices in the place of -1.

  Raises:
    ValueError: see `make_mesh`.
  """
  shape = [sizes[name] for name in SIZES]
  if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
    raise ValueError(f'compute.mesh={sizes}; allowed: sizes of at least 1, of which one may be -1')
  if -1 in shape:
    known = int(np.prod([n for n in shape if n != -1]))
    shape[shape.index(-1)] = max(devices // known, 1)
  if int(np.prod(shape)) != devices:
    raise ValueError(f'compute.mesh={sizes} needs {int(np.prod(shape))} devices; allowed: sizes '
                     f'whose product is {devices}, the devices that there are, of which one '
                     'may be -1')
  return tuple(shape)


def replicated(mesh: Mesh) -> NamedSharding:
  """Makes the sharding of scalars and of everything small."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
  """Makes the sharding of a batch: rows over data and fsdp."""
  return NamedSharding(mesh, layout.partition_spec(('batch',)))


def row_shards(mesh: Mesh) -> int:
  """Counts the parts into which a batch is split."""
  return _parts(mesh, layout.TRAIN['batch'])


def _parts(mesh, names):
  return math.prod(mesh.shape[name] for name in names)


def param_shardings(specs: dict[str, Any], mesh: Mesh) -> Any:
  """Makes one NamedSharding per parameter, from its table.

  Raises:
    ValueError: an axis that its mesh axis does not divide; names the field and the parameter.
  """
  def one(name: str, spec: ParamSpec) -> NamedSharding:
    sharding = NamedSharding(mesh, layout.partition_spec(spec.axes))
    for size, axis in zip(spec.shape, spec.axes, strict=True):
      names = layout.TRAIN[axis]
      if size % _parts(mesh, names):
        raise ValueError(f'compute.mesh.{names[0]}={_parts(mesh, names)} does not divide the shape '
                         f'{spec.shape} of the parameter {name} along {spec.axes}; allowed: a '
                         f'divisor of {size}')
    return sharding

  return unflatten({name: one(name, spec) for name, spec in flatten(specs).items()})


def fitting(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh,
            rules: layout.Rules = layout.TRAIN) -> NamedSharding:
  """Makes the sharding of an array that is no parameter: what does not divide stays whole."""
  return NamedSharding(mesh, layout.fit(shape, axes, rules, mesh))


def put(tree: Any, shardings: Any) -> Any:
  """Puts host arrays on devices. Every process has the whole array and feeds only its own shard."""
  def one(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  if isinstance(shardings, NamedSharding):
    return jax.tree.map(lambda x: one(x, shardings), tree)
  return jax.tree.map(one, tree, shardings)


def decode_bytes(specs: dict[str, Any], mesh: Mesh, itemsize: int) -> int:
  """Counts the bytes that each device receives when the parameters of a table are laid out for
  decoding: what it reads there, less what it holds of that already."""
  total = 0
  for spec in flatten(specs).values():
    held = layout.partition_spec(spec.axes)
    wanted = layout.fit(spec.shape, spec.axes, layout.DECODE, mesh)
    parts = [(_parts(mesh, layout.axis_names([a])), _parts(mesh, layout.axis_names([b])))
             for a, b in zip(held, wanted, strict=True)]
    size = math.prod(spec.shape)
    total += itemsize * (size / math.prod(b for _, b in parts)
                         - size / math.prod(map(max, parts)))  # along one axis the finer is within
  return int(total)
