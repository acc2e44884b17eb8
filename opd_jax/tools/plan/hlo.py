"""What a program does, counted in what XLA made of it for one device: products, the bytes that they
read and write, and collectives, in loops as often as the loops go round.

`cost_analysis` counts a loop's body once, and `as_text` of a compiled TPU program mostly fails;
what is read here is the module right after it was partitioned for the devices, which both the
TPU's and the CPU's compiler write out when asked (`options`). Later passes fuse and reorder; they
may turn an all-reduce whose result is sliced into a reduce-scatter, which moves half as much.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import math
import pathlib
import re
from typing import Any

import numpy as np

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute',
         'ragged-all-to-all')
PASS = 'spmd-partitioning'
BYTES = dict(pred=1, s4=1, u4=1, s8=1, u8=1, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4,
             s64=8, u64=8, f64=8, c64=8)
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation: its name, its shape as it is written, its operation, and the rest."""

  name: str
  shape: str
  op: str
  rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
  """An exchange of data.

  Attributes:
    kind: of KINDS.
    members: a group of devices that exchange, by their places in the mesh.
    result_bytes: a device's result.
    times: how often it is done.
  """

  kind: str
  members: tuple[int, ...]
  result_bytes: float
  times: float

  @property
  def sent_bytes(self) -> float:
    """What each device sends in all, by the ring algorithms."""
    n = len(self.members)
    share = {'all-reduce': 2 * (n - 1) / n, 'reduce-scatter': n - 1, 'collective-permute': 1.0}
    return self.times * self.result_bytes * share.get(self.kind, (n - 1) / n)


@dataclasses.dataclass
class Counts:
  """What one device does.

  Attributes:
    flops: of products, without those that were left out.
    product_bytes: their operands and results. What operations between them re-read is not counted:
      they are fused with them, or left out.
    collectives: all of them.
  """

  flops: float = 0.0
  product_bytes: float = 0.0
  collectives: list[Collective] = dataclasses.field(default_factory=list)


def options(folder: str) -> dict[str, Any]:
  """Makes the compiler's options that have it write out the partitioned module."""
  return {'xla_dump_to': folder, 'xla_dump_hlo_as_text': True, 'xla_dump_hlo_pass_re': PASS}


def partitioned(folder: str) -> str | None:
  """Reads the partitioned module from what was written; None where nothing had to be split."""
  files = sorted(pathlib.Path(folder).glob(f'*.after_*{PASS}.*.txt'),
                 key=lambda f: f.stat().st_size)
  return files[-1].read_text() if files else None


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Reads a module: (computations by name, the name of the entry)."""
  computations: dict[str, list[Instruction]] = {}
  current: list[Instruction] | None = None
  entry = ''
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif current is not None and (found := _INSTRUCTION.match(line)):
      current.append(Instruction(*found.groups()))
  return computations, entry


def count(text: str, mesh_shape: tuple[int, ...],
          without: frozenset[tuple[int, ...]] = frozenset()) -> Counts:
  """Counts what one device does in a module.

  Args:
    text: of the module.
    mesh_shape: of the mesh, for the groups of all devices.
    without: shapes of arrays whose products are left out.
  """
  computations, entry = parse(text)

  def visit(name: str, times: float, out: Counts) -> Counts:
    shapes = {i.name: i.shape for i in computations.get(name, ())}
    for i in computations.get(name, ()):
      kind = i.op.removesuffix('-start')
      if kind in KINDS:
        size = max(map(shape_bytes, shapes_in(i.shape)), default=0.0) if (
            i.op.endswith('-start')) else shape_bytes(i.shape)
        members = group(i.rest, kind, math.prod(mesh_shape))
        if len(members) > 1:
          out.collectives.append(Collective(kind, members, size, times))
      elif i.op == 'dot':
        a, b = (shapes[name] for name in _operands(i.rest)[:2])
        if not without.isdisjoint(tuple(dims(x)) for x in (a, b, i.shape)):
          continue
        inner = [dims(a)[int(d)] for d in _list(i.rest, 'lhs_contracting_dims')]
        out.flops += times * 2.0 * math.prod(dims(i.shape)) * math.prod(inner)
        out.product_bytes += times * sum(map(shape_bytes, (a, b, i.shape)))
      elif i.op == 'while':
        body = re.search(r'body=%?([\w.\-]+)', i.rest)[1]
        visit(body, times * trips(i, computations), out)
      elif i.op == 'conditional':  # of its branches, the one with the most to do
        most = max((visit(branch, times, Counts()) for branch in _called(i)),
                   key=lambda found: found.flops)
        out.flops += most.flops
        out.product_bytes += most.product_bytes
        out.collectives += most.collectives
      else:
        for called in _called(i):
          visit(called, times, out)
    return out

  return visit(entry, 1.0, Counts())


def trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
  """Tells how often a loop goes round: what XLA knows, or the number in its condition (of a loop
  that may end early, the most)."""
  if known := re.search(r'known_trip_count\D+(\d+)', loop.rest):
    return int(known[1])
  condition = re.search(r'condition=%?([\w.\-]+)', loop.rest)[1]
  numbers = [int(i.rest.partition(')')[0]) for i in computations[condition]
             if i.op == 'constant' and i.shape.startswith(('s32[]', 's64[]', 'u32[]'))]
  return max(numbers, default=1)


def _operands(rest: str) -> list[str]:
  """Their names, which some texts write with a % and their shape."""
  inside = rest.partition(')')[0]
  return re.findall(r'%([\w.\-]+)', inside) or inside.split(', ')


def _called(i: Instruction) -> Iterator[str]:
  if i.op in ('call', 'fusion', 'conditional', 'async-start', 'custom-call'):
    pattern = (r'(?:calls|to_apply|branch_computations|called_computations|true_computation|'
               r'false_computation)=\{?((?:%?[\w.\-]+(?:, )?)+)')
    for names in re.findall(pattern, i.rest):
      yield from re.findall(r'%?([\w.\-]+)', names)


def _list(text: str, name: str) -> list[str]:
  found = re.search(rf'{name}=\{{([\d,]*)\}}', text)
  return [x for x in found[1].split(',') if x] if found else []


def shapes_in(text: str) -> list[str]:
  """Lists the arrays of a shape, which may be a tuple."""
  return re.findall(r'[a-z]+\d*\w*\[[\d,]*\]', text)


def dims(shape: str) -> list[int]:
  """Reads the dimensions of an array's shape."""
  return [int(d) for d in re.search(r'\[([\d,]*)\]', shape)[1].split(',') if d]


def shape_bytes(shape: str) -> float:
  """Counts the bytes of an array, or of all in a tuple."""
  return float(sum(BYTES.get(one.partition('[')[0], 1) * math.prod(dims(one))
                   for one in shapes_in(shape)))


def group(text: str, kind: str, size: int) -> tuple[int, ...]:
  """Reads the first group of devices of a collective, in any of the ways in which they are written.

  Raises:
    ValueError: in another way.
  """
  if kind == 'collective-permute':
    pairs = re.search(r'source_target_pairs=\{(.*?\})\}', text)[1]
    pairs = [tuple(map(int, p.split(','))) for p in re.findall(r'\{(\d+,\d+)\}', pairs)]
    return next((p for p in pairs if p[0] != p[1]), (0,))
  text = text.partition('replica_groups=')[2]
  if listed := re.match(r'\{(?:\{([\d,]*)\})?', text):
    if listed[1] is None:
      return tuple(range(size))
    return tuple(int(x) for x in listed[1].split(','))
  if iota := re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
    shape, over, order = (None if g is None else [int(x) for x in g.split(',')]
                          for g in iota.groups())
    ids = np.arange(math.prod(over)).reshape(over)
    ids = ids if order is None else ids.transpose(order)
    return tuple(ids.reshape(shape)[0].tolist())
  if mesh := re.match(r"mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
    sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    if order := re.search(r'device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?', mesh[2]):
      over = [int(x) for x in order[1].split(',')]
      flat = np.arange(math.prod(over)).reshape(over)
      flat = flat.transpose([int(x) for x in order[2].split(',')]) if order[2] else flat
      ids = flat.reshape(ids.shape)
    return _along(ids, sizes, mesh[3])
  raise ValueError(f'groups of devices that cannot be read: {text[:200]}')


def _along(ids: np.ndarray, sizes: dict[str, int], text: str) -> tuple[int, ...]:
  """The devices of the first group along some axes, or parts of them: 'a':(m)s is that of size s
  within m of a."""
  for name, whole, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text):
    if whole:
      at = list(sizes).index(name)
      outer, inner = int(whole), int(part)
      rest = sizes[name] // (outer * inner)
      ids = ids.reshape(*ids.shape[:at], outer, inner, rest, *ids.shape[at + 1:])
      sizes = {k: v for n, s in sizes.items() for k, v in (
          ((n, s),) if n != name else ((f'{n}.', outer), (n, inner), (f'.{n}', rest)))}
  wanted = {n for n, _, _ in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text)}
  return tuple(ids[tuple(slice(None) if n in wanted else 0 for n in sizes)].reshape(-1).tolist())
