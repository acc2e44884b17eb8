"""The loop, end to end, for every kind of run."""

import contextlib
import functools
import io
import json
import math
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from opd_jax import build, config, load, train
from opd_jax.data import examples as examples_lib
from opd_jax.data import streams
from opd_jax.files import checkpoint, huggingface
from opd_jax.files import workdir as workdir_lib
from opd_jax.models import lora, params
from opd_jax.run import book, flops, metrics, optim
from opd_jax.run.book import NonFiniteError
from opd_jax.tasks import arithmetic
from opd_jax.tools import export

EVERYWHERE = {'kind', 'step', 'loss', 'grad_norm', 'update_norm', 'entropy_student', 'logprob',
              'length', 'truncation_rate', 'flops', 'perf'}
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
    result = train.train(c, workdir)
  (workdir / 'output.txt').write_text(out.getvalue())
  return c, workdir, result


@pytest.mark.parametrize('kind', tiny.KINDS)
def test_metrics_of_every_step(kind):
  c, workdir, _ = finished(kind)
  rows = tiny.rows(workdir, 'train')
  assert [r['step'] for r in rows] == list(range(1, c.steps + 1))
  for row in rows:
    assert set(row) == FIELDS[kind]
    assert set(row['flops']) == {'student', 'sampling', 'teacher'}
    assert set(row['perf']) == {'steps_per_s', 'tokens_per_s', 'compiles'}
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
  assert spent == {'student'} | ({'sampling'} if c.data.source != 'dataset' else set()) | (
      {'teacher'} if kind.startswith('opd') else set())


def test_flops_are_counted_from_the_tokens_of_each_step():
  # By hand for sampled OPD with one shape for both: the student samples (1), rescores (1), learns
  # (3 times a forward pass); the teacher grades (1).
  _, workdir, _ = finished('opd_sampled')
  for before, row in zip([None, *tiny.rows(workdir, 'train')], tiny.rows(workdir, 'train'),
                         strict=False):
    spent = {k: v - (before['flops'][k] if before else 0) for k, v in row['flops'].items()}
    assert spent['sampling'] > 0
    assert spent['teacher'] == pytest.approx(spent['sampling'], rel=1e-9)
    assert spent['student'] == pytest.approx(4 * spent['sampling'], rel=1e-9)


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
  result = train.train(c, tmp_path / 'run')
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
  kl = [r['reverse_kl'] for r in tiny.rows(workdir, 'train')]
  assert np.mean(kl[-5:]) < 0.9 * np.mean(kl[:5])


def test_reinforcement_raises_the_reward(tmp_path, monkeypatch):
  # The share of answers that end in time, a reward that a short run can learn.
  monkeypatch.setattr(arithmetic, 'grade', lambda example, text: float(len(text) < 3))
  train.train(tiny.with_models('grpo', steps=20, checkpoint__every_steps=20), tmp_path)
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
  assert train.train(c, workdir) == result
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
  train.train(c, tmp_path)
  assert tiny.checkpoint_steps(tmp_path) == sorted(seen) == list(range(1, 13))
  for step, tree in seen.items():
    saved = tiny.read_checkpoint(tmp_path, step)
    for name, array in params.flatten(tree).items():
      key = '[\'params\']' + ''.join(f"['{part}']" for part in name.split('/'))
      assert array.tobytes() == saved[key].tobytes(), (step, name)


def test_several_updates_a_batch(tmp_path):
  c = tiny.with_models('opd_sampled', optimizer__updates_per_batch=3, steps=4,
                       log__max_sampler_gap=1e-4)
  train.train(c, tmp_path)
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
  assert first['student'] == pytest.approx((3 * 3 + 1) * first['sampling'], rel=1e-9)


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
  result = train.train(c, tmp_path)
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
        train.train(c, tmp_path)
    assert tiny.checkpoint_steps(tmp_path) == [5, 10]
    assert [r['step'] for r in tiny.rows(tmp_path, 'train')] == list(range(1, bad))
    assert not (tmp_path / 'result.json').exists() and not (tmp_path / 'export').exists()
    assert all(np.isfinite(v).all() for k, v in tiny.read_checkpoint(tmp_path, 10).items()
               if k != 'host' and v.dtype.kind == 'f')
    # With the cause gone the run goes on from there, and nothing of the bad step is left in it.
    train.train(c, tmp_path)
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
      train.train(c, tmp_path)

  def test_the_promised_bound_holds(self):
    for kind in ('grpo', 'opd_sampled', 'opd_exact'):
      _, workdir, _ = finished(kind)
      gaps = [r['gap_max'] for r in tiny.rows(workdir, 'train')]
      assert 0 < max(gaps) < 1e-5, kind

  def test_nan_is_not_below_the_bound(self):
    row = {'loss': 1.0, 'grad_norm': 1.0, 'update_norm': 1.0, 'gap_max': math.nan}
    with pytest.raises(FloatingPointError, match='step 3'):
      book.check_finite(row, 3, 0.1)


class TestEarlyStop:

  def test_at_an_accuracy(self, tmp_path):
    c = tiny.with_models('sft', steps=12, eval__every_steps=2, eval__stop_at_sampled_accuracy=0.01)
    result = train.train(c, tmp_path)
    assert result['steps'] == 2 and [e['step'] for e in result['evals']] == [0, 2]
    assert tiny.read_checkpoint(tmp_path, 2)['host']['stopped_at'] == 2

  def test_stays_stopped_after_a_kill(self, tmp_path, monkeypatch):
    c = tiny.with_models('sft', steps=12, eval__every_steps=2, eval__stop_at_sampled_accuracy=0.01)
    with monkeypatch.context() as m:
      m.setattr(train, 'finish', None)  # as if it had been killed before the export
      with pytest.raises(TypeError):
        train.train(c, tmp_path)
    assert train.train(c, tmp_path)['steps'] == 2


class TestInterrupted:

  @pytest.mark.parametrize('calls', [0, 1, 3])
  def test_whenever_the_signal_comes_there_is_a_checkpoint(self, calls, tmp_path, monkeypatch):
    # The flag is read at several places of the loop; it may go up between any two of them.
    class Flag:
      reads = 0

      def __enter__(self):
        return self

      def __exit__(self, *exc):
        pass

      def __call__(self):
        self.reads += 1
        return self.reads > calls

    monkeypatch.setattr(train, 'Interrupts', Flag)
    c = tiny.with_models('sft', steps=12, checkpoint__every_steps=100, eval__every_steps=4)
    with pytest.raises(train.PreemptedError) as e:
      train.train(c, tmp_path)
    step = tiny.rows(tmp_path, 'train')[-1]['step']
    assert f'step {step},' in str(e.value)
    assert tiny.checkpoint_steps(tmp_path)[-1] == step


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
    train.train(c, tmp_path)
  except config.ConfigError as e:
    assert 'log.transcripts=50' in str(e)


class TestAdapters:

  def _config(self, kind, **fields):
    return tiny.with_models(kind, **{**dict(student__lora__rank=4, student__lora__alpha=8.0,
                                            optimizer__learning_rate=1e-2), **fields})

  @pytest.mark.parametrize('kind', ['opd_sampled', 'opd_exact'])
  def test_only_adapters_are_trained_and_checkpointed(self, kind, tmp_path):
    c = self._config(kind)
    train.train(c, tmp_path)
    saved = tiny.read_checkpoint(tmp_path, c.steps)
    names = {name.split('][')[-1].strip("']") for name in saved if "['params']" in name}
    assert names == {'a', 'b'}
    moments = [name for name in saved if "['mu']" in name or "['nu']" in name]
    assert len(moments) == 2 * sum("['params']" in name for name in saved)
    assert all(name.endswith(("['a']", "['b']")) for name in moments)
    # Both halves have moved: b from zero, and then a.
    b = [x for name, x in saved.items() if "['params']" in name and name.endswith("['b']")]
    assert all(np.abs(x).max() > 0 for x in b)

  def test_the_export_is_the_base_with_the_adapters_added(self, tmp_path):
    c = self._config('opd_exact')
    train.train(c, tmp_path)
    base = params.flatten(huggingface.load(c.student.path, {}).read())
    merged = tiny.load_export(tmp_path)
    saved = tiny.read_checkpoint(tmp_path, c.steps)
    for name, weight in base.items():
      parts = name.split('/')
      key = "['params']" + ''.join(f"['{p}']" for p in parts)
      if f"{key}['a']" not in saved:
        np.testing.assert_array_equal(merged[name], weight, err_msg=name)
        continue
      for layer in range(weight.shape[0]):
        a, b = (np.asarray(saved[f"{key}['{part}']"][layer], np.float64) for part in 'ab')
        delta = (a.reshape(-1, 4) @ b.reshape(4, -1)).reshape(weight[layer].shape)
        # float32: weights of order 1
        np.testing.assert_allclose(merged[name][layer], weight[layer] + 2.0 * delta, atol=1e-6)
        assert np.abs(delta).max() > 1e-3

  def test_the_export_of_a_bfloat16_base_is_the_student_that_was_evaluated(self, tmp_path, capsys):
    c = self._config('opd_exact', compute__frozen_dtype='bfloat16', steps=2)
    c.student.path = str(shutil.copytree(c.student.path, tmp_path / 'base'))
    generation = tmp_path / 'base' / 'generation_config.json'
    generation.write_text(json.dumps({'temperature': 0.6, **json.loads(generation.read_text())}))
    kl = train.train(c, tmp_path / 'run')['export_kl']
    # Merged in float32 it is the student; in bfloat16 most of two steps' update is rounded away.
    assert abs(kl['float32']) < 1e-6 < 3e-6 < kl['bfloat16']
    said = [x for x in capsys.readouterr().out.splitlines() if 'export in float32: KL' in x]
    assert len(said) == 1 and f"in bfloat16 {kl['bfloat16']:.1e}" in said[0]
    base = params.flatten(huggingface.load(c.student.path, {}).read(jnp.bfloat16))
    saved, whole = tiny.read_checkpoint(tmp_path / 'run', 2), tiny.load_export(tmp_path / 'run')
    assert export.export(tmp_path / 'run', tmp_path / 'half', 'full', -1, 'bfloat16') == 2
    assert f"export in bfloat16: KL {kl['bfloat16']:.1e}" in capsys.readouterr().out
    for folder in (tmp_path / 'run' / 'export', tmp_path / 'half'):
      assert huggingface.load(folder, {}).sampling == {'temperature': 0.6}
    half = params.flatten(huggingface.load(tmp_path / 'half', {}).read())
    for part in ('q', 'down'):
      a, b = (np.asarray(saved[f"['params']['layers']['{part}']['{x}']"], np.float64) for x in 'ab')
      name = f'layers/{part}'
      delta = 2.0 * np.einsum('lir,lro->lio', a.reshape(2, -1, 4), b.reshape(2, 4, -1))
      got = whole[name] - base[name].astype(np.float64)
      assert np.abs(got - delta.reshape(got.shape)).max() < 1e-3 * np.abs(delta).max()
      np.testing.assert_array_equal(half[name], whole[name].astype(ml_dtypes.bfloat16), name)
    # Merged into another base, it would be a model that nobody has evaluated.
    shutil.copy(tiny.teacher() / huggingface.WEIGHTS, tmp_path / 'base')
    with pytest.raises(config.ConfigError, match=r'student\.path: model\.safetensors has changed'):
      export.export(tmp_path / 'run', tmp_path / 'other', 'full', -1)
    assert not (tmp_path / 'other').exists()
    export.export(tmp_path / 'run', tmp_path / 'other', 'adapter', -1, changed_inputs='a test')
    assert 'has changed' in capsys.readouterr().err
    written = workdir_lib.read_origin(tmp_path / 'run' / 'adapter')
    assert written == workdir_lib.read_origin(tmp_path / 'run' / 'export')
    assert written['inputs'] != workdir_lib.read_origin(tmp_path / 'other')['inputs']

  def test_a_run_starts_from_the_adapter_that_another_left(self, tmp_path):
    c = self._config('opd_exact')
    first = train.train(c, tmp_path / 'one')
    again = tiny.with_models('opd_exact', student__lora__path=str(tmp_path / 'one' / 'adapter'))
    second = train.train(again, tmp_path / 'two')
    for name in ('reverse_kl', 'sampled_accuracy'):
      assert second['before'][name] == pytest.approx(first['after'][name], rel=1e-5)

  def test_resume_is_bit_exact(self, tmp_path):
    c = self._config('opd_sampled')
    train.train(c, tmp_path / 'whole')
    shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
    shutil.rmtree(tmp_path / 'cut' / 'checkpoints' / '6')
    for done in ('result.json', 'export', 'adapter'):
      target = tmp_path / 'cut' / done
      target.unlink() if target.is_file() else shutil.rmtree(target)
    train.train(c, tmp_path / 'cut')
    tiny.assert_same_bits(tiny.read_checkpoint(tmp_path / 'whole', 6),
                          tiny.read_checkpoint(tmp_path / 'cut', 6))

  def test_a_student_that_teaches_itself_shares_its_base(self, tmp_path):
    c = self._config('opd_sampled', teacher__kind='initial_student', teacher__path='')
    parts = parts_of(c)
    frozen = parts.read_base()
    teacher = params.flatten(parts.read_frozen('teacher', frozen))
    for name, leaf in params.flatten(frozen.base).items():
      mine = teacher[name].base if isinstance(teacher[name], lora.LoRA) else teacher[name]
      assert mine is leaf, name  # the same array, not a copy
    result = train.train(c, tmp_path)
    assert result['after']['reverse_kl'] == 0.0
    for row in tiny.rows(tmp_path, 'train'):
      assert row['loss'] == row['grad_norm'] == row['update_norm'] == 0.0

  def test_the_base_is_kept_in_bfloat16_and_adapters_in_float32(self):
    parts = parts_of(self._config('opd_sampled', compute__frozen_dtype='bfloat16'))
    base, trained = parts.read_base().base, parts.read_trained()
    assert {str(x.dtype) for x in jax.tree.leaves(base)} == {'bfloat16'}
    assert {str(x.dtype) for x in jax.tree.leaves(trained)} == {'float32'}

  @pytest.mark.parametrize(('fields', 'parts'), [
      (dict(student__lora__rank=-1), ('student.lora.rank=-1',)),
      (dict(student__lora__rank=0), ('student.lora.alpha=8.0', 'student.lora.rank=0')),
      (dict(student__lora__targets='layers/gates'), ("student.lora.targets='layers/gates'",
                                                     'layers/gate')),
      (dict(student__lora__targets='('), ("student.lora.targets='('", 'regular expression')),
      (dict(student__lora__targets='embed'), ("student.lora.targets='embed'",)),
      (dict(student__lora__alpha=0.0), ('student.lora.alpha=0.0',)),
      (dict(student__lora__path='nowhere'), ("student.lora.path='nowhere'",)),
      (dict(checkpoint__export='adaptor'), ("checkpoint.export='adaptor'",)),
      (dict(compute__frozen_dtype='int8'), ("compute.frozen_dtype='int8'",)),
  ])
  def test_refused(self, fields, parts, tmp_path):
    with pytest.raises(config.ConfigError) as e:
      train.train(self._config('opd_sampled', **fields), tmp_path / 'run')
    assert all(part in str(e.value) for part in (*parts, 'allowed')), str(e.value)

  def test_only_the_adapter_is_left_where_that_is_asked_for(self, tmp_path):
    train.train(self._config('opd_exact', steps=1, checkpoint__export='adapter'), tmp_path)
    assert (tmp_path / 'adapter' / 'adapter_config.json').exists()
    assert not (tmp_path / 'export').exists()
    with pytest.raises(config.ConfigError, match="checkpoint.export='adapter'.*no adapter"):
      train.train(tiny.config('sft', checkpoint__export='adapter'), tmp_path / 'other')


@pytest.mark.parametrize('fields', [
    dict(route='direct', support='union_top_k(4, tail="bucket")', importance='none',
         divergence='jensen_shannon(0.5)'),
    dict(route='direct', estimator='k2', importance='none'),
    dict(baseline='exact', token_gate='soft_or(keep=0.5)'),
    dict(shaping='power(1)', baseline='leave_one_out', importance='truncated(2)'),
    dict(route='direct', support='full', importance='none', divergence='forward_kl',
         row_gate='wrong', window='tokens(0, 3)'),
], ids=['top_k', 'k2', 'exact_baseline', 'power', 'gates'])
def test_other_objectives_lower_the_reverse_kl(tmp_path, fields):
  c = tiny.with_models('opd_sampled', steps=40, data__samples_per_prompt=2,
                       data__prompts_per_step=64, optimizer__learning_rate=1e-3,
                       **{f'objective__{name}': value for name, value in fields.items()})
  train.train(c, tmp_path)
  rows = tiny.rows(tmp_path, 'train')
  # On the student's own samples of the training problems, some of which it learns by heart: to a
  # fourth in the runs seen. On other problems it depends on how the two models came out.
  kl = [r['reverse_kl'] for r in rows]
  assert np.mean(kl[-10:]) < 0.5 * np.mean(kl[:5])
  assert ('counted_rate' in rows[0]) == any('gate' in f or 'window' in f for f in fields)
  assert all(0 < r.get('counted_rate', 1) <= 1 for r in rows)


# --- who writes the rows, and what else a step looks at ---

# Both draw in every step: which batches are the student's, and which tokens are trusted.
MIXED = dict(
    steps=8, objective__divergence='jensen_shannon(0.5)',
    data__on_policy_fraction=0.5, data__off_policy_source='teacher', given__source='dataset',
    given__split='corpus', given__prompts_per_step=8, given__likelihood_coef=0.1)
UNTRUSTED = dict(
    steps=8, reference__kind='initial_student', objective__reference_kl='k2(0.1)',
    objective__local__coef=1.0, objective__local__support='teacher_top_k(4, tail="drop")',
    objective__local__gate='untrusted', objective__local__instead=True)


@functools.cache
def mixed():
  """(config, work directory) of a run of each."""
  out = []
  for kind, fields in (('opd_exact', MIXED), ('opd_sampled', UNTRUSTED)):
    c = tiny.with_models(kind, checkpoint__every_steps=4, checkpoint__keep_latest=4, **fields)
    workdir = tiny.folder() / f'mixed_{kind}'
    with contextlib.redirect_stdout(io.StringIO()):
      train.train(c, workdir)
    out.append((c, workdir))
  return out


def test_the_student_writes_nothing_in_the_first_steps(tmp_path):
  c = tiny.with_models('opd_exact', steps=5, data__warm_steps=3, data__off_policy_source='teacher',
                       given__source='dataset', given__split='corpus', given__prompts_per_step=8,
                       given__likelihood_coef=0.1)
  train.train(c, tmp_path)
  rows = tiny.rows(tmp_path, 'train')
  # Only on its own samples is there a reverse KL, and a text to look at; the others go on.
  assert ['reverse_kl' in r for r in rows] == [False] * 3 + [True] * 2
  assert ['text' in r for r in rows] == [False] * 3 + [True] * 2
  assert all('given_loss' in r for r in rows)
  assert [r['step'] for r in rows] == [1, 2, 3, 4, 5]


def test_batches_are_the_students_or_not_as_seed_and_step_say():
  c, workdir = mixed()[0]
  rows = tiny.rows(workdir, 'train')
  mine = [streams.step_draw(c.seed, step) < 0.5 for step in range(c.steps)]
  assert 2 <= sum(mine) <= 6  # or nothing is tested
  assert ['gap_max' in r for r in rows] == mine == ['reverse_kl' in r for r in rows]
  # Sampler and update of both kinds, one scorer of the teacher for both (they ask the same of it),
  # and nothing compiled twice.
  assert rows[-1]['perf']['compiles'] == 5
  assert all(r['gap_max'] < 1e-4 for r in rows if 'gap_max' in r)
  # Rows beside, other ones in every step: what they add to the loss, and that their tokens cost.
  # (That they add their gradient is in test_oracle.py.)
  assert rows[0]['given_loss'] == pytest.approx(-0.1 * rows[0]['given_logprob'], rel=1e-5)
  assert 0 < rows[0]['given_loss'] < rows[0]['loss']
  parts = parts_of(c)
  spent = {stream.name: sum(flops.stream_flops(
      stream, np.full(32, 8.0), student=parts.student.model, teacher=parts.teacher.model,
      reference=None, adapter_specs=None, updates=1).values()) for stream in parts.streams}
  assert 0 < spent[streams.GIVEN] < spent[streams.OWN]


def test_a_reference_and_a_random_gate():
  c, workdir = mixed()[1]
  rows = tiny.rows(workdir, 'train')
  # The student has not moved: what is left is the square of the rounding between two programs.
  assert rows[0]['reference_kl'] < 1e-12
  assert all(r['reference_kl'] > 1e-9 for r in rows[1:])
  rates = [r['local_rate'] for r in rows]
  assert len(set(rates)) > 4 and all(0.0 < rate < 1.0 for rate in rates)
  # The reference has the student's programs, and the teacher too.
  assert rows[-1]['perf']['compiles'] == 3


@pytest.mark.parametrize('which', [0, 1], ids=['mixed', 'untrusted'])
def test_mixed_runs_resume_to_the_same_bits(which, tmp_path):
  c, workdir = mixed()[which]
  again = tmp_path / 'again'
  shutil.copytree(workdir, again)
  for name in (workdir_lib.RESULT, workdir_lib.EXPORT, 'checkpoints/8'):
    path = again / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  with contextlib.redirect_stdout(io.StringIO()) as out:
    train.train(c, again)
  assert 'resumed from the checkpoint of step 4' in out.getvalue()
  tiny.assert_same_bits(tiny.read_checkpoint(workdir, 8), tiny.read_checkpoint(again, 8))
  assert tiny.rows(workdir, timing=False) == tiny.rows(again, timing=False)


def test_samples_of_a_mixture_with_the_teacher(tmp_path):
  c = tiny.with_models('opd_sampled', sample__teacher_mix=0.5, objective__discount=1.0,
                       objective__returns='later_mean', objective__local__coef=1.0,
                       objective__local__divergence='reverse_kl')
  train.train(c, tmp_path)
  rows = tiny.rows(tmp_path, 'train')
  # The student's own log-probs of the mixture's tokens are still the scorer's, and p_S / p_mix is
  # at most 1 / (1 - 0.5).
  assert all(r['gap_max'] < 1e-4 for r in rows)
  assert all(0.0 <= r['ratio_min'] < 0.5 and 1.0 < r['ratio_max'] <= 2.0 + 1e-4 for r in rows)
  plain = tiny.rows(finished('opd_sampled')[1], 'train')
  # The teacher writes too, which makes the tokens likelier by it, and decodes beside the student.
  assert rows[0]['reverse_kl'] < plain[0]['reverse_kl']
  mixed, alone = (r[0]['flops']['sampling'] / r[0]['flops']['teacher'] for r in (rows, plain))
  assert alone == pytest.approx(1.0)  # of the same shape, and it decodes what the other grades
  assert 1.5 < mixed < 2.0  # two decode; the teacher's head is applied again for the exact term


def test_advantages_are_recomputed_and_coefficients_annealed(tmp_path):
  fields = dict(steps=2, optimizer__updates_per_batch=2,
                objective__anneal='linear(steps=4, to=0.2)')
  runs = {}
  for kept in ('kept', 'recomputed'):
    c = tiny.with_models('opd_sampled', objective__advantages=kept, **fields)
    train.train(c, tmp_path / kept)
    runs[kept] = tiny.rows(tmp_path / kept, 'train')
  # Of the second of two updates, at gradient steps 1 and 3 of 4.
  assert [r['distill_coef'] for r in runs['kept']] == pytest.approx([0.8, 0.4])
  student = [r[0]['flops']['student'] for r in runs.values()]
  assert student[1] / student[0] == pytest.approx(8 / 7)  # two updates of 3, and one or two scores
  assert runs['kept'][0]['loss'] != runs['recomputed'][0]['loss']
