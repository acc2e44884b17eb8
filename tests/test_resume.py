"""Kill a run anywhere, start it again: the same bits as if nothing had happened."""

import json
import os
import pathlib
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reuse
import tiny

from opd_jax import train
from opd_jax.files import checkpoint
from opd_jax.files import workdir as workdir_lib
from opd_jax.types import TrainState

STEPS, EVERY = 9, 3


def make():
  """Sampled OPD: state, teacher, sampling and evaluation all have a part in it."""
  c = tiny.with_models('opd_sampled', steps=STEPS, eval__every_steps=4,
                       checkpoint__every_steps=EVERY, checkpoint__keep_latest=3)
  # Less than an epoch a step and more than one in all: the order of the data must survive too.
  return tiny.override(c, data__limit=40)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """The work directory of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp('straight')
  reuse.train(make(), workdir)
  return workdir


@pytest.fixture
def command(tmp_path):
  """The arguments of `opd` for that run in `tmp_path / run`."""
  file = tiny.write_config(tmp_path / 'experiment.py', make())
  return 'train', '--config', file, '--workdir', tmp_path / 'run'


def assert_same_run(workdir, straight, later_than=-1):
  tiny.assert_same_bits(tiny.read_checkpoint(workdir, STEPS), tiny.read_checkpoint(straight, STEPS))
  # Every row, not only the later ones: none may be lost, doubled or out of order.
  assert tiny.rows(workdir, timing=False) == tiny.rows(straight, timing=False)
  assert (workdir / 'result.json').read_text() == (straight / 'result.json').read_text()
  a, b = tiny.load_export(workdir), tiny.load_export(straight)
  assert all(a[name].tobytes() == b[name].tobytes() for name in b)


def test_the_comparison_sees_a_difference(straight, tmp_path):
  # One other step from the same checkpoint on: everything after it must differ.
  c = make()
  c.seed = 1
  reuse.train(c, tmp_path)
  with pytest.raises(AssertionError):
    tiny.assert_same_bits(tiny.read_checkpoint(tmp_path, STEPS),
                          tiny.read_checkpoint(straight, STEPS))
  mine, theirs = (tiny.rows(w, 'train', timing=False) for w in (tmp_path, straight))
  assert all(a['loss'] != b['loss'] for a, b in zip(mine, theirs, strict=True))


class TestKilled:

  def test_between_checkpoints(self, straight, command, tmp_path):
    run = tmp_path / 'run'
    with tiny.Held('row:5', *command, cwd=tmp_path) as held:
      tiny.wait_until(lambda: 4 in tiny.checkpoint_steps(run))  # saved in the background
      held.process.send_signal(signal.SIGKILL)
      assert held.finish()[0] == -signal.SIGKILL
    assert tiny.rows(run)[-1]['step'] == 5 and not (run / 'result.json').exists()
    done = tiny.opd(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'resumed from the checkpoint of step 4' in done.stdout
    assert_same_run(run, straight)

  def test_during_the_first_save(self, straight, command, tmp_path):
    run = tmp_path / 'run'
    with tiny.Held(f'commit:{EVERY}', *command, cwd=tmp_path) as held:
      held.process.send_signal(signal.SIGKILL)
      held.finish()
    leftovers = [p.name for p in (run / 'checkpoints').iterdir()]
    assert leftovers and not tiny.checkpoint_steps(run)  # there is a half-finished one
    reuse.train(make(), run)
    assert_same_run(run, straight)
    names = [sorted(p.name for p in (w / 'checkpoints').iterdir()) for w in (run, straight)]
    assert names[0] == names[1]  # the leftover is gone

  def test_between_the_last_checkpoint_and_the_export(self, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
      m.setattr(train, 'finish', None)
      with pytest.raises(TypeError):
        reuse.train(make(), tmp_path)
    reuse.train(make(), tmp_path)
    assert_same_run(tmp_path, straight)

  def test_during_the_export(self, straight, tmp_path, monkeypatch):
    rename = pathlib.Path.rename

    def killed(path, target):
      if target.name == workdir_lib.RESULT:  # it never gets its name
        raise KeyboardInterrupt
      return rename(path, target)

    with monkeypatch.context() as m:
      m.setattr(pathlib.Path, 'rename', killed)
      with pytest.raises(KeyboardInterrupt):
        reuse.train(make(), tmp_path)
    assert (tmp_path / workdir_lib.EXPORT).exists()
    reuse.train(make(), tmp_path)
    assert_same_run(tmp_path, straight)


class TestTerminated:

  @pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
  def test_saves_the_step_it_is_in_and_goes_on_from_there(
      self, number, straight, command, tmp_path):
    run = tmp_path / 'run'
    with tiny.Held('row:5', *command, cwd=tmp_path) as held:
      held.process.send_signal(number)
      held.release()
      status, _, err = held.finish()
    assert status == 143, err
    last = tiny.rows(run)[-1]['step']
    # The metrics of step 5 are read while step 6 runs.
    assert last == 6 and tiny.checkpoint_steps(run)[-1] == last
    assert f'interrupted at step {last}' in err and 'Traceback' not in err
    saved = tiny.read_checkpoint(run, last)
    assert saved["['step']"] == saved['host']['step'] == last
    reuse.train(make(), run)
    assert_same_run(run, straight)

  def test_at_a_step_that_has_no_checkpoint_of_its_own(self, straight, command, tmp_path):
    run = tmp_path / 'run'
    with tiny.Held('row:6', *command, cwd=tmp_path) as held:  # written before step 7 starts
      held.process.send_signal(signal.SIGTERM)
      held.release()
      assert held.finish()[0] == 143
    assert tiny.checkpoint_steps(run)[-1] == tiny.rows(run)[-1]['step']
    reuse.train(make(), run)
    assert_same_run(run, straight)


@pytest.fixture
def stopped(straight, tmp_path):
  """A copy of a run as it was before its end: checkpoints 6, 8 (an evaluation) and 9, no result."""
  workdir = tmp_path / 'stopped'
  shutil.copytree(straight, workdir)
  shutil.rmtree(workdir / 'export')
  (workdir / 'result.json').unlink()
  return workdir


def largest_file(folder):
  """The parameters and the optimizer state, whatever the format calls the file."""
  return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
  file = largest_file(folder)
  os.truncate(file, file.stat().st_size // 2)


def empty(folder):
  os.truncate(largest_file(folder), 0)


def delete(folder):
  largest_file(folder).unlink()


def delete_metadata(folder):
  (folder / 'state' / '_METADATA').unlink()


def delete_host(folder):
  (folder / 'host' / 'metadata').unlink()


def garble_host(folder):
  file = folder / 'host' / 'metadata'
  file.write_bytes(file.read_bytes()[:-20])


def flip(folder, at=0.5, count=64):
  file = largest_file(folder)
  content = bytearray(file.read_bytes())
  start = int(len(content) * at)
  for i in range(start, start + count):
    content[i] ^= 0xFF
  file.write_bytes(content)


def flip_one_bit(folder):
  file = largest_file(folder)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


class TestDamaged:

  @pytest.mark.parametrize('damage', [truncate, empty, delete, delete_metadata, delete_host,
                                      garble_host, flip, flip_one_bit])
  def test_the_newest_falls_back_loudly_to_the_one_before(
      self, damage, straight, stopped, capsys):
    damage(stopped / 'checkpoints' / str(STEPS))
    reuse.train(make(), stopped)
    captured = capsys.readouterr()
    assert f'WARNING: the checkpoint of step {STEPS} is damaged' in captured.err
    assert 'resumed from the checkpoint of step 8' in captured.out
    assert (stopped / 'damaged' / str(STEPS)).is_dir()
    assert_same_run(stopped, straight)

  def test_two_of_them(self, straight, stopped, capsys):
    for step in (8, 9):
      truncate(stopped / 'checkpoints' / str(step))
    reuse.train(make(), stopped)
    assert capsys.readouterr().err.count('WARNING') == 2
    assert_same_run(stopped, straight)

  def test_all_of_them_stops_every_start(self, stopped):
    for folder in (stopped / 'checkpoints').iterdir():
      delete(folder)
    rows = tiny.rows(stopped)
    for _ in range(2):  # not only the first: starting anew is the user's decision
      with pytest.raises(RuntimeError, match=r'no checkpoint .* can be read'):
        reuse.train(make(), stopped)
      assert tiny.rows(stopped) == rows and not (stopped / 'result.json').exists()


class TestKept:

  def state(self, value):
    state = TrainState(step=np.int32(value), params={'w': np.full(3, value, np.float32)},
                       opt_state=())
    return jax.tree.map(jnp.asarray, state)

  def fill(self, path, accuracies, **options):
    options = dict(keep_latest=2, keep_best=1, best_metric='accuracy') | options
    store = checkpoint.Checkpoints(path, **options)
    for step, accuracy in enumerate(accuracies, 1):
      store.save(self.state(step), step, {'step': step},
                 None if accuracy is None else {'accuracy': accuracy})
    store.wait()
    return store

  @pytest.mark.parametrize(('accuracies', 'options', 'kept'), [
      ([None] * 5, {}, [4, 5]),
      ([.1, .9, .2, .3, .1], {}, [2, 4, 5]),
      ([.1, .2, .3, .4, .5], {}, [4, 5]),
      ([.9, None, .8, None, None, None], dict(keep_best=2), [1, 3, 5, 6]),
      ([.9, .1, .1], dict(keep_best=0, keep_latest=1), [3]),
  ])
  def test_the_latest_and_the_best(self, accuracies, options, kept, tmp_path):
    store = self.fill(tmp_path / 'checkpoints', accuracies, **options)
    assert store.steps() == kept
    store.close()

  def test_the_best_is_remembered_over_a_restart(self, tmp_path):
    self.fill(tmp_path / 'checkpoints', [.1, .9, .2]).close()
    store = checkpoint.Checkpoints(tmp_path / 'checkpoints', keep_latest=2, keep_best=1,
                                   best_metric='accuracy')
    for step in (4, 5):
      store.save(self.state(step), step, {'step': step}, {'accuracy': .3})
    store.wait()
    assert store.steps() == [2, 4, 5]
    store.close()

  def test_saving_a_step_twice_changes_nothing(self, tmp_path):
    store = self.fill(tmp_path / 'checkpoints', [None])
    store.save(self.state(7), 1, {'step': 7}, None)
    store.wait()
    state, host = store.restore_latest(jax.eval_shape(lambda: self.state(1)))
    assert host == {'step': 1} and state.params['w'][0] == 1
    store.close()

  def test_what_happens_after_saving_is_not_in_it(self, tmp_path, monkeypatch):
    # The host item is written in the background while the loop goes on counting in it.
    counted, dumps = threading.Event(), json.dumps

    def slow_dumps(*args, **options):
      if threading.current_thread() is not threading.main_thread():
        counted.wait(timeout=10)
      return dumps(*args, **options)

    monkeypatch.setattr(json, 'dumps', slow_dumps)
    store = checkpoint.Checkpoints(tmp_path / 'checkpoints', keep_latest=1, keep_best=0,
                                   best_metric='accuracy')
    host = {'step': 1, 'flops': {'student': 1.0}, 'evals': [{'step': 0}]}
    store.save(self.state(1), 1, host, None)
    host['flops']['student'] += 1.0
    host['evals'].append({'step': 1})
    counted.set()
    store.wait()
    _, restored = store.restore_latest(jax.eval_shape(lambda: self.state(1)))
    assert restored == {'step': 1, 'flops': {'student': 1.0}, 'evals': [{'step': 0}]}
    store.close()

  def test_none_at_all(self, tmp_path):
    store = checkpoint.Checkpoints(tmp_path / 'checkpoints', keep_latest=1, keep_best=0,
                                   best_metric='accuracy')
    assert store.restore_latest(jax.eval_shape(lambda: self.state(1))) is None
    store.close()


class TestHost:

  def test_a_damaged_metrics_file_does_not_stop_the_start(self, tmp_path, capsys):
    def open_store():
      return checkpoint.Checkpoints(tmp_path / 'c', keep_latest=3, keep_best=1, best_metric='x')

    store = open_store()
    state = TrainState(step=jnp.int32(1), params={}, opt_state=())
    for step in (1, 2):
      store.save(state, step, {'step': step}, {'x': 0.5})
    store.close()
    (tmp_path / 'c' / '2' / 'metrics' / 'metrics').write_text('{"x": ')
    store = open_store()
    assert 'the checkpoint of step 2 is damaged' in capsys.readouterr().err
    assert store.restore_latest(jax.eval_shape(lambda: state))[1] == {'step': 1}
    store.close()

  def test_a_half_written_metrics_file_of_an_interrupted_save(self, tmp_path):
    # Not a checkpoint yet: nothing to warn about, and no reason not to start.
    leftover = tmp_path / 'c' / '3.orbax-checkpoint-tmp' / 'metrics'
    leftover.mkdir(parents=True)
    (leftover / 'metrics').write_text('{"x": ')
    store = checkpoint.Checkpoints(tmp_path / 'c', keep_latest=3, keep_best=1, best_metric='x')
    assert store.steps() == []
    store.close()

  def test_a_failure_that_is_not_the_files_moves_nothing(self, tmp_path, monkeypatch):
    store = checkpoint.Checkpoints(tmp_path / 'c', keep_latest=3, keep_best=0, best_metric='x')
    state = TrainState(step=jnp.int32(1), params={}, opt_state=())
    for step in (1, 2):
      store.save(state, step, {'step': step}, None)
    store.wait()

    def full(*args, **options):
      raise MemoryError('another process holds the device')

    with monkeypatch.context() as patch:
      patch.setattr(ocp.StandardCheckpointHandler, 'restore', full)
      with pytest.raises(checkpoint.DamagedError, match='nothing was changed.*another process'):
        store.restore_latest(jax.eval_shape(lambda: state))
    assert store.steps() == [1, 2]
    assert store.restore_latest(jax.eval_shape(lambda: state))[1] == {'step': 2}
    store.close()
