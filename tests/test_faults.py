"""Faults around a run, end to end: on real file systems, and in processes of their own."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import kills
import pytest
import tiny

from opd_jax import train
from opd_jax.files import checkpoint, disk, huggingface

STEPS = 4
OPD = (sys.executable, '-m', 'opd_jax')


def make():
  return tiny.with_models('opd_sampled', steps=STEPS, checkpoint__every_steps=2,
                          checkpoint__keep_latest=3)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """The work directory of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp('straight')
  train.train(make(), workdir)
  return workdir


@pytest.fixture
def command(tmp_path):
  """The arguments of `opd` for that run in `tmp_path / disk / run`."""
  file = tiny.write_config(tmp_path / 'experiment.py', make())
  return 'train', '--config', file, '--workdir', tmp_path / 'disk' / 'run'


@pytest.fixture
def mounted(tmp_path):
  """Mounts small file systems: (folder, size) -> the folder."""
  folders = []

  def mount(folder, size):
    folder.mkdir(parents=True)
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)],
                          capture_output=True, check=False)
    if done.returncode:
      pytest.skip('only root can mount a file system')
    folders.append(folder)
    return folder

  yield mount
  for folder in folders:
    subprocess.run(['umount', '-l', str(folder)], check=True)


def fill(folder):
  """Leaves no byte of a file system free."""
  with open(folder / 'ballast', 'wb', buffering=0) as file:
    for size in (65536, 1):
      try:
        while file.write(b'x' * size):
          pass
      except OSError:
        pass


def full(folder):
  fill(folder)


def removed(folder):
  while (folder / 'run').exists():  # the writer of a checkpoint may add a file meanwhile
    shutil.rmtree(folder / 'run', ignore_errors=True)


def assert_goes_on(run, straight):
  train.train(make(), run)
  assert kills.differences(run, straight) == []


# Where the fault comes: (owner, name) of the function that is about to be called the nth time.
POINTS = {'between checkpoints': ((train, 'take_step'), 4),
          'at a checkpoint': ((checkpoint.ocp.CheckpointManager, 'save'), 1),
          'at the export': ((huggingface, 'write_checkpoint'), 1)}


@pytest.mark.parametrize(('fault', 'point'), [
    (full, 'between checkpoints'), (full, 'at a checkpoint'), (full, 'at the export'),
    (removed, 'between checkpoints'), (removed, 'at a checkpoint')])
def test_a_disk_that_is_full_and_a_directory_that_is_removed(
    fault, point, straight, mounted, tmp_path, monkeypatch):
  folder = mounted(tmp_path / 'disk', '24m')
  (owner, name), nth = POINTS[point]
  called, calls = getattr(owner, name), []

  def late(*args, **options):
    calls.append(name)
    if len(calls) == nth:
      fault(folder)
    return called(*args, **options)

  with monkeypatch.context() as m:
    m.setattr(owner, name, late)
    with pytest.raises((disk.StorageError, disk.ExportError)) as e:
      train.train(make(), folder / 'run')
  assert str(folder / 'run') in str(e.value) and '\n' not in str(e.value)
  if fault is full:
    # What was there before stays good, and nothing has a final name that is not whole.
    for step in tiny.checkpoint_steps(folder / 'run'):
      assert tiny.read_checkpoint(folder / 'run', step)['host']['step'] == step
    assert not (folder / 'run' / 'export').exists()
    (folder / 'ballast').unlink()
  else:  # the last checkpoint may be there again, which the next start takes for another run's
    shutil.rmtree(folder / 'run', ignore_errors=True)
  assert_goes_on(folder / 'run', straight)


def test_a_finished_run_has_no_checkpoint_that_is_half_deleted(tmp_path, monkeypatch):
  # After result.json no start looks for one. (Random kills found it, see kills.py.)
  calls = []
  for owner, name in ((checkpoint.Checkpoints, 'save'), (checkpoint.Checkpoints, 'wait'),
                      (train, 'finish')):
    called = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, _name=name, _called=called: (
        calls.append(_name), _called(*args), calls.append(f'{_name} ended'))[1])
  train.train(make(), tmp_path)
  last = calls[:calls.index('finish')]
  assert last[-3:] == ['save ended', 'wait', 'wait ended']


def assert_one_line(status, err, path):
  assert status == 2, err
  assert err.startswith('error: ') and err.count('\n') == 1 and str(path) in err, err


def test_a_full_disk_is_a_line_and_an_exit_status(straight, command, mounted, tmp_path):
  folder = mounted(tmp_path / 'disk', '24m')
  with tiny.Held('row:3', *command, cwd=tmp_path) as held:
    fill(folder)
    held.release()
    status, _, err = held.finish()
  assert_one_line(status, err.partition('WARNING')[0], folder / 'run')
  assert 'Traceback' not in err
  (folder / 'ballast').unlink()
  assert_goes_on(folder / 'run', straight)


def test_a_directory_that_becomes_read_only(straight, command, tmp_path):
  run, prefix = tmp_path / 'disk' / 'run', ()
  if not os.getuid():  # root heeds no permissions, but for this
    if not shutil.which('setpriv'):
      pytest.skip('root can write everywhere')
    prefix = ('setpriv', '--bounding-set', '-dac_override')
  with tiny.Held('row:3', *command, cwd=tmp_path, prefix=prefix) as held:
    tiny.wait_until(lambda: 2 in tiny.checkpoint_steps(run))
    folders = [run, *(p for p in run.rglob('*') if p.is_dir())]
    for folder in folders:
      folder.chmod(0o555)
    held.release()
    status, _, err = held.finish()
  assert_one_line(status, err, run)
  assert 'Permission denied' in err and tiny.checkpoint_steps(run) == [2]
  for folder in folders:
    folder.chmod(0o755)
  assert_goes_on(run, straight)


def test_no_room_for_tensorboard(straight, command, mounted, tmp_path):
  run = tmp_path / 'disk' / 'run'
  fill(mounted(run / 'tensorboard', '64k'))
  with tiny.Held('row:3', *command, cwd=tmp_path) as held:
    held.process.send_signal(signal.SIGTERM)
    held.release()
    status, _, err = held.finish()  # it obeys
  assert status == 143, err
  assert err.count('the run goes on without TensorBoard') == 1, err
  done = tiny.opd(*command, cwd=tmp_path)  # and it comes to its end
  assert done.returncode == 0 and 'without TensorBoard' in done.stderr
  assert kills.differences(run, straight) == []


class TestConsole:

  @pytest.mark.parametrize('arguments', ['--help', 'train --help'])
  def test_help_that_cannot_be_written(self, arguments):
    line = f'{" ".join(OPD)} {arguments} > /dev/full'
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=tiny.environment())
    assert_one_line(done.returncode, done.stderr, 'the console could not be written')
    line = f'{" ".join(OPD)} {arguments} | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', line], capture_output=True, text=True,
                          env=tiny.environment())
    assert (done.returncode, done.stderr) == (0, '')

  def test_a_reader_who_has_seen_enough(self, straight, command, tmp_path):
    line = f'{" ".join(map(str, OPD + command))} | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', line], cwd=tmp_path, capture_output=True, text=True,
                          env=tiny.environment(), timeout=tiny.PATIENCE_S)
    assert (done.returncode, done.stderr, done.stdout.count('\n')) == (0, '', 1)
    assert kills.differences(tmp_path / 'disk' / 'run', straight) == []


class TestTheEnds:
  """How the process of a command begins and ends."""

  def test_interrupted_while_it_imports(self, command, tmp_path):
    process = subprocess.Popen(
        [*OPD, *map(str, command)], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=tiny.environment(),
        # As in a terminal: in the background of a script, it would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    maps = pathlib.Path('/proc', str(process.pid), 'maps')
    tiny.wait_until(lambda: 'numpy' in maps.read_text())  # JAX and all the rest is to come
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=tiny.PATIENCE_S)
    assert process.returncode == 130
    assert err == 'interrupted; the same command goes on from the newest checkpoint\n'

  def test_the_package_imports_nothing_before_it_is_asked(self):
    code = ('import sys, opd_jax.__main__\nassert "jax" not in sys.modules\n'
            'from opd_jax import sample_fn\nassert sample_fn.__module__.endswith("sample")')
    subprocess.run([sys.executable, '-c', code], check=True, env=tiny.environment())

  @pytest.mark.parametrize(('raised', 'status'), [
      ('SystemExit(3)', 3), ('SystemExit(None)', 0), ('SystemExit("text")', 1), ('', 0),
      ('ValueError', 1)])
  def test_the_exit_status(self, raised, status):
    # A thread that is about in the end must not change it, and what was registered is done.
    code = (f'import atexit, sys\nfrom opd_jax import __main__\ndef main():\n  print("out")\n'
            f'  {"raise " + raised if raised else "pass"}\n'
            'atexit.register(print, "done")\n__main__.main = main\n__main__.entry()')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          env=tiny.environment())
    assert (done.returncode, done.stdout) == (status, 'out\ndone\n'), done.stderr
    assert ('text' in done.stderr) == ('text' in raised)
