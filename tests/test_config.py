"""Configs: every experiment loads, and every mistake in a field is refused with the field, the
value and what is allowed."""

import importlib.util
import json
import math
import pathlib
import re

from ml_collections import ConfigDict
import pytest
from refusal import check, refused
import tiny

from opd_jax import config, experiment, models, presets, tasks, teachers
from opd_jax.algorithm import objective as objective_lib
from opd_jax.algorithm import signals
from opd_jax.algorithm.objective import Objective
from opd_jax.data import examples as examples_lib
from opd_jax.data import prompts as prompts_lib
from opd_jax.data import streams
from opd_jax.errors import ConfigError

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


@pytest.mark.usefixtures('models_made')
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
      ('n=1.5', ("'n=1.5'", 'int')),
      ('n=True', ("'n=True'", 'int')),
      ('n=three', ("'n=three'", 'int')),
      ('n', ("'n'", 'int')),
      ('n=', ("'n='", 'int')),
      ('rate=x', ("'rate=x'", 'float')),
      ('flag=1', ("'flag=1'", 'bool')),
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
    with pytest.raises(ConfigError, match=r'eval\.pass_k'):
      config.parse(ConfigDict(values))

  @pytest.mark.parametrize(('field', 'value', 'allowed'), [
      ('steps', 'many', 'int'), ('steps', 2.0, 'int'), ('steps', True, 'int'),
      ('name', 3, 'str'), ('compute__remat', 1, 'str'),
      ('compute__remat', True, "str ('layer' for True"),
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
      ('optimizer__updates_per_batch', 0), ('optimizer__warmup_steps', -1), ('eval__problems', -1),
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
            'samples_per_prompt=4', '32')

  def test_a_group_of_one(self):
    # Rows are prompts x samples, so a batch always divides into groups; one that is too small is
    # what can be wrong with a group.
    c = tiny.config('grpo', data__samples_per_prompt=1)
    refused(c, 'data.samples_per_prompt=1', "reward_baseline='group_mean_std'")
    check(tiny.config('grpo', data__samples_per_prompt=1, objective__reward_baseline='none'))

  def test_a_group_that_does_not_divide_the_rows_cannot_be_reshaped(self):
    import jax.numpy as jnp
    with pytest.raises(TypeError, match='reshape'):
      signals.group_advantage(Objective(reward_baseline='group_mean'), jnp.zeros(10), 4)


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
      ({}, ('optimizer.b2',)), ({'b2': 0.9}, ("['optimizer.b3']", 'allowed'))])
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
