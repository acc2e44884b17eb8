"""experiments/pods/: every size of every file is a run that fits its mesh, and is documented."""

from __future__ import annotations

import ast
import importlib.util
import json
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import tiny

from opd_jax import experiment
from opd_jax.errors import ConfigError
from opd_jax.tools.plan import hardware, shapes

FOLDER = tiny.ROOT / 'experiments' / 'pods'
FILES = sorted(FOLDER.glob('*.py'))
ARGUMENTS = [f'{size},answers={answers}' for size in experiment.MACHINES
             for answers in experiment.ANSWERS]
each_file = pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
# Models, mesh and rows of every size held against each other, on as many CPU devices as chips.
CHILD = '''
import json, sys
import jax
jax.config.update('jax_num_cpu_devices', 64)
from opd_jax import experiment
from opd_jax.tools.plan import shapes
import runpy
folder, *files = sys.argv[1:]
out = {}
for file in files:
  make = runpy.run_path(file)['get_config']
  for size, machines in experiment.MACHINES.items():
    for answers in experiment.ANSWERS:
      run = shapes.parse(make(f'{size},answers={answers}'), folder)
      parts = shapes.open_parts(run, jax.devices()[:machines.chips])
      out[run.name] = [parts.mesh.size, parts.teacher.model.family]
print(json.dumps(out))
'''


def _make(file):
  return runpy.run_path(str(file))['get_config']


@each_file
@pytest.mark.parametrize('argument', ARGUMENTS)
def test_every_size_is_a_run(file, argument):
  run = shapes.parse(_make(file)(argument), str(FOLDER / 'models'))
  size, _, answers = argument.partition(',answers=')
  assert run.data.max_new_tokens == experiment.ANSWERS[answers]
  assert run.name == f'{file.stem}-{size}-{answers}'
  assert pathlib.Path(run.student.path, 'config.json').is_file()


@each_file
def test_what_it_does_not_know(file):
  make = _make(file)
  for argument, field in (('8b', 'size='), ('answers=huge', 'answers='), ('x=1', 'x=1')):
    with pytest.raises(ConfigError, match=f'{field}.*allowed'):
      make(argument)


@each_file
def test_says_how_it_is_run_and_what_it_takes(file):
  text = ast.get_docstring(ast.parse(file.read_text()))
  for part in (f'opd train --config experiments/pods/{file.name}:',
               f'opd plan --config experiments/pods/{file.name}:', 'PLAN.md', 'Expected: '):
    assert part in text
  for size in experiment.MACHINES:
    assert f'`{size}`' in text
  size, topology = re.search(r'opd plan --config \S+:(\S+) --topology (\S+)', text).groups()
  assert experiment.MACHINES[size].topology == topology


def test_machines_are_topologies():
  for machines in experiment.MACHINES.values():
    assert hardware.parse(machines.topology).chips == machines.chips


def test_sizes_fit_their_meshes():
  done = subprocess.run(
      [sys.executable, '-c', CHILD, str(FOLDER / 'models'), *map(str, FILES)], text=True,
      capture_output=True, env=tiny.environment(), timeout=tiny.PATIENCE_S)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  assert len(found) == len(FILES) * len(ARGUMENTS)
  assert {tuple(x) for x in found.values()} >= {(64, 'qwen3'), (64, 'qwen3_moe'), (4, 'qwen3')}


def test_the_models_are_those_of_their_names():
  """Parameters of each, as its name says, in billions."""
  from opd_jax import models
  from opd_jax.models.params import count_params
  for name, billions in (('Qwen3-1.7B-Base', 1.72), ('Qwen3-4B', 4.02), ('Qwen3-8B-Base', 8.19),
                         ('Qwen3-32B', 32.76), ('Qwen3-30B-A3B', 30.53)):
    config = json.loads((FOLDER / 'models' / 'Qwen' / name / 'config.json').read_text())
    assert count_params(models.build(config).specs) / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_table_has_every_size():
  text = (FOLDER / 'PLAN.md').read_text()
  for file in FILES:
    assert f'## {file.stem}' in text
  assert 'benchmarks/pod_plans.py' in text


def test_rows_stay_until_they_are_planned_again(tmp_path, monkeypatch):
  spec = importlib.util.spec_from_file_location(
      'pod_plans', tiny.ROOT / 'benchmarks' / 'pod_plans.py')
  pod_plans = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(pod_plans)
  shutil.copytree(FOLDER, tmp_path / 'pods', ignore=shutil.ignore_patterns('models'))
  monkeypatch.setattr(pod_plans, 'PODS', tmp_path / 'pods')
  before = (FOLDER / 'PLAN.md').read_text().splitlines()
  name = next(iter(pod_plans.rows_there()))
  (tmp_path / f'{name}.json').write_text(json.dumps({'refused': 'no such mesh'}))
  pod_plans.write_table(tmp_path)
  after = (tmp_path / 'pods' / 'PLAN.md').read_text().splitlines()
  changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b and a.startswith('|')]
  assert len(changed) == 1 and 'no such mesh' in changed[0][1]
