"""Configs: every experiment loads, and every mistake is refused with the field, the value and what
is allowed."""

import importlib.util
import json
import math
import os
import pathlib
import re

from ml_collections import ConfigDict
import pytest
import tiny

from opd_jax import build, config, experiment, models, presets, tasks, teachers, train
from opd_jax.algorithm import objective as objective_lib
from opd_jax.algorithm import signals
from opd_jax.algorithm.objective import Objective
from opd_jax.data import examples as examples_lib
from opd_jax.data import prompts as prompts_lib
from opd_jax.data import streams
from opd_jax.errors import ConfigError
from opd_jax.files import workdir as workdir_lib
from opd_jax.tools import pipeline

EXPERIMENTS = sorted(p for p in (tiny.ROOT / 'experiments').glob('*.py') if p.stem[0] != '_')


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def named_arguments():
  """(file, argument) for every command in the docstring of an experiment, and for none at all."""
  out = []
  for path in EXPERIMENTS:
    arguments = re.findall(rf'--config \S*{path.name}(?::(\S+))?', load(path).__doc__ or '')
    out += [(path, a or None) for a in dict.fromkeys([*arguments, ''])]
  return out


def check(c):
  return experiment.parse_pipeline(c) if experiment.is_pipeline(c) else config.parse(c)


def claim(c, path):
  workdir_lib.claim(path, config.to_dict(c), {})


def refused(c, *parts):
  """The config is refused, by a message with all of these parts and what is allowed."""
  with pytest.raises(ConfigError) as e:
    check(c)
  for part in (*parts, 'allowed'):
    assert part in str(e.value), f'{part!r} is not in {e.value}'
  return str(e.value)


class TestExperiments:

  def test_there_are_some(self):
    assert {'quickstart', 'dense_vs_rl'} <= {p.stem for p in EXPERIMENTS}

  @pytest.mark.parametrize(('path', 'argument'), named_arguments(),
                           ids=lambda x: x.stem if isinstance(x, pathlib.Path) else str(x))
  def test_loads_and_validates(self, path, argument, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)  # relative paths are relative to the repository
    check(load(path).get_config(argument) if argument else load(path).get_config())

  @pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
  def test_says_how_it_is_run(self, path):
    assert f'opd train --config experiments/{path.name}' in load(path).__doc__

  @pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
  def test_refuses_arguments_it_does_not_know(self, path):
    with pytest.raises(ConfigError, match='allowed'):
      load(path).get_config('no_such_size')
    with pytest.raises(ConfigError, match="'nonsense'.*allowed"):
      load(path).get_config('nonsense=1')

  @pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
  def test_seeds(self, path, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    if not experiment.is_pipeline(load(path).get_config()):
      pytest.skip('a single run: its seed is a field')
    assert load(path).get_config('seeds=3').seeds == (0, 1, 2)


class TestParseArg:

  def test_values_take_the_type_of_their_default(self):
    arg = experiment.parse_arg('n=3,rate=2,flag=True,word=7', n=1, rate=0.5, flag=False, word='x')
    assert arg.to_dict() == dict(n=3, rate=2.0, flag=True, word='7')
    assert isinstance(arg.rate, float)

  def test_a_bare_word_is_the_size(self):
    assert experiment.parse_arg('8b,n=2', size='tiny', n=1).to_dict() == dict(size='8b', n=2)

  @pytest.mark.parametrize('arg', [None, ''])
  def test_nothing(self, arg):
    assert experiment.parse_arg(arg, n=1).to_dict() == dict(n=1)

  @pytest.mark.parametrize(('arg', 'parts'), [
      ('m=1', ("'m=1'", "'m'", "['flag', 'n', 'rate']")),
      ('8b', ("'8b'", "['flag', 'n', 'rate']")),  # no size here
      ('n=1.5', ("'n=1.5'", 'n takes a int')),
      ('n=True', ("'n=True'", 'n takes a int')),
      ('n=three', ("'n=three'", 'n takes a int')),
      ('n', ("'n'", 'n takes a int')),
      ('n=', ("'n='", 'n takes a int')),
      ('rate=x', ("'rate=x'", 'rate takes a float')),
      ('flag=1', ("'flag=1'", 'flag takes a bool')),
  ])
  def test_strict(self, arg, parts):
    with pytest.raises(ConfigError) as e:
      experiment.parse_arg(arg, n=1, rate=0.5, flag=False)
    for part in parts:
      assert part in str(e.value)


class TestFields:

  def test_the_default_is_locked(self):
    with pytest.raises(AttributeError, match='stepz'):
      config.default_config().stepz = 3
    with pytest.raises(AttributeError, match='learning_rte'):
      config.default_config().optimizer.learning_rte = 1.0

  def test_every_tiny_kind_is_valid(self):
    # Else the tests below could pass for another reason than theirs.
    for kind in tiny.KINDS:
      check(tiny.config(kind))

  def test_unknown_key(self):
    values = tiny.config('sft').to_dict()
    refused(ConfigDict({**values, 'stepz': 3}), "['stepz']", "'steps'")
    refused(ConfigDict({**values, 'data': {**values['data'], 'shuffle': True}}),
            "['data.shuffle']", "'data.split'")

  def test_missing_key(self):
    values = tiny.config('sft').to_dict()
    del values['eval']['pass_k']
    with pytest.raises(ConfigError, match=r'eval\.pass_k is missing'):
      config.parse(ConfigDict(values))

  @pytest.mark.parametrize(('field', 'value', 'allowed'), [
      ('steps', 'many', 'int'), ('steps', 2.0, 'int'), ('steps', True, 'int'),
      ('name', 3, 'str'), ('compute__remat', 1, 'bool'),
      ('optimizer__learning_rate', '1e-3', 'float')])
  def test_wrong_type(self, field, value, allowed):
    values = tiny.config('sft').to_dict()
    *groups, last = field.split('__')
    target = values
    for group in groups:
      target = target[group]
    target[last] = value
    refused(ConfigDict(values), f"{field.replace('__', '.')}={value!r}", type(value).__name__,
            f'allowed: {allowed}')

  def test_a_value_where_a_group_belongs(self):
    values = tiny.config('sft').to_dict()
    refused(ConfigDict({**values, 'data': 3}), 'data=3', "'split'")

  @pytest.mark.parametrize(('field', 'value', 'names'), [
      ('task__name', 'algebra', tasks.names()),
      ('teacher__kind', 'oracle', teachers.names()),
      ('objective__divergence', 'jeffreys', objective_lib.KINDS['divergence'].names),
      ('objective__route', 'straight', objective_lib.ROUTES),
      ('objective__support', 'half', objective_lib.KINDS['support'].names),
      ('objective__importance', 'weights', objective_lib.KINDS['importance'].names),
      ('objective__reduction', 'mean', objective_lib.REDUCTIONS),
      ('objective__reward_baseline', 'critic', objective_lib.KINDS['reward_baseline'].names),
      ('objective__student_logprobs', 'cached', objective_lib.STUDENT_LOGPROBS),
      ('data__source', 'web', streams.SOURCES),
      ('data__overlong', 'skip', examples_lib.OVERLONG),
      ('prompt__template', 'chatml', prompts_lib.TEMPLATES),
      ('prompt__thinking', 'yes', prompts_lib.THINKING),
      ('optimizer__name', 'lion', ('adamw', 'sgd')),
      ('optimizer__schedule', 'step', ('constant', 'linear', 'cosine')),
      ('compute__dtype', 'float16', ('float32', 'bfloat16')),
      ('compute__block', 'maybe', ('auto', 'always', 'never'))])
  def test_unknown_name_lists_what_exists(self, field, value, names):
    c = tiny.override(tiny.config('opd_sampled'), **{field: value})
    refused(c, f"{field.replace('__', '.')}={value!r}", *(repr(n) for n in names))

  def test_unknown_model_family_lists_what_exists(self):
    c = tiny.config('sft')
    c.student.fresh.model_type = 'gpt2'
    with pytest.raises(ConfigError, match="'gpt2'") as e:
      config.parse(c)
    assert 'model_type' in str(e.value) and str(models.names()) in str(e.value)

  def test_unknown_task_option(self):
    c = tiny.config('sft')
    with c.unlocked():
      c.task.options.operandmax = 3
    refused(c, 'task.options', "['operandmax']", "'operand_max'")

  @pytest.mark.parametrize(('field', 'value'), [
      ('steps', 0), ('data__prompts_per_step', 0), ('data__samples_per_prompt', 0),
      ('data__max_prompt_tokens', 0), ('data__max_new_tokens', 0), ('data__limit', -1),
      ('compute__microbatch_rows', -1), ('compute__chunk_tokens', 0), ('compute__layer_unroll', 0),
      ('optimizer__updates_per_batch', 0), ('optimizer__warmup_steps', -1), ('eval__problems', 0),
      ('eval__every_steps', -1), ('eval__samples_per_problem', 0), ('checkpoint__every_steps', 0),
      ('checkpoint__keep_latest', 0), ('checkpoint__keep_best', -2), ('log__every_steps', 0),
      ('log__plain_every_steps', 0), ('log__transcripts', -1), ('eval__pass_k', 0),
      ('eval__pass_k', 3), ('optimizer__learning_rate', -1.0), ('sample__temperature', 0.0),
      ('sample__top_p', 0.0), ('sample__top_p', 1.5), ('sample__top_k', -1),
      ('objective__discount', 1.5), ('objective__teacher_temperature', 0.0),
      ('objective__teacher_temperature', math.nan), ('objective__distill_coef', math.nan),
      ('objective__distill_coef', math.inf), ('objective__reward_coef', math.nan),
      ('sample__temperature', math.nan), ('sample__temperature', math.inf),
      ('log__max_sampler_gap', math.nan), ('seed', 2**32),
      ('objective__reward_coef', -0.1), ('seed', -1)])
  def test_out_of_range(self, field, value):
    c = tiny.override(tiny.config('opd_sampled'), **{field: value})
    refused(c, f"{field.rpartition('__')[2]}={value}")

  @pytest.mark.parametrize(('field', 'value'), [
      ('operations', 3), ('train_examples', 'many'), ('operations', ('1',)), ('clean', 'all')])
  def test_wrong_type_of_a_task_option(self, field, value):
    c = tiny.config('sft')
    values = c.to_dict()
    values['task']['options'][field] = value
    with pytest.raises(ConfigError, match=f'{field}='):
      config.parse(ConfigDict(values))


class TestBatch:

  def test_microbatch_does_not_divide_the_batch(self):
    c = tiny.config('grpo', compute__microbatch_rows=5)
    refused(c, 'compute.microbatch_rows=5', 'data.prompts_per_step=8',
            'samples_per_prompt=4', 'a divisor of 32')

  def test_a_group_of_one(self):
    # Rows are prompts x samples, so a batch always divides into groups; one that is too small is
    # what can be wrong with a group.
    c = tiny.config('grpo', data__samples_per_prompt=1)
    refused(c, 'data.samples_per_prompt=1', "reward_baseline='group_mean_std'", 'at least 2')
    check(tiny.config('grpo', data__samples_per_prompt=1, objective__reward_baseline='none'))

  def test_a_group_that_does_not_divide_the_rows_cannot_be_reshaped(self):
    import jax.numpy as jnp
    with pytest.raises(TypeError, match='reshape'):
      signals.group_advantage(Objective(reward_baseline='group_mean'), jnp.zeros(10), 4)


class TestRoles:
  """Options that contradict each other, or that would have no effect."""

  @pytest.mark.parametrize(('kind', 'fields', 'parts'), [
      ('opd_sampled', dict(teacher__kind='none'), ("teacher.kind='none'", 'distill_coef=1.0')),
      ('sft_teacher', dict(teacher__kind='none'), ("teacher.kind='none'", "data.source='teacher'")),
      ('sft', dict(objective__importance='ratio'),
       ("objective.importance='ratio'", "data.source='dataset'", "'none'")),
      ('sft', dict(log__max_sampler_gap=0.1),
       ('log.max_sampler_gap=0.1', 'no effect', "data.source='dataset'")),
      ('sft_teacher', dict(objective__distill_coef=1.0),
       ("objective.route='policy_gradient'", "data.source='teacher'")),
      ('grpo', dict(objective__student_logprobs='sampler'),
       ("objective.student_logprobs='sampler'", 'no effect')),
      ('opd_sampled', dict(objective__route='direct'),
       ("objective.route='direct', support='sampled'",)),
      ('opd_sampled', dict(objective__support='full'),
       ("objective.route='policy_gradient', support='full'",)),
      ('opd_sampled', dict(objective__local__coef=1.0, objective__local__gate='teacher_entropy'),
       ("objective.local.gate='teacher_entropy'", "missing a required argument: 'above'")),
      ('opd_sampled', dict(teacher__kind='initial_student',
                           objective__token_gate='teachability(keep=0.5, top_k=65)'),
       ('objective.token_gate', '64')),
      ('opd_sampled', dict(teacher__kind='initial_student', objective__local__coef=1.0,
                           objective__local__support='teacher_top_k(65, tail="bucket")'),
       ('objective.local.support', '64')),
      ('sft_teacher', dict(objective__distill_coef=1.0, objective__importance='none'),
       ("data.source='teacher'", "support='sampled'")),
      # The ratio of the reward's term does not correct k2.
      ('opd_sampled', dict(objective__route='direct', objective__estimator='k2',
                           objective__reward_coef=1.0, sample__top_p=0.9),
       ("estimator='k2'", 'sample.top_p=0.9')),
      ('opd_sampled', dict(objective__window='tokens(0, 99)'),
       ("objective.window='tokens(0, 99)'", 'data.max_new_tokens=')),
      ('opd_sampled', dict(objective__window='tokens(99, 1)'),
       ("objective.window='tokens(99, 1)'", 'data.max_new_tokens=')),
      ('sft', dict(objective__likelihood_coef=0.0), ('likelihood_coef', 'all 0')),
      # A setting away from its default that nothing reads is a misunderstanding.
      ('opd_exact', dict(objective__importance='ratio'), ("objective.importance='ratio'",)),
      ('sft', dict(teacher__path='.'), ('teacher.path', "teacher.kind='none'")),
      ('sft', dict(optimizer__final_learning_rate=1e-4),
       ('optimizer.final_learning_rate=0.0001', "schedule='constant'")),
      ('sft', dict(optimizer__name='sgd', optimizer__weight_decay=0.1),
       ('optimizer.weight_decay=0.1', "'sgd'")),
      ('sft', dict(eval__stop_at_sampled_accuracy=0.5),
       ('eval.stop_at_sampled_accuracy=0.5', 'eval.every_steps=0')),
      ('sft', dict(objective__discount=0.5), ('objective.discount=0.5',)),
      ('sft', dict(checkpoint__best_metric='acuracy'),
       ("checkpoint.best_metric='acuracy'", "'sampled_accuracy'")),
      ('sft', dict(eval__problems=17), ('eval.problems=17', '16')),
      ('sft', dict(data__limit=10_000), ('data.limit=10000', '256')),
      ('sft', dict(data__max_new_tokens=60), ('max_position_embeddings', '32')),
      ('sft', dict(data__split='eval'), ("data.split='eval'",)),
      ('sft', dict(prompt__system='Be brief.'),
       ("prompt.system='Be brief.'", 'no effect', "prompt.template='none'")),
      ('sft', dict(prompt__thinking='on'), ("prompt.thinking='on'", 'no effect', "'default'")),
      ('sft', dict(prompt__date='1 May'), ("prompt.date='1 May'", 'no effect')),
      ('sft', dict(prompt__special_tokens=True), ('prompt.special_tokens=True has no effect',)),
      ('sft', dict(prompt__template='student', prompt__special_tokens=True),
       ('prompt.special_tokens=True', "template='student'", 'False')),
      ('sft', dict(prompt__template='student'), ("prompt.template='student'", 'no chat template')),
      ('sft', dict(prompt__template='teacher'), ("prompt.template='teacher'", "kind='none'")),
      ('sft', dict(prompt__template='student', data__overlong='cut'),
       ("data.overlong='cut'", "prompt.template='student'", "'drop'")),
      ('sft', dict(prompt__special_tokens=True, data__overlong='cut'),
       ("data.overlong='cut'", 'special_tokens=True', "'drop'")),
      ('sft', dict(data__samples_per_prompt=2), ('data.samples_per_prompt=2', "'dataset'")),
      ('sft', dict(optimizer__warmup_steps=10**6), ('optimizer.warmup_steps=1000000',)),
      ('sft', dict(optimizer__learning_rate=float('nan')), ('optimizer.learning_rate=nan',)),
      ('sft', dict(optimizer__b1=1.5), ('optimizer.b1=1.5',)),
      ('sft', dict(sample__top_k=65), ('sample.top_k=65', '64')),
      ('grpo', dict(objective__importance='none', sample__top_p=0.5),
       ("objective.importance='none'", 'sample.top_p=0.5')),
      ('grpo', dict(objective__importance='none', optimizer__updates_per_batch=2),
       ("objective.importance='none'", 'updates_per_batch=2')),
      ('grpo', dict(log__max_sampler_gap=-1.0), ('log.max_sampler_gap=-1.0',)),
      ('grpo', dict(objective__reward_coef=-1.0), ('objective.reward_coef=-1.0',)),
      ('sft', dict(eval__every_steps=1, eval__stop_at_sampled_accuracy=2.0),
       ('eval.stop_at_sampled_accuracy=2.0',)),
      # Batches and rows that the student does not write.
      ('opd_exact', dict(data__on_policy_fraction=0.5),
       ("data.off_policy_source='none'", 'on_policy_fraction=0.5', "'teacher'")),
      ('opd_exact', dict(data__on_policy_fraction=-0.5),
       ('data.on_policy_fraction=-0.5', '0 to 1')),
      ('opd_exact', dict(data__off_policy_source='teacher'),
       ("data.off_policy_source='teacher'", 'on_policy_fraction=1.0', "'none'")),
      ('opd_exact', dict(data__warm_steps=2), ("data.off_policy_source='none'", 'warm_steps=2')),
      ('opd_exact', dict(data__warm_steps=6, data__off_policy_source='teacher'),
       ('data.warm_steps=6, steps=6', 'never write')),
      ('opd_exact', dict(data__warm_steps=-1), ('data.warm_steps=-1', 'at least 0')),
      ('opd_exact', dict(data__warm_steps=2, data__off_policy_source='teacher',
                         data__on_policy_fraction=0.0), ('data.warm_steps=2', 'no effect')),
      ('opd_sampled', dict(data__warm_steps=2, data__off_policy_source='teacher'),
       ("objective.importance='ratio'", "data.off_policy_source='teacher'")),
      ('opd_sampled', dict(data__on_policy_fraction=0.5, data__off_policy_source='teacher'),
       ("objective.importance='ratio'", "data.off_policy_source='teacher'")),
      ('opd_sampled', dict(data__on_policy_fraction=0.5, data__off_policy_source='teacher',
                           objective__importance='none'),
       ("support='sampled'", "data.off_policy_source='teacher'")),
      ('opd_exact', dict(data__on_policy_fraction=0.5, data__off_policy_source='dataset',
                         teacher__kind='initial_student'), ("'dataset'", 'completions')),
      ('grpo', dict(data__on_policy_fraction=0.5, data__off_policy_source='dataset',
                    objective__importance='none'),
       ('data.samples_per_prompt=4', "off_policy_source='dataset'")),
      ('opd_sampled', dict(given__likelihood_coef=0.1),
       ('given.likelihood_coef=0.1', 'no effect', "given.source='none'")),
      ('opd_sampled', dict(given__source='dataset', given__likelihood_coef=0.1),
       ('given.prompts_per_step=0', 'at least 1')),
      ('opd_sampled', dict(given__source='dataset', given__prompts_per_step=4),
       ('given.distill_coef=0.0', 'likelihood_coef=0.0', 'both 0')),
      ('opd_sampled', dict(given__source='dataset', given__prompts_per_step=4,
                           given__likelihood_coef=0.1, teacher__kind='initial_student'),
       ('given.split', "'completion'")),
      ('opd_sampled', dict(given__source='teacher', given__prompts_per_step=4,
                           given__distill_coef=1.0, given__support='sampled'),
       ("given.support='sampled'", 'own')),
      ('opd_sampled', dict(given__source='teacher', given__prompts_per_step=4,
                           given__distill_coef=1.0, given__support='teacher_top_k(0, "drop")'),
       ('given.support', 'k=0', 'at least 1')),
      ('opd_sampled', dict(given__source='teacher', given__prompts_per_step=4,
                           given__distill_coef=1.0, teacher__kind='initial_student',
                           given__support='teacher_top_k(65, tail="bucket")'),
       ('given.support', '64')),
      ('grpo', dict(given__source='teacher', given__prompts_per_step=4, given__likelihood_coef=1.0),
       ("teacher.kind='none'", "given.source='teacher'")),
      ('opd_sampled', dict(sample__teacher_mix=0.2, sample__top_p=0.9),
       ('sample.teacher_mix=0.2', 'top_p=0.9')),
      ('opd_sampled', dict(sample__teacher_mix=1.0), ('sample.teacher_mix=1.0', 'below 1')),
      ('grpo', dict(sample__teacher_mix=0.2), ("teacher.kind='none'", 'teacher_mix=0.2')),
      ('opd_sampled', dict(sample__teacher_mix=0.2, objective__importance='ppo_clip(0.2)'),
       ('sample.teacher_mix=0.2', "objective.importance='ppo_clip(0.2)'", "'truncated'")),
      ('opd_sampled', dict(sample__teacher_mix=0.2, objective__importance='none'),
       ("objective.importance='none'", 'teacher_mix=0.2')),
      # References.
      ('opd_sampled', dict(objective__reference_kl='k2(0.1)'),
       ("reference.kind='none'", "objective.reference_kl='k2(0.1)'", "'initial_student'")),
      ('opd_sampled', dict(reference__kind='initial_student'),
       ("reference.kind='initial_student'", "'none' without")),
      ('opd_sampled', dict(reference__kind='initial_student', objective__extrapolation=1.2,
                           reference__path='.'),
       ("reference.path='.'", "kind='initial_student'")),
      ('opd_exact', dict(reference__kind='initial_student', objective__reference_kl='k3(0.1)',
                         sample__top_p=0.9),
       ("reference_kl='k3(0.1)'", 'sample.top_p=0.9')),
      ('opd_sampled', dict(objective__advantages='recomputed'),
       ("objective.advantages='recomputed'", 'updates_per_batch=1')),
      ('opd_sampled', dict(objective__baseline='exact', optimizer__updates_per_batch=2),
       ("objective.advantages='kept'", "objective.baseline='exact'", "'recomputed'")),
      ('opd_sampled', dict(objective__importance='ppo_clip(0.2)', sample__top_p=0.9),
       ("objective.importance='ppo_clip(0.2)'", 'sample.top_p=0.9', "'truncated'")),
      ('opd_exact', dict(data__on_policy_fraction=0.0, data__off_policy_source='teacher',
                         sample__teacher_mix=0.2),
       ('sample.teacher_mix=0.2', 'on_policy_fraction=0.0')),
      ('opd_exact', dict(data__on_policy_fraction=0.0, data__off_policy_source='teacher',
                         log__max_sampler_gap=0.1), ('log.max_sampler_gap=0.1', 'no effect')),
      ('opd_sampled', dict(reference__kind='checkpoint', objective__extrapolation=1.2),
       ("reference.path=''", "kind='checkpoint'")),
      ('grpo', dict(objective__teacher_temperature=0.7),
       ('objective.teacher_temperature=0.7', "teacher.kind='none'")),
      ('sft', dict(eval__top_p=0.0), ('eval.top_p=0.0',)),
      ('sft', dict(eval__top_k=65), ('eval.top_k=65', '64')),
  ], ids=lambda x: ','.join(f'{k}={v}' for k, v in x.items()) if isinstance(x, dict) else None)
  def test_refused(self, kind, fields, parts, tmp_path):
    c = tiny.config(kind, **fields)
    if c.teacher.kind == 'checkpoint':
      c.teacher.path = str(tmp_path)
    with pytest.raises(ConfigError) as e:
      build.open_parts(config.parse(c))  # some of it only the models or the data can tell
    for part in (*parts, 'allowed'):
      assert part in str(e.value), f'{part!r} is not in {e.value}'

  def test_a_path_for_the_initial_student(self, tmp_path):
    c = tiny.config('opd_sampled', teacher__kind='initial_student', teacher__path=str(tmp_path))
    with pytest.raises(ConfigError, match='teacher.path=.*no effect'):
      build.open_parts(config.parse(c))

  def test_no_path_for_a_checkpoint(self):
    with pytest.raises(ConfigError, match="teacher.path=''.*allowed: a directory"):
      build.open_parts(config.parse(tiny.config('opd_sampled')))


class TestModels:

  @pytest.mark.parametrize('part', ['student', 'teacher'])
  def test_missing_directory(self, part, tmp_path):
    c = tiny.config('opd_sampled', **{f'{part}__path': str(tmp_path / 'nowhere')})
    refused(c, f'{part}.path=', 'nowhere', 'a Hugging Face checkpoint directory')

  @pytest.mark.parametrize('part', ['student', 'teacher'])
  def test_a_repository_has_a_pinned_commit(self, part):
    for revision in ('', 'main'):
      c = tiny.config('opd_sampled', **{f'{part}__path': 'acme/tiny',
                                        f'{part}__revision': revision})
      refused(c, f'{part}.revision={revision!r}', "path='acme/tiny'", '40 hex digits')

  @pytest.mark.parametrize('part', ['student', 'teacher'])
  @pytest.mark.parametrize('path', ['', '.', 'stage:first'])
  def test_a_revision_of_something_else(self, part, path):
    c = tiny.config('opd_sampled', **{f'{part}__path': path, f'{part}__revision': 'ab' * 20})
    refused(c, f'{part}.revision=', 'no effect', "allowed: ''")

  @pytest.mark.parametrize('missing', ['config.json', 'model.safetensors', 'tokenizer_config.json'])
  @pytest.mark.parametrize('part', ['student', 'teacher'])
  def test_a_directory_that_is_not_a_checkpoint(self, part, missing, tmp_path):
    whole = tiny.write_model(tmp_path / 'whole')
    broken = tiny.write_model(tmp_path / 'broken')
    (broken / missing).unlink()
    c = tiny.config('opd_sampled', student__path=str(whole), teacher__path=str(whole))
    c[part].path = str(broken)
    with pytest.raises(ConfigError) as e:
      train.train(c, tmp_path / 'run')
    for word in (f'{part}.path', str(broken), missing):
      assert word in str(e.value), f'{word!r} is not in {e.value}'

  @pytest.mark.parametrize(('file', 'text'), [
      ('tokenizer.json', '{}'), ('tokenizer.json', '{"a'), ('tokenizer_config.json', '{"a'),
      ('tokenizer_config.json', '[]'), ('generation_config.json', '{"a'),
      ('generation_config.json', '[]')])
  @pytest.mark.parametrize('part', ['student', 'teacher'])
  def test_a_damaged_file_of_a_checkpoint(self, part, file, text, tmp_path):
    whole = tiny.write_model(tmp_path / 'whole')
    broken = tiny.write_model(tmp_path / 'broken')
    (broken / file).write_text(text)
    c = tiny.config('opd_sampled', student__path=str(whole), teacher__path=str(whole))
    c[part].path = str(broken)
    with pytest.raises(ConfigError,
                       match=rf'{part}\.path=.*broken.*(damaged|read).*allowed'):
      build.open_parts(config.parse(c))

  @pytest.mark.parametrize('alphabet', [prompts_lib.ALPHABET[:-1], prompts_lib.ALPHABET[::-1]],
                           ids=['smaller', 'other order'])
  def test_vocabulary_mismatch(self, alphabet, tmp_path):
    other = tiny.write_model(tmp_path / 'other', alphabet=alphabet)
    c = tiny.config('opd_sampled', teacher__path=str(other))
    with pytest.raises(ConfigError) as e:
      train.train(c, tmp_path / 'run')
    for part in ('teacher.path=', str(other), f'({len(alphabet) + 2} tokens)', '(64 tokens)',
                 'allowed'):
      assert part in str(e.value)

  def test_a_prompt_longer_than_the_room(self, tmp_path):
    c = tiny.config('sft', data__max_prompt_tokens=4)
    with pytest.raises(ConfigError, match=(
        r"data\.max_prompt_tokens=4: \d+ of 256 .* 5 tokens: '\d\d[+-]\d='; allowed: at least 5")):
      train.train(c, tmp_path)

  def test_a_completion_longer_than_the_room(self, tmp_path):
    c = tiny.config('sft', data__max_new_tokens=3)
    with pytest.raises(ConfigError, match=r'data\.max_new_tokens=3: .*allowed: at least 4'):
      train.train(c, tmp_path)

  def test_unknown_split(self, tmp_path):
    c = tiny.config('sft', data__split='test')
    with pytest.raises(ConfigError, match=r"split='test'.*\['corpus', 'eval', 'train'\]"):
      train.train(c, tmp_path)

  def test_a_split_without_completions(self, tmp_path):
    c = tiny.config('sft', data__split='train')
    with pytest.raises(ConfigError, match=r"data\.source='dataset' needs .* completions"):
      train.train(c, tmp_path)


class TestWorkdir:

  def test_another_configs_run(self, tmp_path):
    claim(tiny.config('sft'), tmp_path)
    c = tiny.config('sft', optimizer__learning_rate=0.5, steps=7)
    with pytest.raises(ConfigError) as e:
      train.train(c, tmp_path)
    for part in (str(tmp_path), 'steps: 6 -> 7', 'optimizer/learning_rate: 0.01 -> 0.5', 'allowed'):
      assert part in str(e.value)
    claim(tiny.config('sft'), tmp_path)  # the same config is welcome

  def test_the_doctors_switches_may_change(self, tmp_path):
    # Or a run that the doctor does not let resume could never go on as it advises.
    claim(tiny.config('sft'), tmp_path)
    claim(tiny.config('sft', doctor__support='off: known'), tmp_path)

  def test_a_start_that_failed_does_not_keep_the_directory(self, tmp_path):
    with pytest.raises(ConfigError, match='max_prompt_tokens'):
      train.train(tiny.config('sft', data__max_prompt_tokens=4), tmp_path)
    claim(tiny.config('sft'), tmp_path)  # the corrected config may have it

  def test_under_a_file(self, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match=r'workdir=.*file/run.*allowed'):
      train.train(tiny.config('sft'), tmp_path / 'file' / 'run')

  @pytest.mark.parametrize('call', ['mkdir', 'write_text', 'rename'])
  def test_no_permission(self, call, tmp_path, monkeypatch):
    def refuse(self, *args, **options):
      raise PermissionError(13, 'Permission denied', str(self))

    monkeypatch.setattr(pathlib.Path, call, refuse)
    with pytest.raises(ConfigError, match=r'workdir=.*Permission denied.*allowed'):
      claim(tiny.config('sft'), tmp_path / 'run')

  @pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
  def test_a_directory_of_somebody_else(self, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r'workdir=.*Permission denied.*allowed'):
      train.train(tiny.config('sft'), tmp_path / 'run')

  def test_a_config_file_that_was_cut_off(self, tmp_path):
    for text in ('{"steps": ', '3'):
      (tmp_path / 'config.json').write_text(text)
      with pytest.raises(ConfigError, match=r'workdir=.*config\.json'):
        claim(tiny.config('sft'), tmp_path)


class TestPipeline:

  def make(self, **stages):
    c = experiment.default_pipeline()
    c.stages = ConfigDict(stages or dict(
        base=tiny.config('sft'),
        student=tiny.config('opd_exact', student__path='stage:base', teacher__path='stage:base')))
    c.order = tuple(c.stages)
    c.report.methods, c.report.labels = (c.order[-1],), ('last',)
    return c

  def test_valid(self):
    check(self.make())

  @pytest.mark.parametrize(('fields', 'parts'), [
      (dict(order=('student', 'base')),
       ("stages.student.student.path='stage:base'", 'an earlier stage')),
      (dict(order=('base',)), ("order=('base',)", "['base', 'student']")),
      (dict(order=('base', 'student', 'base')), ('order=',)),
      (dict(order=('base', 'studnet')), ("'studnet'", "['base', 'student']")),
      (dict(seeds=()), ('seeds=()',)),
      (dict(seeds=(0, 0)), ('seeds=(0, 0)',)),
      (dict(seeds=(-1,)), ('seeds=(-1,)',)), (dict(seeds=(2**32,)), ('seeds=(4294967296,)',)),
      (dict(seeds=('0',)), ("seeds=('0',)",)),
      (dict(report__methods=('studnet',)), ("report.methods=('studnet',)", "['base', 'student']")),
      (dict(report__methods=()), ('report.methods=()',)),
      (dict(report__labels=('a', 'b')), ("labels=('a', 'b')", 'one label each')),
      (dict(report__teacher='stage:nobody'), ("report.teacher='stage:nobody'", "['base',")),
      (dict(report__teacher='base'), ("report.teacher='base'", "'stage:NAME'"))])
  def test_refused(self, fields, parts):
    refused(tiny.override(self.make(), **fields), *parts)

  @pytest.mark.parametrize('part', ['student', 'teacher'])
  @pytest.mark.parametrize('path', ['stage:nobody', 'stage:student'], ids=['missing', 'itself'])
  def test_reference_to_a_stage_that_is_not_there_yet(self, part, path):
    c = self.make()
    c.stages.student[part].path = path
    refused(c, f'stages.student.{part}.path={path!r}', "['base']")

  def test_a_mistake_in_a_stage_names_the_stage(self):
    for field, value in (('data__source', 'web'), ('steps', 0), ('task__name', 'algebra'),
                         ('eval__pass_k', 9), ('objective__route', 'straight')):
      c = self.make()
      tiny.override(c.stages.student, **{field: value})
      refused(c, f"stages.student.{field.replace('__', '.')}={value!r}")

  def test_the_pipeline_sets_the_seed(self):
    c = self.make()
    c.stages.base.seed = 7
    refused(c, 'stages.base.seed=7', 'no effect', 'seeds')

  def test_unknown_keys(self):
    values = self.make().to_dict()
    refused(ConfigDict({**values, 'sedes': 3}), "['sedes']", "'seeds'")
    values['stages']['base']['stepz'] = 3
    refused(ConfigDict(values), "['stages.base.stepz']", "'stages.base.steps'")

  def test_a_prompt_that_does_not_fit_a_later_stage_is_found_before_the_first_runs(
      self, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'train', None)
    c = self.make()
    c.stages.student.data.max_prompt_tokens = 4
    with pytest.raises(ConfigError, match=r'stages\.student: data\.max_prompt_tokens=4'):
      pipeline.run(c, tmp_path)

  def test_a_stage_of_no_pipeline(self, tmp_path):
    # 'stage:' means something in a pipeline only.
    c = tiny.config('sft', student__path='stage:base')
    with pytest.raises(ConfigError, match=r"student\.path='stage:base'"):
      train.train(c, tmp_path)

  def test_pick_stage(self):
    c = self.make()
    assert experiment.pick_stage(c, 'base') == c.stages.base
    assert experiment.pick_stage(c.stages.base, None) == c.stages.base
    for name in ('nobody', None):
      with pytest.raises(ConfigError, match=rf"stage={name!r}; allowed: \['base', 'stud"):
        experiment.pick_stage(c, name)


class TestFromDict:

  @pytest.mark.parametrize('kind', tiny.KINDS)
  def test_is_the_inverse_of_to_dict(self, kind):
    c = tiny.config(kind)
    again = config.from_dict(json.loads(json.dumps(config.to_dict(c))))
    assert again.to_dict() == c.to_dict()  # tuples are tuples again

  def test_of_a_task_whose_defaults_do_not_work(self, tmp_path):
    (tmp_path / 'x.jsonl').write_text('{"p": "1"}\n')
    c = config.default_config()
    c.task = config.task_config('prompts', source=str(tmp_path / 'x.jsonl'), prompt_column='p',
                                holdout_examples=1, filters=("p == '1'",))
    again = config.from_dict(json.loads(json.dumps(config.to_dict(c))))
    assert again.to_dict() == c.to_dict()

  @pytest.mark.parametrize(('extra', 'parts'), [
      ({}, ('optimizer.b2 is missing',)), ({'b2': 0.9}, ("['optimizer.b3']", 'allowed'))])
  def test_fields_of_another_version(self, extra, parts):
    values = config.to_dict(tiny.config('sft'))
    values['optimizer']['b3'] = values['optimizer'].pop('b2')
    values['optimizer'] |= extra
    with pytest.raises(ConfigError) as e:
      config.parse(config.from_dict(values))
    assert all(part in str(e.value) for part in parts)


class TestPresets:

  def test_the_rows_of_a_batch_stay_and_nothing_of_another_method_does(self):
    c = tiny.config('grpo')  # 8 prompts of 4 samples
    c.teacher.kind, c.objective.teacher_temperature = 'initial_student', 0.7
    presets.apply(c, 'stable_opd')
    assert (c.data.prompts_per_step, c.data.samples_per_prompt) == (32, 1)
    assert c.objective.reward_coef == 0.0 and c.objective.teacher_temperature == 0.7
    assert c.given.source == 'dataset' and c.reference.kind == 'initial_student'
    presets.apply(c, 'reinforce')
    assert (c.data.prompts_per_step, c.data.samples_per_prompt) == (8, 4)
    assert c.given.source == c.reference.kind == c.teacher.kind == 'none'
    check(c)

  def test_an_unknown_name(self):
    with pytest.raises(ConfigError, match="preset='opt'; allowed: .*'opd'"):
      presets.apply(tiny.config('opd_sampled'), 'opt')


def test_what_is_distilled_has_one_temperature_whoever_wrote_it():
  c = tiny.config('opd_exact', sample__temperature=0.7, data__on_policy_fraction=0.5,
                  data__off_policy_source='teacher', given__source='teacher',
                  given__prompts_per_step=4, given__distill_coef=1.0)
  made = streams.make(config.parse(c))
  assert [s.name for s in made] == [streams.OWN, streams.OFF_POLICY, streams.GIVEN]
  assert [s.objective.temperature for s in made] == [0.7, 0.7, 0.7]
  assert not any(s.warm_steps for s in made)
  imitated, = streams.make(config.parse(tiny.config('sft', sample__temperature=0.7)))
  assert imitated.objective.temperature == 1.0
