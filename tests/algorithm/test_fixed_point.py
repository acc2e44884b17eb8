"""Through a transformer in float32, where last bits matter: a student equal to its teacher
stays, and one step whose numbers are pinned."""

from __future__ import annotations

import dataclasses
import functools

from conftest import left_padded, quick_jit, sharp_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
from steps import LOGPROBS, PROMPTS, SAMPLED, difference, new_state, vector

from opd_jax.algorithm import objective as objective_lib
from opd_jax.algorithm import signals, update
from opd_jax.models import params as params_lib
from opd_jax.rules import objective as objective_rules
from opd_jax.types import Batch, Heads, Wants


@pytest.fixture(scope='module')
def loop():
  """Sampler and scorer compiled as the train loop compiles them: this is about rounding."""
  model = steps.transformer(False, 'float32')
  return (model, sharp_params(model), left_padded(PROMPTS, 6), steps.sampler(model),
          steps.scorer(model, jit=jax.jit))


@pytest.mark.parametrize('fields', [
    dict(), dict(discount=1.0), dict(baseline='exact'),
    dict(baseline='leave_one_out', shaping='log', importance='truncated(2)'),
    dict(divergence='jensen_shannon(0.3)', baseline='batch_mean'),
    dict(shaping='power(0.7)', importance='two_sided(0.5, 2)'),
    dict(shaping='clip(1)', importance='ppo_clip(0.2)'),
    dict(signal='fixed_negative', token_gate='student_entropy(keep=0.5)')], ids=str)
def test_self_distillation_is_a_fixed_point_bit_for_bit(loop, fields):
  model, params, prompts, sampler, _ = loop
  optimizer, objective = steps.adam(), dataclasses.replace(SAMPLED, **fields)
  objective_rules.check(objective)
  asked = objective_lib.wants(objective)
  scorer = steps.scorer(model, 1.0, asked['teacher'] | asked['student'], jit=jax.jit)
  step = steps.step(model, objective, optimizer=optimizer, group_size=2, microbatch_rows=3)
  state = new_state(params, optimizer)
  for i in range(3):
    rollout = sampler(state.params, prompts, jax.random.key(i))
    teacher, student = scorer(params, rollout), scorer(state.params, rollout)
    heads = Heads(model.head(params) if asked['teacher'].hidden else None)
    state, metrics = step(state, Batch(rollout, teacher, student), heads)
    assert float(metrics['grad_norm']) == 0.0
  same = jax.tree.map(jnp.array_equal, state.params, params)
  assert all(jax.tree.leaves(same)), {k: v for k, v in params_lib.flatten(same).items() if not v}
  assert int(state.step) == 3


def test_self_distillation_with_the_samplers_logprobs_moves_by_no_more_than_rounding_allows(loop):
  # The cheap way: the advantage is then the sampler's rounding error instead of zero. Adam divides
  # it by its own size, and the parameters move by full steps in random directions.
  model, params, prompts, sampler, scorer = loop
  objective, optimizer = dataclasses.replace(SAMPLED, student_logprobs='sampler'), steps.adam()
  rollout = sampler(params, prompts, jax.random.key(0))
  teacher = scorer(params, rollout)
  advantage = signals.distillation_advantage(objective, Batch(rollout, teacher), 1)
  gap = float(jnp.max(jnp.abs(teacher.logprobs - rollout.sampler_logprobs)))
  assert 0.0 < gap < 1e-5  # of sampler and scorer, test_sample.py
  assert float(jnp.max(jnp.abs(advantage))) == gap
  state, metrics = steps.step(model, objective, optimizer=optimizer)(
      new_state(params, optimizer), Batch(rollout, teacher), Heads())
  # The gradient is in proportion to the gap: |grad log p| is of order 10 for this model.
  assert 0.0 < float(metrics['grad_norm']) < 30 * gap
  moved = np.abs(vector(difference(params, state.params)))
  assert 1e-4 < moved.max() < 1.1e-3  # a step of Adam is at most its learning rate


# --- one pinned step ---

# Written by this test's own failure message. Update them only for a change that is meant to change
# numbers (random keys, sampling, loss, optimizer), and say so in the commit. CPUs differ in the
# last bits of float32, hence 1e-4; a single parameter that takes its first step of Adam in the
# wrong direction moves the checksum by 1.2e-4 of itself. The sampled tokens are exact.
PINS = {
    'tokens': 1121,
    'exact': {'loss': 1.3808539, 'grad_norm': 2.165777, 'checksum': -16.591306},
    'sampled': {'loss': 1.2677352, 'grad_norm': 12.936144, 'checksum': -16.609957},
}


def _checksum(params) -> float:
  """A weighted sum, so that values which swap places or signs show."""
  flat = np.concatenate([np.ravel(x) for _, x in sorted(params_lib.flatten(params).items())])
  return float(np.sum(flat.astype(np.float64) * np.cos(np.arange(flat.size))))


def test_one_pinned_step():
  student, teacher = (steps.transformer(wide, 'float32') for wide in (False, True))
  params, teacher_params = sharp_params(student, 0), sharp_params(teacher, 1)
  rollout = steps.sampler(student)(params, left_padded(PROMPTS, 6), jax.random.key(2))
  got = {'tokens': int(jnp.sum(rollout.tokens[:, 6:] * (1 + jnp.arange(8)[None])))}
  for name, exact in (('exact', True), ('sampled', False)):
    asked = Wants(hidden=True) if exact else LOGPROBS
    graded = steps.scorer(teacher, wants=asked)(teacher_params, rollout)
    own = None if exact else steps.scorer(student)(params, rollout)
    head = teacher.head(teacher_params) if exact else None
    state, metrics = quick_jit(functools.partial(
        update.reverse_kl_update, exact=exact, model=student, optimizer=steps.adam(),
        chunk_tokens=16, microbatch_rows=2))(
            new_state(params, steps.adam()), rollout, graded, own, head)
    got[name] = {'loss': float(metrics['loss']), 'grad_norm': float(metrics['grad_norm']),
                 'checksum': _checksum(state.params)}
  same = got['tokens'] == PINS['tokens'] and all(
      got[n][k] == pytest.approx(PINS[n][k], rel=1e-4)
      for n in ('exact', 'sampled') for k in PINS[n])
  assert same, f'the pinned step gives other numbers; if that is meant, set PINS = {got}'
