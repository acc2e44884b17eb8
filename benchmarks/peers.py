"""opd_jax beside other systems on the same work, step by step in turn: the ratios, in one table.

    python third_party/make_env.py trl tunix transformers          (once; see third_party/README.md)
    python benchmarks/peers.py --vocab 2048 --rounds 5
    python benchmarks/peers.py --only trl_gkd,tunix --vocab 32768 --threads all --json ratios.json

Every system is a process of its own, reads the same two checkpoints and the same prompts
(step_work.py), and takes a step when it is its turn, so that ratios hold on a machine whose speed
drifts; all of them are alive at once, and so is what they hold. Before the first step each computes
its own loss on the same given rows, which has to be that of opd_jax (of the forward KL for Tunix,
which has no reverse one; the log-probability for what only generates). How the peers are called is
in third_party/. A ratio is the median over the rounds of their seconds by ours: above 1, ours is
faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import step
import step_floor
import step_loop
import step_work
import turns

ROOT = step.ROOT
sys.path.append(str(ROOT / 'third_party'))
import make_env  # noqa: E402

OURS = 'opd_jax'
WARM = 2  # steps that are not counted: some compile twice
# How far a loss may be from ours, relative to it.
TOLERANCE = {'float32': 1e-4, 'bfloat16': 0.02}


@dataclasses.dataclass(frozen=True)
class Peer:
  """A system: its environment, its worker with arguments, and the loss that it can be held to."""

  env: str
  script: str
  args: tuple[str, ...]
  loss: str


PEERS = {
    'trl_distillation': Peer('trl', 'run_trl.py', ('distillation',), 'reverse_kl'),
    'trl_gkd': Peer('trl', 'run_trl.py', ('gkd',), 'reverse_kl'),
    'tunix': Peer('tunix', 'run_tunix.py', (), 'forward_kl'),
    'transformers': Peer('transformers', 'run_transformers.py', ('default',),
                         step_loop.NEGATIVE_LOGPROB),
    'transformers_static': Peer('transformers', 'run_transformers.py', ('static',),
                                step_loop.NEGATIVE_LOGPROB)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """Reads the command line; a mistake is one line, before anything is made."""
  parser = step.Parser(description=__doc__.split('\n', 1)[0])
  step.add_sizes(parser)
  parser.add_argument('--only', default='trl_distillation,trl_gkd,tunix,transformers',
                      help=f'of {", ".join(PEERS)}')
  parser.add_argument('--vocab', type=step.positive, nargs='+', default=[2048])
  parser.add_argument('--dtype', nargs='+', default=['float32'], choices=step.DTYPES)
  parser.add_argument('--threads', nargs='+', default=['one'], choices=turns.THREADS)
  parser.add_argument('--rounds', type=step.positive, default=5)
  parser.add_argument('--envs', type=pathlib.Path, default=make_env.FOLDER,
                      help='the folder of make_env.py')
  parser.add_argument('--json', type=pathlib.Path, help='a file for all that was measured')
  parser.add_argument('--logs', type=pathlib.Path, help='a folder for what the processes say')
  args = parser.parse_args(argv)
  args.only, args.objective = args.only.split(','), ['exact']
  for name in args.only:
    if name not in PEERS:
      parser.error(f'--only {name}; allowed: {", ".join(PEERS)}')
  for name in args.only:
    if not make_env.python_of(args.envs, PEERS[name].env).exists():
      parser.error(f'--only {name}: no environment in --envs {args.envs}; allowed: one made by '
                   f'python third_party/make_env.py {PEERS[name].env} --folder {args.envs}')
  step.check(parser, args)
  return args


def check_losses(dtype: str, ours: dict[str, float], theirs: dict[str, dict[str, float]]
                 ) -> dict[str, float]:
  """Holds the losses on the given rows against ours; returns how far each is, relative to it.

  Raises:
    WorkerError: it is another loss, or other work.
  """
  out = {}
  for name, losses in theirs.items():
    for kind, value in losses.items():
      out[name] = abs(value - ours[kind]) / abs(ours[kind])
      if not out[name] <= TOLERANCE[dtype]:
        raise turns.WorkerError(f'{name}: {kind} of the given rows is {value}, and {ours[kind]} of '
                                f'opd_jax; allowed: within {TOLERANCE[dtype]:g} of it')
  return out


def ratios(ours: list[dict[str, list[float]]], theirs: list[dict[str, list[float]]]
           ) -> dict[str, dict[str, float]]:
  """Computes, for each phase of a peer, the medians over the rounds of its wall and CPU seconds by
  ours of the same round. What only generates is compared with our generation."""
  shared = [name for name in theirs[0] if name in ours[0]]
  if set(theirs[0]) <= {'generate', turns.STEP}:
    shared = ['generate']
  return {name: {unit: statistics.median(t[name][i] / o[name][i]
                                         for o, t in zip(ours, theirs, strict=True))
                 for i, unit in enumerate(('wall', 'cpu'))} for name in shared}


def our_losses(args: argparse.Namespace, work: pathlib.Path, dtype: str, threads: str,
               logs: pathlib.Path) -> dict[str, float]:
  """Computes the losses that the peers are held to, in a process of their own."""
  losses = tuple(dict.fromkeys(PEERS[name].loss for name in args.only))
  worker = step.loop_worker(work, step.settings_of(args, 'exact', dtype, losses=losses), threads,
                            logs / 'losses.log')
  worker.stop()
  return worker.about['losses']


def start(args: argparse.Namespace, work: pathlib.Path, dtype: str, threads: str,
          logs: pathlib.Path) -> dict[str, turns.Worker]:
  """Starts a worker of each system, one after the other."""
  peers = {name: PEERS[name] for name in args.only}
  started: dict[str, turns.Worker] = {}
  try:
    started[OURS] = step.loop_worker(work, step.settings_of(args, 'exact', dtype), threads,
                                     logs / f'{OURS}.log')
    for name, peer in peers.items():
      started[name] = turns.Worker(
          [make_env.python_of(args.envs, peer.env), ROOT / 'third_party' / peer.script, work,
           *peer.args, dtype], threads, logs / f'{name}.log',
          {'HF_HUB_OFFLINE': '1', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': ''})
      print(f'{name}: {started[name].about}', flush=True)
  except BaseException as e:
    stop(started)
    if isinstance(e, turns.WorkerError):
      raise turns.WorkerError(f'{list(peers)[len(started) - 1] if started else OURS}: {e}') from e
    raise
  return started


def stop(workers: dict[str, turns.Worker]) -> None:
  """Ends all of them."""
  for worker in workers.values():
    worker.stop()


def compare(args: argparse.Namespace, work: pathlib.Path, sizes: step_work.Sizes, dtype: str,
            threads: str, logs: pathlib.Path) -> dict[str, Any]:
  """Takes steps of all systems in turn."""
  load, losses = os.getloadavg()[0], our_losses(args, work, dtype, threads, logs)
  print(f'{OURS}: {losses}', flush=True)
  workers = start(args, work, dtype, threads, logs)
  machine, rounds = [], {name: [] for name in workers}
  try:
    distances = check_losses(dtype, losses, {
        name: workers[name].about['losses'] for name in args.only})
    with step.floor_worker(threads, [dtype], logs / 'floor.log') as floor:
      for n in range(WARM + args.rounds):
        spent = {name: worker.step() for name, worker in workers.items()}
        print(f'round {n - WARM + 1}' if n >= WARM else 'not counted', {
            name: round(s[turns.STEP][0], 2) for name, s in spent.items()}, flush=True)
        if n >= WARM:
          rounds = {name: [*rounds[name], s] for name, s in spent.items()}
          machine.append(floor.step())
    peaks = {name: worker.finish() for name, worker in workers.items()}
  finally:
    stop(workers)
  best = step_floor.best_of(machine)
  floors = step.floors_of(sizes, step.settings_of(args, 'exact', dtype), best)
  return {'sizes': dataclasses.asdict(sizes), 'dtype': dtype, 'threads': threads, 'losses': losses,
          'load': [load, os.getloadavg()[0]], 'machine': best, 'floors': floors,
          'systems': {name: {
              'about': workers[name].about, 'peak_bytes': peaks[name], 'steps': rounds[name],
              'loss_distance': distances.get(name, 0.0), 'medians': turns.medians(rounds[name]),
              'ratios': ratios(rounds[OURS], rounds[name])} for name in workers}}


def table(found: dict[str, Any]) -> list[str]:
  """Makes the lines of a table: seconds, peak memory, and ratios (wall; CPU in brackets)."""
  sizes, phases = found['sizes'], ('generate', 'score_teacher', 'update', turns.STEP)
  tokens = sizes['rows'] * sizes['new']
  floor = {name: f['floor_s'] for name, f in found['floors'].items()}
  floor[turns.STEP] = sum(floor.values())
  lines = [
      f"### vocabulary {sizes['vocab']}, {found['dtype']}, threads: {found['threads']}; load "
      f"{found['load'][0]:.1f} to {found['load'][1]:.1f}", '',
      step_floor.describe(found['machine']), '',
      '| | generate s | teacher s | update s | step s | tokens/s | peak GiB | generate | update '
      '| step | memory | loss off by |', '|---|' + '---|' * 11]
  for name, system in found['systems'].items():
    cells = [f"{system['medians'][p]['wall_s']:.2f}" if p in system['medians'] and (
        p != turns.STEP or p in system['ratios']) else '' for p in phases]
    cells.append(f"{tokens / system['medians']['generate']['wall_s']:.0f}")
    cells.append(f"{system['peak_bytes'] / 2**30:.2f}")
    for phase in ('generate', 'update', turns.STEP):
      r = system['ratios'].get(phase)
      cells.append(f"{r['wall']:.2f} ({r['cpu']:.2f})" if r else '')
    cells.append(f"{system['peak_bytes'] / found['systems'][OURS]['peak_bytes']:.2f}")
    cells.append(f"{system['loss_distance']:.1e}")
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  lines.append('| floor | ' + ' | '.join(f'{floor[p]:.2f}' for p in phases)
               + f" | {tokens / floor['generate']:.0f} |" + ' |' * 6)
  return [*lines, '']


def main() -> None:
  """Compares, for every vocabulary, type and number of threads."""
  args = parse()
  step.jax.config.update('jax_platforms', 'cpu')
  out = []
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    works = {v: step_work.make(folder / str(v), step.sizes_of(args, v)) for v in args.vocab}
    for vocab, dtype, threads in itertools.product(args.vocab, args.dtype, args.threads):
      out.append(compare(args, works[vocab], step.sizes_of(args, vocab), dtype, threads,
                         args.logs or folder))
      print('\n'.join(table(out[-1])), flush=True)
      if args.json:
        args.json.write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
  try:
    main()
  except turns.WorkerError as e:
    sys.exit(f'error: {e}')
