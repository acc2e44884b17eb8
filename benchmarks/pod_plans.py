"""Plans every size of every experiment in experiments/pods/ and writes the table of what came out.

    python benchmarks/pod_plans.py                       (all that is not there yet, then PLAN.md)
    python benchmarks/pod_plans.py --only 'lora.*short'  (those whose name matches)
    python benchmarks/pod_plans.py --anew                (from nothing)

Each is `opd plan` in a process of its own, one after the other; for TPUs libtpu has to be there
(`pip install 'opd_jax[plan]'`). One takes half a minute (GPUs) to a few minutes (TPUs) of a core.
What was planned is kept in `--folder`, a JSON file each, and its row in PLAN.md; either way it is
not planned again.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from opd_jax import experiment  # noqa: E402, the package of this checkout

PODS = ROOT / 'experiments' / 'pods'
MODELS = PODS / 'models'
GIB = 2**30
ABSENT = 'not planned yet'


def names() -> dict[str, tuple[pathlib.Path, str, str]]:
  """Lists what there is to plan: {name: (file, size, answers)}, short answers first."""
  return {f'{file.stem}-{size}-{answers}': (file, size, answers)
          for answers in experiment.ANSWERS for size in experiment.MACHINES
          for file in sorted(PODS.glob('*.py'))}


def plan(file: pathlib.Path, size: str, answers: str, out: pathlib.Path, timeout_s: int) -> None:
  """Runs `opd plan` of one of them; what it says in place of a plan is kept too."""
  command = [sys.executable, '-m', 'opd_jax', 'plan', '--config',
             f'{file}:{size},answers={answers}', '--topology',
             experiment.MACHINES[size].topology, '--models', str(MODELS), '--json', str(out)]
  began = time.monotonic()
  try:
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=timeout_s)
  except subprocess.TimeoutExpired:
    print(f'  not done in {timeout_s} s', flush=True)
    return
  if done.returncode == 2:
    out.write_text(json.dumps({'refused': done.stderr.strip().splitlines()[-1]}))
  elif done.returncode not in (0, 1):
    print(f'  failed: {done.stderr[-2000:]}', flush=True)
  print(f'  {time.monotonic() - began:.0f} s, exit status {done.returncode}', flush=True)


def row(size: str, answers: str, found: dict | None) -> str:
  """Makes a row of the table."""
  chips = experiment.MACHINES[size].chips
  start = f'| {size} | {chips} | {answers} | '
  if found is None:
    return start + f'| | | | | | {ABSENT} |'
  if 'refused' in found:
    return start + f'| | | | | | {found["refused"]} |'
  phases = found['phases']
  known = [p for p in phases if p['total_bytes'] is not None]
  worst = max(known, key=lambda p: p['total_bytes'], default=None)
  said = '; '.join(f'{p["name"]} {p["refused"]}' for p in phases if p['total_bytes'] is None)
  memory = said or f'{worst["total_bytes"] / GIB:.1f} ({worst["name"]})'
  memory += f' of {found["hbm_bytes"] / GIB:.1f}'
  times = ', '.join(f'{p["name"]} {p["roofline_s"]:.2g} ({p["limit"]})' for p in phases)
  if found['fits']:
    verdict = 'fits'
  else:
    fits = [t for t in found['tried'] if t['fits']]
    settings = fits and ' '.join(f'{n}={v}' for n, v in fits[-1]['settings'].items())
    verdict = '**does not fit yet**' + (f'; fits with {settings}' if fits else (
        f'; nor with any of {len(found["tried"])} settings'))
  return (f'{start}{memory} | {times} | {found["step_s"]:.3g} | '
          f'{found["answer_tokens_per_s"]:.3g} | {found["model_flops_utilization"]:.1%} | '
          f'{found["chip_hours"]:.3g} | {verdict} |')


def rows_there() -> dict[str, str]:
  """Reads the rows of PLAN.md of what was planned, by name."""
  out, stem = {}, ''
  for line in (PODS / 'PLAN.md').read_text().splitlines():
    cells = [cell.strip() for cell in line.split('|')]
    if line.startswith('## '):
      stem = line.removeprefix('## ')
    elif len(cells) > 3 and cells[1] in experiment.MACHINES and ABSENT not in line:
      out[f'{stem}-{cells[1]}-{cells[3]}'] = line
  return out


def write_table(folder: pathlib.Path) -> None:
  """Writes PLAN.md from what is in the folder; of what is not, its rows stay."""
  there = rows_there()
  lines = [
      '# What `opd plan` says of these experiments', '',
      'Made by `python benchmarks/pod_plans.py`; no machine of these was used. Times are at a '
      'roofline (products at their peak, bytes at full bandwidth, collectives at full rate with '
      'their latency), every answer takes all of its room, and evaluations are not in it: a real '
      'run takes longer. Memory is that of the largest program, GiB a chip; of TPUs without the '
      "program's own code, some tenths of a GiB; of GPUs, temporaries are those of XLA's CPU "
      'compiler, which takes more. Chip-hours are for 100 steps of 256 '
      'answers. A row stays as it is until it is planned again. What is counted, and how, is in '
      '[docs/plan.md](../../docs/plan.md).', '']
  for file in sorted(PODS.glob('*.py')):
    lines += [f'## {file.stem}', '', '| size | chips | answers | GiB a chip | seconds a step, and '
              'their limit | step, s | answer tokens/s | MFU | chip-hours | |',
              '|---|---|---|---|---|---|---|---|---|---|']
    for name, (of, size, answers) in names().items():
      if of == file:
        path = folder / f'{name}.json'
        found = json.loads(path.read_text()) if path.exists() else None
        lines.append(there[name] if found is None and name in there else row(size, answers, found))
    lines.append('')
  (PODS / 'PLAN.md').write_text('\n'.join(lines))


def main() -> None:
  """Plans what is asked for."""
  flags = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
  flags.add_argument('--only', default='', help='a regular expression of names')
  flags.add_argument('--anew', action='store_true', help='plan what is there already, too')
  flags.add_argument('--folder', default=str(ROOT / 'runs' / 'pod_plans'), help='of JSON files')
  flags.add_argument('--timeout_s', type=int, default=3600, help='for one of them')
  args = flags.parse_args()
  folder = pathlib.Path(args.folder)
  folder.mkdir(parents=True, exist_ok=True)
  there = rows_there()
  for name, what in names().items():
    out = folder / f'{name}.json'
    if re.search(args.only, name) and (args.anew or not (out.exists() or name in there)):
      print(name, flush=True)
      plan(*what, out, args.timeout_s)
      write_table(folder)
  write_table(folder)


if __name__ == '__main__':
  main()
