"""Command lines of `opd` as several processes that are one run, or are not.

As a script it is a process that has imported everything and makes children of itself: starting
Python and JAX for every process would take longer than most of what they do.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import tiny

from opd_jax.parallel import watch


def free_port() -> int:
  """A port on which nobody listens now."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def flags(count: int, port: int | None = None) -> list[list[str]]:
  """Those of each of so many processes."""
  port = port or free_port()
  return [[f'--coordinator=127.0.0.1:{port}', f'--processes={count}', f'--process={i}']
          for i in range(count)]


class Process:
  """A command that has been started."""

  def __init__(self, launcher: Launcher, number: int):
    self._launcher, self._number = launcher, number

  @property
  def pid(self) -> int:
    """Its process id."""
    return self._launcher.answer(self._number, 'pid')

  def kill(self, number: int = signal.SIGKILL) -> None:
    """Sends a signal."""
    os.kill(self.pid, number)

  def finish(self, until: str = '') -> subprocess.CompletedProcess[str]:
    """Waits for the end; and until stderr has a text, which may come from the process beside it
    (parallel/watch.py) when it has died."""
    status = self._launcher.answer(self._number, 'status')
    out, err = (self._launcher.folder / f'{self._number}.{name}' for name in ('out', 'err'))
    tiny.wait_until(lambda: until in err.read_text())
    if status in (-signal.SIGABRT, -signal.SIGSEGV):  # the process beside it says why, but later
      time.sleep(2 * watch.GRACE_S + watch.KILL_S)
    return subprocess.CompletedProcess([], status, out.read_text(), err.read_text())


class Launcher:
  """Starts commands; a context that ends those which are left."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self._answers, self._count, self._rest = folder, {}, 0, b''
    self._process = subprocess.Popen(
        [sys.executable, __file__], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=tiny.environment())

  def start(self, *args: Any, devices: int = 2, hold: tuple[str, pathlib.Path] | None = None,
            cwd: pathlib.Path | None = None, **extra: str) -> Process:
    """Starts one process with so many devices; `hold` is for `tiny.hold_at`."""
    number, self._count = self._count, self._count + 1
    request = {'number': number, 'args': list(map(str, args)),
               'hold': hold and [hold[0], str(hold[1])], 'cwd': str(cwd or self.folder),
               'env': {'XLA_FLAGS': tiny.environment(devices)['XLA_FLAGS'], **extra}}
    self._process.stdin.write(json.dumps(request).encode() + b'\n')
    self._process.stdin.flush()
    return Process(self, number)

  def together(self, count: int, *args: Any, **how: Any) -> list[Process]:
    """Starts the same command as `count` processes that are one run."""
    return [self.start(*args, *own, **how) for own in flags(count)]

  def run(self, count: int, *args: Any, **how: Any) -> list[subprocess.CompletedProcess[str]]:
    """Runs a command as `count` processes to its end."""
    return [p.finish() for p in self.together(count, *args, **how)]

  def answer(self, number: int, what: str) -> int:
    """Waits for the id or the status of a process."""
    end = time.monotonic() + tiny.PATIENCE_S
    while (number, what) not in self._answers:
      ready, _, _ = select.select([self._process.stdout], [], [], end - time.monotonic())
      assert ready, f'{what} of {number}: waited in vain'
      data = os.read(self._process.stdout.fileno(), 2**16)  # without a buffer, beside `select`
      assert data, 'the launcher has ended'
      *lines, self._rest = (self._rest + data).split(b'\n')
      for n, name, value in map(json.loads, lines):
        self._answers[n, name] = value
    return self._answers[number, what]

  def __enter__(self) -> Launcher:
    return self

  def __exit__(self, *exc: Any) -> None:
    for number in range(self._count):
      if (number, 'pid') in self._answers and (number, 'status') not in self._answers:
        os.kill(self._answers[number, 'pid'], signal.SIGKILL)
    self._process.stdin.close()
    self._process.wait(timeout=tiny.PATIENCE_S)


def _child(request: dict[str, Any]) -> None:
  for fd, name in ((1, 'out'), (2, 'err')):
    os.dup2(os.open(f'{request["number"]}.{name}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
  os.close(0)
  os.open(os.devnull, os.O_RDONLY)
  os.environ.update(request['env'])
  for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
  os.chdir(request['cwd'])
  if request['hold']:
    where, marker = request['hold']
    tiny.hold_at(where, pathlib.Path(marker))
  from opd_jax import __main__
  sys.argv = ['opd', *request['args']]
  try:
    __main__.entry()
  except BaseException:
    sys.excepthook(*sys.exc_info())
    os._exit(1)


def _main() -> None:
  from absl import app, flags  # noqa: F401
  from ml_collections import config_flags  # noqa: F401

  import opd_jax.__main__
  from opd_jax.data import prompts
  import opd_jax.tools.compare_estimators
  import opd_jax.tools.evaluate_model
  import opd_jax.tools.export
  import opd_jax.tools.pipeline  # noqa: F401
  prompts.character_tokenizer()  # imports what loads one
  gc.freeze()  # memory that is shared with the children stays so
  running, open_ = {}, True
  while open_ or running:
    ready, _, _ = select.select([0] if open_ else [], [], [], 0.05)
    line = sys.stdin.buffer.raw.readline() if ready else None
    open_ = open_ and line != b''
    if line:
      request = json.loads(line)
      if not (pid := os.fork()):
        _child(request)
      running[pid] = request['number']
      print(json.dumps([request['number'], 'pid', pid]), flush=True)
    while running and (done := os.waitpid(-1, os.WNOHANG))[0]:
      print(json.dumps([running.pop(done[0]), 'status', os.waitstatus_to_exitcode(done[1])]),
            flush=True)


if __name__ == '__main__':
  _main()
