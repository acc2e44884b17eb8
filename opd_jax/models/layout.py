"""Where arrays lie on a mesh, by the names of their axes, and the constraints that hold them there.

In training, rows stay where they are: a batch and all activations are split by rows over `data` and
`fsdp`. A weight is stored split along the model width, over `fsdp`, and gathered when it is used, a
layer at a time and in the dtype of the activations (ZeRO-3, Rajbhandari et al. 2019, 1910.02054).
So what travels grows with the weights and not with the tokens. Left to itself the partitioner would
split each product along the model width, and add up the activations of all rows on every device.

In decoding, a token is too little work to gather a weight for. There heads, feed-forward and
vocabulary are split over `decode` too (Shoeybi et al. 2019, Megatron, 1909.08053), the part of
`fsdp` that `compute.decode_split` says, and the rows over what is left of it.

Without a mesh of several devices in context nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

MESH_AXES = ('data', 'fsdp', 'decode', 'tensor', 'expert')

Rules = dict[str | None, tuple[str, ...]]

# Logical axis -> mesh axes. `group` is of rows that the devices of an fsdp group all have.
TRAIN: Rules = {
    None: (), 'layer': (), 'embed': ('fsdp', 'decode'), 'vocab': ('tensor',), 'heads': ('tensor',),
    'kv_heads': ('tensor',), 'mlp': ('tensor',), 'experts': ('expert',),
    'batch': ('data', 'fsdp', 'decode'), 'group': ('data',)}
USED: Rules = TRAIN | {'embed': ()}  # a weight at work
DECODE: Rules = USED | {
    'vocab': ('tensor', 'decode'), 'heads': ('tensor', 'decode'), 'kv_heads': ('tensor', 'decode'),
    'mlp': ('tensor', 'decode'), 'experts': ('expert', 'decode'), 'batch': ('data', 'fsdp')}
# On the way there: what leaves the width for another axis, before what is left of it is gathered.
MOVED: Rules = DECODE | {'embed': ('fsdp',)}

# Vocabularies are padded for decoding to a multiple of so many tokens a device: the blocks in which
# the sampler draws then lie on one device each.
BLOCK = 256


def partition_spec(axes: tuple[str | None, ...], rules: Rules = TRAIN) -> PartitionSpec:
  """Turns logical axes into a PartitionSpec.

  Raises:
    ValueError: two axes of one array on the same mesh axis, or an unknown logical axis.
  """
  unknown = [a for a in axes if a not in rules]
  if unknown:
    raise ValueError(f'unknown logical axes {unknown}; there are {sorted(map(str, rules))}')
  spec = [rules[a] for a in axes]
  used = sum(spec, ())
  if len(set(used)) != len(used):
    raise ValueError(f'logical axes {axes} collide on one mesh axis: {spec}')
  return PartitionSpec(*map(_entry, spec))


def _entry(names):
  return names[0] if len(names) == 1 else names or None


def fit(shape: tuple[int, ...], axes: tuple[str | None, ...], rules: Rules, mesh: Any
        ) -> PartitionSpec:
  """Makes the spec of an array whose axes may not divide: mesh axes that do not, or that an axis
  before has taken, are left out."""
  taken, spec = set(), []
  for size, axis in zip(shape, axes, strict=True):
    kept = ()
    for name in rules[axis]:
      if name not in taken and size % math.prod(mesh.shape[n] for n in (*kept, name)) == 0:
        kept += (name,)
    taken.update(kept)
    spec.append(_entry(kept))
  return PartitionSpec(*spec)


def mesh_of_several() -> Any:
  """Looks up the mesh in context; None where there is none of several devices."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: Any, axes: tuple[str | None, ...], rules: Rules = TRAIN) -> Any:
  """Holds an array where the rules put its axes."""
  mesh = mesh_of_several()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, fit(x.shape, axes, rules, mesh))


def rows(tree: Any, rules: Rules = TRAIN) -> Any:
  """Holds activations [B, ...] split by rows, and whole along all other axes."""
  return jax.tree.map(
      lambda x: constrain(x, ('batch', *(None,) * (x.ndim - 1)), rules), tree)


def _row_axes(n: int, rules: Rules, mesh: Any) -> tuple[str, ...]:
  return () if mesh is None else tuple(
      name for name in axis_names(fit((n,), ('batch',), rules, mesh)) if mesh.shape[name] > 1)


def row_parts(n: int, rules: Rules = TRAIN, mesh: Any = None) -> int:
  """Counts the parts into which a mesh, or that in context, splits n rows."""
  mesh = mesh or mesh_of_several()
  return math.prod(mesh.shape[name] for name in _row_axes(n, rules, mesh))


def on_own_rows(f: Callable[..., Any], *trees: Any, rules: Rules = TRAIN) -> Any:
  """Applies a function of rows [B, ...] on each device to its own: what the partitioner cannot
  split by rows (the CPU's top-k, say) it would compute of all of them everywhere."""
  names = _row_axes(jax.tree.leaves(trees)[0].shape[0], rules, mesh_of_several())
  if not names:
    return f(*trees)
  return jax.shard_map(f, in_specs=PartitionSpec(names), out_specs=PartitionSpec(names),
                       axis_names=set(names))(*trees)


def axis_names(spec: PartitionSpec) -> list[str]:
  """Lists the mesh axes of a spec."""
  return [name for part in spec if part for name in ((part,) if isinstance(part, str) else part)]


def whole_head(head: Any, dtype: Any) -> Any:
  """Gathers the matrix of a `types.Head` (or of several) along its width, in the dtype in which it
  multiplies: once a program, before any loop over chunks."""
  return lay_head(jax.tree.map(lambda x: x.astype(dtype), head), USED)


def lay_head(head: Any, rules: Rules = TRAIN) -> Any:
  """Holds the matrix of a `types.Head` (or of several, in a pytree), or its gradient, where the
  rules say; what else is in the tree is left to the partitioner."""
  def is_head(x):
    return hasattr(x, 'matrix')

  def lay(x):
    if not is_head(x) or x.matrix is None:
      return x
    return x.replace(matrix=constrain(x.matrix, x.axes, rules))

  return jax.tree.map(lay, head, is_leaf=is_head)


def token_logits(head: Any, hidden: Any) -> Any:
  """Computes the logits [B, V] of a decode step, split by rows and vocabulary."""
  return constrain(head.logits(hidden), ('batch', 'vocab'), DECODE)


def pad_vocabulary(x: Any, axes: tuple[str | None, ...]) -> Any:
  """Pads the vocabulary axis of a weight, if it has one, so that blocks lie on one device each."""
  mesh = mesh_of_several()
  if mesh is None or 'vocab' not in axes:
    return x
  devices = math.prod(mesh.shape[name] for name in DECODE['vocab'])
  extra = -x.shape[axes.index('vocab')] % (BLOCK * devices) if devices > 1 else 0
  return jnp.pad(x, [(0, extra if axis == 'vocab' else 0) for axis in axes])
