"""Thousands of damaged inputs, each handed to the command that reads it.

    python tests/fuzz.py --seconds 120 --seed 0
    python tests/fuzz.py --kinds data templates --seconds 300 --seed 7
    python tests/fuzz.py --seed 7 --case data:41            # one again, with all it writes

Three things may come of an input: it works; it is refused, by one line that names a field or a file
and the exit status 2 (or `opd doctor` says which check failed); anything else is a failure, of
which the process ends with 1: a traceback, several lines, another status, a process that dies,
needs more memory than it should, or does not come to an end.

Case n of a kind is a function of (seed, kind, n), and the kind that has had the least time is next:
how far each one comes is all that depends on the clock. Cases run in a process of their own, one
after the other, by the entry point of the console command (`__main__.main`); one that ends the
process costs the next one a new process. What the cases are is in fuzz_inputs.py.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any
import warnings

import conftest  # noqa: F401, the environment comes first
import fuzz_inputs

CPU_S, WALL_S = 30, 120  # of a case: what takes longer hangs
SILENCE_S = 300  # of the process of the cases
EXTRA_BYTES = 8 * 2**30  # more than a tiny model needs
LONGEST = 3000  # characters of a line that is still a message
WORKS, REFUSED, FAILURE = 'works', 'refused', 'failure'


class HangError(BaseException):
  """A case has had its time; nothing that a command catches."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of a case.

  Attributes:
    kind, number: which case.
    verdict: one of WORKS, REFUSED, FAILURE.
    what: what was done to the input, and the command.
    said: the line, or what is wrong.
    seconds: that it took.
  """

  kind: str
  number: int
  verdict: str
  what: str
  said: str
  seconds: float


# --- one case ---


@contextlib.contextmanager
def captured() -> Iterator[list[bytes]]:
  """Takes what is written to the descriptors 1 and 2, by whatever language; the list is filled at
  the end."""
  out: list[bytes] = []
  streams = sys.stdout, sys.stderr
  for stream in streams:
    stream.flush()
  kept, files = [os.dup(1), os.dup(2)], [tempfile.TemporaryFile() for _ in range(2)]
  try:
    for descriptor, file in zip((1, 2), files, strict=True):
      os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = (open(fd, 'w', closefd=False) for fd in (1, 2))
    yield out
  finally:
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    sys.stdout, sys.stderr = streams
    for descriptor, (before, file) in enumerate(zip(kept, files, strict=True), 1):
      os.dup2(before, descriptor)
      os.close(before)
      file.seek(0)
      out.append(file.read())
      file.close()


@contextlib.contextmanager
def limited() -> Iterator[None]:
  """Raises HangError, where the code stands, when the time is up."""
  def stop(number, frame):
    raise HangError(f'it has not come to an end after {CPU_S} seconds of computing or {WALL_S}')

  timers = ((signal.SIGPROF, signal.ITIMER_PROF, CPU_S), (signal.SIGALRM, signal.ITIMER_REAL,
                                                          WALL_S))
  before = [(number, signal.signal(number, stop)) for number, _, _ in timers]
  for _, timer, seconds in timers:
    signal.setitimer(timer, seconds)
  try:
    yield
  finally:
    for _, timer, _ in timers:
      signal.setitimer(timer, 0)
    for number, handler in before:
      signal.signal(number, handler)


def command(args: list[str]) -> tuple[int | None, str, str]:
  """Runs `opd ARGS` in this process; (exit status, None for none; stdout; stderr)."""
  from absl import app
  from absl.testing import flagsaver

  from opd_jax import __main__ as console
  os.environ['MALLOC_ARENA_MAX'] = '1'  # or it would start this process anew
  # What absl does around it, logging, can be done only once in a process.
  run, app.run = app.run, lambda f, flags_parser: f(flags_parser(sys.argv))
  flags, argv, sys.argv = flagsaver.save_flag_values(), sys.argv, ['opd', *args]
  form = warnings.formatwarning
  status = None
  with captured() as written:
    try:
      with limited():
        console.main()
    except SystemExit as e:
      status = e.code
    except BaseException:
      traceback.print_exc()
    finally:
      app.run, sys.argv, warnings.formatwarning = run, argv, form
      flagsaver.restore_flag_values(flags)
  out, err = (text.decode(errors='backslashreplace') for text in written)
  return status, out, err


def judge(args: list[str], names: tuple[str, ...], status: int | None, out: str, err: str
          ) -> tuple[str, str]:
  """Judges what a command came to: (verdict, the line or what is wrong)."""
  lines = [line for line in err.splitlines() if not line.startswith('WARNING: ')]
  if 'Traceback' in err or 'panicked at' in err or status not in (0, 1, 2):
    return FAILURE, f'status {status}: {err[-6000:]}'
  if status == 0:
    return (WORKS, '') if not lines else (FAILURE, f'it works, and says {err[-2000:]}')
  if status == 1:
    failed = [line for line in out.splitlines() if re.search(r'│ FAIL ', line)]
    return (REFUSED, failed[0]) if args[:1] == ['doctor'] and failed else (
        FAILURE, f'status 1: {out[-2000:]}{err[-2000:]}')
  if len(lines) != 1 or not lines[0].startswith('error: '):
    return FAILURE, f'{len(lines)} lines: {err[-3000:]}'
  line = lines[0]
  if len(line) > LONGEST:
    return FAILURE, f'a line of {len(line)} characters: {line[:1000]}'
  if not re.search(r'[\w.\]]+=|--\w|/|\w\.\w|\bfields?\b|\bcolumn', line) and not any(
      name in line for name in names):
    return FAILURE, f'it names neither field nor file: {line}'
  if 'allowed' not in line and '/' not in line:
    return FAILURE, f'it does not say what is allowed: {line}'
  return REFUSED, line


def run(kind: str, seed: int, number: int, folder: pathlib.Path | None = None) -> Outcome:
  """Makes a case, in a folder that is removed unless it is given, and runs it."""
  where = folder or pathlib.Path(tempfile.mkdtemp(prefix='opd_jax_fuzz_'))
  here = os.getcwd()
  os.chdir(where)
  try:
    case = fuzz_inputs.make(kind, seed, number, where)
    start = time.monotonic()
    status, out, err = command(case.args)
    verdict, said = judge(case.args, case.names, status, out, err)
    return Outcome(kind, number, verdict, f'{case.what} | opd {" ".join(case.args)}', said,
                   time.monotonic() - start)
  finally:
    os.chdir(here)
    if folder is None:
      shutil.rmtree(where, ignore_errors=True)


# --- many ---


def work(seed: int) -> None:
  """Runs the cases that stdin names, 'KIND NUMBER' in a line, and writes their outcomes."""
  answers = os.fdopen(os.dup(1), 'w')
  used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, resource.RLIM_INFINITY))
  for line in sys.stdin:
    kind, number = line.split()
    print(json.dumps(dataclasses.asdict(run(kind, seed, int(number)))), file=answers, flush=True)


class Worker:
  """A process in which cases run, and another one after one that died."""

  def __init__(self, seed: int):
    self._seed, self._process = seed, None

  def run(self, kind: str, number: int) -> Outcome:
    """Runs a case."""
    if self._process is None or self._process.poll() is not None:
      self._process = subprocess.Popen(
          [sys.executable, __file__, '--work', '--seed', str(self._seed)], stdin=subprocess.PIPE,
          stdout=subprocess.PIPE, text=True)
    process, start = self._process, time.monotonic()
    process.stdin.write(f'{kind} {number}\n')
    process.stdin.flush()
    heard = select.select([process.stdout], [], [], SILENCE_S)[0]
    if heard and (line := process.stdout.readline()):
      return Outcome(**json.loads(line))
    process.kill()
    return Outcome(kind, number, FAILURE, '', f'the process died or hung ({process.wait()})',
                   time.monotonic() - start)

  def close(self) -> None:
    """Ends the process."""
    if self._process is not None:
      self._process.stdin.close()
      self._process.wait(timeout=SILENCE_S)


def run_for(seconds: float, seed: int, kinds: list[str]) -> dict[str, list[Outcome]]:
  """Runs cases of the kinds until the clock stops it."""
  begin, worker = time.monotonic(), Worker(seed)
  done: dict[str, list[Outcome]] = {kind: [] for kind in kinds}
  spent: collections.Counter[str] = collections.Counter()
  while time.monotonic() - begin < seconds:
    kind = min(kinds, key=lambda k: spent[k])
    outcome = worker.run(kind, len(done[kind]))
    spent[kind] += outcome.seconds
    done[kind].append(outcome)
    if outcome.verdict == FAILURE:
      print(f'FAILURE {kind}:{outcome.number} {outcome.what}\n  {outcome.said}\n  again: python '
            f'tests/fuzz.py --seed {seed} --case {kind}:{outcome.number}\n', flush=True)
  worker.close()
  return done


def table(done: dict[str, list[Outcome]]) -> str:
  """Writes how many of each kind came to what."""
  lines = [f'{"kind":12} {"tried":>6} {"worked":>7} {"refused":>8} {"failures":>9} {"slowest":>8}']
  total: collections.Counter[str] = collections.Counter()
  for kind, outcomes in done.items():
    counts = collections.Counter(o.verdict for o in outcomes)
    total += counts
    slowest = max((o.seconds for o in outcomes), default=0)
    lines.append(f'{kind:12} {len(outcomes):6} {counts[WORKS]:7} {counts[REFUSED]:8} '
                 f'{counts[FAILURE]:9} {slowest:7.1f}s')
  lines.append(f'{"all":12} {total.total():6} {total[WORKS]:7} {total[REFUSED]:8} '
               f'{total[FAILURE]:9}')
  return '\n'.join(lines)


def main() -> None:
  """Runs what the command line asks for."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--seconds', type=float, default=120)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--kinds', nargs='+', choices=list(fuzz_inputs.KINDS),
                      default=list(fuzz_inputs.KINDS))
  parser.add_argument('--case', help='KIND:NUMBER, one case; its folder is kept')
  parser.add_argument('--work', action='store_true', help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.work:
    work(given.seed)
  elif given.case:
    kind, number = given.case.split(':')
    folder = pathlib.Path(tempfile.mkdtemp(prefix='opd_jax_fuzz_'))
    outcome: Any = run(kind, given.seed, int(number), folder)
    print(f'{outcome.verdict} after {outcome.seconds:.1f} s\n{outcome.what}\n{outcome.said}\n'
          f'in {folder}')
    sys.exit(outcome.verdict == FAILURE)
  else:
    done = run_for(given.seconds, given.seed, given.kinds)
    print(table(done))
    sys.exit(any(o.verdict == FAILURE for outcomes in done.values() for o in outcomes))


if __name__ == '__main__':
  main()
