"""Filters of rows: 'COLUMN OPERATOR LITERAL'."""

from __future__ import annotations

import ast
from collections.abc import Callable
import operator
import re
from typing import Any

from opd_jax.tasks import _tables

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    '==': operator.eq, '!=': operator.ne, '<': operator.lt, '<=': operator.le, '>': operator.gt,
    '>=': operator.ge, 'in': lambda value, allowed: value in allowed}


def parse(name: str, text: str) -> tuple[str, str, Any]:
  """Turns 'level >= 3' into ('level', '>=', 3).

  Raises:
    ValueError: it is no filter; `name` is of the field that has it.
  """
  match = re.fullmatch(r'\s*(\S+?)\s*(==|!=|<=|>=|<|>|\sin\s)\s*(.+?)\s*', text)
  try:
    literal = ast.literal_eval(match[3]) if match else None
  except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
    match = None
  if match is None or match[2].strip() == 'in' and not isinstance(literal, list | tuple | set):
    raise ValueError(
        f'task.options.{name} has {text!r}; allowed: COLUMN OPERATOR LITERAL with an operator of '
        f"{list(OPERATORS)} and a Python literal, a list for 'in': \"level >= 3\", "
        "\"source == 'math'\", \"level in [4, 5]\"")
  return match[1], match[2].strip(), literal


def _kind(value):
  if isinstance(value, bool):
    return 'bool'
  return 'number' if isinstance(value, int | float) else type(value).__name__


def _cell(text):
  """What a cell of a CSV stands for, which has no types."""
  if text in ('', 'True', 'False', 'true', 'false'):
    return text[0] in 'Tt' if text else None
  number = re.fullmatch(r'[+-]?\d+(\.\d*)?([eE][+-]?\d+)?', text)
  return text if number is None else float(text) if number[1] or number[2] else int(text)


def apply(table: _tables.Table, part: _tables.Part) -> _tables.Table:
  """Keeps the rows for which all filters of a part are right.

  Raises:
    ValueError: a column that is not there, or a comparison with another type.
  """
  for text in part.filters:
    column, symbol, literal = parse(f'{part.prefix}filters', text)
    where = f'task.options.{part.prefix}filters has {text!r}'
    if not table.has(column):
      raise ValueError(f'{where}; allowed: a column of {part.source!r}, {table.names}')
    values = table.column(column, where)
    wanted = {_kind(x) for x in (literal if symbol == 'in' else [literal])}
    if table.only_texts and wanted != {'str'}:
      values = [_cell(v) for v in values]
    held = {_kind(v) for v in values}
    ordered = symbol in ('<', '<=', '>', '>=')
    # A text is never equal to a number: such a filter keeps all rows, or none, without a word.
    if not wanted <= held | {'NoneType'} or ordered and (held != wanted or 'bool' in held):
      odd = next((i for i, v in enumerate(values) if _kind(v) not in wanted), 0)
      raise ValueError(f'{where}, and the column has values of type {sorted(held)} '
                       f'({table.where(odd)} has {_tables.shown(values[odd])}); allowed: a '
                       'comparison with the same')
    table = table.select([i for i, v in enumerate(values) if OPERATORS[symbol](v, literal)])
  return table
