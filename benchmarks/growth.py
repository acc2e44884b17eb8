"""How the cost of a step grows: with rows, length, vocabulary, model and devices.

    python benchmarks/growth.py --png growth.png --json growth.json
    python benchmarks/growth.py --only vocabulary devices

Along each axis one size grows and the others stay; a step is that of step.py (exact reverse KL,
float32, one core), the median of `--steps`. In a log-log plot the slope is the exponent with which
the seconds grow, and beside it stands that of the arithmetic (step_floor.py): what is above it
grows faster than it has to, what is below has costs that do not grow. Devices are fake ones: what
is counted there is the bytes of what collectives leave on a device, by the compiled programs of
fsdp over 2, 4 and 8 of them: the gathered weights, which are as many on any number of devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

import numpy as np  # noqa: E402
import step  # noqa: E402
import step_floor  # noqa: E402
import step_loop  # noqa: E402
import step_work  # noqa: E402
import turns  # noqa: E402

from opd_jax.models import params  # noqa: E402

BASE, SETTINGS = step_work.Sizes(), step_loop.Settings()
AXES: dict[str, tuple[step_work.Sizes, ...]] = {
    'rows': tuple(dataclasses.replace(BASE, rows=n) for n in (16, 32, 64, 128)),
    'length': tuple(dataclasses.replace(BASE, new=n) for n in (64, 128, 256, 512)),
    'vocabulary': tuple(dataclasses.replace(BASE, vocab=n) for n in (2048, 8192, 32768)),
    'model': tuple(dataclasses.replace(BASE, shapes=s) for s in ('half', 'small', 'double'))}
DEVICES, FAKE = 'devices', (2, 4, 8)
LOOSE = 0.1  # of an exponent: what medians of a shared machine are apart


def place(axis: str, sizes: step_work.Sizes) -> float:
  """Says where on its axis something is: rows, new tokens, words, parameters of both models."""
  if axis == 'model':
    return sum(params.count_params(step_work.model_of(sizes, part).specs)
               for part in ('student', 'teacher'))
  return {'rows': sizes.rows, 'length': sizes.new, 'vocabulary': sizes.vocab}[axis]


def exponent(x: list[float], y: list[float]) -> float:
  """Fits y = a x^b by least squares of the logarithms; returns b."""
  return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def take(work: pathlib.Path, log: pathlib.Path, steps: int) -> dict[str, float]:
  """Takes steps in a process of its own; returns median CPU seconds by phase."""
  worker = step.loop_worker(work, SETTINGS, 'one', log)
  try:
    worker.step()
    taken = [worker.step() for _ in range(steps)]
    worker.finish()
  finally:
    worker.stop()
  return {name: p['cpu_s'] for name, p in turns.medians(taken).items()}


def arithmetic(sizes: step_work.Sizes) -> dict[str, float]:
  """Counts the operations by phase, and of the step."""
  models = [step_work.model_of(sizes, part) for part in ('student', 'teacher')]
  o = step.config_lib.parse(step_loop.make_config(None, sizes, SETTINGS)).objective
  out = step_floor.phase_flops(*models, o, sizes.rows, sizes.prompt, sizes.new)
  return out | {turns.STEP: sum(out.values())}


def measure(axis: str, folder: pathlib.Path, steps: int) -> dict[str, Any]:
  """Measures along an axis of sizes."""
  found, counted, x = [], [], []
  for i, sizes in enumerate(AXES[axis]):
    work = step_work.make(folder / f'{axis}{i}', sizes)
    found.append(take(work, folder / f'{axis}{i}.log', steps))
    counted.append(arithmetic(sizes))
    x.append(place(axis, sizes))
    print(f'  {axis} {x[-1]:.4g}: ' + ', '.join(
        f'{name} {seconds:.3f} s' for name, seconds in found[-1].items()), flush=True)
  return {'x': x, 'unit': 'CPU seconds', 'phases': {name: {
      'y': [f[name] for f in found], 'least': [c[name] for c in counted],
      'exponent': exponent(x, [f[name] for f in found]),
      'arithmetic': exponent(x, [c[name] for c in counted])} for name in counted[0]}}


def bytes_of(work: pathlib.Path) -> dict[str, float]:
  """Counts the bytes that collectives leave on a device, by program, for those of this process."""
  import jax

  from opd_jax import build, programs
  from opd_jax.doctor import lowered
  from opd_jax.tools.plan import hlo
  how = dataclasses.replace(SETTINGS, fields=(
      'compute.microbatch_rows=0', 'compute.chunk_tokens=512',
      f'compute.mesh.fsdp={jax.device_count()}', f'eval.problems={FAKE[-1]}'))
  run = step.config_lib.parse(step_loop.make_config(work, step_work.read(work)[0], how))
  parts, out = build.open_parts(run), {}
  made = programs.compile_programs(run, parts)
  for name, call in lowered.calls(run, made, lowered.resident(made)).items():
    if name in ('lay out', 'sample', 'score teacher', 'update'):
      with tempfile.TemporaryDirectory() as folder:
        call.compile(hlo.options(folder) | lowered.look_options())
        counts = hlo.count(hlo.partitioned(folder) or call.text(), call.mesh.devices.shape)
      out[name] = sum(c.times * c.result_bytes for c in counts.collectives)
  return out


def measure_devices(folder: pathlib.Path) -> dict[str, Any]:
  """Counts along the number of devices, on which gathered weights do not depend."""
  work, found = step_work.make(folder / DEVICES, BASE), []
  rows = work / 'eval.jsonl'  # not read, but rows are divided over devices
  rows.write_text(rows.read_text() * FAKE[-1])
  for n in FAKE:
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu',
           'XLA_FLAGS': f'--xla_force_host_platform_device_count={n}'}
    done = subprocess.run([sys.executable, __file__, '--bytes_of', str(work)], env=env, text=True,
                          capture_output=True, check=False)
    if done.returncode:
      raise turns.WorkerError(f'{n} devices: {done.stderr.strip()[-2000:]}')
    found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f'  devices {n}: ' + ', '.join(f'{k} {v / 2**20:.1f} MiB' for k, v in found[-1].items()),
          flush=True)
  x = list(map(float, FAKE))
  least = [1.0] * len(FAKE)
  return {'x': x, 'unit': 'bytes a device', 'phases': {name: {
      'y': [f[name] for f in found], 'least': least,
      'exponent': exponent(x, [f[name] for f in found]), 'arithmetic': exponent(x, least)}
      for name in found[0] if all(f[name] for f in found)}}


def table(found: dict[str, Any]) -> str:
  """Makes a table of exponents."""
  lines = ['| axis | | measured exponent | of the arithmetic | |', '|---|---|---|---|---|']
  for axis, a in found.items():
    span = f'{axis}, {a["x"][0]:.4g} to {a["x"][-1]:.4g}'
    for name, p in a['phases'].items():
      worse = 'faster' if p['exponent'] > p['arithmetic'] + LOOSE else ''
      lines.append(f'| {span} | {name} | {p["exponent"]:.2f} | {p["arithmetic"]:.2f} | {worse} |')
  return '\n'.join(lines)


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  """Draws a plot an axis; the arithmetic is dashed, through the last point."""
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  figure, panels = plt.subplots(1, len(found), figsize=(4 * len(found), 3.6), squeeze=False)
  for panel, (axis, a) in zip(panels[0], found.items(), strict=True):
    for i, (name, p) in enumerate(a['phases'].items()):
      panel.loglog(a['x'], p['y'], 'o-', color=f'C{i}', label=f'{name}, {p["exponent"]:.2f}')
      scale = p['y'][-1] / p['least'][-1]
      panel.loglog(a['x'], [scale * y for y in p['least']], '--', color=f'C{i}', linewidth=0.8)
    panel.set(xlabel=axis, ylabel=a['unit'])
    panel.set_xticks(a['x'], [f'{x:.3g}' for x in a['x']])
    panel.minorticks_off()
    panel.legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=90)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """Reads the command line."""
  parser = step.Parser(description=__doc__.split('\n', 1)[0])
  parser.add_argument('--only', nargs='+', default=[*AXES, DEVICES], choices=[*AXES, DEVICES])
  parser.add_argument('--steps', type=step.positive, default=3, help='that are measured')
  parser.add_argument('--json', type=pathlib.Path, help='a file for all that was measured')
  parser.add_argument('--png', type=pathlib.Path, help='a file for the plots')
  parser.add_argument('--bytes_of', type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  for path in {args.json, args.png} - {None}:
    if not path.absolute().parent.is_dir():
      parser.error(f'{path.absolute().parent} is no folder')
  return args


def main() -> None:
  """Measures along all axes."""
  args = parse()
  if args.bytes_of:
    print(json.dumps(bytes_of(args.bytes_of)))
    return
  step.jax.config.update('jax_platforms', 'cpu')
  found: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as folder:
    for axis in dict.fromkeys(args.only):
      found[axis] = (measure_devices(pathlib.Path(folder)) if axis == DEVICES
                     else measure(axis, pathlib.Path(folder), args.steps))
      assert all(math.isfinite(p['exponent']) for p in found[axis]['phases'].values())
      if args.json:
        args.json.write_text(json.dumps(found, indent=1) + '\n')
  print(table(found))
  if args.png:
    draw(found, args.png)


if __name__ == '__main__':
  try:
    main()
  except turns.WorkerError as e:
    sys.exit(f'error: {e}')
