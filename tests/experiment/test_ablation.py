"""The ablations: every size of each, and all of them in one pipeline."""

import functools
import importlib.util
import json

import pytest
import tiny

from opd_jax import config, experiment
from opd_jax.errors import ConfigError
from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim


def load(name):
  spec = importlib.util.spec_from_file_location(name, tiny.ROOT / 'experiments' / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


ABLATIONS = load('reproduce').ABLATIONS
ONLY = {'batch_and_support': ['tiny'], 'teacher_identity': ['tiny'],
        'personalize': ['tiny', 'smollm2']}


@pytest.mark.usefixtures('models_made')
class TestSizes:

  @pytest.mark.parametrize('size', ablation.SIZES)
  @pytest.mark.parametrize('name', ABLATIONS)
  def test_every_size(self, name, size):
    get_config = functools.partial(load(name).get_config, f'{size},seeds=2')
    if size not in ONLY.get(name, ablation.SIZES):
      with pytest.raises(ConfigError, match=f"size='{size}'; allowed: .*tiny"):
        get_config()
      return
    c = get_config()
    for stage in c.stages.values():
      for part in (stage.student, stage.teacher):
        if part.path.startswith('Qwen/'):  # the first start pins it
          part.revision = 40 * '0'
    p = experiment.parse_pipeline(c)
    assert p.report.claims and len(p.report.methods) >= 3 and p.seeds == (0, 1)
    # Arms differ in what is run, and not in their names alone.
    texts = [run.to_json(sort_keys=True) for run in c.stages.values()]
    assert len(set(texts)) == len(texts)
    if size in ablation.HUB:
      models = {m.path for run in p.runs.values() for m in (run.student, run.teacher)} - {''}
      assert ablation.HUB[size][1] in models <= set(ablation.HUB[size])

  @pytest.mark.parametrize('size', ablation.SIZES)
  def test_the_longest_context_is_the_whole_room(self, size):
    whole = ablation.opd(ablation.parse_arg(size)).data.max_new_tokens
    longest = load('context_length').get_config(size).order[-1]
    assert longest == f'opd_{whole}'

  def test_sources_are_left_out_of_what_they_did_not_measure(self):
    claims = load('personalize').get_config('smollm2').report.claims
    assert claims.recovers_again.post == '83 % of 85 %'
    assert {c.post for c in load('discount').get_config('smollm2').report.claims.values()} == {'–'}

  def test_an_unknown_size(self):
    with pytest.raises(ConfigError, match=r"size='70b'; allowed: \['tiny', 'small', 'smollm2'"):
      load('discount').get_config('70b')


@pytest.mark.parametrize(('size', 'command'), [
    ('small', r'experiments/dense_vs_rl\.py:small'),
    ('smollm2', r'experiments/assets/smollm2\.py')])
def test_models_that_are_not_there(tmp_path, size, command):
  with pytest.raises(ConfigError, match=rf'models=.*has no model.*allowed: .*{command}'):
    load('discount').get_config(f'{size},models={tmp_path}')


@pytest.mark.parametrize(('arg', 'match'), [
    ('tiny,models=runs', "models='runs' with size='tiny'; allowed"), ('tiny,seeds=-1', 'seeds=-1'),
    ('tiny,seeds=0', 'seeds=0; allowed: at least 1')])
def test_arguments_without_effect(arg, match):
  with pytest.raises(ConfigError, match=match):
    load('discount').get_config(arg)


def test_the_other_teacher_has_nothing_of_the_student():
  shape = ablation.other_teacher(ablation.opd(ablation.parse_arg('tiny'))).student.fresh
  with open(ablation.ASSETS / 'base' / 'config.json') as f:
    # Weights of one shape and seed are the same numbers.
    assert shape.hidden_size != json.load(f)['hidden_size']


class TestChanges:

  def base(self):
    return ablation.opd(ablation.parse_arg('tiny'))

  def test_a_copy_is_changed(self):
    c = self.base()
    before = c.to_json()
    ablation.lora(ablation.sft(ablation.sampled(ablation.with_rate(c, 2.0))), 4, 5.0)
    assert c.to_json() == before

  def test_the_last_rate_goes_along(self):
    for c in (ablation.with_rate(self.base(), 0.5), ablation.lora(self.base(), 4, 0.5)):
      assert c.optimizer.learning_rate == 1e-3
      assert c.optimizer.final_learning_rate == pytest.approx(1e-4)

  def test_sampled_is_the_papers_loss(self):
    assert ablation.sampled(self.base()).objective == config.default_config().objective

  def test_microbatches_fit_the_rows(self):
    c = self.base()
    c.compute.microbatch_rows = 64
    assert ablation.changed(c, data__prompts_per_step=8).compute.microbatch_rows == 8
    assert ablation.changed(c, data__prompts_per_step=128).compute.microbatch_rows == 64


class TestJoin:

  def parts(self):
    c = ablation.opd(ablation.parse_arg('tiny'))
    arg = ablation.parse_arg('tiny,seeds=2')
    gain = Claim('', '', 'opd.sampled_accuracy - sft.sampled_accuracy', 0.0, 0.1)
    chained = ablation.changed(c, teacher__path='stage:opd')
    return {'a': ablation.pipeline('a', arg, dict(opd=('OPD', c), sft=('SFT', ablation.sft(c))),
                                   dict(gain=gain)),
            'b': ablation.pipeline('b', arg, dict(opd=('again', c), sft=('from it', chained)),
                                   dict(gain=gain))}

  def test_stages_are_named_and_run_once(self):
    p = experiment.parse_pipeline(ablation.join('all', self.parts()))
    assert p.order == p.report.methods == ('a_opd', 'a_sft', 'b_sft')
    assert p.report.labels == ('OPD', 'SFT', 'from it')
    assert dict(p.report.sections) == {'a': ('a_opd', 'a_sft'), 'b': ('a_opd', 'b_sft')}
    assert p.runs['b_sft'].teacher.path == 'stage:a_opd'
    assert p.seeds == (0, 1)

  def test_claims_follow_their_stages(self):
    p = experiment.parse_pipeline(ablation.join('all', self.parts()))
    assert {name: claim.measure for name, claim in p.report.claims.items()} == {
        'a_gain': 'a_opd.sampled_accuracy - a_sft.sampled_accuracy',
        'b_gain': 'a_opd.sampled_accuracy - b_sft.sampled_accuracy'}

  @pytest.mark.parametrize('value', ['a_opd', 5, ()])
  def test_a_section_of_no_stages_is_refused(self, value):
    c = ablation.join('all', self.parts())
    with c.ignore_type():
      c.report.sections.a = value
    with pytest.raises(ConfigError, match=r"report\.sections\.a=.*allowed: some of \('a_opd'"):
      experiment.parse_pipeline(c)

  def test_a_section_of_others_is_refused(self):
    c = ablation.join('all', self.parts())
    c.report.sections.a = ('a_opd', 'nobody')
    with pytest.raises(ConfigError, match=r"report\.sections has \['nobody'\]; allowed"):
      experiment.parse_pipeline(c)


def test_everything_tiny_is_one_pipeline():
  p = experiment.parse_pipeline(load('reproduce').get_config())
  assert set(p.report.sections) == set(ABLATIONS) and p.seeds == (0, 1, 2)
  few = experiment.parse_pipeline(load('reproduce').get_config('tiny,only=discount+top_k'))
  assert set(few.report.sections) == {'discount', 'top_k'}
  with pytest.raises(ConfigError, match="only='nothing'; allowed: .*sft_vs_opd"):
    load('reproduce').get_config('tiny,only=nothing')
