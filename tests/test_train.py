"""The loop, end to end, for every kind of run."""

import contextlib
import functools
import io
import json
import math

import jax
import numpy as np
import pytest
import reuse
import tiny

from opd_jax import build, config, load, train
from opd_jax.data import examples as examples_lib
from opd_jax.files import checkpoint
from opd_jax.models import params
from opd_jax.run import book, ledger, metrics, optim
from opd_jax.run.book import NonFiniteError
from opd_jax.tasks import arithmetic

EVERYWHERE = {'kind', 'step', 'loss', 'grad_norm', 'update_norm', 'entropy_student', 'logprob',
              'length', 'truncation_rate', 'scored_useful', 'flops', 'perf'}
ON_POLICY = {'gap_mean', 'gap_max', 'ratio_mean', 'ratio_min', 'ratio_max', 'text'}
TAUGHT = {'reverse_kl', 'entropy_teacher'} | {f'log_ratio_p{q}' for q in ('05', 25, 50, 75, 95)}
FIELDS = {
    'sft': EVERYWHERE,
    'sft_teacher': EVERYWHERE,
    'grpo': EVERYWHERE | ON_POLICY | {'reward', 'clip_rate'},
    'opd_sampled': EVERYWHERE | ON_POLICY | TAUGHT,
    'opd_exact': EVERYWHERE | ON_POLICY | TAUGHT | {'divergence'},
}
# The functions of the loop that each kind uses. A teacher of the student's shape is scored by the
# student's own program, so sampled OPD has three and not four.
PROGRAMS = {'sft': 1, 'sft_teacher': 2, 'grpo': 2, 'opd_sampled': 3, 'opd_exact': 3}
EVALUATED = {'sampled_accuracy', 'greedy_accuracy', 'pass_at_2', 'length', 'truncation_rate',
             'text', 'flops'}


def parts_of(c):
  """What a config's run is made of."""
  return build.open_parts(config.parse(c))


def parameters_before(c):
  """The student's parameters before training, by path."""
  return params.flatten(load.open_student(config.parse(c)).read())


@functools.cache
def finished(kind):
  """(config, work directory, result) of a short run of each kind. Its output is in output.txt."""
  c = tiny.with_models(kind, steps=20, eval__every_steps=10, checkpoint__every_steps=5)
  workdir = tiny.folder() / f'finished_{kind}'
  with contextlib.redirect_stdout(io.StringIO()) as out:
    result = reuse.train(c, workdir, anew=True)
  (workdir / 'output.txt').write_text(out.getvalue())
  return c, workdir, result


@pytest.mark.parametrize('kind', tiny.KINDS)
def test_metrics_of_every_step(kind):
  c, workdir, _ = finished(kind)
  rows = tiny.rows(workdir, 'train')
  assert [r['step'] for r in rows] == list(range(1, c.steps + 1))
  for row in rows:
    assert set(row) == FIELDS[kind]
    assert set(row['flops']) == set(ledger.PARTS)
    decoded = {'decode_useful'} if kind != 'sft' else set()
    assert set(row['perf']) == {'steps_per_s', 'tokens_per_s', 'compiles'} | decoded
    numbers = [v for v in params.flatten(row).values() if not isinstance(v, str)]
    assert all(map(math.isfinite, numbers)), row
    assert row['update_norm'] > 0  # Adam moves even when no group disagrees about its reward
    assert 1 <= row['length'] <= c.data.max_new_tokens
    assert 0 <= row['truncation_rate'] <= 1
    assert 0 < row['entropy_student'] <= math.log(64) + 1e-6


@pytest.mark.parametrize('kind', tiny.KINDS)
def test_evaluations(kind):
  c, workdir, result = finished(kind)
  rows = tiny.rows(workdir, 'eval')
  assert [r['step'] for r in rows] == [0, 10, 20]
  wanted = EVALUATED | ({'reverse_kl'} if c.teacher.kind != 'none' else set())
  for row in rows:
    assert wanted <= set(row)
    assert ('reverse_kl' in row) == ('reverse_kl' in wanted)
    for name in ('sampled_accuracy', 'greedy_accuracy', 'pass_at_2'):
      assert row[f'{name}_low'] <= row[name] <= row[f'{name}_high']
    assert row['sampled_accuracy'] <= row['pass_at_2']
  # The trained student gets some right: otherwise the evaluations above compare zeros.
  assert rows[0]['sampled_accuracy'] > 0
  assert result['evals'] == [{k: v for k, v in r.items() if k != 'kind'} for r in rows]


@pytest.mark.parametrize('kind', tiny.KINDS)
def test_result(kind):
  c, workdir, result = finished(kind)
  assert result == json.loads((workdir / 'result.json').read_text())
  assert (result['name'], result['seed'], result['steps']) == (kind, c.seed, c.steps)
  assert result['before'] == result['evals'][0] and result['after'] == result['evals'][-1]
  assert (result['teacher'] is not None) == (c.teacher.kind != 'none')
  last = tiny.rows(workdir, 'train')[-1]
  assert result['flops'] == last['flops'] == result['after']['flops']
  spent = {name for name, amount in result['flops'].items() if amount}
  assert spent == {'student_training'} | {
      'sft': set(), 'sft_teacher': {'teacher_sampling'}, 'grpo': {'student_sampling'},
      'opd_sampled': {'student_sampling', 'student_scoring', 'teacher_scoring'},
      'opd_exact': {'student_sampling', 'teacher_scoring'}}[kind]


def test_flops_are_counted_from_the_tokens_of_each_step():
  # By hand for sampled OPD with one shape for both: the student samples (1), rescores (1), learns
  # (3 times a forward pass); the teacher grades (1).
  _, workdir, _ = finished('opd_sampled')
  for before, row in zip([None, *tiny.rows(workdir, 'train')], tiny.rows(workdir, 'train'),
                         strict=False):
    spent = {k: v - (before['flops'][k] if before else 0) for k, v in row['flops'].items()}
    forward = spent['student_sampling']
    assert forward > 0
    assert spent == pytest.approx(dict(
        student_training=3 * forward, student_scoring=forward, student_sampling=forward,
        teacher_scoring=forward, teacher_sampling=0.0, reference_scoring=0.0), rel=1e-9)


@pytest.mark.parametrize('kind', tiny.KINDS)
def test_each_function_is_compiled_once(kind):
  _, workdir, _ = finished(kind)
  assert {r['perf']['compiles'] for r in tiny.rows(workdir, 'train')} == {PROGRAMS[kind]}


def test_nothing_is_compiled_after_the_first_step(tmp_path, monkeypatch):
  # Independent of the loop's own count: what JAX itself reports.
  compiled, at_step = [], []

  def listen(event, duration, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(event)

  progress = metrics.Display.progress
  monkeypatch.setattr(metrics.Display, 'progress', lambda self, step, values: (
      at_step.append(len(compiled)), progress(self, step, values)))
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    train.train(tiny.with_models('opd_sampled', steps=5, checkpoint__every_steps=100), tmp_path)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert at_step[0] >= 3  # the listener hears something
  # Step 1 is reported after step 2 was dispatched, so all programs are there by then.
  assert at_step == [at_step[0]] * 5


def test_a_teacher_of_another_shape_has_its_own_program(tmp_path):
  other = tiny.write_model(tmp_path / 'other', num_hidden_layers=1, hidden_size=16)
  c = tiny.with_models('opd_sampled', teacher__path=str(other), steps=3)
  result = reuse.train(c, tmp_path / 'run', anew=True)
  assert {r['perf']['compiles'] for r in tiny.rows(tmp_path / 'run', 'train')} == {4}
  assert result['teacher']['sampled_accuracy'] == 0.0  # random weights, so it was really this one
  assert result['before']['reverse_kl'] > 0.1


def test_supervised_loss_goes_down():
  losses = [r['loss'] for r in tiny.rows(tiny.student().parent, 'train')][:20]
  assert losses[0] == pytest.approx(math.log(64), rel=0.2)  # of a fresh model: about uniform
  assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_supervision_by_the_teacher_lowers_its_loss():
  _, workdir, _ = finished('sft_teacher')
  losses = [r['loss'] for r in tiny.rows(workdir, 'train')]
  assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize('kind', ['opd_sampled', 'opd_exact'])
def test_the_student_moves_towards_the_teacher(kind):
  _, workdir, _ = finished(kind)
  # Of the evaluations, which is no estimate from the tokens drawn; a tenth to a quarter less here.
  kl = [r['reverse_kl'] for r in tiny.rows(workdir, 'eval')]
  assert kl[-1] < 0.95 * kl[0]


def test_reinforcement_raises_the_reward(tmp_path, monkeypatch):
  # The share of answers that end in time, a reward that a short run can learn.
  monkeypatch.setattr(arithmetic, 'grade', lambda example, text: float(len(text) < 3))
  reuse.train(tiny.with_models('grpo', steps=20, checkpoint__every_steps=20), tmp_path)
  rewards = [r['reward'] for r in tiny.rows(tmp_path, 'train')]
  assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.3


@pytest.mark.parametrize('kind', tiny.KINDS)
def test_export_is_the_final_state(kind):
  c, workdir, _ = finished(kind)
  saved = tiny.read_checkpoint(workdir, c.steps)
  exported = tiny.load_export(workdir)
  start = parameters_before(c)
  assert exported.keys() == start.keys()
  for name, array in exported.items():
    key = '[\'params\']' + ''.join(f"['{part}']" for part in name.split('/'))
    assert array.tobytes() == saved[key].tobytes(), name
  assert any((exported[name] != start[name]).any() for name in start)
  assert saved["['step']"] == c.steps


def test_a_finished_run_is_not_run_again(monkeypatch):
  c, workdir, result = finished('sft')
  before = tiny.stamps(workdir)
  monkeypatch.setattr(build, 'open_parts', None)  # a call raises
  assert reuse.train(c, workdir) == result
  assert tiny.stamps(workdir) == before


def test_the_state_that_is_saved_is_the_state_of_that_step(tmp_path, monkeypatch):
  # Saving is asynchronous and the next update is given the state's buffers to overwrite.
  seen = {}
  save = checkpoint.Checkpoints.save

  def spy(self, state, step, host, best):
    seen[step] = jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(state.params))
    save(self, state, step, host, best)

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', spy)
  c = tiny.with_models('sft', steps=12, checkpoint__every_steps=1, checkpoint__keep_latest=12)
  reuse.train(c, tmp_path)
  assert tiny.checkpoint_steps(tmp_path) == sorted(seen) == list(range(1, 13))
  for step, tree in seen.items():
    saved = tiny.read_checkpoint(tmp_path, step)
    for name, array in params.flatten(tree).items():
      key = '[\'params\']' + ''.join(f"['{part}']" for part in name.split('/'))
      assert array.tobytes() == saved[key].tobytes(), (step, name)


def test_several_updates_a_batch(tmp_path):
  c = tiny.with_models('opd_sampled', optimizer__updates_per_batch=3, steps=4,
                       log__max_sampler_gap=1e-4)
  reuse.train(c, tmp_path, anew=True)
  saved = tiny.read_checkpoint(tmp_path, 4)
  assert saved["['step']"] == 12 and saved['host']['step'] == 4
  rows = tiny.rows(tmp_path, 'train')
  for row in rows:
    assert row['perf']['compiles'] == 3
    # The last update is off-policy, which the ratio shows; the gap between sampler and scorer is
    # that of the policy that sampled.
    assert abs(row['ratio_max'] - 1) > 1e-3
    assert row['gap_max'] < 1e-4
  first = rows[0]['flops']
  assert first['student_training'] == pytest.approx(3 * 3 * first['student_sampling'], rel=1e-9)


def test_learning_rate_schedule_covers_the_gradient_steps(tmp_path, monkeypatch):
  seen = []
  make = optim.make_schedule
  monkeypatch.setattr(optim, 'make_schedule', lambda *args: seen.append(args) or make(*args))
  c = tiny.config('sft', steps=5, optimizer__updates_per_batch=2, optimizer__schedule='cosine',
                  optimizer__final_learning_rate=1e-3, optimizer__warmup_steps=3)
  parts_of(c)
  assert seen[-1] == ('cosine', 1e-2, 1e-3, 3, 10)


def test_self_distillation_leaves_every_bit_where_it_was(tmp_path):
  c = tiny.with_models('opd_sampled', teacher__kind='initial_student', teacher__path='')
  result = reuse.train(c, tmp_path)
  start, end = parameters_before(c), tiny.load_export(tmp_path)
  assert start.keys() == end.keys()
  for name in start:
    assert start[name].tobytes() == end[name].tobytes(), name
  for row in tiny.rows(tmp_path, 'train'):
    assert (row['grad_norm'], row['update_norm']) == (0.0, 0.0)
    # The loss's own forward pass is another program than the scorer's: float32 rounding.
    assert abs(row['reverse_kl']) < 1e-6
  accuracies = ('sampled_accuracy', 'greedy_accuracy', 'length')
  assert all(result['before'][k] == result['after'][k] for k in accuracies)
  assert result['after']['reverse_kl'] == 0.0


class TestNonFinite:

  @pytest.mark.parametrize('bad', [13, 15])  # 15 is a checkpoint step itself
  def test_stops_with_the_step_and_keeps_the_last_good_checkpoint(self, bad, tmp_path, monkeypatch):
    c, straight, _ = finished('grpo')
    steps, fold_in, grade = [], load.fold_in, examples_lib.grade

    def watched(key, purpose, step):
      steps.append(step + 1)
      return fold_in(key, purpose, step)

    def poisoned(*args):
      rewards, texts = grade(*args)
      return (rewards * np.float32('nan') if steps[-1] == bad else rewards), texts

    with monkeypatch.context() as m:
      m.setattr(load, 'fold_in', watched)
      m.setattr(examples_lib, 'grade', poisoned)
      with pytest.raises(NonFiniteError, match=rf'step {bad}: .*loss.*nan'):
        reuse.train(c, tmp_path)
    assert tiny.checkpoint_steps(tmp_path) == [5, 10]
    assert [r['step'] for r in tiny.rows(tmp_path, 'train')] == list(range(1, bad))
    assert not (tmp_path / 'result.json').exists() and not (tmp_path / 'export').exists()
    assert all(np.isfinite(v).all() for k, v in tiny.read_checkpoint(tmp_path, 10).items()
               if k != 'host' and v.dtype.kind == 'f')
    # With the cause gone the run goes on from there, and nothing of the bad step is left in it.
    reuse.train(c, tmp_path)
    tiny.assert_same_bits(tiny.read_checkpoint(tmp_path, 20), tiny.read_checkpoint(straight, 20))

  def test_gradient_alone(self):
    row = {'loss': 1.0, 'grad_norm': math.inf, 'update_norm': 1.0, 'gap_max': 0.0}
    with pytest.raises(NonFiniteError, match="step 7: {'grad_norm': inf}"):
      book.check_finite(row, 7, 0.0)
    book.check_finite(row | {'grad_norm': 1.0}, 7, 0.0)


class TestSamplerGap:

  def test_too_wide_stops(self, tmp_path):
    # No two programs round alike, so any gap is wider than this.
    c = tiny.with_models('opd_sampled', log__max_sampler_gap=1e-30)
    with pytest.raises(FloatingPointError, match=r'step 1: .*log\.max_sampler_gap=1e-30'):
      reuse.train(c, tmp_path)

  def test_the_promised_bound_holds(self):
    for kind in ('grpo', 'opd_sampled', 'opd_exact'):
      _, workdir, _ = finished(kind)
      gaps = [r['gap_max'] for r in tiny.rows(workdir, 'train')]
      assert 0 < max(gaps) < 1e-5, kind

  def test_nan_is_not_below_the_bound(self):
    row = {'loss': 1.0, 'grad_norm': 1.0, 'update_norm': 1.0, 'gap_max': math.nan}
    with pytest.raises(FloatingPointError, match='step 3'):
      book.check_finite(row, 3, 0.1)


def test_transcripts_are_shown_before_during_and_after():
  _, workdir, _ = finished('opd_exact')
  out = (workdir / 'output.txt').read_text()
  for title in ('before training:', 'halfway:', 'after training:'):
    assert out.count(title) == 1
  assert out.count('✓') + out.count('✗') == 3
  assert "the teacher's sampled accuracy is 0." in out


def test_more_transcripts_than_problems_is_refused_or_all_of_them(tmp_path):
  c = tiny.config('sft', steps=1, log__transcripts=50)
  try:
    reuse.train(c, tmp_path)
  except config.ConfigError as e:
    assert 'log.transcripts=50' in str(e)
