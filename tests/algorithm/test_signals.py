"""Signal, shaping, baselines and gates against loops over tokens."""

from __future__ import annotations

import fractions
import math

from conftest import make_rollout
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.algorithm import signals, update
from opd_jax.algorithm.gates import keep_highest
from opd_jax.algorithm.objective import Objective
from opd_jax.types import Batch, Heads, Scores

PROMPTS = [[5, 9], [5, 9], [7], [7]]
COMPLETIONS = [[3, 1, 4, 1, 0], [9, 0], [6, 5, 3], [8]]


@pytest.fixture
def batch(x64):
  """(rollout, own log-probs, the teacher's, both entropies) in float64, zero where the mask is."""
  rollout = make_rollout(PROMPTS, COMPLETIONS, prompt_width=2, room=5, dtype=jnp.float64)
  rng, mask = np.random.RandomState(0), np.asarray(rollout.mask)
  own, theirs = (-rng.exponential(1.0, mask.shape) * mask for _ in range(2))
  entropies = [rng.uniform(0.1, 2.0, mask.shape) * mask for _ in range(2)]
  return rollout, own, theirs, *entropies


def _scores(logprobs, entropy):
  return Scores(logprobs=jnp.asarray(logprobs), entropy=jnp.asarray(entropy), hidden=None)


def _graded(batch, rewards=None):
  rollout, own, theirs, *entropies = batch
  return Batch(rollout, _scores(theirs, entropies[1]), _scores(own, entropies[0]), rewards=rewards)


def _weights(o, batch, rewards=None, group_size=1):
  rows, _ = update.weigh(o, _graded(batch, rewards), o.distill_coef, None, Heads(), None,
                         group_size=group_size, chunk_tokens=50)
  return np.asarray(rows.advantage)


def _gate(o, batch, rewards=None):
  return np.asarray(signals.gate(o, _graded(batch, rewards)))


@pytest.mark.parametrize(('fields', 'by_hand'), [
    (dict(), lambda s, t: t - s),
    (dict(shaping='clip(0.5)'), lambda s, t: min(max(t - s, -0.5), 0.5)),
    (dict(shaping='log'), lambda s, t: np.sign(t - s) * np.log(1 + abs(t - s))),
    (dict(shaping='power(0.7)'), lambda s, t: np.exp(t)**0.7 - np.exp(s)**0.7),
    (dict(signal='fixed_negative'), lambda s, t: -1.0 if t < s else 0.0),
    (dict(divergence='forward_kl'), lambda s, t: np.exp(t) / np.exp(s) - 1),
    (dict(divergence='forward_kl', shaping='clip(0.3)'),
     lambda s, t: min(max(np.exp(t - s) - 1, -0.3), 0.3)),
], ids=['log_ratio', 'clip', 'log', 'power', 'fixed_negative', 'forward_kl', 'clipped_forward_kl'])
def test_signal_of_every_token(batch, fields, by_hand):
  rollout, own, theirs, *_ = batch
  got = _weights(Objective(**fields), batch)
  for b, t in np.ndindex(*got.shape):
    want = by_hand(own[b, t], theirs[b, t]) if rollout.mask[b, t] else 0.0
    assert got[b, t] == pytest.approx(want, rel=1e-12, abs=1e-15), (b, t)


def test_power_of_a_small_exponent_is_the_log_ratio(batch):
  plain = _weights(Objective(), batch)
  power = _weights(Objective(shaping='power(1e-7)'), batch) / 1e-7
  np.testing.assert_allclose(power, plain, rtol=1e-5)


def test_shaping_comes_before_the_return(batch):
  o = Objective(shaping='clip(0.5)', discount=0.9)
  clipped = _weights(Objective(shaping='clip(0.5)'), batch)
  got = _weights(o, batch)
  for b in range(len(PROMPTS)):
    places = np.flatnonzero(np.asarray(batch[0].mask)[b])
    total = 0.0
    for t in places[::-1]:
      total = clipped[b, t] + 0.9 * total
      assert got[b, t] == pytest.approx(total, rel=1e-12)


class TestBaselines:

  @pytest.mark.parametrize('discount', [0.0, 0.9])  # a prompt's positions have a return, too
  def test_mean_of_the_batch(self, batch, discount):
    plain, got = (_weights(Objective(baseline=b, discount=discount), batch)
                  for b in ('none', 'batch_mean'))
    mask = np.asarray(batch[0].mask) > 0
    np.testing.assert_allclose(got[mask], plain[mask] - plain[mask].mean(), rtol=1e-12, atol=1e-15)
    assert not got[~mask].any()

  def test_leave_one_out_is_the_mean_of_the_other_rows_of_the_prompt(self, batch):
    plain = _weights(Objective(), batch)
    got = _weights(Objective(baseline='leave_one_out'), batch, group_size=2)
    mask = np.asarray(batch[0].mask) > 0
    for b, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
      want = plain[b, mask[b]] - plain[other, mask[other]].mean()
      np.testing.assert_allclose(got[b, mask[b]], want, rtol=1e-12)

  def test_leave_one_out_does_not_look_at_its_own_row(self, batch):
    # That is what keeps it unbiased: E[grad log p_S * b] = 0 for a b that the row does not decide.
    rollout, own, theirs, *entropies = batch
    o = Objective(baseline='leave_one_out')
    changed = theirs.copy()
    changed[0] *= 3.0
    before = _weights(o, batch, group_size=2) - _weights(Objective(), batch)
    after_batch = (rollout, own, changed, *entropies)
    after = _weights(o, after_batch, group_size=2) - _weights(Objective(), after_batch)
    np.testing.assert_allclose(after[0], before[0], atol=1e-15)
    assert np.abs(after[1] - before[1]).max() > 0.1  # but at the others'

  def test_a_row_of_an_empty_group_keeps_its_value(self, x64):
    rollout = make_rollout([[5], [5]], [[1, 2], []], prompt_width=1, room=2, dtype=jnp.float64)
    own, theirs = jnp.full((2, 2), -1.0), jnp.full((2, 2), -0.5)
    got = signals.distillation_advantage(
        Objective(baseline='leave_one_out'),
        Batch(rollout, _scores(theirs, own), _scores(own, own)), 2)
    np.testing.assert_array_equal(got, [[0.5, 0.5], [0.0, 0.0]])


class TestGates:

  @pytest.mark.parametrize(('start', 'tokens'), [(0, 1), (0, 2), (1, 2), (3, 9)])
  def test_window(self, batch, start, tokens):
    got = _gate(Objective(window=f'tokens({start}, {tokens})'), batch)
    want = make_rollout(PROMPTS, COMPLETIONS, prompt_width=2, room=5).mask * 0
    want = np.array(want)
    for b, completion in enumerate(COMPLETIONS):
      for place in range(start, min(start + tokens, len(completion))):
        want[b, 2 - 1 + place] = 1
    np.testing.assert_array_equal(got, want)

  @pytest.mark.parametrize(('gate', 'rows'), [('correct', [1, 0, 0, 1]), ('wrong', [0, 1, 1, 0])])
  def test_rows_by_their_reward(self, batch, gate, rows):
    got = _gate(Objective(row_gate=gate), batch, jnp.array([1.0, 0.5, 0.0, 1.0]))
    np.testing.assert_array_equal(got, np.asarray(batch[0].mask) * np.array(rows)[:, None])

  @pytest.mark.parametrize('keep', [0.2, 0.5, 0.74, 0.76])
  def test_rows_that_the_teacher_finds_likely(self, batch, keep):
    rollout, _, theirs, *_ = batch
    mask = np.asarray(rollout.mask)
    means = (theirs * mask).sum(1) / mask.sum(1)
    kept = np.argsort(-means)[:int(np.ceil(keep * 4))]
    want = mask * np.isin(np.arange(4), kept)[:, None]
    np.testing.assert_array_equal(
        _gate(Objective(row_gate=f'teacher_likelihood({keep})'), batch), want)

  @pytest.mark.parametrize('gate', ['student_entropy', 'teacher_entropy', 'divergence', 'soft_or'])
  @pytest.mark.parametrize('keep', [0.25, 0.5, 0.95])
  def test_tokens(self, batch, gate, keep):
    rollout, own, theirs, student_entropy, teacher_entropy = batch
    difference = np.abs(theirs - own)
    score = {'student_entropy': student_entropy, 'teacher_entropy': teacher_entropy,
             'divergence': difference,
             'soft_or': 1 - (1 - student_entropy / student_entropy.max())
                        * (1 - difference / difference.max())}[gate]
    places = np.argwhere(np.asarray(rollout.mask) > 0)
    ordered = sorted(places.tolist(), key=lambda p: -score[tuple(p)])
    want = np.zeros(score.shape)
    for p in ordered[:int(np.ceil(keep * len(places)))]:
      want[tuple(p)] = 1
    np.testing.assert_array_equal(_gate(Objective(token_gate=f'{gate}(keep={keep})'), batch), want)

  def test_tokens_are_chosen_among_those_that_the_other_gates_leave(self, batch):
    o = Objective(token_gate='student_entropy(0.5)', window='tokens(0, 1)')
    got = _gate(o, batch)
    assert got.sum() == 2 and got[:, 1].sum() == 2  # of the four first tokens

  def test_a_row_without_tokens_is_not_among_the_rows(self, x64):
    rollout = make_rollout([[5]] * 4, [[1], [1, 2], [], []], prompt_width=1, room=2,
                           dtype=jnp.float64)
    theirs = rollout.mask * jnp.array([[-1.0], [-2.0], [0.0], [0.0]])
    got = signals.gate(Objective(row_gate='teacher_likelihood(0.5)'),
                      Batch(rollout, _scores(theirs, theirs)))
    np.testing.assert_array_equal(got, [[1, 0], [0, 0], [0, 0], [0, 0]])

  def test_soft_or_is_relative_to_the_tokens_that_are_left(self, x64):
    rollout = make_rollout([[5]] * 2, [[1, 2], [1, 2]], prompt_width=1, room=2, dtype=jnp.float64)
    # Of the first tokens one has the largest entropy, the other the largest difference: both score
    # 1, a tie. Relative to the outliers of the second tokens only one of them would stay.
    entropy = jnp.array([[1.0, 100.0], [0.1, 100.0]])
    theirs = jnp.array([[-1.0, 0.0], [-1.8, 0.0]])
    own = jnp.array([[-1.0, -2.0], [-1.0, -2.0]])
    got = signals.gate(Objective(token_gate='soft_or(0.5)', window='tokens(0, 1)'),
                      Batch(rollout, _scores(theirs, entropy), _scores(own, entropy)))
    np.testing.assert_array_equal(got, [[1, 0], [1, 0]])

  def test_none_is_the_mask_itself(self, batch):
    np.testing.assert_array_equal(_gate(Objective(), batch), batch[0].mask)

  def test_nothing_to_choose_from(self, x64):
    rollout = make_rollout([[5]], [[]], prompt_width=1, room=2, dtype=jnp.float64)
    zeros = jnp.zeros((1, 2))
    got = signals.gate(Objective(token_gate='student_entropy(0.5)'),
                      Batch(rollout, student=_scores(zeros, zeros)))
    np.testing.assert_array_equal(got, zeros)


def test_keep_highest_keeps_ties():
  got = keep_highest(jnp.array([1.0, 2.0, 2.0, 0.0]), jnp.ones(4, bool), 0.25)
  np.testing.assert_array_equal(got, [0, 1, 1, 0])


def test_keep_highest_counts_as_in_exact_arithmetic():
  for share, n in ((0.6, 25), (0.3, 50), (0.1, 10), (0.25, 9)):
    got = keep_highest(jnp.arange(float(n)), jnp.ones(n, bool), share)
    assert float(jnp.sum(got)) == math.ceil(fractions.Fraction(str(share)) * n)


def test_everything_is_detached(batch):
  rollout, own, theirs, *entropies = batch

  def total(x):
    graded = Batch(rollout, _scores(theirs, entropies[1]), _scores(x, entropies[0]))
    o = Objective(shaping='log', baseline='batch_mean')
    weights = signals.distillation_advantage(o, graded, 1)
    # Of any one token: the sum of all is zero with this baseline, and so has no gradient anyway.
    return weights[0, 1] + jnp.sum(signals.gate(
        Objective(token_gate='divergence(0.5)'), graded))

  assert not np.asarray(jax.grad(total)(jnp.asarray(own))).any()
