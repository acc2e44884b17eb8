"""Every check of the doctor on a pairing that it must pass and on one that it must not."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import tiny

from opd_jax import build, config, models, programs, train
from opd_jax.data import prompts as prompts_lib
from opd_jax.doctor import examine as doctor
from opd_jax.doctor import rollouts, static
from opd_jax.doctor.finding import FAIL, OFF, OK, SKIPPED, WARN
from opd_jax.files import huggingface
from opd_jax.files import workdir as workdir_lib
from opd_jax.models import lora, params

EVERY = {**doctor.STATIC, **doctor.COMPILED, **doctor.ROLLOUTS}
GOOD = dict(doctor__rollouts=8, steps=1, eval__problems=4)


def _pair(kind='opd_sampled', **fields):
  return tiny.with_models(kind, **{**GOOD, **fields})


def _open(c):
  """(run, parts) of a config."""
  run = config.parse(c)
  return run, build.open_parts(run)


def _examine(c):
  """Every finding by the name of its check."""
  run, parts = _open(c)
  base = parts.read_base()
  student = lora.join(base, parts.read_trained())
  found = doctor.examine(run, programs.compile_programs(run, parts)) + doctor.examine_rollouts(
      run, parts, student, parts.read_frozen('teacher', base))
  return {f.check: f for f in found}


def _statuses(found):
  return {name: f.status for name, f in found.items() if f.status != OK}


@pytest.fixture(scope='module')
def healthy():
  return _examine(_pair())


def test_a_good_pair_passes_every_check(healthy):
  assert not _statuses(healthy)
  assert '64 tokens, the same ids' in healthy['token_ids'].detail
  assert "{1: '<eos>'}" in healthy['stop_tokens'].detail


def test_every_check_has_a_switch_and_every_switch_a_check():
  switches = {name for name, value in config.default_config().doctor.items() if value == 'on'}
  assert switches == EVERY.keys()


@pytest.mark.parametrize('name', EVERY)
def test_a_switch_turns_its_check_off_and_gives_the_reason(name):
  c = _pair(**{f'doctor__{n}': 'off: not this one' for n in EVERY})
  run = config.parse(c)  # with all of them off nothing is opened
  nothing = types.SimpleNamespace(parts=None)
  found = doctor.examine(run, nothing) + doctor.examine_rollouts(run, None, None, None)
  (finding,) = [f for f in found if f.check == name]
  assert (finding.status, finding.detail) == (OFF, 'not this one')
  for value in ('no', 'off', 'off: '):
    with pytest.raises(config.ConfigError, match=f"doctor.{name}='{value}'.*allowed: 'on'"):
      config.parse(_pair(**{f'doctor__{name}': value}))


def _teacher(tmp_path, change=None, alphabet=prompts_lib.ALPHABET, **shape):
  """A copy of the trained teacher whose parameters went through `change`, in a directory."""
  loaded = huggingface.load(tiny.teacher(), {})
  characters = prompts_lib.character_tokenizer(alphabet)
  model, values = loaded.model, loaded.read()
  if shape:
    model = models.build({**tiny.SHAPE, 'vocab_size': len(characters), **shape})
    values = jax.device_get(params.init_params(model.specs, jax.random.key(0)))
  if change:
    values = params.unflatten({n: change(n, x) for n, x in params.flatten(values).items()})
  huggingface.write_checkpoint(tmp_path / 'teacher', model, values, characters)
  return str(tmp_path / 'teacher')


def test_a_teacher_with_other_ids(tmp_path):
  path = _teacher(tmp_path, alphabet=prompts_lib.ALPHABET[::-1])
  found = _examine(_pair(teacher__path=path))
  assert found['token_ids'].status == found['templates'].status == FAIL
  assert 'differ from place 0 on: [' in found['templates'].detail
  assert found['token_ids'].field == found['templates'].field == 'teacher.path'


def test_a_teacher_that_lost_its_weights_is_uniform(tmp_path):
  path = _teacher(tmp_path, lambda name, x: 0 * x if name in ('head', 'embed') else x)
  found = _examine(_pair(teacher__path=path))
  assert found['uniform_teacher'].status == FAIL
  assert '4.159 of at most ln V = 4.159' in found['uniform_teacher'].detail


def test_a_teacher_that_finds_the_students_text_unlikely(tmp_path):
  path = _teacher(tmp_path, lambda name, x: -x if name == 'head' else x)
  found = _examine(_pair(teacher__path=path))
  assert found['support'].status == FAIL
  assert 'doctor.max_reverse_kl=6.0' in found['support'].detail


def test_a_student_that_is_far_is_told_how_to_begin(tmp_path, healthy):
  path = _teacher(tmp_path, lambda name, x: -x if name == 'head' else x)
  far = dict(teacher__path=path, doctor__max_reverse_kl=1000.0)  # does not bring it nearer
  asked = "preset 'warm_start'"
  warm = dict(steps=4, data__warm_steps=2, data__off_policy_source='teacher')
  found = _examine(_pair(**far))['support']
  assert found.status == WARN and asked in found.detail
  assert asked not in healthy['support'].detail
  warmed = _examine(_pair('opd_exact', **far, **warm))['support']
  assert warmed.status == WARN and asked not in warmed.detail


def test_the_log_ratio_is_that_of_the_models(healthy):
  # Against the run's own metric on other rollouts of the same policies.
  detail = healthy['support'].detail
  value = float(detail.split(': ')[1].split()[0])
  assert 0.5 < value < 5  # 1.6 on the whole held-out set


def test_a_first_token_that_stands_out():
  c, mask = _pair(), np.zeros((3, 7))
  mask[:, 3:] = 1
  ratio = np.where(mask > 0, -0.1, -99.0)  # what the mask leaves out is not read
  ratio[:, 3] = -4.0
  probe = rollouts.Probe(mask=mask, gap=0 * mask, logratio=ratio, teacher_entropy=None,
                       ended=np.array([True, False, False]), tokens=np.zeros((3, 8), int), room=4)
  run = config.parse(c)
  assert rollouts.check_support(run, None, probe).status == OK  # no template to be wrong
  c.prompt.template = 'student'
  run = config.parse(c)
  finding = rollouts.check_support(run, None, probe)
  assert finding.status == WARN and '4.000 at the first one' in finding.detail
  assert finding.detail.startswith('log p_S - log p_T: 1.075 nats') and 'compare' in finding.detail
  ratio[1:, 3] = -0.1  # a habit in one of them
  assert rollouts.check_support(run, None, probe).status == OK
  c.data.max_new_tokens = 4
  assert rollouts.check_truncation(config.parse(c), None, probe).status == WARN
  c.data.max_new_tokens = 400  # the run has more room than the probe had
  assert rollouts.check_truncation(config.parse(c), None, probe).status == OK
  none = dataclasses.replace(probe, ended=np.zeros(3, bool))
  finding = rollouts.check_truncation(config.parse(c), None, none)
  assert (finding.status, finding.field) == (WARN, 'doctor.max_new_tokens')
  assert '100% of 3 completions do not end within 4 tokens; the run allows 400' in finding.detail


def test_stop_tokens_that_differ(tmp_path):
  path = tmp_path / 'teacher'
  hf_teacher = huggingface.load(tiny.teacher(), {})
  characters = prompts_lib.character_tokenizer()
  characters.eos_token = '#'
  huggingface.write_checkpoint(path, hf_teacher.model, hf_teacher.read(), characters)
  ends = {'student': FAIL, 'union': WARN, 'teacher': OK}
  for stop, status in ends.items():
    c = _pair(teacher__path=str(path), sample__stop=stop)
    finding = static.check_stop_tokens(*_open(c))
    assert finding.status == status, stop
  c = _pair(teacher__path=str(path))
  with pytest.raises(config.ConfigError, match=r"sample\.stop='student'.*stop_tokens.*'#'.*union"):
    train.train(c, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists()  # before anything expensive


@pytest.mark.parametrize('kind', ['grpo', 'opd_sampled'])
def test_a_turn_that_ends_in_no_stop_token(kind, tmp_path):
  path = tiny.write_chat_model(tmp_path / 'model')
  (path / 'generation_config.json').write_text('{"eos_token_id": 280}')
  teacher = tiny.write_chat_model(tmp_path / 'teacher', seed=1)
  fields = dict(data__max_prompt_tokens=40, prompt__template='student')
  c = tiny.config(kind, student__path=str(path), **GOOD, **fields)
  if kind != 'grpo':
    c.teacher.path = str(teacher)
  finding = static.check_stop_tokens(*_open(c))
  assert (finding.status, finding.field) == (FAIL, 'sample.stop')
  assert "'<|over|>\\n', in which there is no stop token (['<|end|>'])" in finding.detail
  if kind != 'grpo':  # whose generation_config.json has it
    c.sample.stop = 'union'
    assert static.check_stop_tokens(*_open(c)).status == OK


def test_an_untrained_student_is_cut_off_and_writes_special_tokens():
  c = tiny.config('grpo', data__max_new_tokens=3, **GOOD)
  found = _examine(c)
  assert found['truncation'].status == WARN
  assert found['uniform_teacher'].status == found['support'].status == SKIPPED
  assert found['templates'].detail == 'no teacher'


def test_special_tokens_within_a_completion():
  run, parts = _open(tiny.config('grpo', **GOOD))
  mask = np.zeros((2, 5))
  mask[:, 2:] = 1
  tokens = np.array([[5, 5, 5, 7, 7, 1], [5, 5, 5, 7, 8, 1]])
  probe = rollouts.Probe(mask=mask, gap=0 * mask, logratio=None, teacher_entropy=None,
                       ended=np.array([True, True]), tokens=tokens, room=4)
  assert rollouts.check_special_tokens(run, parts, probe).status == OK
  parts.student.tokenizer.add_special_tokens({'additional_special_tokens': [
      parts.student.tokenizer.convert_ids_to_tokens(8)]})
  finding = rollouts.check_special_tokens(run, parts, probe)
  assert finding.status == WARN and '16.7%' in finding.detail


def test_a_sampler_that_is_not_the_scorer():
  c = tiny.config('grpo', **GOOD)
  mask = np.ones((2, 3))
  probe = rollouts.Probe(mask=mask, gap=np.full((2, 3), 2e-3), logratio=None, teacher_entropy=None,
                       ended=np.array([True, True]), tokens=np.zeros((2, 4), int), room=4)
  assert rollouts.check_self_kl(config.parse(c), None, probe).status == FAIL
  c.compute.dtype = 'bfloat16'
  assert rollouts.check_self_kl(config.parse(c), None, probe).status == OK


@pytest.mark.parametrize(('dtype', 'worst', 'status'), [
    ('float32', 1e-4, OK), ('float32', 2e-3, WARN), ('float32', 0.02, FAIL),
    ('bfloat16', 0.2, OK), ('bfloat16', 0.63, WARN), ('bfloat16', 1.5, FAIL),
    ('bfloat16', np.nan, FAIL)])
def test_one_token_on_which_sampler_and_scorer_are_apart(dtype, worst, status):
  c = tiny.config('grpo', **GOOD)
  c.compute.dtype = dtype
  gap = np.zeros((8, 100))
  gap[3, 7] = -worst  # of 800 tokens: the mean is far below its limit
  probe = rollouts.Probe(mask=np.ones(gap.shape), gap=gap, logratio=None, teacher_entropy=None,
                         ended=np.ones(8, bool), tokens=np.zeros((8, 101), int), room=100)
  finding = rollouts.check_self_kl(config.parse(c), None, probe)
  assert finding.status == status
  assert status == OK or dtype in finding.detail and finding.field == 'compute.dtype'
  unread = dataclasses.replace(probe, gap=np.where(gap, np.nan, 0.0),
                               mask=(gap == 0).astype(float))  # a place that nobody chose
  assert rollouts.check_self_kl(config.parse(c), None, unread).status == OK


@pytest.mark.parametrize(('fields', 'look', 'room'), [
    (dict(), True, 10), (dict(data__max_new_tokens=300), True, 128),
    (dict(data__max_new_tokens=300), False, 256), (dict(data__max_new_tokens=200), True, 200),
    (dict(data__max_new_tokens=300, doctor__max_new_tokens=160), True, 160)])
def test_how_long_completions_may_be(fields, look, room):
  run = config.parse(_pair(**fields))
  assert rollouts._room(run, look) == min(room, run.data.max_new_tokens)


def test_a_look_at_rollouts_sees_what_a_start_sees(healthy):
  run, parts = _open(_pair())
  looked = {f.check: f for f in doctor.examine_rollouts(
      run, parts, parts.read_trained(), parts.read_frozen('teacher', None), look=True)}
  assert not _statuses(looked)
  for check in ('uniform_teacher', 'special_tokens', 'truncation'):
    assert looked[check].detail == healthy[check].detail


@pytest.mark.parametrize(('fields', 'name'), [
    (dict(optimizer__name='sgd', optimizer__b2=0.5), 'optimizer.b2=0.5'),
    (dict(doctor__max_reverse_kl=1.0, doctor__support='off: x'), 'doctor.max_reverse_kl=1.0'),
    (dict(checkpoint__keep_best=0, checkpoint__best_metric='greedy_accuracy'),
     "checkpoint.best_metric='greedy_accuracy'")])
def test_options_that_nothing_reads(fields, name):
  finding = static.check_unused_options(*_open(_pair(**fields)))
  assert finding.status == FAIL and name in finding.detail
  assert finding.field == name.partition('=')[0]


def test_a_fresh_shape_beside_a_checkpoint():
  c = _pair()
  c.student.fresh.hidden_size = 128
  finding = static.check_unused_options(*_open(c))
  assert finding.status == FAIL and 'student.fresh.hidden_size=128' in finding.detail


class TestAtTheStart:

  def test_what_was_found_is_written_and_said(self, tmp_path, capsys):
    train.train(_pair(doctor__truncation='off: known to be long'), tmp_path)
    rows = json.loads((tmp_path / doctor.RESULT).read_text())
    assert {r['check'] for r in rows} == EVERY.keys()
    assert {r['status'] for r in rows} == {OK, OFF}
    assert 'doctor: truncation off: known to be long' in capsys.readouterr().out

  def test_a_failure_starts_nothing(self, tmp_path):
    path = _teacher(tmp_path, lambda name, x: 0 * x if name in ('head', 'embed') else x)
    with pytest.raises(config.ConfigError, match='teacher.path=.*uniform_teacher.*allowed'):
      train.train(_pair(teacher__path=path), tmp_path / 'run')
    assert not (tmp_path / 'run' / 'checkpoints').exists() or not tiny.checkpoint_steps(
        tmp_path / 'run')
    # The corrected config may have the directory.
    workdir_lib.check(tmp_path / 'run', config.to_dict(_pair()))


class TestCommand:

  def test_table_and_status(self, tmp_path):
    tiny.write_config(tmp_path / 'one.py', _pair())
    done = tiny.opd('doctor', '--config', 'one.py', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in (*EVERY, 'compiling: update', 'reading weights'):
      assert name in done.stdout
    assert done.stdout.index('compiling: update') < done.stdout.index('check')  # while it lasts
    path = _teacher(tmp_path, lambda name, x: 0 * x if name in ('head', 'embed') else x)
    done = tiny.opd('doctor', '--config', 'one.py', f'--config.teacher.path={path}', cwd=tmp_path)
    assert done.returncode == 1 and 'FAIL' in done.stdout and 'teacher.path' in done.stdout

