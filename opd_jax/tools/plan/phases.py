"""What each program of a run would take of a device, and how long: compiled, counted, and held
against what the device can do."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import math
import re
import tempfile
from typing import Any

import jax
import numpy as np

from opd_jax.data.streams import OWN
from opd_jax.doctor import lowered, memory
from opd_jax.doctor.memory import Memory
from opd_jax.models import layout
from opd_jax.parallel import sharding
from opd_jax.programs import Programs, compile_programs
from opd_jax.settings import Run
from opd_jax.tools.plan import ahead, hardware, hlo, products, shapes
from opd_jax.tools.plan.hardware import Topology

SURE = 0.95  # of a chip's memory: a program that takes less has room for its code


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What the collectives of a program send over one kind of link.

  Attributes:
    axes: of the mesh, along which they are.
    link: 'ICI', 'NVLink' or 'IB'.
    count: of collectives.
    sent_bytes: by each device.
    seconds: at the link's full rate, with its latency.
  """

  axes: str
  link: str
  count: float
  sent_bytes: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Phase:
  """A program of a run on a topology.

  Attributes:
    name: see `lowered.calls`.
    times: how often it runs in a step, on average.
    memory: of a device; None where the compiler refused.
    refused: what it said then.
    cache_bytes: of keys and values a device, which are among the temporaries.
    flops: of the products that the program asks for, on all devices.
    device_flops: of those that one device does.
    hbm_bytes: that a device reads and writes at least: operands and results of products and
      collectives, arguments and results of the program.
    traffic: of its collectives.
    seconds: of 'compute', 'memory' and 'network', if nothing else held it up.
    tokens: that it writes, scores or learns from.
  """

  name: str
  times: float
  memory: Memory | None
  refused: str = ''
  cache_bytes: float = 0.0
  flops: float = 0.0
  device_flops: float = 0.0
  hbm_bytes: float = 0.0
  traffic: tuple[Traffic, ...] = ()
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  tokens: int = 0

  @property
  def roofline_s(self) -> float:
    """How long it takes if its parts overlap without a gap."""
    return max(self.seconds.values(), default=0.0)

  @property
  def limit(self) -> str:
    """What it waits for."""
    return max(self.seconds, key=self.seconds.get, default='')

  def fits(self, topology: Topology) -> bool:
    """Tells whether a device has room for it."""
    return self.memory is not None and self.memory.total <= topology.chip.hbm_bytes


def open_programs(run: Run, topology: Topology, devices: list[Any]) -> Programs:
  """Makes the programs of a run for a topology.

  Raises:
    ConfigError: see `shapes.open_parts`.
  """
  # Slots are planned as passes of so many rows, all of which fill their room (`_of_slots`).
  run = dataclasses.replace(run, sample=dataclasses.replace(run.sample, slots=0))
  if topology.platform == 'gpu':  # compiled for CPUs, which have neither
    compute = run.compute
    run = dataclasses.replace(run, compute=dataclasses.replace(
        compute, attention='blocks' if compute.attention == 'cudnn' else compute.attention,
        remat='layer' if compute.remat == 'offload' else compute.remat))
  return compile_programs(run, shapes.open_parts(run, devices))


def measure(run: Run, programs: Programs, topology: Topology, only: tuple[str, ...] = ()
            ) -> list[Phase]:
  """Compiles the programs of a step (evaluations are not planned) and counts what they do.

  Args:
    run: its settings.
    programs: of `open_programs`.
    topology: what they are for.
    only: the names of some of them; () for all.
  """
  there, out, seen = lowered.resident(programs), [], {}
  for name, call, passes in _calls(run, programs, there):
    if only and name not in only:
      continue
    # Models of one form share a program, of which the arguments may yet be laid out differently.
    key = id(call.program), str(jax.tree.map(lambda x: (x.shape, x.dtype), call.args))
    if key not in seen:
      seen[key] = _compile(run, call, there, topology, name)
    phase = dataclasses.replace(seen[key], name=name, times=passes * _times(run, programs, name))
    out.append(phase)
  return out


def _calls(run: Run, programs: Programs, there: lowered.Resident
           ) -> Iterator[tuple[str, lowered.Call, float]]:
  """Lists the programs of a step, and in how many passes each does its rows."""
  for name, call in lowered.calls(run, programs, there).items():
    if run.sample.slots and name.endswith('sample') and not name.startswith('evaluate'):
      yield name, *_of_slots(call, run.sample.slots)
    elif not name.startswith('evaluate'):
      yield name, call, 1.0


def open_call(run: Run, topology: Topology, name: str) -> lowered.Call:
  """Makes one of the programs of a step, where nothing has been made yet."""
  programs = open_programs(run, topology, hardware.devices(topology))
  return next(call for found, call, _ in _calls(run, programs, lowered.resident(programs))
              if found == name)


def _of_slots(call: lowered.Call, slots: int) -> tuple[lowered.Call, float]:
  """The sampler of as many rows as there are slots, and how often it takes to write all rows."""
  rows = len(call.args[1].tokens)
  if slots >= rows:
    return call, 1.0
  prompts = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      (slots, *x.shape[1:]), x.dtype, sharding=x.sharding), call.args[1])
  args = call.args[0], prompts, *call.args[2:]
  return dataclasses.replace(call, args=args), rows / slots


def _times(run: Run, programs: Programs, name: str) -> float:
  """How often a program runs in a step, on average."""
  stream = next((s for s in programs.parts.streams if name.startswith(f'{s.name} ')), None)
  stream = stream or programs.parts.streams[0]
  share = stream.steps[1] - stream.steps[0]
  updates = run.optimizer.updates_per_batch
  # What is written once, before the first step, is a part of each; of how many examples is known
  # without reading them only where they are limited.
  written = name.removeprefix(f'{stream.name} ') in ('sample', 'lay out')
  if stream.fixed and written and run.data.limit:
    return math.ceil(run.data.limit / stream.prompts) / run.steps
  if name.endswith('update'):
    return share * updates
  recomputed = stream.objective.advantages == 'recomputed' and stream.name == OWN
  return share * (updates if name.endswith('score student') and recomputed else 1)


def _compile(run: Run, call: lowered.Call, there: lowered.Resident, topology: Topology,
             name: str) -> Phase:
  traced, mesh, chip = call.trace(), call.mesh, topology.chip
  # Laying weights out for decoding has no rows.
  rows = next((x.shape[0] for x in jax.tree.leaves((call.args, call.keywords)) if x.ndim == 2
               and x.dtype == np.int32), 0)
  stats, refused = None, ''
  with tempfile.TemporaryDirectory() as folder:
    try:
      if topology.platform == 'gpu':
        stats = call.compile(hlo.options(folder) | lowered.look_options()).memory_analysis()
      else:  # near the limit, the compiler has the last word
        stats = ahead.allocate(open_call, (run, topology, name), folder, lambda found: (
            memory.memory_from(call, found, there).total < SURE * chip.hbm_bytes))
    except jax.errors.JaxRuntimeError as e:  # after it was partitioned
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      refused = _said(str(e))
    text = hlo.partitioned(folder) or call.text()
  asked = products.count(traced.jaxpr, max(run.data.max_new_tokens - 1, 1))
  # Of experts what is asked for counts: XLA's CPU multiplies each row by the matrices of all.
  counts = hlo.count(text, mesh.devices.shape, asked.experts)
  once = [lowered.bytes_each(x) for x in jax.tree.leaves((call.args, call.keywords))]
  out = stats.output_size_in_bytes if stats else 0.0
  hbm = sum(once) + out + counts.product_bytes + asked.other_bytes / mesh.size + 2 * sum(
      c.times * c.result_bytes for c in counts.collectives)
  # No device does less than its share: in decoding, XLA may make a sum of a product, which is not
  # counted as one.
  device_flops = max(counts.flops + asked.other_flops / mesh.size, asked.flops / mesh.size)
  traffic = _traffic(counts, mesh, topology)
  rate = chip.flops_per_s if run.compute.dtype == 'bfloat16' else chip.wide_flops_per_s
  return Phase(
      name, 1.0, memory.memory_from(call, stats, there) if stats else None, refused,
      _cache(run, call, rows) if name.endswith('sample') else 0.0, asked.flops, device_flops, hbm,
      traffic, {'compute': device_flops / rate, 'memory': hbm / chip.hbm_bytes_per_s,
                'network': sum(t.seconds for t in traffic)}, rows * _length(run, name))


def _length(run: Run, name: str) -> int:
  own = run.data.max_new_tokens
  return own if name.endswith('sample') else own + run.data.max_prompt_tokens


def _said(text: str) -> str:
  """What a TPU's compiler says of a program that does not fit, in its shortest form."""
  found = re.search(r'Used ([\d.]+\w) of ([\d.]+\w) hbm. Exceeded hbm capacity by ([\d.]+\w)', text)
  if found:
    return f'needs {found[1]} of {found[2]}, {found[3]} too much'
  if found := re.search(r'\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)', text):
    return f'needs {found[1]} of {found[2]}' + (
        f', {float(found[1][:-1]) - float(found[2][:-1]):.2f}G too much'
        if found[1][-1] == found[2][-1] == 'G' else '')
  return ' '.join(text.split())[:300]


def _cache(run: Run, call: lowered.Call, rows: int) -> float:
  """Bytes of keys and values of a sampler a device: split by rows and by key/value heads."""
  length = run.data.max_prompt_tokens + run.data.max_new_tokens
  model = call.program.__wrapped__.keywords['model']
  kept = jax.eval_shape(lambda: model.init_cache(rows, length))
  axes = {4: ('batch', 'kv_heads', None, None), 2: ('batch', None)}
  return sum(float(np.prod(sharding.fitting(
      x.shape, axes.get(x.ndim, (None,) * x.ndim), call.mesh, layout.DECODE).shard_shape(x.shape)))
      * x.dtype.itemsize for x in jax.tree.leaves(kept))


def _traffic(counts: hlo.Counts, mesh: jax.sharding.Mesh, topology: Topology
             ) -> tuple[Traffic, ...]:
  devices, total = list(mesh.devices.flat), {}
  for c in counts.collectives:
    places = np.array(np.unravel_index(c.members, mesh.devices.shape))
    axes = '+'.join(axis for axis, at in zip(mesh.axis_names, places, strict=True)
                    if len(set(at.tolist())) > 1)
    link, rate = topology.link(c.members, devices)
    seconds = c.sent_bytes / rate + c.times * hardware.LATENCY_S[topology.platform]
    old = total.get((axes, link), Traffic(axes, link, 0.0, 0.0, 0.0))
    total[axes, link] = Traffic(axes, link, old.count + c.times, old.sent_bytes + c.sent_bytes,
                                old.seconds + seconds)
  return tuple(sorted(total.values(), key=lambda t: -t.seconds))
