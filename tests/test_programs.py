"""Which models share a program, and what each is asked for."""

import dataclasses
import functools
import operator
import types

import pytest
import tiny

from opd_jax import build, config, errors, presets, programs, teachers
from opd_jax.algorithm import score
from opd_jax.algorithm.objective import wants
from opd_jax.data import streams
from opd_jax.types import Scores, Wants

MODELS = ('student', 'teacher', 'reference')


def _config(name):
  c = presets.apply(tiny.config('opd_sampled'), name)
  for group, field in (('data', 'source'), ('given', 'source')):
    if c[group][field] == 'dataset':
      c[group].split = 'corpus'
  return c


def _scorers(monkeypatch, run, own_form, **changes):
  """{model: (which model's program, temperature, wants)} of the student's own rows."""
  stream = streams.make(run)[0]
  stream = dataclasses.replace(stream, objective=dataclasses.replace(stream.objective, **changes))
  parts = types.SimpleNamespace(
      mesh=None, apart=None, chunk_tokens=16,
      wanted=lambda stream, part: wants(stream.objective)[part],
      runs_students_programs=lambda loaded: own_form or loaded.model == 'student',
      **{name: types.SimpleNamespace(model=name) for name in MODELS})
  with monkeypatch.context() as m:
    m.setattr(programs.jax, 'jit', lambda f, **_: f)
    m.setattr(programs.sharding, 'by_rows', lambda mesh: None)
    made = programs.make_scorers(parts, (stream,))
  return stream.objective, {model: tuple(
      f.keywords[name] for name in ('model', 'temperature', 'wants'))
      for (_, model), f in made.items()}


@pytest.mark.parametrize('own_form', [False, True])
@pytest.mark.parametrize('name', presets.PRESETS)
def test_models_that_share_a_program_are_asked_for_what_each_is_asked_alone(
    monkeypatch, name, own_form):
  """`own_form`: of teacher and reference, that of the student, whose program is then theirs."""
  run = config.parse(_config(name))
  o, made = _scorers(monkeypatch, run, own_form)
  asked = {model: known for model, known in wants(o).items() if known}
  everyone = functools.reduce(operator.or_, asked.values(), Wants())
  assert made == {model: ('student', 1.0, everyone) if own_form else (model, 1.0, known)
                  for model, known in asked.items()}
  if own_form and 'teacher' in asked:  # at another temperature it has a program of its own
    o, made = _scorers(monkeypatch, run, own_form, teacher_temperature=2.0)
    assert made['teacher'] == ('student', 2.0, asked['teacher'])


def test_what_was_not_asked_for_is_dropped():
  everything = Scores(logprobs=1, entropy=2, hidden=3)
  assert score.only(everything, Wants(logprobs=True)) == everything.replace(hidden=None)
  assert score.only(everything, Wants(hidden=True)) == Scores(None, None, 3)
  assert score.only(everything, Wants(True, True)) == everything


def test_a_grader_is_asked_for_no_more_than_it_gives(monkeypatch):
  # A kind of teacher that knows log-probs only, as a server would.
  opened = teachers.load
  monkeypatch.setattr(teachers, 'load', lambda *args: dataclasses.replace(
      opened(*args), gives=Wants(logprobs=True)))
  for kind, fine in (('opd_sampled', True), ('opd_exact', False)):
    run = config.parse(tiny.config(kind, teacher__kind='initial_student'))
    if fine:
      assert build.open_parts(run).teacher.gives == Wants(logprobs=True)
    else:
      with pytest.raises(errors.ConfigError, match='teacher.kind gives .*hidden=False.*allowed'):
        build.open_parts(run)
