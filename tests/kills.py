"""Kills at random points of six kinds of run: what is left must go on to the same bits.

    python tests/kills.py --kills 20 --seed 0 [--only plain,mesh] [--folder DIR]

Each kind of `KINDS` first runs twice undisturbed: for its bits, and for how long it lives. Then it
is killed at times drawn uniformly over that life (config, models, checks, loop, checkpoints,
evaluations, export, report; before those are imports, which touch nothing), and the same command is
started again each time, until it ends; then in a new directory, until there were so many kills.
Three in four are SIGKILL, the others SIGTERM, SIGHUP and SIGINT in turn, which must end without a
traceback.
Of every run that ends, all files but TensorBoard's must be those of the undisturbed one, bit for
bit: export, adapter, result.json, metrics.jsonl (but for `perf`), the last checkpoint, the report.

Prints a table, in Markdown, and exits with 1 if anything was not so. docs/running.md records one.
About half an hour on two idle cores. Linux only.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterator
import json
import os
import pathlib
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

GENTLE = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# What a process that a signal ended may say: Python's own end before the loop, and the run's.
ENDS = {signal.SIGKILL: (-9,), signal.SIGTERM: (-15, 143), signal.SIGHUP: (-1, 143),
        signal.SIGINT: (130, -2, 143)}
# Where a process is: the innermost function of these on its stack.
PHASES = {('train.py', 'take_step'): 'step', ('checkpoint.py', 'restore_latest'): 'restore',
          ('checkpoint.py', 'save'): 'checkpoint', ('checkpoint.py', 'wait'): 'checkpoint',
          ('checkpoint.py', 'close'): 'checkpoint', ('book.py', 'evaluation'): 'evaluation',
          ('train.py', 'evaluate_teacher'): 'evaluation', ('train.py', 'finish'): 'export',
          ('report.py', 'write'): 'report', ('examine.py', 'examine'): 'checks',
          ('examine.py', 'examine_rollouts'): 'checks', ('book.py', 'flush'): 'metrics',
          ('train.py', 'train'): 'models', ('__main__.py', 'run_command'): 'config'}
START, SHOWN = 'start', ('start', 'config', 'models', 'restore', 'checks', 'step', 'metrics',
                           'evaluation', 'checkpoint', 'export', 'report', 'exit')
# Of one process, or written again at each start: the rest of a work directory is the run's.
OTHERS = ('tensorboard', 'checkpoints', '.lock', 'doctor.json', 'times.json')


def kinds(folder: pathlib.Path) -> dict[str, tuple[Any, int]]:
  """Makes the config of each kind of run, and says on how many devices it runs."""
  import tiny

  from opd_jax import experiment
  tiny.folder = lambda: folder  # where its models are, so that a second start has them
  often = dict(steps=24, eval__every_steps=8, checkpoint__every_steps=2, checkpoint__keep_latest=3)
  plain = tiny.with_models('opd_sampled', **often)
  plain = tiny.override(plain, data__limit=40)
  adapters = tiny.with_models('opd_exact', **often, student__lora__rank=4)
  mixed = tiny.with_models(
      'opd_exact', **often, data__on_policy_fraction=0.5, data__off_policy_source='teacher',
      given__source='teacher', given__prompts_per_step=8, given__distill_coef=0.5)
  moving = tiny.with_models(
      'opd_sampled', **often, optimizer__updates_per_batch=3, optimizer__schedule='cosine',
      optimizer__warmup_steps=10, objective__anneal='linear(steps=200, to=0.2)',
      objective__advantages='recomputed', objective__importance='ppo_clip(0.2)')
  mesh = tiny.with_models('opd_sampled', **{**often, 'steps': 16})
  mesh.compute.mesh.fsdp, mesh.compute.mesh.tensor = 2, 2
  both = experiment.default_pipeline()
  both.name, both.order = 'both', ('first', 'second')
  short = {**often, 'steps': 12}
  stages = dict(first=tiny.config('sft', **short), second=tiny.config('opd_exact', **short))
  stages['second'].teacher.path = str(tiny.teacher())
  stages['second'].student.path = 'stage:first'
  stages['second'].student.fresh = tiny.with_models('opd_exact').student.fresh
  both.stages = type(plain)(stages)
  both.report.methods, both.report.labels = ('second',), ('second',)
  return dict(plain=(plain, 1), adapters=(adapters, 1), mixed=(mixed, 1), moving=(moving, 1),
              pipeline=(both, 1), mesh=(mesh, 4))


class Server:
  """A process that has imported everything, and forks one that runs `opd train` when it is asked:
  what comes after the imports is what touches files. As a context it ends with the block."""

  def __init__(self, folder: pathlib.Path, devices: int):
    import tiny
    self.folder = folder
    self._process = subprocess.Popen(
        [sys.executable, __file__, 'serve'], cwd=folder, text=True, env=tiny.environment(devices),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

  def __enter__(self) -> Server:
    return self

  def __exit__(self, *exc: Any) -> None:
    self._process.kill()
    self._process.communicate()

  def start(self) -> int:
    """Starts the command; its process id."""
    (self.folder / 'where').write_text(START)
    self._process.stdin.write('start\n')
    self._process.stdin.flush()
    return int(self._process.stdout.readline())

  def finish(self, seconds: float) -> int | None:
    """Waits so long for the end; the exit status, None where it goes on."""
    ended, _, _ = select.select([self._process.stdout], [], [], seconds)
    return int(self._process.stdout.readline()) if ended else None

  @property
  def where(self) -> str:
    """Where the command is, or was in the end."""
    return (self.folder / 'where').read_text().strip()

  @property
  def said(self) -> str:
    """What the command wrote to stderr."""
    return (self.folder / 'stderr').read_text()


def serve() -> None:
  """Is the other side of `Server`."""
  import opd_jax.tools.export  # noqa: F401
  import opd_jax.tools.pipeline  # noqa: F401
  for number in GENTLE:  # as in a terminal, wherever the script runs
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
  for _ in sys.stdin:
    if not (child := os.fork()):
      try:
        for descriptor, name in ((1, 'stdout'), (2, 'stderr')):
          os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        look()
        sys.argv = ['opd', 'train', '--config', 'experiment.py', '--workdir', 'run']
        from opd_jax import __main__
        __main__.entry()
      except BaseException:
        sys.excepthook(*sys.exc_info())
      finally:
        sys.stderr.flush()
        os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def look() -> None:
  """Writes down, 50 times a second, where the main thread is."""
  file, main = os.open('where', os.O_WRONLY), threading.main_thread().ident

  def watch() -> None:
    outside = START
    while True:
      frame, where = sys._current_frames().get(main), outside
      while frame is not None:
        code = frame.f_code
        key = os.path.basename(code.co_filename), code.co_name
        if 'opd_jax' in code.co_filename and key in PHASES:
          where, outside = PHASES[key], 'exit'
          break
        frame = frame.f_back
      os.pwrite(file, where.ljust(12).encode(), 0)
      time.sleep(0.02)

  threading.Thread(target=watch, daemon=True).start()


def files(workdir: pathlib.Path) -> Iterator[pathlib.PurePath]:
  """Lists what a run leaves, without what is of one process."""
  for path in sorted(workdir.rglob('*')):
    name = path.relative_to(workdir)
    if path.is_file() and not set(OTHERS) & set(name.parts):
      yield name


def differences(workdir: pathlib.Path, straight: pathlib.Path) -> list[str]:
  """Lists in what a finished run is not the undisturbed one; leftovers of kills count."""
  import tiny
  mine, theirs = set(files(workdir)), set(files(straight))
  out = [f'{name}: only in one of the two' for name in sorted(mine ^ theirs)]
  for name in sorted(mine & theirs):
    if name.name == 'metrics.jsonl':
      a, b = (tiny.rows((w / name).parent, timing=False) for w in (workdir, straight))
      if a != b:
        out.append(f'{name}: other rows')
    elif (workdir / name).read_bytes() != (straight / name).read_bytes():
      out.append(f'{name}: other bytes')
  for folder in straight.rglob('checkpoints'):
    other = workdir / folder.relative_to(straight)
    step = tiny.checkpoint_steps(folder.parent)[-1]
    try:
      tiny.assert_same_bits(*(tiny.read_checkpoint(w.parent, step) for w in (other, folder)))
    except (AssertionError, OSError, ValueError) as e:
      out.append(f'{other}: {type(e).__name__}: {str(e)[:100]}')
    out += [f'{p}: left over' for p in other.iterdir() if not p.name.isdigit()]
  return out


def half_written(workdir: pathlib.Path) -> bool:
  """Tells whether a kill left something unfinished that has no final name."""
  return any('.partial' in p.name or 'orbax-checkpoint-tmp' in p.name or p.name == 'deleted'
             for p in workdir.rglob('*'))


class Kind:
  """The kills of one kind of run.

  Attributes:
    hits: how often each phase was hit.
    signals: how often each signal was sent.
    ended, halves: runs that ended, kills that left something half-written.
    failures: what did not hold.
  """

  def __init__(self, name: str, c: Any, folder: pathlib.Path, seed: int):
    import tiny
    self.name, self._folder = name, folder
    self._random = random.Random(f'{seed} {name}')
    self.hits, self.signals = collections.Counter(), collections.Counter()
    self.ended, self.halves, self.failures = 0, 0, []
    folder.mkdir()
    tiny.write_config(folder / 'experiment.py', c)
    self.run = folder / 'run'  # always the same path: the config of a later stage holds it

  def undisturbed(self, server: Server) -> None:
    """Runs twice without a kill."""
    for again in (False, True):  # the second time, nothing is compiled
      began = time.monotonic()
      server.start()
      if (status := server.finish(1800)) != 0:
        raise AssertionError(f'{self.name}: an undisturbed run: status {status}: {server.said}')
      self.life_s = time.monotonic() - began
      if again:
        self._compare('undisturbed, again')
      else:
        self.run.rename(server.folder / 'straight')

  def _compare(self, what: str) -> None:
    found = differences(self.run, self._folder / 'straight')
    self.failures += [f'{what}: {line}' for line in found]
    self.run.rename(self._folder / f'run_{self.ended}')
    self.ended += 1

  def kill(self, server: Server, kills: int) -> None:
    """Kills, and starts again, until there were so many kills and the last run has ended."""
    history: list[str] = []
    while sum(self.hits.values()) < kills or history:
      process, enough = server.start(), sum(self.hits.values()) >= kills
      after = 600.0 if enough else self._random.uniform(0, self.life_s)
      number = signal.SIGKILL if self._random.random() < 0.75 else (
          GENTLE[sum(self.signals[n] for n in GENTLE) % len(GENTLE)])
      if (status := server.finish(after)) is None:
        where = server.where
        os.kill(process, number)
        status = server.finish(600)
        if status is None:
          os.kill(process, signal.SIGKILL)
          server.finish(600)
        if status != 0:  # else it came to its end meanwhile
          self.hits[where] += 1
          self.signals[number] += 1
          self.halves += half_written(self.run)
          history.append(f'{number.name} in {where} after {after:.2f} s')
          if status not in ENDS[number] or 'Traceback' in server.said:
            self.failures.append(f'{history[-1]}: status {status}: {server.said[-1500:]}')
      elif status != 0:
        self.failures.append(f'{"; ".join(history)}: did not go on: {server.said[-1500:]}')
        self.run.rename(server.folder / f'failed_{len(self.failures)}')
        history = []
      if status == 0:
        self._compare('; '.join(history) or 'no kill')
        history = []
      print(f'{self.name}: {sum(self.hits.values())} kills: {history[-1:]}', flush=True)

  def row(self) -> str:
    """Writes the row of the table."""
    where = ', '.join(f'{name} {self.hits[name]}' for name in SHOWN if self.hits[name])
    sent = ', '.join(f'{signal.Signals(n).name[3:]} {count}' for n, count in self.signals.items())
    outcome = f'{len(self.failures)} failures' if self.failures else 'the same bits'
    return (f'| {self.name} | {self.life_s:.0f} s | {sum(self.hits.values())} ({sent}) | {where} | '
            f'{self.halves} | {self.ended - 1} | {outcome} |')


HEAD = ('| kind | life | kills | where they hit | left something half-written | runs that ended | '
        'they are |\n|---|---|---|---|---|---|---|')


def main() -> None:
  """Runs all kinds, or some, and prints the table."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', default='')
  parser.add_argument('--folder', type=pathlib.Path)
  args = parser.parse_args()
  folder = (args.folder or pathlib.Path(tempfile.mkdtemp(prefix='opd_jax_kills_'))).resolve()
  folder.mkdir(exist_ok=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'cache')
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
  print(f'in {folder}', flush=True)
  done = []
  for name, (c, devices) in kinds(folder).items():
    if args.only and name not in args.only.split(','):
      continue
    kind = Kind(name, c, folder / name, args.seed)
    with Server(folder / name, devices) as server:
      kind.undisturbed(server)
      print(f'{name}: lives {kind.life_s:.1f} s', flush=True)
      kind.kill(server, args.kills)
    done.append(kind)
    print('\n'.join([HEAD, *(k.row() for k in done)]), flush=True)
    (folder / 'failures.json').write_text(json.dumps({k.name: k.failures for k in done}, indent=1))
  failures = [f'{k.name}: {line}' for k in done for line in k.failures]
  print('\n'.join(failures))
  sys.exit(bool(failures))


if __name__ == '__main__':
  serve() if sys.argv[1:2] == ['serve'] else main()
