"""`opd plan`: from a config and a topology to tables, a JSON file, and a yes or no."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import sys
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from rich.console import Console
from rich.table import Table

from opd_jax.errors import ConfigError
from opd_jax.files import disk
from opd_jax.programs import Programs
from opd_jax.run import metrics
from opd_jax.run.ledger import Ledger
from opd_jax.settings import Run
from opd_jax.tools.plan import hardware, nearest, phases, shapes
from opd_jax.tools.plan.hardware import GIB, Topology
from opd_jax.tools.plan.nearest import Try
from opd_jax.tools.plan.phases import Phase

FROZEN = ('base', 'teacher', 'reference', 'heads')
NOTES = (
    'Every answer takes all of its room. Evaluations, checkpoints, compiling and the host are not '
    'in it. Times are those of a roofline: products at their peak, every byte at full bandwidth, '
    'all three overlapped; a real step takes longer.',
    'FLOPs: of the products in the jaxpr, loops as often as they go round, all chips. GB: operands '
    'and results of products and collectives, arguments and results, a chip, counted in the '
    'module that XLA partitioned; what elementwise operations re-read is not in it. Collectives: '
    'sent by a chip, by the ring algorithms, in the same module, over the links at their peak.')
OF_GPUS = ('GPUs by arithmetic: the programs are partitioned and compiled by XLA for as many CPU '
           'devices. Weights, optimizer and cache are exact; temporaries are those of the CPU, '
           'which widens bfloat16 and multiplies every token by every expert: more than a GPU '
           'takes. jax takes three quarters of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says '
           'more.')


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run takes on a topology.

  Attributes:
    run: its settings.
    topology: where.
    mesh: sizes of its axes.
    phases: its programs.
    model_flops: of a step, as the method needs them (`run/ledger.py`), every answer at full length.
    tries: settings that were tried where it does not fit.
    price: of a chip an hour, in USD; 0 where none was said.
  """

  run: Run
  topology: Topology
  mesh: dict[str, int]
  phases: list[Phase]
  model_flops: Ledger
  tries: list[Try]
  price: float

  @property
  def fits(self) -> bool:
    """Whether every program has room."""
    return all(p.fits(self.topology) for p in self.phases)

  @property
  def step_s(self) -> float:
    """The time of a step on average."""
    return sum(p.times * p.roofline_s for p in self.phases)

  def summary(self) -> dict[str, Any]:
    """Sums it up in numbers."""
    chip, chips, run = self.topology.chip, self.topology.chips, self.run
    rate = chip.flops_per_s if run.compute.dtype == 'bfloat16' else chip.wide_flops_per_s
    hours = self.step_s * run.steps * chips / 3600
    rows = run.data.prompts_per_step * run.data.samples_per_prompt
    return {
        'topology': self.topology.name, 'chips': chips, 'mesh': self.mesh, 'fits': self.fits,
        'step_s': self.step_s, 'answer_tokens_per_s': rows * run.data.max_new_tokens / self.step_s,
        'model_flops_per_step': self.model_flops.total,
        'model_flops_by_part': self.model_flops.parts(),
        'model_flops_utilization': self.model_flops.total / (self.step_s * chips * rate),
        'steps': run.steps, 'chip_hours': hours,
        'cost_usd': hours * self.price if self.price else None}

  def to_json(self) -> dict[str, Any]:
    """Turns all of it into JSON content."""
    of_phase = [{**dataclasses.asdict(p), 'fits': p.fits(self.topology), 'limit': p.limit,
                 'roofline_s': p.roofline_s,
                 'total_bytes': p.memory.total if p.memory else None} for p in self.phases]
    return {**self.summary(), 'hbm_bytes': self.topology.chip.hbm_bytes,
            'chip': dataclasses.asdict(self.topology.chip) | {'host_bytes_per_s': None if (
                self.topology.platform == 'tpu') else self.topology.chip.host_bytes_per_s},
            'phases': of_phase, 'tried': [dataclasses.asdict(t) for t in self.tries],
            'notes': self.notes()}

  def notes(self) -> list[str]:
    """Says what the numbers are."""
    return [*NOTES, *([OF_GPUS] if self.topology.platform == 'gpu' else [])]


def make(run: Run, topology: Topology, price: float = 0.0, tries: int = nearest.TRIES) -> Plan:
  """Plans a run; where it does not fit, looks for settings that do.

  Raises:
    ConfigError: what the run's start would refuse: a mesh or sizes that do not fit.
  """
  devices = hardware.devices(topology)
  programs = phases.open_programs(run, topology, devices)
  found = phases.measure(run, programs, topology)
  failed = [p for p in found if not p.fits(topology)]
  tried = nearest.search(run, topology, devices, failed, tries) if failed and tries else []
  return Plan(run, topology, dict(programs.parts.mesh.shape), found, model_flops(run, programs),
              tried, price)


def model_flops(run: Run, programs: Programs) -> Ledger:
  """Counts what the method needs in a step, as the book of the run will (`run/ledger.py`), every
  prompt and every answer at its full length."""
  parts, total = programs.parts, Ledger()
  for stream in parts.streams:
    lengths = np.full(stream.rows, run.data.max_prompt_tokens + run.data.max_new_tokens)
    spent = parts.counter(run.optimizer.updates_per_batch).stream(stream, lengths)
    total += spent * (stream.steps[1] - stream.steps[0])
  return total


def command(c: ConfigDict, topology: str, models: str, price: float, file: str | None) -> bool:
  """Runs `opd plan`: prints tables, and writes `file`.

  Args:
    c: of a run.
    topology: such as 'v5p:4x4x4'.
    models: a folder of config.json files; '' where the hub is asked.
    price: of a chip an hour, in USD; 0 for none.
    file: for all numbers as JSON; None for none.

  Returns:
    Whether the run fits.

  Raises:
    ConfigError: see `make`, `hardware.parse` and `shapes.find`; or a price or a file that cannot
      be.
  """
  where = hardware.parse(topology)
  if not 0 <= price < math.inf:
    raise ConfigError(f'--price={price}; allowed: USD of a chip an hour, at least 0')
  if models and not pathlib.Path(models).is_dir():
    raise ConfigError(f'--models={models!r} is not here; allowed: a directory that holds '
                      'ORGANIZATION/NAME/config.json or NAME/config.json')
  if file is not None and (pathlib.Path(file).is_dir() or not os.access(
      pathlib.Path(file).absolute().parent, os.W_OK)):
    raise ConfigError(f'--json={file!r} cannot be written; allowed: a file in a directory that is '
                      'here')
  run = shapes.parse(c, models)
  # No accelerator of this machine is needed, and what is compiled here is never run.
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)
  if where.platform == 'gpu':
    with contextlib.suppress(RuntimeError):  # where devices are counted already
      jax.config.update('jax_num_cpu_devices', where.chips)
  plan = make(run, where, price)
  if file is not None:
    disk.write_json(pathlib.Path(file), plan.to_json())
  # A file is read at leisure: there, tables need not be as narrow as a terminal.
  show(plan, metrics.make_console(None if sys.stdout.isatty() else 160))
  return plan.fits


def show(plan: Plan, console: Console) -> None:
  """Prints a plan."""
  console.print(memory_table(plan))
  console.print(time_table(plan))
  s = plan.summary()
  text = (f'{plan.run.name} on {s["topology"]}: a step takes {_number(s["step_s"])} s at least, '
          f'{_number(s["answer_tokens_per_s"])} answer tokens/s, model FLOPs utilization '
          f'{s["model_flops_utilization"]:.1%}; {s["steps"]} steps {_number(s["chip_hours"])} '
          'chip-hours')
  console.print(text + (f', {s["cost_usd"]:,.2f} USD' if plan.price else '')
                + ('' if plan.fits else ', but it does not fit'))
  for tried in plan.tries:
    console.print('tried: ' + tried.describe(), soft_wrap=True)
  if plan.tries and not plan.tries[-1].fits:
    console.print(f'none of the {len(plan.tries)} settings that were compiled fits')
  for note in plan.notes():
    console.print(note, style='dim')


def memory_table(plan: Plan) -> Table:
  """Makes the table of what a chip holds while each program runs."""
  limit = plan.topology.chip.hbm_bytes
  sizes = ', '.join(f'{axis}={n}' for axis, n in plan.mesh.items())
  out = Table('phase', 'weights', 'optimizer', 'frozen', 'rows', 'cache', 'temporaries', 'results',
              'total', f'of {limit / GIB:.1f}', title=f'GiB a chip ({plan.topology.name}: {sizes})')
  for p in plan.phases:
    if p.memory is None:
      out.add_row(p.name, *[''] * 8, p.refused, style='bold red')
      continue
    m = p.memory
    frozen = sum(m.resident.get(name, 0.0) for name in FROZEN)
    cells = (m.resident.get('weights', 0.0), m.resident.get('optimizer', 0.0), frozen, m.rows,
             p.cache_bytes, max(m.temporaries - p.cache_bytes, 0.0), m.results, m.total)
    over = m.total - limit
    out.add_row(p.name, *(f'{x / GIB:.2f}' for x in cells),
                'fits' if over <= 0 else f'{over / GIB:.2f} too much',
                style=None if over <= 0 else 'bold red')
  return out


def time_table(plan: Plan) -> Table:
  """Makes the table of what each program does, and how long it takes."""
  out = Table('phase', 'a step', 'TFLOP', 'GB a chip', 'collectives, GB sent by a chip', 's',
              'limit', 'tokens/s')
  for p in plan.phases:
    sent = '; '.join(f'{t.axes} {t.link} {_number(t.sent_bytes / 1e9)} in {t.count:,.0f}'
                     for t in p.traffic if t.sent_bytes)
    out.add_row(p.name, f'{p.times:g}', _number(p.flops / 1e12), _number(p.hbm_bytes / 1e9),
                sent or 'none', _number(p.roofline_s), p.limit,
                _number(p.tokens / p.roofline_s) if p.tokens and p.roofline_s else '')
  return out


def _number(x: float) -> str:
  return f'{x:,.0f}' if x >= 1000 else f'{x:.3g}'
