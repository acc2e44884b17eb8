"""Checkpoints whose small files are damaged: no other number is ever read than was written."""

import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.files import checkpoint, disk
from opd_jax.types import TrainState

CHECKSUMS = jax.jit(checkpoint.checksums)


def make_state(step):
  return jax.tree.map(jnp.asarray, TrainState(
      step=np.int32(step), params={'w': np.arange(step, step + 6, dtype=np.float32)},
      opt_state=()))


def history(step):
  return {'step': step, 'flops': {'student': 1.5 * step}, 'evals': [{'step': 0, 'x': 0.1 * step}]}


def open_store(path, **options):
  return checkpoint.Checkpoints(path, **{**dict(
      keep_latest=3, keep_best=1, best_metric='x', checksums=CHECKSUMS), **options})


def restore(path):
  with open_store(path) as store:
    state, host = store.restore_latest(jax.eval_shape(lambda: make_state(1)))
  return int(state.step), host


@pytest.fixture
def folder(tmp_path):
  """Checkpoints of the steps 1 and 2."""
  with open_store(tmp_path / 'checkpoints') as store:
    for step in (1, 2):
      store.save(make_state(step), step, history(step), {'x': 0.1 * step})
  return tmp_path / 'checkpoints'


def test_what_is_read_is_what_was_saved(folder):
  assert restore(folder) == (2, history(2))


# Of the history: another step, another float, a key that is gone, and one that is new.
HOSTS = [lambda h: h.update(step=4), lambda h: h['flops'].update(student=3.0000000000000004),
         lambda h: h.pop('flops'), lambda h: h.pop('checksums'), lambda h: h.pop('metrics'),
         lambda h: h.pop('digest'), lambda h: h.update(stopped_at=2),
         lambda h: h['evals'].append(h['evals'][0])]


@pytest.mark.parametrize('change', HOSTS)
def test_another_history_falls_back(change, folder, capsys):
  file = folder / '2' / 'host' / 'metadata'
  host = json.loads(file.read_text())
  change(host)
  file.write_text(json.dumps(host))
  assert restore(folder) == (1, history(1))
  assert 'the checkpoint of step 2 is damaged' in capsys.readouterr().err
  assert (folder.parent / 'damaged' / '2').is_dir()


def test_a_checkpoint_under_another_steps_name_falls_back(folder):
  (folder / '2').rename(folder / '3')
  assert restore(folder) == (1, history(1))


@pytest.mark.parametrize('bit', range(8))
def test_no_flipped_bit_of_the_history_is_accepted(bit, folder):
  file = folder / '2' / 'host' / 'metadata'
  content = file.read_bytes()
  rng = np.random.RandomState(bit)
  with open_store(folder, read_only=True) as store:
    for at in rng.choice(len(content), 12, replace=False):
      flipped = bytearray(content)
      flipped[at] ^= 1 << bit
      file.write_bytes(flipped)
      try:
        _, host = store.restore(2, jax.eval_shape(lambda: make_state(1)))
      except Exception:  # JSON, orbax and the digest each raise their own
        continue
      assert host == history(2)  # such as a space that became another one


@pytest.mark.parametrize(('name', 'content'), [
    ('metrics/metrics', '{"x": 0.3}'), ('metrics/metrics', '[]'), ('metrics/metrics', ''),
    ('metrics/metrics', 'null'), ('_CHECKPOINT_METADATA', '[1, 2]')])
def test_another_small_file_falls_back(name, content, folder, capsys):
  (folder / '2' / name).write_text(content)
  assert restore(folder) == (1, history(1))
  assert 'the checkpoint of step 2 is damaged' in capsys.readouterr().err


def test_damaged_metrics_of_every_checkpoint_stop_every_start(folder):
  for step in (1, 2):
    (folder / str(step) / 'metrics' / 'metrics').write_text('{"x":')
  for _ in range(2):  # starting anew is the user's decision
    with pytest.raises(checkpoint.DamagedError, match='nothing was changed'):
      open_store(folder)
  with open_store(folder, read_only=True) as store:  # an export needs no metrics
    assert store.restore(2, jax.eval_shape(lambda: make_state(1)))[1] == history(2)


class TestRefused:
  """The file system refuses a save: one line with the path, and what is there stays."""

  @pytest.mark.parametrize('error', [
      OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
      OSError(errno.EROFS, os.strerror(errno.EROFS)),
      # What tensorstore raises.
      ValueError('RESOURCE_EXHAUSTED: Error writing "params.w/0" in OCDBT database:\n Failed to '
                 "write 82788 bytes to file 4: No space left on device [os_error_code='28']")])
  def test_a_disk_that_is_full(self, error, folder, monkeypatch):
    def refuse(*args, **options):
      raise error

    store = open_store(folder)
    with monkeypatch.context() as m:
      m.setattr(checkpoint.ocp.CheckpointManager, 'save', refuse)
      with pytest.raises(disk.StorageError, match='cannot be written: (No space|Read-only)') as e:
        store.save(make_state(3), 3, history(3), None)
    assert str(folder) in str(e.value) and '\n' not in str(e.value)
    store.close()
    assert restore(folder) == (2, history(2))

  @pytest.mark.parametrize(('error', 'reason'), [
      ("Failed to write: No space left on device [os_error_code='28']", 'No space left'),
      # What orbax raises if some of its files go before the checkpoint is whole.
      ('Save failed: 4/45 params are missing .zarray in checkpoint:\nparams.embed', 'Save failed')])
  def test_while_it_writes_in_the_background(self, error, reason, folder, monkeypatch):
    def refuse(self):
      raise ValueError(error)

    store = open_store(folder)
    with monkeypatch.context() as m:
      m.setattr(checkpoint.ocp.CheckpointManager, 'wait_until_finished', refuse)
      for wait in (store.wait, store.close):
        with pytest.raises(disk.StorageError, match=f'written: .*{reason}') as e:
          wait()
        assert str(folder) in str(e.value) and '\n' not in str(e.value)
    assert restore(folder) == (2, history(2))

  def test_a_directory_that_was_removed_is_not_made_again(self, folder):
    store = open_store(folder)
    shutil.rmtree(folder)
    with pytest.raises(disk.StorageError, match='was removed'):
      store.save(make_state(3), 3, history(3), None)
    store.close()
    assert not folder.exists()

  def test_an_error_that_is_not_the_file_systems_stays_what_it_is(self, folder, monkeypatch):
    for error in (RuntimeError, ValueError):
      def fail(*args, error=error, **options):
        raise error('of another kind')

      monkeypatch.setattr(checkpoint.ocp.CheckpointManager, 'save', fail)
      with open_store(folder) as store, pytest.raises(error, match='of another kind'):
        store.save(make_state(3), 3, history(3), None)


class TestDeleted:

  def test_old_ones_lose_their_name_in_one_step(self, tmp_path, monkeypatch):
    # Whenever the process is killed, no half of a checkpoint has a step's name.
    monkeypatch.setattr(checkpoint.shutil, 'rmtree', lambda *args, **options: None)
    with open_store(tmp_path / 'c', keep_latest=2, keep_best=0) as store:
      for step in range(1, 5):
        store.save(make_state(step), step, history(step), None)
    assert sorted(os.listdir(tmp_path / 'c')) == ['3', '4', 'deleted']
    for step in '12':
      gone = {p.relative_to(tmp_path / 'c' / 'deleted' / step)
              for p in (tmp_path / 'c' / 'deleted' / step).rglob('metadata')}
      assert len(gone) == 1  # whole

  def test_what_a_kill_left_is_removed_at_the_next_start(self, folder):
    shutil.copytree(folder / '1', folder / 'deleted' / '0')
    (folder / 'deleted' / '0' / 'host' / 'metadata').unlink()
    assert restore(folder) == (2, history(2))
    assert sorted(os.listdir(folder)) == ['1', '2']
