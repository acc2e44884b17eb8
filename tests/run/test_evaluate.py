"""avg@k, pass@k, their intervals, and the evaluator."""

import dataclasses
import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from opd_jax import build, config, load, tasks
from opd_jax.algorithm import sample, score
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface
from opd_jax.run import evaluate, meshes
from opd_jax.run import evaluator as evaluator_lib
from opd_jax.types import Model, Params

UNTIMED = settings(deadline=None, derandomize=True)  # the machine is shared; failures must repeat


class TestPassAtK:

  @UNTIMED
  @given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
  def test_is_the_average_over_all_subsets(self, right, draw):
    k = draw.draw(st.integers(1, len(right)))
    subsets = list(itertools.combinations(right, k))
    wanted = sum(map(any, subsets)) / len(subsets)
    np.testing.assert_allclose(
        evaluate.pass_at_k(np.array([right], np.float32), k), [wanted], atol=1e-12)

  def test_per_problem(self):
    rewards = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    np.testing.assert_allclose(evaluate.pass_at_k(rewards, 2), [0, 0.5, 1])

  def test_partial_credit_is_not_right(self):
    assert evaluate.pass_at_k(np.array([[0.99, 0.5]]), 2) == 0.0

  def test_no_overflow_with_many_samples(self):
    rewards = np.zeros((1, 4000))
    rewards[0, 0] = 1
    np.testing.assert_allclose(evaluate.pass_at_k(rewards, 1000), [0.25], rtol=1e-12)

  @pytest.mark.parametrize('k', [0, 4, -1])
  def test_k_outside_the_samples(self, k):
    with pytest.raises(ValueError, match=rf'k={k}; allowed: 1 to 3'):
      evaluate.pass_at_k(np.zeros((2, 3)), k)


class TestInterval:

  @UNTIMED
  @given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=60))
  def test_contains_the_mean_and_repeats(self, values):
    values = np.array(values)
    low, high = evaluate.interval(values)
    assert values.min() <= low <= values.mean() + 1e-12
    assert values.mean() - 1e-12 <= high <= values.max()
    assert evaluate.interval(values) == (low, high)

  def test_width_is_that_of_the_normal_approximation(self):
    values = (np.arange(1000) % 4 == 0).astype(float)
    low, high = evaluate.interval(values)
    standard_error = (0.25 * 0.75 / 1000) ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    wide = evaluate.interval(values, level=0.99)
    assert wide[0] < low and wide[1] > high

  def test_all_alike(self):
    assert evaluate.interval(np.ones(5)) == (1.0, 1.0)
    assert evaluate.interval(np.zeros(1)) == (0.0, 0.0)


class TestParts:

  REWARDS = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], np.float32)

  def test_the_curve_of_pass_at_k(self):
    curve = evaluate.pass_curve(self.REWARDS)
    assert list(curve) == ['1', '2', '4']
    assert curve['1'] == pytest.approx(self.REWARDS.mean())
    assert curve['4'] == pytest.approx(0.75)
    # Of two of four: 1/2, 1, 0 and 5/6.
    assert curve['2'] == pytest.approx((1 / 2 + 1 + 0 + 5 / 6) / 4)
    assert list(evaluate.pass_curve(self.REWARDS[:, :3])) == ['1', '2']

  def test_by_group(self):
    got = evaluate.by_group(['b', 'a', 'b', ''], self.REWARDS)
    assert got == {'a': 1.0, 'a_low': 1.0, 'a_high': 1.0, 'a_problems': 1,
                   'b': 0.125, 'b_low': 0.0, 'b_high': 0.25, 'b_problems': 2}


@dataclasses.dataclass(frozen=True)
class Loaded:
  """`huggingface.LoadedModel` with its parameters read."""

  model: Model
  tokenizer: Any
  stop_tokens: tuple[int, ...]
  params: Params


@pytest.fixture(scope='module')
def models():
  loaded = [huggingface.load(path, {}) for path in (tiny.student(), tiny.teacher())]
  return [Loaded(m.model, m.tokenizer, m.stop_tokens, jax.device_put(m.read())) for m in loaded]


def make_evaluator(models, problems, **fields):
  run = config.parse(tiny.config('opd_sampled', **fields))
  return evaluator_lib.make_evaluator(
      run, models[0], models[1].model, task=tasks.get(run.task.name),
      examples=build.load_examples(run, 'eval', problems, models[0].tokenizer, prompts_lib.Style()),
      stop_tokens=models[0].stop_tokens, mesh=meshes.make_mesh(run.compute, []),
      key=load.fold_in(jax.random.key(run.seed), load.EVAL, 0))


@pytest.fixture(scope='module')
def evaluator(models):
  return make_evaluator(models, 16)


class TestEvaluator:

  def test_against_its_parts(self, models, evaluator):
    values, _ = evaluator(models[0].params, models[1].params, 0)
    rollout = evaluator.sample(models[0].params, evaluator._put(2), evaluator._key)
    # Graded here from the tokens themselves: the characters up to EOS.
    rewards = []
    for b, row in enumerate(np.asarray(rollout.tokens)):
      text, example = '', evaluator.rows[b // 2]
      for token in row[rollout.prompt_length:]:
        if token == models[0].tokenizer.eos_token_id:
          rewards.append(float(text.split('#')[-1] == str(example['answer'])))
          break
        text += models[0].tokenizer.decode([token])
      else:
        rewards.append(0.0)  # truncated
    rewards = np.array(rewards).reshape(16, 2)
    assert 0 < rewards.mean() < 1  # else there is nothing to compare
    assert values['sampled_accuracy'] == rewards.mean()  # avg@2
    assert values['pass_at_2'] == rewards.max(axis=1).mean()
    assert (values['sampled_accuracy_low'], values['sampled_accuracy_high']) == evaluate.interval(
        rewards.mean(axis=1))  # over problems, not over samples
    mask = np.asarray(rollout.mask)
    assert values['length'] == mask.sum() / 32
    assert values['truncation_rate'] == 1 - np.asarray(rollout.ended).mean()

  def test_reverse_kl_is_the_exact_one_on_the_students_own_samples(self, models, evaluator):
    values, _ = evaluator(models[0].params, models[1].params, 0)
    rollout = evaluator.sample(models[0].params, evaluator._put(2), evaluator._key)
    logprobs = []
    for m in models:
      positions = sample.positions_of(rollout.valid)
      hidden, _ = m.model.forward(m.params, rollout.tokens, positions, rollout.valid, None)
      logits = m.model.head(m.params).logits(hidden)
      logprobs.append(np.asarray(jax.nn.log_softmax(logits), np.float64))
    kl = (np.exp(logprobs[0]) * (logprobs[0] - logprobs[1])).sum(-1)[:, :-1]
    mask = np.asarray(rollout.mask)
    assert values['reverse_kl'] == pytest.approx((kl * mask).sum() / mask.sum(), rel=1e-4)
    assert values['reverse_kl'] > 0.1
    drawn = np.take_along_axis(
        np.asarray(logprobs[1])[:, :-1], np.asarray(rollout.tokens)[:, 1:, None], axis=2)[..., 0]
    assert values['teacher_logprob'] == pytest.approx((drawn * mask).sum() / mask.sum(), rel=1e-4)
    # And the overlap of the 16 most likely tokens, which are sets here.
    own, other = (x[:, :-1][mask > 0] for x in logprobs)
    mine, theirs = (np.argsort(-x)[:, :16] for x in (own, other))
    shared = (mine[:, :, None] == theirs[:, None, :]).any(-1)
    p = np.exp(own)
    inside = np.take_along_axis(p, theirs, axis=1).sum(1)
    of_shared = (np.take_along_axis(p, mine, axis=1) * shared).sum(1)
    # Of some 200 x 16 tokens, one may be at the edge of a set in one program and not in the other.
    assert values['overlap_count'] == pytest.approx(shared.mean(), abs=2e-3)
    assert values['overlap_mass'] == pytest.approx(of_shared.mean(), abs=1e-4)
    assert values['mass_outside'] == pytest.approx(1 - inside.mean(), abs=1e-4)
    assert 0 < values['overlap_count'] < 1

  def test_microbatches_are_those_of_training(self, models, evaluator):
    rollout = evaluator.sample(models[0].params, evaluator._put(2), evaluator._key)
    small = make_evaluator(models, 12, compute__microbatch_rows=16)
    rows = jax.tree.map(lambda x: x[:24] if x.ndim else x, rollout)
    both = models[0].params, models[1].params
    # 24 rows: the largest part of 16 that divides them is 8.
    assert 'f32[8,10,32]' in small.compare.lower(*both, rows).compile().as_text()
    mine, whole = small.compare(*both, rows), evaluator.compare(*both, rollout)
    assert mine.keys() == whole.keys() == {'tokens', *evaluate.BY_TEACHER}
    for name in mine:  # absolutely: of the mass outside little is left, as a difference from 1
      np.testing.assert_allclose(mine[name], whole[name][:24], rtol=1e-4, atol=1e-5, err_msg=name)

  def test_greedy_is_the_most_likely_token(self, models, evaluator):
    student = models[0]
    rollout = evaluator.greedy(student.params, evaluator._put(1), evaluator._key)
    hidden = score.completion_hidden(student.model, student.params, rollout)
    best = np.asarray(jnp.argmax(student.model.head(student.params).logits(hidden), axis=-1))
    alive = np.asarray(rollout.valid)[:, rollout.prompt_length:]
    assert (best == np.asarray(rollout.completion_targets))[alive].all()

  def test_the_same_every_time(self, models, evaluator):
    first = evaluator(models[0].params, models[1].params, 2)
    evaluator(models[1].params, models[0].params, 2)
    assert evaluator(models[0].params, models[1].params, 2) == first
    assert evaluator.compile_count() == 3

  def test_without_a_teachers_parameters_there_is_no_kl(self, models, evaluator):
    values, _ = evaluator(models[0].params, None, 0)
    assert 'reverse_kl' not in values

  def test_parts_and_measures_of_a_task(self, models, evaluator, monkeypatch):
    task = tasks.get('arithmetic')
    values, _ = evaluator(models[0].params, None, 0)
    assert not {'by_group', 'measures', 'pass_at'} & set(values)  # of 2 samples there is no curve
    monkeypatch.setattr(task, 'group', lambda row: str(row['answer'] % 2), raising=False)
    monkeypatch.setattr(task, 'measures', lambda row, text: {
        'right': [task.grade(row, text)] * 2, 'empty': [float(not text)]}, raising=False)
    more, _ = evaluator(models[0].params, None, 0)
    parts, measures = more.pop('by_group'), more.pop('measures')
    assert more == values
    assert parts['0_problems'] + parts['1_problems'] == 16
    assert sum(parts[g] * parts[f'{g}_problems'] for g in '01') == pytest.approx(
        16 * values['sampled_accuracy'])
    assert measures['right'] == pytest.approx(values['sampled_accuracy'])
    assert measures['empty'] >= values['truncation_rate']  # what did not end says nothing

  def test_transcripts_are_of_different_problems(self, models, evaluator):
    _, shown = evaluator(models[0].params, None, 3)
    assert [t['prompt'] for t in shown] == [r['problem'] + '=' for r in evaluator.rows[:3]]
    assert all(set(t) == {'prompt', 'completion', 'reward'} for t in shown)
