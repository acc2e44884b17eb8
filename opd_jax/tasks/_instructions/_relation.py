"""How many there may be of something."""

from __future__ import annotations

from typing import Literal

Relation = Literal['less than', 'at least']


def holds(count: int, relation: Relation, bound: int) -> bool:
  """Tells whether `count` is less than `bound`, or at least `bound`."""
  return count < bound if relation == 'less than' else count >= bound
