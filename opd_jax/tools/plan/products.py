"""The products of a program, counted in its jaxpr: those that the method asks for, on all devices
together, before XLA partitions or repeats any."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend import core


def count(jaxpr: Any, loop_trips: int) -> float:
  """Counts floating-point operations of matrix products, two for each multiplication.

  Args:
    jaxpr: of `trace(...).jaxpr`.
    loop_trips: of loops whose length is no part of the program: decoding, which may end early.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  total = 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == 'dot_general':
      (inner, _), _ = eqn.params['dimension_numbers']
      sizes = [eqn.invars[0].aval.shape[d] for d in inner]
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(sizes)
    elif name.startswith('ragged_dot'):
      total += _ragged(eqn)
    elif name == 'scan':
      total += eqn.params['length'] * count(eqn.params['jaxpr'], loop_trips)
    elif name == 'while':
      total += loop_trips * count(eqn.params['body_jaxpr'], loop_trips)
    elif name == 'cond':
      total += max(count(branch, loop_trips) for branch in eqn.params['branches'])
    elif name == 'shard_map':  # its shapes are those of one device
      total += eqn.params['mesh'].size * count(eqn.params['jaxpr'], loop_trips)
    else:
      total += sum(count(inner, loop_trips) for value in eqn.params.values()
                   for inner in jax.tree.leaves(value, is_leaf=_is_jaxpr) if _is_jaxpr(inner))
  return total


def _is_jaxpr(x: Any) -> bool:
  return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def _ragged(eqn: Any) -> float:
  """Each row with the matrix of its group: 2 rows x inputs x outputs."""
  numbers = eqn.params['ragged_dot_dimension_numbers']
  (_, inner), (_, batch) = numbers.dot_dimension_numbers
  left, right = (v.aval.shape for v in eqn.invars[:2])
  groups = tuple(numbers.rhs_group_dimensions)
  outputs = [n for d, n in enumerate(right) if d not in (*inner, *batch, *groups)]
  return 2.0 * math.prod(left) * math.prod(outputs)
