"""The console command as a user starts it: in processes of its own."""

import json
import os
import platform
import signal
import subprocess
import sys

from forks import assert_one_line, run
import pytest
import tiny

from opd_jax.__main__ import check_output
from opd_jax.run import console

OVERRIDES = '--config.steps=3 --config.eval.every_steps=0'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """One experiment file."""
  path = tmp_path_factory.mktemp('cli')
  c = tiny.with_models('opd_sampled', steps=8, eval__every_steps=4)
  tiny.write_config(path / 'one.py', c)
  return path


@pytest.fixture(scope='module')
def trained(folder):
  """A finished run with two overrides, and its process."""
  done = tiny.opd('train', '--config', 'one.py', '--workdir', 'run', *OVERRIDES.split(), cwd=folder)
  assert done.returncode == 0, done.stderr
  return done


class TestTrain:

  def test_overrides(self, folder, trained):
    c = json.loads((folder / 'run' / 'config.json').read_text())
    assert (c['steps'], c['eval']['every_steps']) == (3, 0)
    assert [r['step'] for r in tiny.rows(folder / 'run', 'train')] == [1, 2, 3]

  def test_output(self, trained):
    assert trained.stdout.endswith('done: run\n')
    assert 'step 3/3' in trained.stdout and 'eval at step 3' in trained.stdout
    assert trained.stderr == ''

  def test_again_does_nothing(self, folder, trained):
    before = (folder / 'run' / 'result.json').stat().st_mtime_ns
    done, = run([f'train --config one.py --workdir run {OVERRIDES}'], folder).values()
    assert done.returncode == 0 and 'step 3/3' not in done.stdout
    assert (folder / 'run' / 'result.json').stat().st_mtime_ns == before

  def test_in_the_same_directory_without_the_overrides(self, folder, trained):
    done, = run(['train --config one.py --workdir run'], folder).values()
    assert_one_line(done, 'workdir=', 'steps: 3 -> 8')


class TestConsole:
  """A run outlives its console, and a signal is no traceback."""

  def test_a_full_disk_behind_it(self, folder, trained):
    with open('/dev/full', 'w') as full:
      done = subprocess.run(
          [sys.executable, '-m', 'opd_jax', 'train', '--config', 'one.py', '--config.steps=3',
           '--config.eval.every_steps=0', '--workdir', 'full'], cwd=folder, stdout=full, text=True,
          stderr=subprocess.PIPE, env=tiny.environment(), timeout=tiny.PATIENCE_S)
    assert done.returncode == 0
    assert done.stderr == 'WARNING: the console could not be written: No space left on device\n'
    assert (folder / 'full' / 'result.json').read_text() == (
        folder / 'run' / 'result.json').read_text()

  @pytest.mark.parametrize(('command', 'behind', 'status', 'text'), [
      ('train', '/dev/full', 0, 'WARNING: the console could not be written: No space left'),
      ('doctor', '/dev/full', 2, 'error: the console could not be written: No space left'),
      ('doctor', 'a reader who left', 0, ''), ('doctor', '/dev/null', 0, '')])
  def test_what_it_means_for_a_command(self, command, behind, status, text, capsys):
    if behind.startswith('/'):
      descriptor = os.open(behind, os.O_WRONLY)
    else:
      reader, descriptor = os.pipe()
      os.close(reader)
    out = console.Lasting(descriptor)
    out.write(b'a table')
    assert check_output(command, out, 0) == status
    assert check_output(command, out, 1) == 1  # what failed before has failed
    os.close(descriptor)
    err = capsys.readouterr().err
    assert text in err and bool(err) == bool(text)

  def test_interrupted_before_the_loop(self, folder):
    (folder / 'slow.py').write_text(
        'import pathlib, time\ndef get_config():\n  pathlib.Path("begun").touch()\n'
        '  time.sleep(600)\n')
    process = subprocess.Popen(
        [sys.executable, '-m', 'opd_jax', 'train', '--config', 'slow.py'], cwd=folder, text=True,
        stderr=subprocess.PIPE, env=tiny.environment(),
        # As in a terminal: in the background of a script, it would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    tiny.wait_until(lambda: (folder / 'begun').exists())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=tiny.PATIENCE_S)
    assert process.returncode == 130
    assert err == 'interrupted; the same command goes on from the newest checkpoint\n'


def test_evaluate_repeats_the_runs_final_evaluation(folder, trained):
  result = json.loads((folder / 'run' / 'result.json').read_text())
  done = tiny.opd('evaluate', '--config', folder / 'one.py', '--model', 'run/export',
                  '--teacher', tiny.teacher(), cwd=folder)
  assert done.returncode == 0, done.stderr
  values = json.loads(done.stdout[done.stdout.index('{\n'):])
  assert 0 < values['sampled_accuracy'] < 1
  wanted = {k: v for k, v in result['after'].items() if k not in ('step', 'flops')}
  # The export is the state, bit for bit, and the programs are the same.
  assert values == wanted


def test_the_console_script_is_the_module(folder):
  script = os.path.join(os.path.dirname(sys.executable), 'opd')
  if not os.path.exists(script):
    pytest.skip('the package is not installed')
  done = subprocess.run([script, 'tarin'], cwd=folder, text=True, capture_output=True,
                        env=tiny.environment(), timeout=tiny.PATIENCE_S)
  assert done.returncode == 2 and "command 'tarin'" in done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='the settings are glibc\'s')
class TestAllocator:

  # Every interpreter that starts leaves a line; the config file leaves what it sees.
  SITE = 'import os\nopen({log!r}, "a").write(f"start {{os.getpid()}}\\n")\n'
  CONFIG = ('import os, json\ndef get_config():\n'
            '  seen = {{k: v for k, v in os.environ.items() if "MALLOC_" in k or "GLIBC" in k}}\n'
            '  open({log!r}, "a").write(json.dumps(seen) + "\\n")\n'
            '  raise SystemExit(7)\n')

  def start(self, tmp_path, **settings):
    log = str(tmp_path / 'log')
    (tmp_path / 'sitecustomize.py').write_text(self.SITE.format(log=log))
    (tmp_path / 'experiment.py').write_text(self.CONFIG.format(log=log))
    env = tiny.environment()
    env['PYTHONPATH'] = os.pathsep.join([str(tmp_path), env['PYTHONPATH']])
    env = {k: v for k, v in env.items() if 'MALLOC_' not in k and 'GLIBC' not in k} | settings
    process = subprocess.Popen([sys.executable, '-m', 'opd_jax', 'train', '--config',
                                'experiment.py'], cwd=tmp_path, env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.wait(timeout=tiny.PATIENCE_S) == 7  # the arguments went through, and the status
    *starts, seen = (tmp_path / 'log').read_text().splitlines()
    # The process is replaced and not left waiting: signals reach the one that works.
    assert set(starts) == {f'start {process.pid}'}
    return len(starts), json.loads(seen)

  def test_set_once(self, tmp_path):
    starts, seen = self.start(tmp_path)
    assert starts == 2
    assert seen == {'MALLOC_ARENA_MAX': '1', 'MALLOC_MMAP_MAX_': '0',
                    'MALLOC_TRIM_THRESHOLD_': '8589934592', 'MALLOC_TOP_PAD_': '268435456',
                    'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}

  def test_other_tunables_of_a_user_are_kept_and_cost_nothing_else(self, tmp_path):
    tunable = {'GLIBC_TUNABLES': 'glibc.malloc.check=0'}
    starts, seen = self.start(tmp_path, **tunable)
    assert starts == 2 and len(seen) == 5 and tunable.items() <= seen.items()

  def test_a_users_own_setting_is_left_alone(self, tmp_path):
    assert self.start(tmp_path, MALLOC_ARENA_MAX='4') == (1, {'MALLOC_ARENA_MAX': '4'})
