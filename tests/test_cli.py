"""The console command as a user starts it: in processes of its own."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys

from ml_collections import ConfigDict
import ml_dtypes
import numpy as np
import pytest
import tiny

from opd_jax import experiment
from opd_jax.__main__ import COMMANDS, check_output
from opd_jax.data import prompts as prompts_lib
from opd_jax.errors import ConfigError
from opd_jax.files import huggingface
from opd_jax.models import params
from opd_jax.run import console
from opd_jax.tools import export

EXPERIMENT = '''
from opd_jax import config, experiment

def get_config(arg=None):
  arg = experiment.parse_arg(arg, size='tiny', n=1)
  c = config.default_config()
  c.steps = arg.n
  return c
'''


# Files that are no experiment.
FILES = {
    'syntax.py': 'def get_config(:\n', 'bare.py': 'x = 1\n', 'empty.py': '', 'null.py': '\x00',
    'raises.py': 'def get_config():\n  return 1 / 0\n', 'text.txt': 'text',
    'none.py': 'def get_config():\n  return None\n',
    'plain.py': 'def get_config():\n  return {"a": 1}\n',
    'stranger.py': 'from ml_collections import ConfigDict\n'
                   'def get_config():\n  return ConfigDict(dict(a=1))\n',
    'number.py': 'from ml_collections import ConfigDict\n'
                 'def get_config():\n  return ConfigDict(dict(name="a", stages=3))\n'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Experiment files: one run, a pipeline, one with an argument, one that cannot be imported."""
  path = tmp_path_factory.mktemp('cli')
  c = tiny.with_models('opd_sampled', steps=8, eval__every_steps=4)
  tiny.write_config(path / 'one.py', c)
  both = experiment.default_pipeline()
  both.stages = ConfigDict(dict(first=tiny.config('sft'), second=tiny.config('sft')))
  both.order = ('first', 'second')
  both.report.methods, both.report.labels = ('second',), ('second',)
  tiny.write_config(path / 'both.py', both)
  (path / 'argument.py').write_text(EXPERIMENT)
  (path / 'broken.py').write_text('import nonsense_module\n')
  for name, text in FILES.items():
    (path / name).write_text(text)
  os.mkfifo(path / 'pipe.py')
  tiny.write_model(path / 'base')
  tiny.write_model(path / 'other', alphabet=prompts_lib.ALPHABET[::-1])
  (path / 'half').mkdir()  # a directory, but no checkpoint
  return path


@pytest.fixture(scope='module')
def trained(folder):
  """A finished run with two overrides, and its process."""
  done = tiny.opd('train', '--config', folder / 'one.py', '--workdir', 'run', '--config.steps=3',
                  '--config.eval.every_steps=0', cwd=folder)
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
    done = tiny.opd('train', '--config', folder / 'one.py', '--workdir', 'run', '--config.steps=3',
                    '--config.eval.every_steps=0', cwd=folder)
    assert done.returncode == 0 and 'step 3/3' not in done.stdout
    assert (folder / 'run' / 'result.json').stat().st_mtime_ns == before

  def test_in_the_same_directory_without_the_overrides(self, folder, trained):
    done = tiny.opd('train', '--config', folder / 'one.py', '--workdir', 'run', cwd=folder)
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


def assert_one_line(done, *parts):
  """A failure that says all of `parts` in one line on stderr."""
  assert done.returncode == 2, (done.returncode, done.stderr)
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
  for part in parts:
    assert part in done.stderr, f'{part!r} is not in {done.stderr}'


MISTAKES = [
    ('train --config one.py --config.stepz=3', ('stepz', "'steps'")),
    ('train --config one.py --config.optimizer.learning_rte=3', ('learning_rte', 'learning_rate')),
    ('train --config one.py --config.optimzer.learning_rate=3', ('optimzer', "'optimizer'")),
    ('train --config=one.py --config.stepz=3', ('stepz', "'steps'")),
    ('train --config one.py --config.steps=abc', ('config.steps', 'abc')),
    ('train --config one.py --config.steps=0', ('steps=0', 'at least 1')),
    ('train --config one.py extra', ("['extra']",)),
    ('train --config one.py --colour=red', ('colour',)),
    ('train --config nowhere.py', ('nowhere.py',)),
    ('train --config broken.py', ('nonsense_module',)),
    ('train --config argument.py:huge=3', ("'huge'", "['n', 'size']")),
    ('train --config argument.py:n=x', ("'n=x'", 'n takes a int')),
    ('train --config one.py --workdir one.py/run', ('workdir=', 'one.py/run')),
    ('evaluate --config one.py --model nowhere', ("model='nowhere'", 'a Hugging Face directory')),
    ('evaluate --config one.py', ("'evaluate' needs --model DIR",)),
    ('evaluate --config one.py --model half', ('half', 'config.json')),
    ('evaluate --config one.py --model base --teacher other',
     ("teacher='other'", '64 tokens', 'same token ids')),
    ('evaluate --config both.py --model half', ('stage=None', "['first', 'second']")),
    ('evaluate --config both.py --stage third --model half', ("stage='third'",)),
    ('doctor --config one.py --stage opd', ("stage='opd'", 'single run')),
    ('diagnose --config one.py --stage opd', ("stage='opd'", 'single run')),
    ('diagnose --config both.py', ('stage=None', "['first', 'second']")),
    ('diagnose --config both.py --stage first', ("teacher.kind='none'", "'checkpoint'")),
    ('report --config both.py --workdir new', ('stage second of seed 0', 'new')),
    ('report --config one.py --workdir new', ('pipeline',)),
    *[(f'train --config {name}', (name, 'allowed: a Python file whose get_config', *parts))
      for name, parts in {
          'syntax.py': ('SyntaxError',), 'bare.py': (), 'empty.py': (), 'null.py': (),
          'raises.py': ('ZeroDivisionError: division by zero',), 'text.txt': ('NameError',),
          'none.py': ('returned None',), 'plain.py': (), 'stranger.py': (),
          'pipe.py': ('no regular file',), 'half': ('no regular file',)}.items()],
    ('train --config number.py', ('stages', 'allowed')),
    ('train --config', ('--config', 'allowed: flags as --NAME VALUE')),
    ('train --config one.py:tiny', ('get_config() takes 0', 'allowed')),
    ('train --config argument.py:n=', ('n takes a int', 'allowed: such as 1')),
    ('train --config one.py --config.steps=', ("config.steps=''", 'allowed: an integer')),
    ('train --config one.py --config.steps=1.5', ("config.steps='1.5'", 'allowed: an integer')),
    ('train --config one.py --config.steps.x=3', ('config.steps has no fields', 'allowed')),
    ('train --config one.py --config.optimizer.learning_rate=x',
     ("config.optimizer.learning_rate='x'", 'allowed: a number')),
    ('train --config one.py --config.optimizer=3', ("config.optimizer='3'", 'FIELD=VALUE')),
    ('train --config one.py --config.task.options.operations=(1,', ('operations', 'a tuple')),
    ('train --config one.py --config.', ('allowed',)),
    ('train --config one.py --config.steps', ('config.steps', 'allowed')),
    ('train --config one.py --step=x', ("--step='x'", 'allowed: an integer')),
    ('train --confg one.py', ('--confg is unknown', "'--config'")),
    ('train --config one.py --flagfile=nowhere', ('nowhere', 'allowed')),
    ('train --config one.py --flagfile', ('flagfile', 'allowed')),
    ('train --config one.py --workdir=', ("--workdir=''", 'allowed: DIR')),
    ('export --workdir= --output new', ("--workdir=''", 'allowed: DIR')),
    ('report --config both.py --config.report.levels=("a",)', ("levels=('a',)", 'allowed')),
    ('report --config both.py --config.order=(3,4)', ('order=(3, 4)', 'allowed')),
]
# Runs every command line in a child of its own that has imported everything already: starting
# Python and JAX two dozen times would take longer than all other tests here.
FORKS = '''
import json, os, sys
import opd_jax.__main__, opd_jax.tools.pipeline
from absl import app, flags
from ml_collections import config_flags
for i, args in enumerate(json.load(sys.stdin)):
  child = os.fork()
  if not child:
    for fd, name in ((1, f"{i}.out"), (2, f"{i}.err")):
      os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), fd)
    sys.argv, status = ["opd", *args], 99  # main() always exits by itself
    try:
      opd_jax.__main__.main()
    except SystemExit as e:
      status = e.code
    except BaseException:
      sys.excepthook(*sys.exc_info())
      status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without tearing down what it shares with its parent, which takes seconds
  with open(f"{i}.status", "w") as f:
    f.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
'''


@pytest.fixture(scope='module')
def outcomes(folder):
  """What became of every command line in MISTAKES."""
  lines = [args.split() for args, _ in MISTAKES]
  subprocess.run([sys.executable, '-c', FORKS], cwd=folder, input=json.dumps(lines), text=True,
                 check=True, capture_output=True, env=tiny.environment(), timeout=tiny.PATIENCE_S)
  return {args: subprocess.CompletedProcess(
      args, int((folder / f'{i}.status').read_text()), (folder / f'{i}.out').read_text(),
      (folder / f'{i}.err').read_text()) for i, (args, _) in enumerate(MISTAKES)}


def test_a_command_without_its_config_says_what_there_is(folder):
  done = tiny.opd('train', cwd=folder)
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  first, *rest = done.stderr.splitlines()
  assert first.startswith("error: 'train' needs --config FILE")
  assert COMMANDS['train'].example in first
  assert any('quickstart.py: ' in line for line in rest)


@pytest.mark.parametrize(('args', 'parts'), MISTAKES)
def test_mistakes_are_one_line(args, parts, outcomes):
  assert_one_line(outcomes[args], *parts)


def test_a_mistake_in_a_process_of_its_own(folder):
  # One of them as a user meets it.
  args, parts = MISTAKES[0]
  assert_one_line(tiny.opd(*args.split(), cwd=folder), *parts)


class TestExport:

  def test_the_newest_checkpoint_is_the_final_model(self, folder, trained):
    done = tiny.opd('export', '--workdir', 'run', '--output', 'out', cwd=folder)
    assert done.returncode == 0 and done.stdout == 'step 3: out\n', done.stderr
    for file in (folder / 'run' / 'export').iterdir():
      assert (folder / 'out' / file.name).read_bytes() == file.read_bytes(), file.name

  def test_in_bfloat16_and_for_a_mesh_that_is_not_here(self, folder, trained):
    shutil.copytree(folder / 'run', folder / 'moved')
    c = json.loads((folder / 'moved' / 'config.json').read_text())
    c['compute']['mesh'] |= {'fsdp': 2, 'tensor': 2}
    (folder / 'moved' / 'config.json').write_text(json.dumps(c))
    done = tiny.opd('export', '--workdir', 'moved', '--output', 'out16', '--dtype', 'bfloat16',
                    cwd=folder)
    assert done.returncode == 0, done.stderr
    whole, half = (params.flatten(huggingface.load(folder / d, {}).read())
                   for d in ('run/export', 'out16'))
    for name in whole:
      np.testing.assert_array_equal(half[name], whole[name].astype(ml_dtypes.bfloat16), name)

  @pytest.mark.parametrize(('arguments', 'parts'), [
      ('--workdir run --output new --dtype int8', ("dtype='int8'", "'bfloat16'")),
      ('--workdir run --output new --step 17', ('step=17', 'allowed: -1', '3]')),
      ('--workdir run --output new --format gguf', ("format='gguf'", "['full', 'adapter']")),
      ('--workdir run --output new --format adapter', ("format='adapter'", 'the whole model')),
      ('--workdir run --output run', ("output='run' exists", 'a new directory')),
      ('--workdir half --output new', ("workdir='half' holds no run", 'allowed')),
      ('--workdir run', ('--output',)),
      ('--workdir run --output new --stage x', ("--stage has no effect with 'export'", 'allowed')),
  ])
  def test_refused(self, arguments, parts, folder, trained):
    done = tiny.opd('export', *arguments.split(), cwd=folder)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert not (folder / 'new').exists()

  def test_a_damaged_checkpoint(self, folder, trained, tmp_path):
    shutil.copytree(folder / 'run', tmp_path / 'run')
    (tmp_path / 'run' / 'checkpoints' / '3' / 'state' / '_METADATA').write_text('{"')
    done = tiny.opd('export', '--workdir', 'run', '--output', 'new', cwd=tmp_path)
    assert_one_line(done, 'step=3', "workdir='run' cannot be read", 'allowed: another of')
    assert not (tmp_path / 'new').exists()


def changed(**changes):
  """Makes other content of a config.json: a dict in `changes` changes a group, anything else
  replaces what is there."""
  def change(config):
    return {**config, **{name: {**config[name], **value} if isinstance(value, dict) else value
                         for name, value in changes.items()}}
  return change


class TestExportOfOddDirectories:
  """In this process: every one is a line that names the directory."""

  def refused(self, workdir, output, *parts):
    with pytest.raises(ConfigError) as e:
      export.export(workdir, output, 'full', -1)
    assert '\n' not in str(e.value) and not output.exists()
    assert all(part in str(e.value) for part in (*parts, 'allowed')), e.value

  @pytest.fixture
  def workdir(self, folder, trained, tmp_path):
    shutil.copytree(folder / 'run', tmp_path / 'run')
    return tmp_path / 'run'

  @pytest.mark.parametrize('text', ['', '[]', '3', 'null', '"a"', '{}', '{"steps": 3', '\x00',
                                    '[' * 100_000, '{"a.b": 1}', '{"1": 2}'])
  def test_content_of_config_json(self, text, workdir, tmp_path):
    (workdir / 'config.json').write_text(text)
    self.refused(workdir, tmp_path / 'new', f'workdir={str(workdir)!r} holds no run')

  @pytest.mark.parametrize('change', [
      changed(student=None), changed(student=[1]), changed(student='x'), changed(task=None),
      changed(task=dict(name='nope')), changed(task=dict(options=[1])), changed(steps='4'),
      changed(seed=None), changed(student=dict(fresh=None)), changed(colour=1),
      changed(student=dict(path='/nowhere')), changed(optimizer=[])])
  def test_fields_of_config_json(self, change, workdir, tmp_path):
    file = workdir / 'config.json'
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    self.refused(workdir, tmp_path / 'new', f'workdir={str(workdir)!r} holds no run')

  @pytest.mark.parametrize('name', ['state', 'host'])
  def test_half_a_checkpoint(self, name, workdir, tmp_path):
    shutil.rmtree(workdir / 'checkpoints' / '3' / name)
    self.refused(workdir, tmp_path / 'new', 'step=3', 'cannot be read', 'another of []')

  def test_no_checkpoints(self, workdir, tmp_path):
    shutil.rmtree(workdir / 'checkpoints')
    self.refused(workdir, tmp_path / 'new', 'has no such checkpoint')
    (workdir / 'checkpoints').touch()
    self.refused(workdir, tmp_path / 'new', 'has no such checkpoint')

  def test_what_lies_beside_the_checkpoints_is_left_alone(self, workdir, tmp_path):
    (workdir / 'checkpoints' / 'notes').mkdir()
    (workdir / 'checkpoints' / '3' / 'metrics' / 'metrics').write_text('{"')  # not needed here
    assert export.export(workdir, tmp_path / 'new', 'full', -1) == 3

  def test_an_output_that_is_a_link_to_nothing(self, workdir, tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'nothing')
    self.refused(workdir, tmp_path / 'link', 'link', 'exists')


class TestUsage:

  @pytest.mark.parametrize('args', [[], ['tarin', '--config', 'one.py']])
  def test_no_command(self, args, folder):
    done = tiny.opd(*args, cwd=folder)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    for name, command in COMMANDS.items():
      assert f'opd {name}' in done.stderr and command.does in done.stderr
    if args:
      assert done.stderr.startswith(f"error: command 'tarin'; allowed: {list(COMMANDS)}\n")

  def test_help(self, folder):
    done = tiny.opd('--help', cwd=folder)
    assert done.returncode == 0 and 'opd train --config' in done.stdout + done.stderr

  def test_the_console_script_is_the_module(self, folder):
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
            '  seen = {{k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}}\n'
            '  open({log!r}, "a").write(json.dumps(seen) + "\\n")\n'
            '  raise SystemExit(7)\n')

  def start(self, tmp_path, **settings):
    log = str(tmp_path / 'log')
    (tmp_path / 'sitecustomize.py').write_text(self.SITE.format(log=log))
    (tmp_path / 'experiment.py').write_text(self.CONFIG.format(log=log))
    env = tiny.environment()
    env['PYTHONPATH'] = os.pathsep.join([str(tmp_path), env['PYTHONPATH']])
    env = {k: v for k, v in env.items() if not k.startswith('MALLOC_')} | settings
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
                    'MALLOC_TRIM_THRESHOLD_': '8589934592', 'MALLOC_TOP_PAD_': '268435456'}

  def test_a_users_own_setting_is_left_alone(self, tmp_path):
    assert self.start(tmp_path, MALLOC_ARENA_MAX='4') == (1, {'MALLOC_ARENA_MAX': '4'})
