"""The products of a program, counted in its jaxpr: those that the method asks for, on all devices
together, before XLA partitions or repeats any."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Products:
  """What the products of a program are, all devices together.

  Attributes:
    flops: floating-point operations, two for each multiplication.
    other_flops: of those, what is no plain product to a compiler: of experts, a row with the matrix
      of its group (XLA's CPU multiplies each row by every matrix); and in Pallas kernels.
    other_bytes: operands and results of these.
    experts: shapes of the matrices of all groups of a device, by which these products are known.
  """

  flops: float = 0.0
  other_flops: float = 0.0
  other_bytes: float = 0.0
  experts: frozenset[tuple[int, ...]] = frozenset()

  def __add__(self, other: Products) -> Products:
    return Products(self.flops + other.flops, self.other_flops + other.other_flops,
                    self.other_bytes + other.other_bytes, self.experts | other.experts)

  def times(self, n: float) -> Products:
    """Multiplies all of it."""
    return Products(n * self.flops, n * self.other_flops, n * self.other_bytes, self.experts)


def count(jaxpr: Any, loop_trips: int) -> Products:
  """Counts matrix products.

  Args:
    jaxpr: of `trace(...).jaxpr`.
    loop_trips: of loops whose length is no part of the program: decoding, which may end early.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  total = Products()
  for eqn in jaxpr.eqns:
    name, values = eqn.primitive.name, eqn.params
    if name == 'dot_general':
      (inner, _), _ = values['dimension_numbers']
      sizes = [eqn.invars[0].aval.shape[d] for d in inner]
      total += Products(2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(sizes))
    elif name.startswith('ragged_dot'):
      total += _ragged(eqn)
    elif name == 'pallas_call':
      total += _kernel(eqn, loop_trips)
    elif name == 'scan':
      total += count(values['jaxpr'], loop_trips).times(values['length'])
    elif name == 'while':
      total += count(values['body_jaxpr'], loop_trips).times(
          _bound(values['cond_jaxpr'], loop_trips))
    elif name == 'cond':
      total += max((count(branch, loop_trips) for branch in values['branches']),
                   key=lambda found: found.flops)
    elif name == 'shard_map':  # its shapes are those of one device
      total += count(values['jaxpr'], loop_trips).times(values['mesh'].size)
    else:
      for inner in jax.tree.leaves(list(values.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(inner):
          total += count(inner, loop_trips)
  return total


def _bound(condition: Any, otherwise: int) -> int:
  """The number below which the condition of a loop wants something, which counts from 0."""
  numbers = [int(eqn.invars[1].val) for eqn in condition.jaxpr.eqns
             if eqn.primitive.name == 'lt' and isinstance(eqn.invars[1], core.Literal)
             and jax.numpy.issubdtype(eqn.invars[1].aval.dtype, jax.numpy.integer)]
  return max(numbers, default=otherwise)


def _is_jaxpr(x: Any) -> bool:
  return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def _kernel(eqn: Any, loop_trips: int) -> Products:
  """A kernel: what a step of its grid does, as often as there are steps. Of splash attention, where
  a block of queries (or of keys) meets `most` blocks of the others, the one at i meets i + 1 at
  most, and what is left of its steps does nothing."""
  grid, name = eqn.params['grid_mapping'].grid, eqn.params['name'] or ''
  steps = math.prod(grid)
  if name.startswith('splash'):
    *outer, blocks, heads, most = grid if '_dkv_' in name else (*grid[:-3], grid[-2], grid[-3],
                                                                grid[-1])
    steps = math.prod(outer) * heads * sum(min(i + 1, most) for i in range(blocks))
  flops = count(eqn.params['jaxpr'], loop_trips).times(steps).flops
  arrays = [v.aval for v in (*eqn.invars, *eqn.outvars)]
  return Products(flops, flops, float(sum(a.size * a.dtype.itemsize for a in arrays)))


def _ragged(eqn: Any) -> Products:
  numbers = eqn.params['ragged_dot_dimension_numbers']
  (_, inner), (_, batch) = numbers.dot_dimension_numbers
  left, right = (v.aval.shape for v in eqn.invars[:2])
  groups = tuple(numbers.rhs_group_dimensions)
  outputs = [n for d, n in enumerate(right) if d not in (*inner, *batch, *groups)]
  flops = 2.0 * math.prod(left) * math.prod(outputs)
  arrays = [v.aval for v in (*eqn.invars[:2], *eqn.outvars)]
  grouped = right if groups else eqn.outvars[0].aval.shape  # the gradient of the matrices is one
  return Products(flops, flops, float(sum(a.size * a.dtype.itemsize for a in arrays)),
                  frozenset([tuple(grouped)]))
