"""Command lines with a mistake: one line says what is wrong and what is allowed."""

import os

from forks import assert_one_line, run
from ml_collections import ConfigDict
import pytest
import tiny

from opd_jax import experiment
from opd_jax.__main__ import COMMANDS
from opd_jax.data import prompts as prompts_lib

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
  base = str(tiny.write_model(path / 'base'))
  tiny.write_model(path / 'other', alphabet=prompts_lib.ALPHABET[::-1])
  (path / 'half').mkdir()  # a directory, but no checkpoint
  tiny.write_config(path / 'one.py', tiny.config('opd_sampled', student__path=base,
                                                 teacher__path=base))
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
  return path


MISTAKES = [
    ('train --config one.py --config.stepz=3', ('stepz', "'steps'")),
    ('train --config one.py --config.optimizer.learning_rte=3', ('learning_rte', 'learning_rate')),
    ('train --config one.py --config.optimzer.learning_rate=3', ('optimzer', "'optimizer'")),
    ('train --config=one.py --config.stepz=3', ('stepz', "'steps'")),
    ('train --config one.py --config.steps=abc', ('config.steps', 'abc')),
    ('train --config one.py --config.steps=0', ('steps=0', 'allowed')),
    ('train --config one.py extra', ("['extra']",)),
    ('train --config one.py --colour=red', ('colour',)),
    ('train --config nowhere.py', ('nowhere.py',)),
    ('train --config broken.py', ('nonsense_module',)),
    ('train --config argument.py:huge=3', ("'huge'", "['n', 'size']")),
    ('train --config argument.py:n=x', ("'n=x'", 'int')),
    ('train --config one.py --workdir gs://bucket/run', ("workdir='gs://bucket/run'", 'allowed')),
    ('train --config one.py --workdir one.py/run', ('workdir=', 'one.py/run')),
    ('evaluate --config one.py --model nowhere', ("model='nowhere'", 'allowed')),
    ('evaluate --config one.py', ('--model',)),
    ('evaluate --config one.py --model half', ('half', 'config.json')),
    ('evaluate --config one.py --model base --teacher other',
     ("teacher='other'", '64', 'allowed')),
    ('evaluate --config both.py --model half', ('stage=None', "['first', 'second']")),
    ('evaluate --config both.py --stage third --model half', ("stage='third'",)),
    ('doctor --config one.py --stage opd', ("stage='opd'", 'allowed')),
    ('diagnose --config one.py --stage opd', ("stage='opd'", 'allowed')),
    ('diagnose --config both.py', ('stage=None', "['first', 'second']")),
    ('diagnose --config both.py --stage first', ("teacher.kind='none'", "'checkpoint'")),
    ('report --config both.py --workdir new', ('second', 'new')),
    ('report --config one.py --workdir new', ('pipeline',)),
    *[(f'train --config {name}', (name, 'allowed', *parts))
      for name, parts in {
          'syntax.py': ('SyntaxError',), 'bare.py': (), 'empty.py': (), 'null.py': (),
          'raises.py': ('ZeroDivisionError',), 'text.txt': ('NameError',),
          'none.py': ('None',), 'plain.py': (), 'stranger.py': (),
          'pipe.py': (), 'half': ()}.items()],
    ('train --config number.py', ('stages', 'allowed')),
    ('train --config', ('--config', 'allowed')),
    ('train --config one.py:tiny', ('--config one.py', 'allowed')),
    ('train --config argument.py:n=', ('n=', 'int', 'allowed')),
    ('train --config one.py --config.steps=', ("config.steps=''", 'allowed')),
    ('train --config one.py --config.steps=1.5', ("config.steps='1.5'", 'allowed')),
    ('train --config one.py --config.steps.x=3', ('config.steps', 'allowed')),
    ('train --config one.py --config.optimizer.learning_rate=x',
     ("config.optimizer.learning_rate='x'", 'allowed')),
    ('train --config one.py --config.optimizer=3', ("config.optimizer='3'", 'FIELD=VALUE')),
    ('train --config one.py --config.task.options.operations=(1,', ('operations', 'allowed')),
    ('train --config one.py --config.', ('allowed',)),
    ('train --config one.py --config.steps', ('config.steps', 'allowed')),
    ('train --config one.py --step=x', ("--step='x'", 'allowed')),
    ('train --confg one.py', ('--confg', "'--config'")),
    ('train --config one.py --flagfile=nowhere', ('nowhere', 'allowed')),
    ('train --config one.py --flagfile', ('flagfile', 'allowed')),
    ('train --config one.py --workdir=', ("--workdir=''", 'allowed')),
    ('export --workdir= --output new', ("--workdir=''", 'allowed')),
    ('report --config both.py --config.report.levels=("a",)', ("levels=('a',)", 'allowed')),
    ('report --config both.py --config.order=(3,4)', ('order=(3, 4)', 'allowed')),
]
# What else is no run, and has a text of its own.
USAGE = ('', 'tarin --config one.py', '--help', 'train')


@pytest.fixture(scope='module')
def outcomes(folder):
  """What became of every command line in MISTAKES and USAGE."""
  return run([*(line for line, _ in MISTAKES), *USAGE], folder)


@pytest.mark.parametrize(('args', 'parts'), MISTAKES)
def test_mistakes_are_one_line(args, parts, outcomes):
  assert_one_line(outcomes[args], *parts)


def test_a_mistake_in_a_process_of_its_own(folder):
  # One of them as a user meets it.
  args, parts = MISTAKES[0]
  assert_one_line(tiny.opd(*args.split(), cwd=folder), *parts)


def test_a_command_without_its_config_says_what_there_is(outcomes):
  done = outcomes['train']
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  first, *rest = done.stderr.splitlines()
  assert first.startswith('error: ') and "'train'" in first and '--config' in first
  assert COMMANDS['train'].example in first
  assert any('quickstart.py: ' in line for line in rest)


@pytest.mark.parametrize('line', USAGE[:2])
def test_no_command(line, outcomes):
  done = outcomes[line]
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  for name, command in COMMANDS.items():
    assert f'opd {name}' in done.stderr and command.does in done.stderr
  if line:
    assert done.stderr.startswith(f"error: command 'tarin'; allowed: {list(COMMANDS)}\n")


def test_help(outcomes):
  done = outcomes['--help']
  assert done.returncode == 0 and 'opd train --config' in done.stdout + done.stderr
