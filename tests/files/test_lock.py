"""The lock of a work directory, and files that are whole or not there."""

import json
import os
import signal
import subprocess
import sys

import pytest
import tiny

from opd_jax import config, tasks, train
from opd_jax.errors import ConfigError
from opd_jax.files import disk, huggingface
from opd_jax.files import workdir as workdir_lib

HOLD = '''
import pathlib, sys
from opd_jax.files import workdir
held = workdir.lock(pathlib.Path(sys.argv[1]))
print('held', flush=True)
sys.stdin.read()
'''


@pytest.fixture
def holder(tmp_path):
  """Another process that has the lock of `tmp_path`."""
  process = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=tiny.environment())
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.communicate()


class TestLock:

  def test_one_process_at_a_time_and_none_that_is_dead(self, holder, tmp_path):
    with pytest.raises(ConfigError) as e:
      workdir_lib.lock(tmp_path)
    text = str(e.value)
    assert f'workdir={str(tmp_path)!r} is in use by process {holder.pid}' in text
    assert 'allowed' in text and '\n' not in text
    holder.send_signal(signal.SIGKILL)  # it cannot clean up
    holder.wait()
    assert (tmp_path / workdir_lib.LOCK).exists()
    with workdir_lib.lock(tmp_path) as held:
      held.seek(0)
      assert held.read().startswith(f'process {os.getpid()} ')

  def test_train_is_refused_before_it_opens_a_model(self, holder, tmp_path, monkeypatch):
    monkeypatch.setattr(train.build, 'open_parts', None)
    with pytest.raises(ConfigError, match='is in use by process'):
      train.train(tiny.config('sft'), tmp_path)
    assert not (tmp_path / 'config.json').exists()

  def test_once_within_a_process_too(self, tmp_path):
    with workdir_lib.lock(tmp_path):
      with pytest.raises(ConfigError, match=f'is in use by process {os.getpid()} '):
        workdir_lib.lock(tmp_path)
    workdir_lib.lock(tmp_path).close()

  def test_a_start_that_is_refused_gives_it_back(self, tmp_path, monkeypatch):
    def refuse(run):
      raise ConfigError('steps=0; allowed: 1')

    monkeypatch.setattr(train.build, 'open_parts', refuse)
    with pytest.raises(ConfigError, match='steps=0') as kept:  # as a notebook keeps a traceback
      train.train(tiny.config('sft'), tmp_path)
    workdir_lib.lock(tmp_path).close()
    assert kept.value

  def test_released_at_the_end(self, tmp_path):
    with workdir_lib.lock(tmp_path):
      pass
    done = subprocess.run([sys.executable, '-c', HOLD, str(tmp_path)], text=True, input='',
                          capture_output=True, env=tiny.environment())
    assert done.stdout == 'held\n', done.stderr

  def test_a_file_system_without_locks_is_said(self, tmp_path, monkeypatch, capsys):
    def none(*args):
      raise OSError(37, 'No locks available')

    monkeypatch.setattr(workdir_lib.fcntl, 'flock', none)
    workdir_lib.lock(tmp_path).close()
    assert 'No locks available' in capsys.readouterr().err


class TestWrite:

  def test_the_content_is_on_disk_before_the_name(self, tmp_path, monkeypatch):
    # Else a power failure leaves an empty file under the final name.
    calls, fsync, rename = [], os.fsync, disk.pathlib.Path.rename
    monkeypatch.setattr(os, 'fsync', lambda fd: calls.append(
        os.readlink(f'/proc/self/fd/{fd}')) or fsync(fd))
    monkeypatch.setattr(disk.pathlib.Path, 'rename', lambda self, target: calls.append(
        'rename') or rename(self, target))
    disk.write_json(tmp_path / 'a.json', {'b': 1})
    assert calls == [str(tmp_path / '.a.json.partial'), 'rename', str(tmp_path)]
    assert json.loads((tmp_path / 'a.json').read_text()) == {'b': 1}

  def test_what_was_there_stays_where_the_disk_is_full(self, tmp_path, monkeypatch):
    disk.write_text(tmp_path / 'a', 'before')

    def full(fd):
      raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(disk.StorageError, match='a cannot be written: No space left') as e:
      disk.write_text(tmp_path / 'a', 'after')
    assert '\n' not in str(e.value) and (tmp_path / 'a').read_text() == 'before'


@pytest.mark.parametrize('name', ['config.json', 'result.json'])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(name, tmp_path):
  os.mkfifo(tmp_path / name)
  run = tiny.config('sft')
  with pytest.raises(ConfigError, match=f'{name}.*no regular file'):
    if name == 'config.json':
      workdir_lib.check(tmp_path, config.to_dict(run))
    workdir_lib.result(tmp_path, config.parse(run))


def test_a_pipe_among_what_a_model_or_a_data_set_is_read_from(tmp_path):
  # What opens it for reading waits until somebody writes, and nobody does.
  model = tiny.write_model(tmp_path / 'model')
  (model / 'tokenizer.json').unlink()
  os.mkfifo(model / 'tokenizer.json')
  with pytest.raises(ValueError, match=r'tokenizer\.json.*no regular files; allowed'):
    huggingface.fetch(model)
  os.mkfifo(tmp_path / 'rows.jsonl')
  task = tasks.get('prompts')
  options = task.Options(source=str(tmp_path / 'rows.jsonl'), holdout_examples=1,
                         prompt_column='q', answer_column='a', grader='exact')
  with pytest.raises(ValueError, match=r'task\.options\.source=.*no regular files; allowed'):
    task.load('train', options)
