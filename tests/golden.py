"""The golden run: what a few steps of every method come out as, to the bit.

    python tests/golden.py write [NAME ...]    after a change that is meant to change numbers
    python tests/golden.py check [NAME ...]    after one that is not

A case is a short run from the shipped base to the shipped teacher by plain SGD, so that the final
parameters say the gradients: every preset, a pipeline, adapters, given rows, mixed batches, several
updates, on one device and on four (2 x 2; GOLDEN_DEVICES=1 leaves them out). Written down are
digests of the final parameters and of every row of metrics.jsonl, and the numbers that say most.
Bits hold for one kind of processor and one XLA only: `check` tells the same bits from the same
numbers up to rounding.

Written at the last flat tree; on four devices, where scorers give hidden states and log-probs both
(minillm, vopd, eopd, tropd, aopd, stable_opd, two_updates, bfloat16_teacher_gated), after scoring
kept rows on their devices: sums in another order, first steps within 1e-5.
Written again once what stands at masked places was replaced before the loss: other roundings nearly
everywhere, within 4e-5 through all steps, but for two_updates (4e-4 at its second step, some per
cent at its third) and, on four devices, the cases in bfloat16 (2e-4 at the first step, some per
cent at the last). grpo and kdrl divide by the sample's deviation since.
All of it written again once a row's draws came from a key of its own: other samples. On four
devices the numbers are those on one within 4e-4, but for cases that amplify rounding (bfloat16,
mopd, stable_opd, two_updates and a draw on an edge of opd, at their last rows).
Written again once attention's sums were in another order, and once the FLOPs of a row had other
names, on the same machine.

It takes some minutes, and so is no test of the suite.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import quick

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = ROOT / 'tests' / 'references' / 'golden.json'
DEVICES = tuple(map(int, os.environ.get('GOLDEN_DEVICES', '1,4').split(',')))
RELATIVE = 1e-4  # of another processor: float32 sums in another order, through three steps
# Of the process: counts of programs are looked at by tests, wall-clock rates are nobody's business;
# and what the texts are like, which other tests look at.
NOT_GOLDEN = ('perf', 'text', 'teacher_logprob')
DIGESTS = ('parameters', 'adapter', 'digest')
SHOWN = ('loss', 'grad_norm', 'reverse_kl', 'length')


def presets_file() -> Any:
  """The module `experiments/presets.py`."""
  spec = importlib.util.spec_from_file_location('golden_presets', ROOT / 'experiments/presets.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def small(c: Any) -> Any:
  """A stage of `experiments/presets.py`, cut down to seconds."""
  c.steps = 3
  c.data.warm_steps = min(c.data.warm_steps, 1)
  rows = 16
  c.data.prompts_per_step, c.data.max_new_tokens = rows // c.data.samples_per_prompt, 20
  if c.data.source == 'dataset' or c.given.source == 'dataset':
    c.data.max_new_tokens = 36
  if c.given.source != 'none':
    c.given.prompts_per_step = 8
  c.compute.microbatch_rows, c.compute.chunk_tokens = 8, 96
  o = c.optimizer
  o.name, o.b1, o.clip_norm, o.schedule, o.warmup_steps = 'sgd', 0.0, 0.0, 'constant', 0
  o.learning_rate, o.final_learning_rate = 0.1, 0.0
  c.eval.every_steps, c.eval.problems, c.eval.samples_per_problem = 0, 16, 1
  c.eval.pass_k = 1
  c.checkpoint.best_metric = 'sampled_accuracy'
  c.task.options.train_examples, c.task.options.corpus_examples = 256, 256
  for name, value in c.doctor.items():
    if isinstance(value, str):
      c.doctor[name] = 'off: not what is looked at'
  return c


def cases() -> dict[str, Any]:
  """The configs by name."""
  from ml_collections import ConfigDict

  from opd_jax import experiment, presets
  stage = presets_file().stage
  out = {name: small(stage(name)) for name in presets.PRESETS}

  def case(name, preset, **fields):
    c = small(stage(preset))
    for path, value in fields.items():
      *groups, field = path.split('__')
      here = c
      for group in groups:
        here = here[group]
      here[field] = value
    out[name] = c

  adapters = dict(student__lora__rank=4, student__lora__targets='all')
  case('adapters', 'opd', **adapters)
  case('adapters_exact', 'opd_exact', **adapters)
  case('adapters_of_itself', 'opd', **adapters, teacher__kind='initial_student', teacher__path='')
  case('fixed_point', 'opd', teacher__kind='initial_student', teacher__path='')
  case('bfloat16_teacher', 'opd', compute__frozen_dtype='bfloat16')
  case('bfloat16_teacher_gated', 'vopd', compute__frozen_dtype='bfloat16')
  case('bfloat16', 'opd_exact', compute__dtype='bfloat16')
  case('mixed_and_given', 'gkd', given__source='dataset', given__split='corpus',
       given__prompts_per_step=8, given__likelihood_coef=0.1, data__max_new_tokens=36)
  case('two_updates', 'vopd', optimizer__updates_per_batch=2, objective__advantages='recomputed')
  case('temperatures', 'opd', sample__temperature=0.7, objective__teacher_temperature=1.2,
       sample__top_p=0.9)
  c = experiment.default_pipeline()
  c.name = 'golden'
  first, second = small(stage('sft')), small(stage('opd_exact'))
  second.student.path = 'stage:first'
  c.stages = ConfigDict(dict(first=first, second=second))
  c.order = ('first', 'second')
  c.report.methods = c.report.labels = ('second',)
  out['pipeline'] = c
  return out


def digest(folder: pathlib.Path) -> str:
  """The SHA-256 of every tensor of a directory, by name."""
  from safetensors.numpy import load_file
  total = hashlib.sha256()
  for file in sorted(folder.glob('*.safetensors')):
    for name, x in sorted(load_file(file).items()):
      total.update(f'{name} {x.dtype} {x.shape}'.encode() + x.tobytes())
  return total.hexdigest()[:16]


def look(workdir: pathlib.Path) -> dict[str, Any]:
  """What is written down of a finished run."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  rows = [{k: v for k, v in r.items() if k not in NOT_GOLDEN} for r in rows]
  result = json.loads((workdir / 'result.json').read_text())
  return summary({'parameters': digest(workdir / 'export'), 'rows': rows,
                  'teacher': result['teacher']} | (
      {'adapter': digest(workdir / 'adapter')} if (workdir / 'adapter').exists() else {}))


def summary(run: dict[str, Any]) -> dict[str, Any]:
  """A run in a few lines: digests of everything, and the numbers that say most."""
  def of(row):
    everything = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
    return {'digest': everything} | {k: row[k] for k in SHOWN if k in row}

  return {k: v for k, v in run.items() if k not in ('rows', 'teacher')} | {
      'rows': [of(row) for row in run['rows'] if row['kind'] != 'data'],
      'teacher': run['teacher'] and of(run['teacher'])}


def child(folder: pathlib.Path, names: list[str]) -> None:
  """Runs the cases on the devices of this process."""
  import jax

  from opd_jax import experiment, train
  from opd_jax.tools import pipeline
  out = {}
  for name, c in cases().items():
    if names and name not in names:
      continue
    many = experiment.is_pipeline(c)
    for run in c.stages.values() if many else (c,):
      if jax.device_count() > 1:
        run.compute.mesh.fsdp, run.compute.mesh.tensor = 2, jax.device_count() // 2
    workdir = folder / name
    with contextlib.redirect_stdout(io.StringIO()):
      (pipeline.run if many else train.train)(c, workdir)
    out[name] = {s: look(workdir / 'seed_0' / s) for s in c.order} if many else look(workdir)
    print(name, flush=True)
    (folder / 'golden.json').write_text(json.dumps(out))


def run(names: list[str]) -> dict[str, Any]:
  """{devices: {case: what it came out as}}."""
  out = {}
  for devices in DEVICES:
    with tempfile.TemporaryDirectory() as folder:
      # Without optimization programs compile several times faster, and bits are bits.
      env = dict(os.environ, JAX_PLATFORMS='cpu', HF_HUB_OFFLINE='1', PYTHONPATH=str(ROOT),
                 XLA_FLAGS=f'--xla_force_host_platform_device_count={devices} '
                           + quick.flags(one_piece=False))
      env.setdefault('JAX_COMPILATION_CACHE_DIR', f'{folder}/cache')
      env.update(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
                 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES='-1')
      subprocess.run([sys.executable, __file__, 'child', folder, *names], env=env, check=True)
      out[str(devices)] = json.loads((pathlib.Path(folder) / 'golden.json').read_text())
  return out


def flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  """{'a.b.0': leaf}."""
  if isinstance(tree, dict | list):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for name, x in items for k, v in flat(x, f'{prefix}{name}.').items()}
  return {prefix[:-1]: tree}


def compare(want: Any, got: Any) -> tuple[list[str], float]:
  """What differs beyond rounding, and the largest relative difference of a number."""
  a, b = flat(want), flat(got)
  wrong = [f'{k}: only in {"the file" if k in a else "this run"}' for k in sorted(set(a) ^ set(b))]
  worst = 0.0
  for k in sorted(set(a) & set(b)):
    if a[k] == b[k] or k.endswith(DIGESTS):  # `main` says which digests differ
      continue
    if isinstance(a[k], float) and isinstance(b[k], float):
      apart = abs(a[k] - b[k]) / max(abs(a[k]), 1e-3)
      worst = max(worst, apart)
      if apart <= RELATIVE:
        continue
    wrong.append(f'{k}: {a[k]!r} -> {b[k]!r}')
  return wrong, worst


def main() -> int:
  """See the top of this file."""
  command, *names = sys.argv[1:]
  if command == 'child':
    child(pathlib.Path(names[0]), names[1:])
    return 0
  got = run(names)
  if command == 'write':
    before = json.loads(FILE.read_text()) if names and FILE.exists() else {}
    for devices in got:
      got[devices] = before.get(devices, {}) | got[devices]
    FILE.write_text(json.dumps(got, indent=1) + '\n')
    return 0
  want, bad = json.loads(FILE.read_text()), 0
  for devices, runs in got.items():
    for name, result in runs.items():
      wrong, worst = compare(want[devices][name], result)
      same = flat(want[devices][name]) == flat(result)
      bits = [k for k, v in flat(result).items() if k.endswith(DIGESTS)
              and flat(want[devices][name]).get(k) != v][:4]
      bad += bool(wrong)
      print(f'{devices} {name}: ' + ('the same bits' if same else f'other bits in {bits}, '
            f'numbers within {worst:.1e}') + ''.join(f'\n    {w}' for w in wrong[:12]))
  return bool(bad)


if __name__ == '__main__':
  assert math.isfinite(RELATIVE)
  sys.exit(main())
