"""The first thing that every stage of the tiny experiments does: models, data and programs are
opened and held against each other, as a start does before anything is compiled, and of one stage a
file its programs are traced. What an earlier stage will make is stood in for by a model of its
form."""

import dataclasses
import functools
import importlib.util

import pytest
import reuse
import tiny

from opd_jax import build, experiment, programs
from opd_jax.doctor import examine, lowered
from opd_jax.doctor.finding import FAIL
from opd_jax.rules.run import STAGE

CORPUS = 256  # examples, where there are more: nothing here depends on how many
FILES = sorted(path.stem for path in (tiny.ROOT / 'experiments').glob('*.py'))
# Of checkpoints that are not here; and what is made of the others' stages.
NOT_TINY, JOINED = ('checkpoints', 'smollm2'), ('reproduce',)
ARGUMENTS = {name: ['tiny'] for name in FILES} | {
    'dense_vs_rl': ['tiny', 'tiny,sweep=rl', 'tiny,sweep=opd'], 'presets': [None],
    'quickstart': [None], 'self_distillation': [None]}
CASES = [(name, arg) for name in FILES for arg in ARGUMENTS[name] if name not in NOT_TINY + JOINED]
_opened = set()


def load(name):
  spec = importlib.util.spec_from_file_location(name, tiny.ROOT / 'experiments' / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@functools.cache
def made(fresh):
  """A directory with a model of random weights."""
  return tiny.write_model(tiny.folder() / f'fresh_{abs(hash(fresh))}', **dict(fresh))


def place(p, run):
  """A stage with directories in the place of what earlier stages make."""
  for part in experiment.makers(run):
    group = getattr(run, part)
    maker = group
    while maker.path.startswith(STAGE):
      maker = p.runs[maker.path.removeprefix(STAGE)].student
    path = maker.path or made(tuple(sorted(maker.fresh.items())))
    run = dataclasses.replace(run, **{part: dataclasses.replace(
        group, path=str(path), revision=maker.revision if maker.path else '')})
  return run


@pytest.fixture(scope='module')
def sparing():
  """Examples that are encoded once, and one optimizer, so that what differs in its rates alone is
  traced once."""
  examples, optimizers = {}, {}
  load_examples, make_optimizer = build.load_examples, build.make_optimizer

  def kept_examples(run, split, limit, tokens, *rest, **options):
    vocabulary = sorted(tokens.get_vocab().items())  # which comes in any order
    key = repr((run.task, run.data.max_prompt_tokens, run.data.max_new_tokens, run.data.overlong,
                run.seed, split, limit, vocabulary, rest, options))
    if key not in examples:
      examples[key] = load_examples(run, split, limit, tokens, *rest, **options)
    return examples[key]

  def same_optimizer(run):
    rest = dataclasses.replace(run.optimizer, learning_rate=0.0, final_learning_rate=0.0,
                               warmup_steps=0, schedule='')
    return optimizers.setdefault(repr(rest), make_optimizer(run))

  with pytest.MonkeyPatch.context() as m, reuse.programs_of_earlier_runs():
    m.setattr(build, 'load_examples', kept_examples)
    m.setattr(build, 'make_optimizer', same_optimizer)
    yield


@pytest.mark.parametrize(('name', 'arg'), CASES)
def test_every_stage_can_start(name, arg, sparing):
  c = load(name).get_config(arg)
  for stage in c.stages.values():
    if 'corpus_examples' in stage.task.options:
      o = stage.task.options
      o.corpus_examples = min(o.corpus_examples, max(CORPUS, stage.data.limit))
  p = experiment.parse_pipeline(c)
  for stage in p.order:
    run = place(p, p.runs[stage])
    key = repr(dataclasses.replace(run, name='', steps=0))
    if key not in _opened:
      _opened.add(key)
      parts = build.open_parts(run)
      functions = programs.compile_programs(run, parts)
      assert not [f for f in examine.examine_parts(run, parts) if f.status == FAIL]
  for call in lowered.calls(run, functions, lowered.resident(functions)).values():  # of the last
    call.trace()
