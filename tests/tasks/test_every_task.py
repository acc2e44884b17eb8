"""What every task must satisfy: a new file of tasks/ is covered without an edit."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from opd_jax import tasks


def _small_options(task, folder):
  """The defaults with a few dozen examples a split, or the task's own example."""
  if hasattr(task, 'example_options'):
    return tasks.options(task, task.example_options(folder))
  sizes = {f.name: 60 for f in dataclasses.fields(task.Options) if f.name.endswith('_examples')}
  return tasks.options(task, sizes)


def _installed(name):
  """Whether the library is there that a task needs, if it needs one; an extra need not be."""
  try:
    tasks.get(name).Options()
  except ValueError as e:
    return 'not installed' not in str(e)
  return True


INSTALLED = [name for name in tasks.names() if _installed(name)]


def _digest(name):
  """What a task's eval split holds, as a string that any process must reproduce."""
  task = tasks.get(name)
  with tempfile.TemporaryDirectory() as folder:
    rows = task.load('eval', _small_options(task, pathlib.Path(folder))).to_list()
  return json.dumps(rows, sort_keys=True, default=str)


@pytest.mark.parametrize('name', INSTALLED)
def test_task(name, tmp_path):
  task = tasks.get(name)
  options = _small_options(task, tmp_path)
  splits = {split: task.load(split, options) for split in ('eval', 'train')}
  prompts = {split: [task.prompt(row) for row in rows] for split, rows in splits.items()}
  for split, texts in prompts.items():
    assert len(texts) > 0 and all(isinstance(t, str | list) and t for t in texts)
    assert task.load(split, options).to_list() == splits[split].to_list(), 'not deterministic'
  asked = {split: set(map(json.dumps, texts)) for split, texts in prompts.items()}
  assert not asked['eval'] & asked['train'], 'training on held-out problems'
  rng = np.random.RandomState(0)
  for row in splits['eval'].select(range(20)):
    for text in ('', '#', 'no answer', '#12', ''.join(map(chr, rng.randint(32, 127, 40)))):
      reward = task.grade(row, text)
      assert isinstance(reward, float) and 0.0 <= reward <= 1.0
    assert task.grade(row, '') < 1.0, 'saying nothing is worth the full reward'
  with pytest.raises(ValueError, match=r"^split='no_such_split'; allowed: \["):
    task.load('no_such_split', options)
  with pytest.raises(ValueError, match='no_such_knob') as error:
    tasks.options(task, {'no_such_knob': 1})
  assert all(f.name in str(error.value) for f in dataclasses.fields(task.Options))
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(options, dataclasses.fields(options)[0].name, None)


@pytest.mark.parametrize('name', INSTALLED)
def test_a_corpus_has_completions_and_no_held_out_problem(name, tmp_path):
  task = tasks.get(name)
  options = _small_options(task, tmp_path)
  try:
    corpus = task.load('corpus', options)
  except ValueError:
    pytest.skip('no corpus split')
  held_out = {task.prompt(row) for row in task.load('eval', options)}
  rows = corpus.to_list()
  assert rows and not held_out & {task.prompt(row) for row in rows}
  assert all(isinstance(row['completion'], str) for row in rows)
  # With the default options the corpus shows how to do it: full reward for its own text.
  assert max(task.grade(row, row['completion']) for row in rows) == 1.0


def test_tasks_are_the_same_in_every_process():
  # String hashing is random from process to process: a generator seeded by hash() would show here.
  code = ('import test_every_task as t, json; '
          'print(json.dumps({n: t._digest(n) for n in t.INSTALLED}))')
  out = subprocess.run(
      [sys.executable, '-c', code], check=True, capture_output=True, text=True,
      cwd=pathlib.Path(__file__).parent, env={**os.environ, 'PYTHONHASHSEED': '7'}).stdout
  assert json.loads(out.splitlines()[-1]) == {name: _digest(name) for name in INSTALLED}


def test_tasks_are_found_by_listing_the_folder():
  here = pathlib.Path(tasks.__file__).parent
  files = [f for f in (*here.glob('*.py'), *here.glob('[!_]*/*.py')) if f.stem[0] != '_']
  assert tasks.names() == sorted({f.stem for f in files}) and len(files) == len(tasks.names())
  assert 'aime24' in tasks.names('benchmarks') and 'deepmath' not in tasks.names('benchmarks')
  with pytest.raises(ValueError) as error:
    tasks.get('chess')
  assert "task.name='chess'" in str(error.value) and str(tasks.names()) in str(error.value)
