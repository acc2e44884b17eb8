"""Collectives in the text of a partitioned program, with the trip counts of their loops."""

from __future__ import annotations

import math
import re

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8,
         'u64': 8, 'f64': 8}
_INSTRUCTION = re.compile(r' = (\(?.*?\)?) ([\w\-]+)\(')
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
  """The name of the entry computation, and the lines of each."""
  entry, name, out = '', '', {}
  for line in text.splitlines():
    start = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
    if start:
      name = start[2]
      entry, out[name] = name if start[1] else entry, []
    elif name and line.startswith('  '):
      out[name].append(line)
  return entry, out


def _called(line: str) -> list[str]:
  found = re.findall(r'(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)', line)
  for group in re.findall(r'branch_computations=\{([^}]*)\}', line):
    found += [name.strip(' %') for name in group.split(',')]
  return found


def _trips(line: str, computations: dict[str, list[str]]) -> int:
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
  if known:
    return int(known[1])
  # A loop that may end earlier: the bound that its condition compares with.
  names = [re.search(r'condition=%?([\w.\-]+)', line)[1]]
  lines = [text for name in names for text in computations[name]]
  lines += [text for line in lines for name in _called(line) for text in computations[name]]
  bounds = [int(n) for text in lines for n in re.findall(r's32\[\](?:\{[^}]*\})? constant\((\d+)\)',
                                                         text)]
  assert bounds, f'no bound in {lines}'
  return max(bounds)


def of_program(text: str) -> list[tuple[str, int, tuple[tuple[int, ...], ...], int]]:
  """Lists the collectives of `compiled.as_text()`: (kind, bytes of the results on a device in all,
  shapes of the results, how often it runs)."""
  entry, computations = _computations(text)
  found = []

  def visit(name, times):
    for line in computations[name]:
      match = _INSTRUCTION.search(line)
      if not match:
        continue
      result, op = match.groups()
      if op == 'while':
        body = re.search(r'body=%?([\w.\-]+)', line)[1]
        visit(body, times * _trips(line, computations))
        continue
      assert not op.endswith('-start'), 'of an asynchronous pair the results are not told apart'
      if op in COLLECTIVES:
        shapes = [(kind, tuple(map(int, filter(None, dims.split(',')))))
                  for kind, dims in _SHAPE.findall(result)]
        size = sum(BYTES[kind] * math.prod(shape) for kind, shape in shapes)
        found.append((op, times * size, tuple(shape for _, shape in shapes), times))
      elif op in ('fusion', 'call', 'conditional', 'async-start', 'custom-call'):
        for inner in _called(line):
          visit(inner, times)

  visit(entry, 1)
  return found
