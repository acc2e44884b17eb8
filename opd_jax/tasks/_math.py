"""Tells whether two mathematical answers are equal, by `math-verify` in processes of its own.

They are started when first needed and kept, because to import sympy takes longer than most answers.
One that hangs ends itself (`_judges/serve.py`), or is killed should it not end: its question is
answered with no, and the next one starts another.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
import functools
import json
import os
import pathlib
import queue
import select
import subprocess
import sys
from typing import Any

JUDGES = pathlib.Path(__file__).with_name('_judges')
CPU_SECONDS = 3  # of a worker, for one answer; ordinary ones take 0.05
WALL_SECONDS = 60  # for a worker that is stopped, or on a machine that swaps
LONGEST = 500  # characters; what is longer is no answer of a data set
WORKERS = max(1, min(8, os.cpu_count() or 1))


class Worker:
  """A process that judges one answer at a time."""

  def __init__(self, judge: pathlib.Path = JUDGES / 'mathematics.py',
               judges: str = 'mathematics (math-verify)'):
    """Starts it.

    Args:
      judge: the file that `_judges/serve.py` asks.
      judges: what, in errors.

    Raises:
      RuntimeError: it does not start, with what it said.
    """
    # By -P the folder of the file is not where modules are looked for. In a session of its own it
    # does not hear the Ctrl-C that is meant for the run.
    self._process = subprocess.Popen(
        [sys.executable, '-P', str(JUDGES / 'serve.py'), str(CPU_SECONDS), str(judge)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8',
        start_new_session=True)
    if self._process.stdout.readline() != 'ready\n':
      said = self._process.communicate()[1].strip().splitlines()
      raise RuntimeError(f'the process that grades {judges} did not start: '
                         f'{said[-1] if said else "it said nothing"}')

  def ask(self, *question: str) -> Any:
    """Asks for a verdict on one answer; None if it does not answer, and is no more."""
    try:
      self._process.stdin.write(json.dumps(question) + '\n')
      self._process.stdin.flush()
      ready, _, _ = select.select([self._process.stdout], [], [], WALL_SECONDS)
      answer = self._process.stdout.readline() if ready else ''
    except BrokenPipeError:
      answer = ''
    if not answer:
      self.kill()
    return json.loads(answer) if answer else None

  def kill(self) -> None:
    """Ends it."""
    self._process.kill()
    self._process.wait()
    for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
      try:
        pipe.close()
      except BrokenPipeError:  # of a question that it never read
        pass


class Pool:
  """Some processes of one kind."""

  def __init__(self, start: Callable[[], Worker]):
    """Starts none yet; `start` does."""
    self._start = start
    self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
    for _ in range(WORKERS):
      self._idle.put(None)  # a worker that is not started yet
    atexit.register(self.close)

  def ask(self, *question: str) -> Any:
    """Asks one of them; None where it does not answer in time.

    Threads may call it together: as many as `WORKERS` are served at a time.

    Raises:
      RuntimeError: no process can be started.
    """
    worker = self._idle.get()
    try:
      worker = worker or self._start()
      verdict = worker.ask(*question)
      if verdict is None:
        worker = None
    except BaseException:  # Ctrl-C between question and answer: the next answer would be this one's
      if worker is not None:
        worker.kill()
      worker = None
      raise
    finally:
      self._idle.put(worker)
    return verdict

  def close(self) -> None:
    """Ends all idle processes; another question starts others."""
    workers = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
    for worker in workers:
      if worker is not None:
        worker.kill()
      self._idle.put(None)


_pool = Pool(lambda: Worker())
close = _pool.close


@functools.lru_cache(maxsize=100_000)
def equal(wanted: str, found: str) -> bool:
  """Tells whether `found` means what is `wanted`; False where that cannot be decided in time.

  Raises:
    RuntimeError: no process can be started.
  """
  if max(len(wanted), len(found)) > LONGEST:
    return False
  return bool(_pool.ask(wanted, found))
