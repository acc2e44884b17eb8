"""Where a run does not fit: the nearest settings that do, tried by compiling."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import Any

from opd_jax.errors import ConfigError
from opd_jax.settings import Run
from opd_jax.tools.plan import phases
from opd_jax.tools.plan.hardware import GIB, Topology
from opd_jax.tools.plan.phases import Phase

TRIES = 6


@dataclasses.dataclass(frozen=True)
class Try:
  """Settings that were tried.

  Attributes:
    settings: the fields that differ from the run's, with their values.
    fits: whether all that did not fit before does now.
    worst_bytes: of the largest program a device; None where the compiler refused.
    refused: what it said then.
  """

  settings: dict[str, Any]
  fits: bool
  worst_bytes: float | None
  refused: str = ''

  def describe(self) -> str:
    """Writes it as flags, with what came of it."""
    flags = ' '.join(f'--config.{name}={value}' for name, value in self.settings.items())
    if self.refused:
      return f'{flags}: does not fit, {self.refused}'
    return (f'{flags}: {"fits" if self.fits else "does not fit"}, '
            f'{self.worst_bytes / GIB:.1f} GiB a chip')


def candidates(run: Run, chips: int) -> Iterator[dict[str, Any]]:
  """Lists changes, the smallest first: one thing, then several, then the mesh."""
  mesh = run.compute.mesh
  shards = chips // (mesh.tensor * mesh.expert)  # that rows are split into
  rows = run.data.prompts_per_step * run.data.samples_per_prompt // shards
  rows = min(run.compute.microbatch_rows or rows, rows)
  smaller = [rows // k for k in (2, 4, 8, 16, 32, 64, 128, 256, 512) if rows % k == 0]
  remat = {} if run.compute.remat in ('layer', 'offload') else {'compute.remat': 'layer'}
  less = [{'compute.microbatch_rows': n} for n in smaller]
  both = [remat | change for change in less]
  wide = {} if run.compute.dtype == 'bfloat16' else {'compute.dtype': 'bfloat16'}
  yield remat
  yield from less[:1]
  yield from reversed(both)  # the least rows first: whether it fits at all
  least = both[-1] if both else remat
  yield least | wide
  for tensor in (2, 4, 8):
    if tensor > mesh.tensor and chips % (tensor * mesh.data * mesh.expert) == 0:
      yield least | wide | {'compute.mesh.tensor': tensor, 'compute.mesh.fsdp': -1}


def change(run: Run, settings: dict[str, Any]) -> Run:
  """Makes a run with other values of some fields of `compute`."""
  plain = {n.removeprefix('compute.'): v for n, v in settings.items() if '.mesh.' not in n}
  axes = {n.removeprefix('compute.mesh.'): v for n, v in settings.items() if '.mesh.' in n}
  mesh = dataclasses.replace(run.compute.mesh, **axes)
  return dataclasses.replace(run, compute=dataclasses.replace(run.compute, mesh=mesh, **plain))


def search(run: Run, topology: Topology, devices: list[Any], failed: list[Phase],
           tries: int = TRIES) -> list[Try]:
  """Compiles what does not fit under other settings, until it does or `tries` are spent.

  Args:
    run: that does not fit.
    topology: where.
    devices: of it.
    failed: the programs that do not fit.
    tries: how many settings are compiled at most; those that the run's start would refuse cost
      nothing.

  Returns:
    What was tried; the last of them fits, if any does.
  """
  out: list[Try] = []
  done: list[dict[str, Any]] = [{}]
  for settings in candidates(run, topology.chips):
    if settings in done:
      continue
    done.append(settings)
    changed = change(run, settings)
    try:
      programs = phases.open_programs(changed, topology, devices)
    except ConfigError:
      continue
    found = phases.measure(changed, programs, topology, tuple(p.name for p in failed))
    refused = next((p.refused for p in found if p.memory is None), '')
    worst = max((p.memory.total for p in found if p.memory is not None), default=None)
    out.append(Try(settings, all(p.fits(topology) for p in found), worst, refused))
    if out[-1].fits or len(out) == tries:
      break
  return out
