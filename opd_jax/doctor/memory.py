"""How much memory a run takes on a device, which is asked of the compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
import dataclasses
import os
from typing import Any

import jax

from opd_jax.doctor import lowered
from opd_jax.doctor.finding import FAIL, OK, WARN, Finding
from opd_jax.parallel import hosts
from opd_jax.programs import Programs
from opd_jax.settings import Run

GIB = 2**30
MOST_AT_ONCE = 4  # programs that are compiled: each takes memory of the host
LOWERS = ('compute.microbatch_rows, compute.chunk_tokens, compute.remat, compute.frozen_dtype, '
          'compute.mesh or student.lora')


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of a device while a program runs.

  Attributes:
    resident: what stays there before and after it, by what it is for.
    rows: the other arguments: prompts, rollouts, scores.
    temporaries: what XLA allocates for it, with the code. Caches are in here.
    results: what it returns, but for what takes the place of an argument.
  """

  resident: dict[str, float]
  rows: float
  temporaries: float
  results: float

  @property
  def total(self) -> float:
    """All of it."""
    return sum(self.resident.values()) + self.rows + self.temporaries + self.results


def resident_bytes(there: lowered.Resident, mesh: jax.sharding.Mesh) -> dict[str, float]:
  """Counts the bytes a device of what stays on the devices of a mesh, each array once: a teacher on
  devices of its own has nothing of the student there, nor the student of it."""
  seen, out, devices = set(), {}, set(mesh.devices.flat)
  for name, tree in there.groups().items():
    leaves = {id(x): lowered.bytes_each(x) for x in jax.tree.leaves(tree)
              if x.sharding is None or x.sharding.device_set == devices}
    out[name] = sum(size for key, size in leaves.items() if key not in seen)
    seen |= leaves.keys()
  return {name: size for name, size in out.items() if size}


def memory_of(call: lowered.Call, compiled: Any, there: lowered.Resident) -> Memory:
  """Says what a device holds while a compiled program runs."""
  return memory_from(call, compiled.memory_analysis(), there)


def memory_from(call: lowered.Call, stats: Any, there: lowered.Resident) -> Memory:
  """Says what a device holds while a program runs, of which `memory_analysis` says `stats`."""
  stays = {id(x) for x in jax.tree.leaves(there.groups())}
  rows = {id(x): lowered.bytes_each(x) for x in jax.tree.leaves((call.args, call.keywords))}
  return Memory(
      resident=resident_bytes(there, call.mesh),
      rows=sum(size for key, size in rows.items() if key not in stays),
      temporaries=float(stats.temp_size_in_bytes + stats.generated_code_size_in_bytes),
      results=float(stats.output_size_in_bytes - stats.alias_size_in_bytes))


def check_memory(run: Run, programs: Programs, say: Callable[[str], None], look: bool = False
                 ) -> Finding:
  """Compiles the programs of a run and compares what the largest takes with what a device has.

  To `look` only, samplers that take no more than another are left out (`lowered.for_a_look`), and
  what is compiled for a CPU is not what runs later.
  """
  there, limit, worst = lowered.resident(programs), device_bytes(), None
  quick = look and jax.default_backend() == 'cpu'
  options = lowered.look_options() if quick else None
  calls = lowered.calls(run, programs, there)
  if look:
    calls = lowered.for_a_look(calls, short=quick)
  for name, compiled in compile_all(calls, options, say):
    try:
      found = memory_of(calls[name], compiled(), there)
    except jax.errors.JaxRuntimeError as e:  # compilers that know the device refuse by themselves
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      return _refused(f'{name}: the compiler says {" ".join(str(e).split())[:400]}')
    if worst is None or found.total > worst[1].total:
      worst = name, found
  name, found = worst
  parts = {**found.resident, 'rows': found.rows, 'temporaries': found.temporaries,
           'results': found.results}
  detail = ' + '.join(f'{part} {size / GIB:.2f}' for part, size in parts.items())
  detail = f'{name}: {detail} = {found.total / GIB:.2f} GiB a device ({run.compute.dtype})'
  if limit is None:
    return Finding('memory', WARN, detail + '; the device does not say how much it has')
  detail += f' of {limit / GIB:.1f}'
  if found.total > limit:
    return _refused(detail)
  return Finding('memory', OK if found.total < 0.9 * limit else WARN, detail,
                 'compute.microbatch_rows')


def compile_all(calls: dict[str, lowered.Call], options: dict[str, Any] | None,
                say: Callable[[str], None]) -> Iterator[tuple[str, Callable[[], Any]]]:
  """Compiles programs, several at a time: XLA is busy on one core for most of the time that it
  takes for one. They are traced one after another, in this thread, whose settings of jax others do
  not see. Several processes that are one run may wait for each other while they compile, and a GPU
  is measured by its compiler: there, one at a time.

  Args:
    calls: the programs, by name.
    options: of the compiler.
    say: takes a line about what is being done.

  Yields:
    (name, waits for the compiled program or raises what the compiler did).
  """
  alone = hosts.count() == 1 and jax.default_backend() == 'cpu'
  workers = min(os.cpu_count() or 1, MOST_AT_ONCE) if alone else 1
  with futures.ThreadPoolExecutor(workers) as pool:
    try:
      compiled = {name: pool.submit(call.begin(options)) for name, call in calls.items()}
      for name, future in compiled.items():
        say(f'compiling: {name}')
        yield name, future.result
    finally:
      pool.shutdown(cancel_futures=True)


def _refused(detail: str) -> Finding:
  return Finding('memory', FAIL, f'{detail}; allowed: less, by {LOWERS}', 'compute.microbatch_rows')


def device_bytes() -> float | None:
  """Reads the memory of one device; on CPUs, the machine's, shared by all fake devices."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() if device.platform != 'cpu' else None
  if stats and 'bytes_limit' in stats:
    return float(stats['bytes_limit'])
  if device.platform == 'cpu':
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / jax.local_device_count()
  return None
