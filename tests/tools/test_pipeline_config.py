"""Configs of pipelines: what is refused before the first stage runs."""

from ml_collections import ConfigDict
import pytest
from refusal import check, refused
import tiny

from opd_jax import experiment, train
from opd_jax.errors import ConfigError
from opd_jax.tools import pipeline


def make(**stages):
  c = experiment.default_pipeline()
  c.stages = ConfigDict(stages or dict(
      base=tiny.config('sft'),
      student=tiny.config('opd_exact', student__path='stage:base', teacher__path='stage:base')))
  c.order = tuple(c.stages)
  c.report.methods, c.report.labels = (c.order[-1],), ('last',)
  return c


def test_valid():
  check(make())


@pytest.mark.parametrize(('fields', 'parts'), [
    (dict(order=('student', 'base')),
     ("stages.student.student.path='stage:base'")),
    (dict(order=('base',)), ("order=('base',)", "['base', 'student']")),
    (dict(order=('base', 'student', 'base')), ('order=',)),
    (dict(order=('base', 'studnet')), ("'studnet'", "['base', 'student']")),
    (dict(seeds=()), ('seeds=()',)),
    (dict(seeds=(0, 0)), ('seeds=(0, 0)',)),
    (dict(seeds=(-1,)), ('seeds=(-1,)',)), (dict(seeds=(2**32,)), ('seeds=(4294967296,)',)),
    (dict(seeds=('0',)), ("seeds=('0',)",)),
    (dict(report__methods=('studnet',)), ("report.methods=('studnet',)", "['base', 'student']")),
    (dict(report__methods=()), ('report.methods=()',)),
    (dict(report__labels=('a', 'b')), ("labels=('a', 'b')")),
    (dict(report__teacher='stage:nobody'), ("report.teacher='stage:nobody'", "['base',")),
    (dict(report__teacher='base'), ("report.teacher='base'", "'stage:NAME'")),
    (dict(report__baseline='base'), ("report.baseline='base'", "('student',)"))])
def test_refused(fields, parts):
  refused(tiny.override(make(), **fields), *parts)


@pytest.mark.parametrize('part', ['student', 'teacher'])
@pytest.mark.parametrize('path', ['stage:nobody', 'stage:student'], ids=['missing', 'itself'])
def test_reference_to_a_stage_that_is_not_there_yet(part, path):
  c = make()
  c.stages.student[part].path = path
  refused(c, f'stages.student.{part}.path={path!r}', "['base']")


def test_a_mistake_in_a_stage_names_the_stage():
  for field, value in (('data__source', 'web'), ('steps', 0), ('task__name', 'algebra'),
                       ('eval__pass_k', 9), ('objective__route', 'straight')):
    c = make()
    tiny.override(c.stages.student, **{field: value})
    refused(c, f"stages.student.{field.replace('__', '.')}={value!r}")


def test_the_pipeline_sets_the_seed():
  c = make()
  c.stages.base.seed = 7
  refused(c, 'stages.base.seed=7', 'seeds')


def test_unknown_keys():
  values = make().to_dict()
  refused(ConfigDict({**values, 'sedes': 3}), "['sedes']", "'seeds'")
  values['stages']['base']['stepz'] = 3
  refused(ConfigDict(values), "['stages.base.stepz']", "'stages.base.steps'")


def test_a_prompt_that_does_not_fit_a_later_stage_is_found_before_the_first_runs(
    tmp_path, monkeypatch):
  monkeypatch.setattr(train, 'train', None)
  c = make()
  c.stages.student.data.max_prompt_tokens = 4
  with pytest.raises(ConfigError, match=r'stages\.student: data\.max_prompt_tokens=4'):
    pipeline.run(c, tmp_path)


def test_a_stage_of_no_pipeline(tmp_path):
  # 'stage:' means something in a pipeline only.
  c = tiny.config('sft', student__path='stage:base')
  with pytest.raises(ConfigError, match=r"student\.path='stage:base'"):
    train.train(c, tmp_path)


def test_pick_stage():
  c = make()
  assert experiment.pick_stage(c, 'base') == c.stages.base
  assert experiment.pick_stage(c.stages.base, None) == c.stages.base
  for name in ('nobody', None):
    with pytest.raises(ConfigError, match=rf"stage={name!r}; allowed: \['base', 'stud"):
      experiment.pick_stage(c, name)
