"""Processes that take a step when they are told to, so that several systems are timed in turn.

Only the standard library: the adapters in third_party/ import this in environments of their own.

A worker says what it is (one JSON object), then, for each line that it is sent, takes a step and
answers with the seconds it took; when there are no more lines, it says what memory it needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from typing import Any

STEP = 'step'  # the name of the whole beside those of its phases
THREADS = ('one', 'all')
# What libraries would read in place of the affinity.
_THREAD_COUNTS = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')


class Clock:
  """Adds up wall and CPU seconds by phase. CPU seconds are of all threads of the process."""

  def __init__(self):
    self.spent: dict[str, list[float]] = {}

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Adds what happens within to a phase."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
      yield
    finally:
      spent = self.spent.setdefault(name, [0.0, 0.0])
      spent[0] += time.perf_counter() - wall
      spent[1] += time.process_time() - cpu

  def timed(self, name: str, f: Callable[..., Any], wait: Callable[[Any], Any] = lambda x: x
            ) -> Callable[..., Any]:
    """Makes a function whose calls are a phase; `wait` blocks until its result is there."""
    def call(*args, **kwargs):
      with self.phase(name):
        return wait(f(*args, **kwargs))
    return call

  def take(self) -> dict[str, list[float]]:
    """Returns {phase: [wall, CPU] seconds} and begins again."""
    spent, self.spent = self.spent, {}
    return spent


def peak_bytes() -> int:
  """Reads the peak resident memory of this process, and not of the one that started it (which is
  in what getrusage says)."""
  text = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(r'VmHWM:\s+(\d+) kB', text)[1]) * 1024


class Turns:
  """The worker's side. What libraries print goes to stderr, so that nothing disturbs the answers.
  """

  def __init__(self):
    self._out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    self.clock = Clock()

  def say(self, **what: Any) -> None:
    """Sends one JSON object."""
    print(json.dumps(what), file=self._out, flush=True)

  def wait(self) -> bool:
    """Waits for the word; False if there are to be no more steps."""
    return bool(sys.stdin.readline())

  def serve(self, step: Callable[[], None], **about: Any) -> None:
    """Takes steps as long as they are asked for."""
    self.say(**about)
    while self.wait():
      with self.clock.phase(STEP):
        step()
      self.say(spent=self.clock.take())
    self.say(peak_bytes=peak_bytes())


class WorkerError(RuntimeError):
  """A worker ended without an answer; with what it said last."""


class Worker:
  """The other side: a worker in a process of its own, on one core or on all."""

  def __init__(self, command: list[Any], threads: str, log: pathlib.Path,
               env: dict[str, str] | None = None):
    """Starts it; `log` takes what it prints."""
    assert threads in THREADS, threads
    self._log = log
    env = {**os.environ, **(env or {})}
    cores = os.sched_getaffinity(0)
    if threads == 'one':
      env |= dict.fromkeys(_THREAD_COUNTS, '1')
      # Of this thread, and so of what it starts: every library sizes its pool by the cores that it
      # may run on when it is loaded.
      os.sched_setaffinity(0, {max(cores)})
    try:
      with log.open('w') as err:
        self._process = subprocess.Popen(
            [str(a) for a in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err,
            text=True, env=env)
    finally:
      os.sched_setaffinity(0, cores)
    try:
      self.about = self._read()
    except BaseException:
      self.stop()
      raise

  def _read(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      self._process.wait()
      said = self._log.read_text().strip().splitlines()
      raise WorkerError(said[-1] if said else f'exit status {self._process.returncode}')
    return json.loads(line)

  def step(self) -> dict[str, list[float]]:
    """Has it take a step; returns {phase: [wall, CPU] seconds}."""
    with contextlib.suppress(BrokenPipeError):  # it has ended: reading says so
      self._process.stdin.write('step\n')
      self._process.stdin.flush()
    return self._read()['spent']

  def finish(self) -> int:
    """Lets it end; returns its peak resident memory in bytes (of a GPU, of the device)."""
    self._process.stdin.close()
    peak = self._read()['peak_bytes']
    self._process.wait()
    return peak

  def stop(self) -> None:
    """Ends it, whatever it is doing."""
    if self._process.poll() is None:
      self._process.kill()
    for pipe in (self._process.stdin, self._process.stdout):
      with contextlib.suppress(BrokenPipeError):
        pipe.close()
    self._process.wait()


def with_rest(spent: dict[str, list[float]], name: str) -> dict[str, list[float]]:
  """Adds, under a name, what of the step is in none of its phases."""
  phases = [times for phase, times in spent.items() if phase != STEP]
  rest = [whole - sum(times[i] for times in phases) for i, whole in enumerate(spent[STEP])]
  return {**spent, name: rest}


def medians(steps: list[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
  """Takes the medians of some steps: {phase: {'wall_s', 'cpu_s'}}."""
  return {name: {unit: statistics.median(s[name][i] for s in steps)
                 for i, unit in enumerate(('wall_s', 'cpu_s'))} for name in steps[0]}
