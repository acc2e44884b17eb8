"""Tells whether two mathematical answers are equal, by `math-verify` in processes of its own.

They are started when first needed and kept, because to import sympy takes longer than most answers.
One that hangs is ended (`_math_worker.py`), or killed should it not end: its question is answered
with no, and the next one starts another.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pathlib
import queue
import select
import subprocess
import sys

CPU_SECONDS = 3  # of a worker, for one answer; ordinary ones take 0.05
WALL_SECONDS = 60  # for a worker that is stopped, or on a machine that swaps
LONGEST = 500  # characters; what is longer is no answer of a data set
WORKERS = max(1, min(8, os.cpu_count() or 1))


class Worker:
  """A process that judges one answer at a time."""

  def __init__(self):
    """Starts it.

    Raises:
      RuntimeError: it does not start, with what it said.
    """
    # By -P the folder of the file is not where modules are looked for. In a session of its own it
    # does not hear the Ctrl-C that is meant for the run.
    self._process = subprocess.Popen(
        [sys.executable, '-P', str(pathlib.Path(__file__).with_name('_math_worker.py')),
         str(CPU_SECONDS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding='utf-8', start_new_session=True)
    if self._process.stdout.readline() != 'ready\n':
      said = self._process.communicate()[1].strip().splitlines()
      raise RuntimeError('the process that grades mathematics (math-verify) did not start: '
                         f'{said[-1] if said else "it said nothing"}')

  def ask(self, wanted: str, found: str) -> bool | None:
    """Asks whether `found` is what was `wanted`; None if it does not answer, and is no more."""
    try:
      self._process.stdin.write(json.dumps([wanted, found]) + '\n')
      self._process.stdin.flush()
      ready, _, _ = select.select([self._process.stdout], [], [], WALL_SECONDS)
      answer = self._process.stdout.readline() if ready else ''
    except BrokenPipeError:
      answer = ''
    if not answer:
      self.kill()
    return answer == '1\n' if answer else None

  def kill(self) -> None:
    """Ends it."""
    self._process.kill()
    self._process.wait()
    for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
      try:
        pipe.close()
      except BrokenPipeError:  # of a question that it never read
        pass


_idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
for _ in range(WORKERS):
  _idle.put(None)  # a worker that is not started yet


@functools.lru_cache(maxsize=100_000)
def equal(wanted: str, found: str) -> bool:
  """Tells whether `found` means what is `wanted`; False where that cannot be decided in time.

  Threads may call it together: as many as `WORKERS` are served at a time.

  Raises:
    RuntimeError: no process can be started.
  """
  if max(len(wanted), len(found)) > LONGEST:
    return False
  worker = _idle.get()
  try:
    worker = worker or Worker()
    verdict = worker.ask(wanted, found)
    if verdict is None:
      worker = None
  except BaseException:  # Ctrl-C between question and answer: the next answer would be this one's
    if worker is not None:
      worker.kill()
    worker = None
    raise
  finally:
    _idle.put(worker)
  return bool(verdict)


@atexit.register
def close() -> None:
  """Ends all idle processes; another question starts others."""
  workers = [_idle.get_nowait() for _ in range(_idle.qsize())]
  for worker in workers:
    if worker is not None:
      worker.kill()
    _idle.put(None)
