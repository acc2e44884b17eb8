"""What one step of on-policy distillation costs, phase by phase, and how far it is from the floor.

    python benchmarks/step.py --json step.json
    python benchmarks/step.py --vocab 32768 --objective exact --dtype float32 --threads one
    python benchmarks/step.py --set compute.chunk_tokens=1024 --set compute.microbatch_rows=8
    python benchmarks/step.py --platform gpu --shapes 0.6b --vocab 151936 --dtype bfloat16 \
        --new 1024

A step is `train.take_step` with the programs of `programs.compile_programs`: the student writes,
the teacher (and the student) score, the student moves; 32 prompts of 32 tokens with 128 new ones
and no stop, Qwen3 of 256 x 4 and 512 x 8, random weights, AdamW. Each configuration has a process
of its own, on one core or on all. Printed are medians of wall seconds (CPU seconds in brackets),
peak memory, and the share of the floor: the time that the operations of a phase take at the speed
of the best matrix product of this machine, or its bytes at that of the best copy, whichever is
longer, divided by the time that it took. Products (XLA, NumPy, PyTorch if installed) and copies are
measured between the configurations. How that is counted is in step_floor.py; peers.py compares with
others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import tempfile
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')  # it asks for PyTorch

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import step_floor  # noqa: E402
import step_loop  # noqa: E402
import step_work  # noqa: E402
import turns  # noqa: E402

from opd_jax import config as config_lib  # noqa: E402
from opd_jax.errors import ConfigError, one_line  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
DTYPES = ('float32', 'bfloat16')
OTHER = 'other'  # what of a step is in no phase: the host's work


class Parser(argparse.ArgumentParser):
  """Refuses in one line."""

  def error(self, message: str) -> NoReturn:
    """Says what is wrong and ends."""
    self.exit(2, f'error: {one_line(message)}\n')


def positive(text: str) -> int:
  """Reads a number of things that there have to be."""
  if not text.isdigit() or not int(text):
    raise argparse.ArgumentTypeError(f'{text!r}; allowed: a whole number above 0')
  return int(text)


def add_sizes(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the work."""
  parser.add_argument('--shapes', default='small', choices=step_work.SHAPES)
  for name, default, what in (('rows', 32, 'prompts'), ('prompt', 32, 'tokens of a prompt'),
                              ('new', 128, 'tokens of an answer')):
    parser.add_argument(f'--{name}', type=positive, default=default, help=what)
  parser.add_argument('--set', action='append', default=[], metavar='FIELD=VALUE', dest='fields',
                      help='another field of the config of opd_jax')


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """Reads the command line; a mistake is one line, before anything is made."""
  parser = Parser(description=__doc__.split('\n', 1)[0])
  add_sizes(parser)
  parser.add_argument('--vocab', type=positive, nargs='+', default=[2048, 32768])
  parser.add_argument('--objective', nargs='+', default=list(step_loop.PRESETS),
                      choices=step_loop.PRESETS)
  parser.add_argument('--dtype', nargs='+', default=list(DTYPES), choices=DTYPES)
  parser.add_argument('--threads', nargs='+', choices=turns.THREADS,
                      help='both, or all on an accelerator')
  parser.add_argument('--steps', type=positive, default=5, help='that are measured')
  parser.add_argument('--platform', default='cpu', choices=('cpu', 'gpu'))
  parser.add_argument('--json', type=pathlib.Path, help='a file for all that was measured')
  parser.add_argument('--logs', type=pathlib.Path, help='a folder for what the processes say')
  args = parser.parse_args(argv)
  args.threads = args.threads or list(turns.THREADS if args.platform == 'cpu' else ('all',))
  if args.platform != 'cpu' and 'one' in args.threads:
    parser.error("--threads one with --platform gpu; allowed: all")
  check(parser, args)
  return args


def check(parser: Parser, args: argparse.Namespace) -> None:
  """Refuses folders and sizes that are not there, and fields of the config that do not fit."""
  for folder in {args.json and args.json.absolute().parent, args.logs} - {None}:
    if not folder.is_dir():
      parser.error(f'{folder} is no folder')
  for vocab in args.vocab:
    if vocab <= len(step_work.SPECIAL):
      parser.error(f'--vocab {vocab}; allowed: above {len(step_work.SPECIAL)}')
  try:
    for objective, dtype in itertools.product(args.objective, args.dtype):
      config_lib.parse(step_loop.make_config(None, sizes_of(args, args.vocab[0]),
                                             settings_of(args, objective, dtype)))
  except ConfigError as e:
    parser.error(str(e))


def sizes_of(args: argparse.Namespace, vocab: int) -> step_work.Sizes:
  """Makes the sizes of the work."""
  return step_work.Sizes(args.shapes, vocab, args.rows, args.prompt, args.new)


def settings_of(args: argparse.Namespace, objective: str, dtype: str, **more: Any
                ) -> step_loop.Settings:
  """Makes the settings of opd_jax."""
  base = step_loop.Settings(objective, dtype, **more)
  return dataclasses.replace(base, fields=(*base.fields, *args.fields))


def environment(platform: str) -> dict[str, str]:
  """Makes what the processes of opd_jax find in their environment."""
  if platform == 'cpu':
    return {**step_loop.ENVIRONMENT, 'JAX_PLATFORMS': 'cpu'}
  # So that what measures the device and what takes steps fit beside each other.
  return {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', 'JAX_PLATFORMS': 'cuda'}


def loop_worker(work: pathlib.Path, settings: step_loop.Settings, threads: str,
                log: pathlib.Path, platform: str = 'cpu') -> turns.Worker:
  """Starts a worker of opd_jax."""
  return turns.Worker([sys.executable, HERE / 'step_loop.py', work,
                       json.dumps(dataclasses.asdict(settings))], threads, log,
                      environment(platform))


@contextlib.contextmanager
def floor_worker(threads: str, dtypes: list[str], log: pathlib.Path, platform: str = 'cpu'
                 ) -> Iterator[turns.Worker]:
  """Starts what measures the machine, with the threads of what is compared with it."""
  kinds = dict.fromkeys(['float32', *dtypes])
  worker = turns.Worker([sys.executable, HERE / 'step_floor.py', *kinds], threads, log,
                        environment(platform))
  try:
    yield worker
  finally:
    worker.stop()


def floors_of(sizes: step_work.Sizes, settings: step_loop.Settings,
              machine: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
  """Computes the floor of each phase on a machine that was measured."""
  student, teacher = (step_work.model_of(sizes, part) for part in ('student', 'teacher'))
  # The objective as the preset makes it.
  o = config_lib.parse(step_loop.make_config(None, sizes, settings)).objective
  counts = (student, teacher, o, sizes.rows, sizes.prompt, sizes.new)
  return step_floor.floors(
      step_floor.phase_flops(*counts),
      step_floor.phase_bytes(*counts, jnp.dtype(settings.dtype).itemsize), machine, settings.dtype)


def summarize(steps: list[dict[str, list[float]]], floors: dict[str, dict[str, float]],
              answer_tokens: int) -> dict[str, Any]:
  """Joins times and floors.

  Returns:
    'phases' and 'step' with 'wall_s', 'cpu_s', 'floor_s' and 'share', and 'tokens_per_s' of
    answers, in the whole step and while they are written.
  """
  phases = turns.medians([turns.with_rest(s, OTHER) for s in steps])
  whole = phases.pop(turns.STEP)
  for name, floor in floors.items():
    phases[name] |= floor | {'share': floor['floor_s'] / phases[name]['wall_s']}
  whole |= {name: sum(f[name] for f in floors.values()) for name in ('flops', 'bytes', 'floor_s')}
  whole['share'] = whole['floor_s'] / whole['wall_s']
  return {'phases': phases, 'step': whole, 'tokens_per_s': {
      turns.STEP: answer_tokens / whole['wall_s'],
      'generate': answer_tokens / phases['generate']['wall_s']}}


def measure(args: argparse.Namespace, work: pathlib.Path, sizes: step_work.Sizes,
            settings: step_loop.Settings, threads: str, floor: turns.Worker,
            machine: list[dict[str, dict[str, float]]], logs: pathlib.Path) -> dict[str, Any]:
  """Measures a configuration, and the machine once more after it."""
  name = f'{settings.objective}_{sizes.vocab}_{settings.dtype}_{threads}'
  load = os.getloadavg()[0]
  worker = loop_worker(work, settings, threads, logs / f'{name}.log', args.platform)
  try:
    worker.step()
    steps = [worker.step() for _ in range(args.steps)]
    peak = worker.finish()
  finally:
    worker.stop()
  machine.append(floor.step())
  floors = floors_of(sizes, settings, step_floor.best_of(machine))
  return {'name': name, 'sizes': dataclasses.asdict(sizes),
          'settings': dataclasses.asdict(settings), 'threads': threads, 'steps': steps,
          'load': [load, os.getloadavg()[0]], 'peak_bytes': peak, **worker.about,
          **summarize(steps, floors, sizes.rows * sizes.new)}


def show(found: dict[str, Any]) -> None:
  """Prints a configuration."""
  print(f"{found['name']}: peak {found['peak_bytes'] / 2**30:.2f} GiB, "
        f"{found['tokens_per_s'][turns.STEP]:.0f} tokens/s, writing "
        f"{found['tokens_per_s']['generate']:.0f}; load {found['load'][0]:.1f} to "
        f"{found['load'][1]:.1f}; first step {found['first_step_s']:.0f} s")
  for name, p in (*found['phases'].items(), (turns.STEP, found['step'])):
    share = f"{p['floor_s']:8.3f} {p['share']:8.0%}" if 'share' in p else ''
    print(f"  {name:14}{p['wall_s']:8.3f} ({p['cpu_s']:7.3f}){share}", flush=True)


def main() -> None:
  """Measures all configurations, one after the other."""
  args = parse()
  jax.config.update('jax_platforms', 'cpu')  # of this process, which only makes the work
  out: dict[str, Any] = {'cpus': len(os.sched_getaffinity(0)), 'machine': {}, 'found': []}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    logs = args.logs or folder
    works = {v: step_work.make(folder / str(v), sizes_of(args, v)) for v in args.vocab}
    print('wall seconds (CPU seconds), seconds at the floor, share of the floor', flush=True)
    for threads in args.threads:
      with floor_worker(threads, args.dtype, logs / 'floor.log', args.platform) as floor:
        machine = [floor.step()]
        for vocab, objective, dtype in itertools.product(args.vocab, args.objective, args.dtype):
          found = measure(args, works[vocab], sizes_of(args, vocab),
                          settings_of(args, objective, dtype), threads, floor, machine, logs)
          show(found)
          out['found'].append(found)
        best = step_floor.best_of(machine)
        out['machine'][threads] = {**floor.about, **best}
        print(f'threads {threads}: {step_floor.describe(best)}', flush=True)
        if args.json:
          args.json.write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
  try:
    main()
  except turns.WorkerError as e:
    sys.exit(f'error: {e}')
