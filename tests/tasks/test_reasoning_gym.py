"""The task whose problems a library makes; most of it needs the library."""

import base64
import importlib.util
import pickle

import pytest

from opd_jax import config, tasks
from opd_jax.tasks import _math


def make(**values):
  return tasks.options(tasks.get('reasoning_gym'), values)


def test_the_process_that_scores(tmp_path, monkeypatch):
  # A library of three lines in its place: this runs where it is not installed.
  (tmp_path / 'reasoning_gym.py').write_text('''
class Set:
  def score_answer(self, answer, entry):
    print(answer, flush=True)
    return {'right': 7.0, 'half': 0.5, 'wrong': -1.0}[answer] * entry['factor']

def create_dataset(name, size, seed):
  assert (name, size, seed) == ('sums', 1, 0)
  return Set()
''')
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  worker = _math.Worker(_math.JUDGES / 'reasoning_gym_scores.py', 'answers')
  problem = base64.b64encode(pickle.dumps({'factor': 1})).decode()
  scores = [worker.ask('sums', problem, a) for a in ('right', 'half', 'wrong', 'no key')]
  worker.kill()
  assert scores == [1.0, 0.5, 0.0, 0.0]


def test_without_the_library(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError) as e:
    config.task_config('reasoning_gym')
  assert str(e.value) == (
      "task.name='reasoning_gym' needs reasoning-gym, which is not installed; allowed: `pip "
      "install -e '.[reasoning-gym]'`, or another task")


class TestWithTheLibrary:

  @pytest.fixture(autouse=True)
  def library(self):
    return pytest.importorskip('reasoning_gym')

  def test_the_library_scores_what_is_in_the_answer(self, library):
    task, options = tasks.get('reasoning_gym'), make(train_examples=20, eval_examples=10)
    rows = task.load('train', options).to_list()
    answer = library.create_dataset('chain_sum', size=20, seed=0)[3]['answer']
    assert task.grade(rows[3], f'<answer>1</answer> no: <answer> {answer}\n</answer>') == 1.0
    assert task.grade_all([rows[3]] * 3, [answer, '<answer></answer>', '<answer>x</answer>']) == [
        0.0, 0.0, 0.0]
    assert rows[3]['prompt'].startswith('State the final answer') and task.group(
        rows[3]) == 'chain_sum'

  def test_partial_credit_is_kept(self, library):
    task = tasks.get('reasoning_gym')
    row = task.load('eval', make(datasets=('puzzle24',), eval_examples=1))[0]
    assert task.grade(row, '<answer>1+1</answer>') == pytest.approx(0.01)

  def test_data_sets_in_turn_and_held_out_ones_apart(self):
    task, names = tasks.get('reasoning_gym'), ('chain_sum', 'leg_counting', 'knights_knaves')
    options = make(datasets=names, train_examples=10, eval_examples=5)
    rows = task.load('train', options)
    assert rows['dataset'][:] == [names[i % 3] for i in range(10)]
    other = make(datasets=names, train_examples=10, eval_examples=5, data_seed=100)
    assert not set(rows['prompt']) & set(task.load('train', other)['prompt'])
    assert task.load('eval', options).to_list() == task.load('eval', other).to_list()

  def test_a_verifier_that_does_not_come_back(self, monkeypatch):
    task = tasks.get('reasoning_gym')
    row = task.load('eval', make(datasets=('puzzle24',), eval_examples=1))[0]
    monkeypatch.setattr(_math, 'CPU_SECONDS', 1)
    task._pool.close()
    hang = '<answer>9**9**9**9</answer>'
    assert task.grade_all([row] * 2, [hang, '<answer>1</answer>']) == [
        0.0, pytest.approx(0.01)]
    task._pool.close()

  @pytest.mark.parametrize('values, part', [
      (dict(datasets=('chain_sums', 'ab')), "unknown names ['chain_sums']; allowed: at least one"),
      (dict(datasets=()), 'datasets=()'), (dict(datasets=('composite',)), "['composite']"),
      (dict(eval_examples=0), 'eval_examples=0; allowed: at least 1'),
      (dict(data_seed=-1), 'data_seed=-1')])
  def test_what_is_refused(self, values, part):
    with pytest.raises(ValueError, match='allowed') as e:
      make(**values)
    assert part in str(e.value)
    if 'datasets' in values:
      assert "'leg_counting'" in str(e.value)
