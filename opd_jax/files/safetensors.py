"""Spec tables to safetensors files and back, a tensor at a time.

Host memory holds one tensor beside what is asked for. `safetensors` itself checks the files; what
it lacks for NumPy is bfloat16, and a writer that does not need the whole file in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from opd_jax.files import disk
from opd_jax.models import lora
from opd_jax.models.params import ParamSpec, flatten, unflatten
from opd_jax.parallel import hosts
from opd_jax.types import Params

# Names of dtypes in a header. Quantized and integer tensors are no weights to compute with.
DTYPES = {'F32': np.dtype(np.float32), 'BF16': np.dtype(jnp.bfloat16), 'F16': np.dtype(np.float16)}

Plan = dict[str, tuple[np.dtype, tuple[int, ...]]]  # (dtype, shape) of tensors to be written


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where a tensor lies in a file.

  Attributes:
    file: the safetensors file.
    offset: of its first byte, from the beginning of the file.
    shape: its shape.
    dtype: its dtype by the header's name, which need not be one of `DTYPES`.
  """

  file: pathlib.Path
  offset: int
  shape: tuple[int, ...]
  dtype: str


def read_header(file: pathlib.Path) -> dict[str, Stored]:
  """Lists the tensors of a file by name. Nothing but the header is read.

  Raises:
    ValueError: the file is truncated or damaged.
  """
  try:
    if disk.find_pipes(file):
      raise OSError('no regular file')
    with safetensors.safe_open(str(file), framework='numpy'):
      pass  # it checks that the tensors fill the file without gaps
    with open(file, 'rb') as f:
      length = int.from_bytes(f.read(8), 'little')
      header = json.loads(f.read(length))
  except (safetensors.SafetensorError, OSError, ValueError) as e:
    raise ValueError(f'{file} is not a whole safetensors file ({e}); allowed: one whose header and '
                     'size agree') from e
  header.pop('__metadata__', None)
  return {name: Stored(file, 8 + length + entry['data_offsets'][0], tuple(entry['shape']),
                       entry['dtype']) for name, entry in header.items()}


def view(tensor: Stored) -> np.ndarray:
  """Views the tensor, read-only and not yet read: pages come from the file as they are touched, and
  go when the array does. Its dtype is one of `DTYPES`."""
  dtype = DTYPES[tensor.dtype]
  if not math.prod(tensor.shape):  # nothing can be mapped
    return np.zeros(tensor.shape, dtype)
  # As integers first: NumPy maps no bfloat16.
  mapped = np.memmap(tensor.file, f'<u{dtype.itemsize}', 'r', tensor.offset, tensor.shape)
  return np.asarray(mapped).view(dtype)


# --- which tensors there are ---


def places(spec: ParamSpec) -> Iterator[tuple[tuple[int, ...], str]]:
  """Lists (index of the leading axes, tensor name) of every tensor of a parameter, in order."""
  axes = [axis for axis in ('layer', 'expert') if f'{{{axis}}}' in spec.hf_name]
  for place in np.ndindex(spec.shape[:len(axes)]):
    yield place, spec.hf_name.format(**dict(zip(axes, place, strict=True)))


def check(found: dict[str, Stored], specs: dict[str, Any], where: str) -> None:
  """Checks that every tensor found is wanted once, every one wanted is found, in its shape.

  Raises:
    ValueError: otherwise; lists all that does not match.
  """
  wanted, double = {}, []
  for spec in flatten(specs).values():
    for _, name in places(spec):
      if name in wanted:
        double.append(name)
      wanted[name] = spec.hf_shape
  both = sorted(set(found) & set(wanted))
  problems = {
      'unmatched tensors': sorted(set(found) - set(wanted)),
      'missing tensors': sorted(set(wanted) - set(found)),
      'mis-shaped tensors': [f'{n}: {found[n].shape} in the file, {wanted[n]} expected'
                             for n in both if found[n].shape != wanted[n]],
      'tensors that two parameters want': sorted(double),
      f'tensors of another dtype than {list(DTYPES)}': [
          f'{n}: {found[n].dtype}' for n in sorted(found) if found[n].dtype not in DTYPES]}
  if any(problems.values()):
    raise ValueError(f'{where}: ' + '; '.join(f'{k} {v}' for k, v in problems.items()))


# --- reading ---


def read(specs: dict[str, Any], weights: dict[str, Stored], dtype: Any = jnp.float32,
         shardings: Any = None) -> Params:
  """Reads parameters, a slice of a tensor at a time.

  Args:
    specs: the table, which the tensors match (`check`).
    weights: where they lie.
    dtype: of the parameters.
    shardings: one per parameter, for arrays on devices: this process then reads the slices that its
      own devices hold. None for NumPy arrays.

  Raises:
    ValueError: NaN or infinity; names the tensor.
  """
  dtype, out = np.dtype(dtype), {}
  placed = None if shardings is None else flatten(shardings)
  for name, spec in flatten(specs).items():
    part = functools.partial(_read_slice, spec, weights, dtype)
    if placed is None:
      out[name] = part((slice(None),) * len(spec.shape))
      continue
    arrays, host = [], {}
    for device, index in placed[name].addressable_devices_indices_map(spec.shape).items():
      key = tuple(s.indices(n) for s, n in zip(index, spec.shape, strict=True))
      if key not in host:  # else the device before holds the same slice
        host.clear()
        host[key] = part(index)
      arrays.append(jax.block_until_ready(jax.device_put(host[key], device)))
    out[name] = jax.make_array_from_single_device_arrays(spec.shape, placed[name], arrays)
  return unflatten(out)


def _read_slice(spec: ParamSpec, weights: dict[str, Stored], dtype: np.dtype,
                index: tuple[slice, ...]) -> np.ndarray:
  """One slice of one parameter; of each of its tensors only that slice is touched."""
  chosen = [range(n)[s] for s, n in zip(index, spec.shape, strict=True)]
  out = _empty(tuple(map(len, chosen)), dtype)
  for place, name in places(spec):
    leading = len(place)
    if any(i not in r for i, r in zip(place, chosen[:leading], strict=True)):
      continue
    tensor = view(weights[name])
    tensor = (tensor.T if spec.hf_transpose else tensor).reshape(spec.shape[leading:])
    here = tuple(r.index(i) for i, r in zip(place, chosen[:leading], strict=True))
    with np.errstate(over='ignore'):  # what overflows is found below
      out[here] = tensor[index[leading:]]
    if not _finite(out[here]):
      raise ValueError(f'{weights[name].file}: {name} has NaN or infinity (as {dtype}); allowed: '
                       'finite weights')
  return out


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """np.empty, aligned such that JAX can take it over on the CPU instead of copying it."""
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start:start + size].view(dtype).reshape(shape)


def _finite(x: Any) -> bool:
  flat = np.asarray(x).reshape(-1)
  return all(np.isfinite(flat[i:i + 2**20]).all() for i in range(0, flat.size, 2**20))


# --- writing ---


def nbytes(entry: tuple[np.dtype, tuple[int, ...]]) -> int:
  """Counts the bytes of a planned tensor."""
  return entry[0].itemsize * math.prod(entry[1])


def plan(specs: dict[str, Any], params: Params, dtype: Any = None) -> Plan:
  """Lists the tensors that `params` become in files, in the order in which `stream` makes them.

  Raises:
    ValueError: parameters that are not those of the table, or of a dtype that is not in `DTYPES`;
      `dtype` None keeps theirs.
  """
  flat, specs = flatten(params), flatten(specs)
  if set(flat) != set(specs):
    raise ValueError(f'parameters {sorted(set(flat) ^ set(specs))} are only in one of table and '
                     'tree; allowed: in both')
  out = {}
  for name, spec in specs.items():
    base = flat[name].base if isinstance(flat[name], lora.LoRA) else flat[name]
    kind = np.dtype(base.dtype if dtype is None else dtype)
    if base.shape != spec.shape or kind not in DTYPES.values():
      raise ValueError(f'{name}: shape {base.shape}, to be written as {kind}; allowed: shape '
                       f'{spec.shape}, as {[str(d) for d in DTYPES.values()]}')
    out |= {tensor: (kind, spec.hf_shape) for _, tensor in places(spec)}
  return out


def split(planned: Plan, max_bytes: int) -> list[Plan]:
  """Splits the plan into parts of at most `max_bytes`; a tensor larger than that is a part of its
  own."""
  parts, size = [{}], 0
  for name, entry in planned.items():
    if parts[-1] and size + nbytes(entry) > max_bytes:
      parts, size = [*parts, {}], 0
    parts[-1][name] = entry
    size += nbytes(entry)
  return parts


def stream(specs: dict[str, Any], params: Params, planned: Plan) -> Iterator[np.ndarray]:
  """Makes the tensors of a plan, in its order. `lora.LoRA` leaves are merged, and rounded here,
  once. One layer of one parameter is fetched from the devices at a time; several processes have to
  take them together.

  Raises:
    ValueError: NaN or infinity in the dtype that is planned; names the tensor.
  """
  flat = flatten(params)
  for name, spec in flatten(specs).items():
    for layer, same_layer in itertools.groupby(places(spec), lambda place: place[0][:1]):
      rows = _fetch(flat[name], *layer)
      for place, tensor in same_layer:
        x = rows[place[1:]]
        x = x.reshape(spec.hf_shape[::-1]).T if spec.hf_transpose else x.reshape(spec.hf_shape)
        with np.errstate(over='ignore'):
          x = np.array(x, dtype=planned[tensor][0], order='C')
        if not _finite(x):
          raise ValueError(f'{tensor} has NaN or infinity (as {x.dtype}); allowed: finite weights')
        yield x
        del x  # before the next one is made
      del rows


def _fetch(leaf: Any, layer: int | None = None) -> np.ndarray:
  """A parameter, or one layer of a stacked one, on the host.

  Sliced, or copied, on the devices first: an array that is fetched keeps its host copy as long as
  it lives, and trained parameters live on.
  """
  if layer is None:
    return leaf if isinstance(leaf, np.ndarray) else hosts.fetch(jnp.copy(leaf))
  rows = jax.tree.map(
      lambda x: x[layer:layer + 1] if isinstance(x, np.ndarray)
      else jax.lax.dynamic_slice_in_dim(x, layer, 1), leaf)
  return hosts.fetch(lora.merge(rows))[0]


def write(file: pathlib.Path, planned: Plan, arrays: Iterator[np.ndarray]) -> None:
  """Writes a file, taking one array after the other for every name of `planned`. Of several
  processes the first one writes, and the others take the arrays too.

  Args:
    file: the file to make.
    planned: what the header will say.
    arrays: as many as there are names are taken from it, in the same order.

  Raises:
    ValueError: an array that is not as planned.
  """
  names = {dtype: name for name, dtype in DTYPES.items()}
  header, end = {'__metadata__': {'format': 'pt'}}, 0  # transformers insists on a format
  for name, (dtype, shape) in planned.items():
    begin, end = end, end + nbytes((dtype, shape))
    header[name] = {'dtype': names[dtype], 'shape': list(shape),
                    'data_offsets': [begin, end]}
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # tensors are aligned
  with open(file if hosts.is_primary() else os.devnull, 'xb' if hosts.is_primary() else 'wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    for name, (dtype, shape) in planned.items():
      array = next(arrays)
      if array.dtype != dtype or array.shape != tuple(shape):
        raise ValueError(f'{name}: {array.dtype} {array.shape}, and {dtype} {shape} was planned')
      f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
      del array  # before the next one is made
