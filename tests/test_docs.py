"""README and docs/ say what is true: their programs run, what they name exists, their lists are
complete."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import pathlib
import re
import runpy

from conftest import make_rollout, qwen3_config
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from opd_jax import __main__ as console
from opd_jax import config, models, presets, programs, train
from opd_jax.algorithm import objective as objective_lib
from opd_jax.algorithm import update
from opd_jax.data import control, examples
from opd_jax.data import streams as streams_lib
from opd_jax.models.params import abstract_params
from opd_jax.parallel import decoding
from opd_jax.run import evaluate
from opd_jax.types import Batch, Heads, Scores, TrainState

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {str(f.relative_to(ROOT)): f.read_text()
         for f in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))}
PROGRAMS = [(page, i) for page, text in PAGES.items()
            for i in range(len(re.findall(r'^```python$', text, re.MULTILINE)))]
each_page = pytest.mark.parametrize('page', PAGES)


@functools.cache
def _run(page, i):
  """The names after a page's program i, which may use those of the ones before it; what it prints.
  """
  names = _run(page, i - 1)[0] if i else {}
  program = re.findall(r'^```python\n(.*?)^```$', PAGES[page], re.DOTALL | re.MULTILINE)[i]
  printed = io.StringIO()
  with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
    exec(compile(program, f'{page}, program {i}', 'exec'), names)  # noqa: S102, it is ours
  return names, printed.getvalue()


# --- programs and commands ---


@pytest.mark.parametrize(('page', 'i'), PROGRAMS)
def test_every_program_runs(page, i):
  _run(page, i)


def _last_numbers(printed):
  return [float(line.split()[-1]) for line in printed.splitlines()]


def test_the_algorithm_takes_steps():
  names, printed = _run('README.md', 0)
  values = _last_numbers(printed)
  assert len(values) == 3 and np.isfinite(values).all()
  assert int(names['state'].step) == 3
  # The base is far from the teacher, and 64 samples of one prompt already move it.
  assert values[0] > 0.1


def test_a_flax_module_learns():
  names, printed = _run('docs/flax.md', 0)
  values = _last_numbers(printed)
  assert len(values) == 10 and int(names['state'].step) == 10
  assert values[-1] < 0.9 * values[0]  # the exact reverse KL to the teacher falls


def _commands():
  """(page, command line) of every `opd` line in a block that is no program, and in what is started
  from a file."""
  for page, text in PAGES.items():
    blocks = re.findall(r'^```(?:bash|yaml)?\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    for line in '\n'.join(blocks).replace('\\\n', ' ').splitlines():
      # Alone or after what starts it, up to what a shell does with its output.
      if found := re.search(r"(?:^|(?:&&|exec|nohup|srun)(?: --\S+)* )(opd [a-z]+ --[^'>#]*)",
                            line):
        yield page, found[1].strip()
  for file in (ROOT / 'docs' / 'launch').glob('*.yaml'):
    for command in re.findall(r'command:\n((?: +- .*\n)+)', file.read_text()):
      yield str(file.relative_to(ROOT)), ' '.join(re.findall(r'- (.*)', command))


def _check_config(value, fields):
  file, _, argument = value.partition(':')
  c = runpy.run_path(str(ROOT / file))['get_config'](*filter(None, [argument]))
  for field in fields:
    here = c
    for name in field.split('.'):
      assert name in here, field
      here = here[name]


@pytest.mark.parametrize(('page', 'line'), list(_commands()))
def test_every_command_can_be_given(page, line, models_made):
  _, command, *words = line.split()
  known, flags = console.COMMANDS[command], {}
  while words:
    name, has_value, value = words.pop(0).partition('=')
    assert name.startswith('--'), line
    flags[name[2:]] = value if has_value else words.pop(0)
  fields = [name.removeprefix('config.') for name in flags if name.startswith('config.')]
  assert {name.partition('.')[0] for name in flags} <= set(known.flags)
  assert set(known.required) <= flags.keys()
  if 'config' in flags:
    _check_config(flags['config'], fields)


# --- names ---


@each_page
def test_every_path_that_is_named_exists(page):
  folders = r'opd_jax|experiments|tests|docs|benchmarks|third_party'
  for name in re.findall(rf'`((?:{folders})/[\w/.-]*)', PAGES[page]):
    if not re.search(r'NAME|MODEL_TYPE|FILE', name):
      assert (ROOT / name).exists(), name


def _anchors(text):
  return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')
          for title in re.findall(r'^#+ (.*)$', text, re.MULTILINE)}


@each_page
def test_every_link_leads_somewhere(page):
  for target in re.findall(r'\]\(([^)\s]+)\)', PAGES[page]):
    if '://' in target:
      continue
    path, _, anchor = target.partition('#')
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists(), target
    if anchor:
      assert anchor in _anchors(file.read_text()), target


@each_page
def test_every_field_that_is_named_is_in_the_config(page):
  c = config.default_config()
  groups = [name for name, value in c.items() if hasattr(value, 'items')]
  for text in re.findall(r'`([^`\n]+)`', PAGES[page]):
    found = re.match(rf'(?:--config\.)?((?:{"|".join(groups)})(?:\.[a-z_]\w*)+)(?:$|=)', text)
    if not found or found[1].startswith('task.options') or found[1].endswith(('.json', '.py')):
      continue
    here = c
    for name in found[1].split('.'):
      assert name in here, found[1]
      here = here[name]


def test_the_readme_leads_to_every_page_and_is_short():
  readme = PAGES['README.md']
  assert 140 <= len(readme.splitlines()) <= 220
  missing = [page for page in PAGES if page != 'README.md' and f']({page}' not in readme]
  assert not missing


# --- lists ---


def _rows(page, section):
  """(names in the first column, the whole row) of the tables under a heading."""
  text = re.split(r'^## ', PAGES[page].split(f'\n## {section}\n')[1], flags=re.MULTILINE)[0]
  for line in text.splitlines():
    if names := re.findall(r'`([^`]+)`', line.split('|')[1] if line.startswith('|') else ''):
      yield names, line


def _listed(section):
  return {name for names, _ in _rows('docs/metrics.md', section) for name in names}


def _names(row):
  """The names of a row of metrics.jsonl, nested ones with a slash."""
  return {name if inner is None else f'{name}/{inner}' for name, value in row.items()
          if name not in ('kind', 'step')
          for inner in (value if isinstance(value, dict) else [None])}


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
  """The rows that a run of two steps writes."""
  c = tiny.config('opd_sampled', steps=2, teacher__kind='initial_student', data__overlong='drop',
                  given__source='dataset', given__split='corpus', given__prompts_per_step=16,
                  given__likelihood_coef=0.1, **{
                      f'doctor__{name}': 'off: not the point' for name in (
                          'self_kl', 'uniform_teacher', 'support', 'special_tokens', 'truncation')})
  workdir = tmp_path_factory.mktemp('metrics')
  train.train(c, workdir)
  return tiny.rows(workdir)


def _reported(run):
  """The names of what an update of a run reports; nothing is computed."""
  streams = [s for s in streams_lib.make(run) if s.name != streams_lib.OFF_POLICY]
  model, optimizer = models.build(qwen3_config(vocab_size=128)), optax.sgd(1.0)
  rollout = make_rollout([[1, 2]] * 4, [[3, 4, 5]] * 4, prompt_width=3, room=4)
  terms = tuple(dataclasses.replace(programs.term_of(s), microbatch_rows=0) for s in streams)

  def step(params, key):
    scores = Scores(logprobs=rollout.mask, entropy=rollout.mask,
                    hidden=jnp.zeros((4, 4, model.config.hidden_size)))
    batch = Batch(rollout, scores, scores, scores, rewards=jnp.ones(4))
    head = model.head(params)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))
    return update.update_fn(
        state, (batch,) * len(terms), Heads(head, head), None, key, model=model,
        optimizer=optimizer, terms=terms, chunk_tokens=64)[1]

  names = jax.eval_shape(step, abstract_params(model.specs), jax.random.key(0))
  return {name for name in names if not name.endswith('lengths')}


def test_every_metric_of_a_step_is_listed_and_none_besides(rows):
  seen = set().union(*(_names(row) for row in rows if row['kind'] == 'train'))
  for name in presets.PRESETS:  # what only some objectives report
    seen |= _reported(config.parse(presets.apply(tiny.config('opd_sampled'), name)))
  layout = decoding.DecodeLayout(jnp.copy, 1, wait=True)  # what only several devices report
  layout(jnp.zeros(1))
  assert _listed('train') == seen | {f'perf/{name}' for name in layout.report()}


def test_every_metric_of_an_evaluation_is_listed_and_none_besides(rows):
  seen = set().union(*(_names(row) for row in rows if row['kind'] == 'eval'))
  # What only other tasks have, or more samples.
  for group, names in (('pass_at', evaluate.pass_curve(np.zeros((1, 4)))), ('measures', ['NAME']),
                       ('by_group', evaluate.by_group(['NAME'], np.zeros((1, 4))))):
    seen |= {f'{group}/{name}' for name in names}
  assert _listed('eval') == {re.sub(r'^pass_at_\d+', 'pass_at_K', name) for name in seen}


def test_everything_about_the_data_is_listed_and_nothing_besides(rows):
  row, = (row for row in rows if row['kind'] == 'data')
  splits = {name: value for name, value in row.items() if name not in ('kind', 'step')}
  assert splits.keys() == {'train', 'eval', 'given'}
  seen = set().union(*splits.values()) | {'task'}  # where a task has something to say
  seen |= {re.sub('_dropped$', '_cut', name) for name in seen}
  # What only other data have.
  seen |= {f'longer_than_{examples.LONGEST}_characters_dropped',
           *(f'control_tokens_as_{choice}' for choice in control.CHOICES if choice != 'refuse')}
  assert _listed('data') == seen



def test_every_field_and_choice_of_the_objective_is_listed():
  listed = {name: row for names, row in _rows('docs/objectives.md', 'Fields') for name in names}
  fields = {f.name for f in dataclasses.fields(objective_lib.Objective)} - {'temperature'}
  assert listed.keys() == fields
  for field, kind in objective_lib.KINDS.items():
    named = set(re.findall(r'`([^`]+)`', listed[field]))
    assert set(kind.names) - {'none'} <= named, field
  local = set(re.findall(r'`([^`]+)`', listed['local']))
  assert {f'local.{f.name}' for f in dataclasses.fields(objective_lib.Local)} <= local
  assert set(objective_lib.LOCAL_KINDS['gate'].names) - {'none'} <= local
