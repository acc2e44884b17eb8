"""The objective and its step: loss, gradient and metrics against NumPy, clipping, gates,
gradient accumulation, empty masks. (Of every objective: test_oracle.py. In expectation:
test_expectations.py.)
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from oracle_choices import Known
import pytest
import steps
from steps import (
  CLIP,
  EXACT,
  GRPO,
  OBJECTIVES,
  ORACLE,
  PROMPTS,
  REWARDS,
  ROWS,
  SAMPLED,
  SFT,
  difference,
  new_state,
  relative_error,
  vector,
)

from opd_jax.algorithm import signals, update
from opd_jax.algorithm.objective import KINDS, Objective
from opd_jax.rules import objective as objective_rules
from opd_jax.types import Batch, Heads, Scores


# What is detached was computed at the parameters of the case.
@functools.cache
def _fixed_rows(case, of_teacher, temperature):
  model, params = ((case.teacher, case.teacher_params) if of_teacher else
                   (case.student, case.params))
  return steps.numpy_log_rows(model, params, case.rollout, temperature)


def _oracle_loss(o: Objective, case: steps.Case, params) -> float:
  """Of the oracle."""
  r = jax.tree.map(np.asarray, case.rollout)
  own = _fixed_rows(case, False, o.temperature)
  known = Known(
      targets=r.tokens[:, 1:], mask=r.mask, sampler_logprobs=r.sampler_logprobs,
      policy_offset=r.policy_offset, student=own,
      teacher=_fixed_rows(case, True, o.teacher_temperature), reference=own, rewards=REWARDS,
      noise=r.mask, group_size=2)
  return oracle.losses(
      o, known, steps.numpy_log_rows(case.student, params, r, o.temperature)).sum()


@pytest.mark.parametrize('name', ['exact_forward_kl', 'sampled_discounted', 'grpo_by_sequence'])
def test_loss_and_gradient_against_the_oracle_through_a_transformer(x64, name):
  # Of every objective, through a table, in test_oracle.py.
  o, batch = OBJECTIVES[name], steps.transformer_case('float64')
  objective_rules.check(o)
  state, metrics = steps.step(batch.student, o, group_size=2)(
      new_state(batch.params), *steps.inputs(o, batch))
  assert float(metrics['loss']) == pytest.approx(
      _oracle_loss(o, batch, batch.params), rel=ORACLE)
  grads = difference(batch.params, state.params)
  assert float(metrics['grad_norm']) == pytest.approx(np.linalg.norm(vector(grads)), rel=ORACLE)
  rng = np.random.RandomState(3)
  for _ in range(2):
    direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), batch.params)

    def at(step, direction=direction):
      moved = jax.tree.map(lambda p, d: p + step * d, batch.params, direction)
      return _oracle_loss(o, batch, moved)

    # Central differences along a vector of length 25: errors of 1e-9, from the third derivative as
    # from rounding.
    slope = (at(1e-6) - at(-1e-6)) / 2e-6
    assert vector(grads) @ vector(direction) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize('name', ['exact', 'sampled', 'grpo_by_sequence'])
def test_metrics_against_numpy(x64, name):
  o, batch = OBJECTIVES[name], steps.table_case('float64')
  r = jax.tree.map(np.asarray, batch.rollout.replace(
      ended=jnp.array([True, True, False, True, True, False])))
  inputs = steps.inputs(o, batch)
  graded = inputs[0].replace(rollout=batch.rollout.replace(ended=jnp.asarray(r.ended)))
  _, got = steps.step(batch.student, o, group_size=2)(new_state(batch.params), graded, inputs[1])
  mine = steps.numpy_log_rows(batch.student, batch.params, r, o.temperature)
  theirs = steps.numpy_log_rows(batch.teacher, batch.teacher_params, r, o.teacher_temperature)
  places = [tuple(x) for x in np.argwhere(r.mask)]
  chosen = np.array([mine[b, t, r.tokens[b, t + 1]] for b, t in places])
  behaviour, offset = (
      np.array([x[p] for p in places]) for x in (r.sampler_logprobs, r.policy_offset))

  def entropy(rows):
    return np.mean([-np.exp(rows[p]) @ rows[p] for p in places])

  gap = np.abs(chosen - behaviour - offset)
  ratio = np.exp(chosen - behaviour - (offset if o.importance.startswith('ppo_clip') else 0))
  want = {'entropy_student': entropy(mine), 'logprob': chosen.mean(), 'truncation_rate': 2 / 6,
          'gap_mean': gap.mean(), 'gap_max': gap.max(), 'ratio_mean': ratio.mean(),
          'ratio_max': ratio.max(), 'ratio_min': ratio.min(),
          'scored_useful': np.mean(r.mask[:, r.prompt_length - 1:])}
  if o.needs_teacher:
    graded = np.array([theirs[b, t, r.tokens[b, t + 1]] for b, t in places])
    want |= {'entropy_teacher': entropy(theirs), 'reverse_kl': (chosen - graded).mean()}
    want |= {f'log_ratio_p{q:02d}': np.percentile(graded - chosen, q) for q in (5, 25, 50, 75, 95)}
  if o.needs_hidden_in_loss:
    want['divergence'] = np.mean([np.exp(mine[p]) @ (mine[p] - theirs[p]) for p in places])
  if o.importance == 'ppo_clip(0.1)':
    want['clip_rate'] = np.mean(np.abs(ratio - 1) > 0.1)
    assert 0 < want['clip_rate'] < 1
  if o.reward_coef:
    want['reward'] = REWARDS.mean()
  for key, value in want.items():
    # 1e-6: `truncation_rate` is float32 even where the model is float64.
    assert float(got[key]) == pytest.approx(value, rel=1e-6), key
  assert got['lengths'].tolist() == [len(row) for row in ROWS]
  assert got['prompt_lengths'].tolist() == [len(row) for row in PROMPTS]
  rest = {'loss', 'grad_norm', 'update_norm', 'lengths', 'prompt_lengths'}
  assert set(got) == set(want) | rest


def test_sft_loss_is_the_mean_negative_log_likelihood(x64):
  batch = steps.table_case('float64')
  _, metrics = steps.step(batch.student, SFT)(new_state(batch.params), *steps.inputs(SFT, batch))
  rows = steps.numpy_log_rows(batch.student, batch.params, batch.rollout, 1.0)
  nll = [-rows[b, t, batch.rollout.tokens[b, t + 1]]
         for b, t in np.argwhere(np.asarray(batch.rollout.mask))]
  assert float(metrics['loss']) == pytest.approx(np.mean(nll), rel=ORACLE)


def test_token_weights_are_detached_and_zero_where_the_mask_is():
  batch = steps.table_case('float32')
  o = dataclasses.replace(SAMPLED, discount=0.5, reward_coef=0.3, likelihood_coef=0.1)
  zeros = jnp.zeros_like(batch.rollout.mask)

  def weights(teacher_logprobs, own_logprobs, rewards):
    scores = [Scores(logprobs=x, entropy=zeros, hidden=None)
              for x in (teacher_logprobs, own_logprobs)]
    rows, _ = update.weigh(o, Batch(batch.rollout, *scores, rewards=rewards), 1.0, None, Heads(),
                           None, group_size=2, chunk_tokens=50)
    return rows.advantage

  inputs = (zeros - 1.0, zeros - 2.0, jnp.asarray(REWARDS, jnp.float32))
  np.testing.assert_array_equal(weights(*inputs) != 0, batch.rollout.mask > 0)
  grads = jax.grad(lambda *x: jnp.sum(weights(*x)), (0, 1, 2))(*inputs)
  assert not any(np.any(np.asarray(g)) for g in grads)


def test_group_advantage_against_numpy():
  rewards = jnp.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.25])
  groups = np.asarray(rewards, np.float64).reshape(3, 3)
  centred = groups - groups.mean(1, keepdims=True)
  for baseline, want in (('none', groups), ('group_mean', centred),
                         # The sample's standard deviation, as in TRL, verl and Tunix.
                         ('group_mean_std',
                          centred / (groups.std(1, ddof=1, keepdims=True) + 1e-4))):
    got = signals.group_advantage(Objective(reward_baseline=baseline), rewards, 3)
    np.testing.assert_allclose(got, want.reshape(-1), atol=1e-6)  # float32 of numbers near 1
  # A group whose samples agree teaches nothing, with or without the division.
  assert not np.any(np.asarray(signals.group_advantage(GRPO, rewards, 3))[3:6])


@pytest.mark.parametrize('baseline', [n for n in KINDS['reward_baseline'].names if n != 'none'])
@pytest.mark.parametrize('reward', [0.1, 0.3, 1 / 3, -0.7, 1e-3])
def test_a_group_of_equal_rewards_gives_exactly_no_advantage(baseline, reward):
  o = dataclasses.replace(GRPO, reward_baseline=baseline)
  for size in (2, 3, 7, 8):  # none of these rewards is a binary fraction, nor are all their sums
    rewards = jnp.full(2 * size, reward, jnp.float32).at[size].add(1.0)
    got = np.asarray(jax.jit(lambda r, n=size: signals.group_advantage(o, r, n))(rewards))
    assert not np.any(got[:size]) and np.all(got[size:])


def test_a_batch_of_equal_rewards_gives_exactly_no_gradient():
  batch = steps.table_case('float32')
  inputs = Batch(batch.rollout, rewards=jnp.full(len(ROWS), 0.1)), Heads()
  optimizer = steps.adam()
  state, metrics = steps.step(batch.student, GRPO, optimizer=optimizer, group_size=6)(
      new_state(batch.params, optimizer), *inputs)
  assert float(metrics['grad_norm']) == float(metrics['update_norm']) == 0.0
  assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, state.params, batch.params)))


def test_one_sample_alone_is_worth_nothing():
  assert not np.any(signals.group_advantage(GRPO, jnp.array([1.0, 0.3]), 1))


@pytest.mark.parametrize(('ratio', 'reward', 'value', 'active'), [
    (1.0, 1.0, 1.0, True), (1.5, 1.0, 1.2, False), (0.5, 1.0, 0.5, True),
    (1.5, -1.0, -1.5, True), (0.5, -1.0, -0.8, False), (1.1, -1.0, -1.1, True)])
def test_ppo_clip_is_pessimistic(x64, ratio, reward, value, active):
  clipped = np.clip(ratio, 1 - CLIP, 1 + CLIP) * reward
  assert value == min(ratio * reward, clipped)  # the table itself
  batch = steps.table_case('float64')
  mask = batch.rollout.mask
  chosen = steps.scorer(batch.student)(batch.params, batch.rollout).logprobs
  truncated = chosen - batch.rollout.policy_offset  # as if top-p had cut: no move of the policy
  rollout = batch.rollout.replace(sampler_logprobs=(truncated - np.log(ratio)) * mask)
  objective = dataclasses.replace(GRPO, reward_baseline='none')
  state, metrics = steps.step(batch.student, objective)(
      new_state(batch.params), Batch(rollout, rewards=jnp.full(len(ROWS), reward)), Heads())
  assert float(metrics['loss']) == pytest.approx(-value, rel=ORACLE)
  assert float(metrics['ratio_mean']) == pytest.approx(ratio, rel=ORACLE)
  assert float(metrics['clip_rate']) == (abs(ratio - 1) > CLIP)
  # A clipped term is a constant and has no gradient at all. An active one has that of
  # -ratio * reward, which for equal ratios is in proportion to supervised learning's.
  if not active:
    assert float(metrics['grad_norm']) == 0.0
    return
  sft, _ = steps.step(batch.student, SFT)(new_state(batch.params), Batch(rollout), Heads())
  want = jax.tree.map(lambda g: ratio * reward * g, difference(batch.params, sft.params))
  assert relative_error(difference(batch.params, state.params), want) < ORACLE


@pytest.mark.parametrize('fields', [
    dict(baseline='exact', window='tokens(1, 2)'),
    dict(route='direct', estimator='k2', importance='none', window='tokens(1, 2)'),
    dict(route='direct', support='full', importance='none', row_gate='wrong',
         reduction='sequence_mean')], ids=str)
def test_gated_tokens_are_as_if_they_were_masked(x64, fields):
  o, batch = Objective(**fields), steps.table_case('float64')
  objective_rules.check(o)
  inputs = steps.inputs(o, batch)
  gated, metrics = steps.step(batch.student, o)(new_state(batch.params), *inputs)
  mask = signals.gate(o, inputs[0])
  plain = dataclasses.replace(o, window='none', row_gate='none')
  masked, same = steps.step(batch.student, plain)(
      new_state(batch.params), inputs[0].replace(rollout=batch.rollout.replace(mask=mask)),
      inputs[1])
  assert float(metrics['loss']) == pytest.approx(float(same['loss']), rel=1e-12)
  assert relative_error(difference(batch.params, gated.params),
                         difference(batch.params, masked.params)) < 1e-12
  assert float(metrics['counted_rate']) == float(jnp.sum(mask) / jnp.sum(batch.rollout.mask)) < 1


def test_gates_that_leave_nothing_leave_no_gradient(x64):
  o, batch = dataclasses.replace(EXACT, row_gate='correct'), steps.table_case('float64')
  graded, heads = steps.inputs(o, batch)
  graded = graded.replace(rewards=jnp.zeros_like(graded.rewards))
  _, metrics = steps.step(batch.student, o)(new_state(batch.params), graded, heads)
  assert float(metrics['loss']) == float(metrics['grad_norm']) == metrics['counted_rate'] == 0.0


# --- gradient accumulation ---


@pytest.mark.parametrize('objective', [
    EXACT, dataclasses.replace(SAMPLED, reduction='sequence_mean', discount=0.5),
    dataclasses.replace(SAMPLED, baseline='exact', token_gate='soft_or(keep=0.5)'),
    dataclasses.replace(SAMPLED, baseline='leave_one_out', row_gate='wrong', window='tokens(0, 3)',
                        importance='two_sided(0.8, 1.2)')],
    ids=['token_mean', 'sequence_mean', 'token_gate', 'row_gate'])
def test_microbatches_add_up_to_the_full_batch(x64, objective):
  batch = steps.table_case('float64')  # completions of 1 to 5 tokens: means of means would differ
  inputs = steps.inputs(objective, batch)
  want, metrics = steps.step(batch.student, objective, group_size=2)(
      new_state(batch.params), *inputs)
  for rows in (1, 2):
    got, same = steps.step(batch.student, objective, group_size=2, microbatch_rows=rows)(
        new_state(batch.params), *inputs)
    # Sums in another order, in float64.
    assert relative_error(difference(batch.params, got.params),
                           difference(batch.params, want.params)) < 1e-12
    for name, value in metrics.items():
      np.testing.assert_allclose(same[name], value, rtol=1e-12, err_msg=name)


def test_microbatches_that_do_not_divide_raise(x64):
  batch = steps.table_case('float64')
  with pytest.raises(ValueError, match=r'microbatch_rows=4 .*\b6 '):
    steps.step(batch.student, SFT, microbatch_rows=4)(
        new_state(batch.params), *steps.inputs(SFT, batch))


# --- empty masks ---


@pytest.mark.parametrize('name', ['exact_by_sequence', 'grpo_by_sequence', 'sampled_discounted'])
def test_a_row_without_tokens_counts_for_nothing(x64, name):
  o = dataclasses.replace(OBJECTIVES[name], reward_baseline='none')  # a group would see the row
  batch = steps.table_case('float64')
  empty = batch.rollout.replace(mask=batch.rollout.mask.at[4:].set(0.0))
  rest = jax.tree.map(lambda x: x[:4], batch.rollout)
  runs = []
  for rollout, rewards in ((empty, REWARDS), (rest, REWARDS[:4])):
    inputs = steps.inputs(o, dataclasses.replace(batch, rollout=rollout))
    graded = inputs[0].replace(rewards=jnp.asarray(rewards) if o.reward_coef else None)
    state, metrics = steps.step(batch.student, o)(new_state(batch.params), graded, inputs[1])
    runs.append((float(metrics['loss']), difference(batch.params, state.params)))
  assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-12)
  assert relative_error(runs[0][1], runs[1][1]) < 1e-12


@pytest.mark.parametrize('objective', [EXACT, SAMPLED, GRPO,
                                       dataclasses.replace(SFT, reduction='sequence_mean')],
                         ids=['exact', 'sampled', 'grpo', 'sft'])
def test_an_empty_batch_gives_zeros_and_no_nan(objective):
  batch = steps.table_case('float32')
  rollout = batch.rollout.replace(mask=jnp.zeros_like(batch.rollout.mask))
  inputs = steps.inputs(objective, dataclasses.replace(batch, rollout=rollout))
  optimizer = steps.adam()
  state, metrics = steps.step(batch.student, objective, optimizer=optimizer, group_size=2)(
      new_state(batch.params, optimizer), *inputs)
  assert float(metrics['loss']) == 0.0 and float(metrics['grad_norm']) == 0.0
  for name, value in metrics.items():
    # Of no tokens there are no quantiles; the loop writes none then.
    assert np.all(np.isfinite(value)) or name.startswith('log_ratio'), name
  assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, state.params, batch.params)))
