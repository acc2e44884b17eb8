"""The package's loss and gradient, and what the oracle (tests/oracle.py) says of the same batch."""

from __future__ import annotations

import functools

from conftest import make_rollout, quick_jit
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from oracle_choices import Known
from oracle_divergences import log_softmax
import pytest
import tabular

from opd_jax.algorithm import objective as objective_lib
from opd_jax.algorithm import score, update
from opd_jax.algorithm.objective import Local
from opd_jax.algorithm.update import Term
from opd_jax.rules import objective as objective_rules
from opd_jax.types import Wants

VOCAB = 11
PROMPTS = [[5, 9, 1, 2], [5, 9, 1, 2], [7], [7], [3, 3, 8], [3, 3, 8]]  # in groups of two
ROWS = [[3, 1, 4, 1, 0], [9, 0], [6, 5, 3, 8, 9], [7, 9, 0], [0], [8, 6, 2, 6, 4]]
REWARDS = np.array([1.0, 0.0, 0.25, 1.0, 0.0, 0.0])
STEP = 3  # gradient steps taken, for annealing
EXACT = 1e-10  # float64 leaves far more room, and an error of a formula is of order one


# --- the two sides ---


@functools.cache  # one program for all tests of an objective
def gradient(o, metrics=False):
  """The package's loss and gradient: in chunks of 7 tokens and microbatches of 2 rows, so that a
  test against the oracle, which knows neither, is one of both. Its metrics, where they are asked
  for: they are a third of a program."""
  return quick_jit(lambda *inputs: update.gradient(
      *inputs, model=model(), term=term(o), chunk_tokens=7)[:3 if metrics else 2])


def term(o, name='own'):
  """The term of a loss."""
  return Term(name, o, group_size=2, microbatch_rows=2)


@functools.cache
def model():
  """Of the student, the teacher and the reference."""
  return tabular.model(VOCAB, 10, 6)


def only_what_is_asked_for(o, batch, heads):
  """None in place of all that the objective does not want."""
  asked = objective_lib.wants(o)
  return batch.replace(
      rewards=batch.rewards if o.needs_rewards else None,
      **{name: score.only(getattr(batch, name), known) if known else None
         for name, known in asked.items()}), heads.replace(
             teacher=heads.teacher if asked['teacher'].hidden else None,
             reference=heads.reference if asked['reference'].hidden else None)


@functools.cache
def ragged_rollout():
  """Ragged rows. The sampler is an older policy, with ratios to it on both sides of 1, and was
  truncated, so that what it reports is larger than its own log-probability."""
  rollout = make_rollout(PROMPTS, ROWS, prompt_width=5, room=5, dtype=jnp.float64)
  rng, mask = np.random.RandomState(0), np.asarray(rollout.mask)
  rows = log_softmax(tabular.logits(new_cast().params, rollout))
  chosen = np.take_along_axis(rows, np.asarray(rollout.tokens)[:, 1:, None], axis=-1)[..., 0]
  mass = -0.5 * rng.rand(*mask.shape) * mask
  older = (chosen + 0.25 * rng.standard_normal(mask.shape)) * mask
  return rollout.replace(sampler_logprobs=jnp.asarray(older - mass),
                         policy_offset=jnp.asarray(mass))


@functools.cache
def new_cast():
  """Another student was scored than is now updated: what should be detached shows in the loss."""
  student = model()
  params, teacher, reference = (tabular.random_params(student, seed) for seed in (0, 1, 2))
  return tabular.Cast(student, params, tabular.moved(params, 5, 0.1), teacher, reference)


def known_of(o, cast, rollout, key):
  """What the oracle is told."""
  def rows(params, temperature):
    return log_softmax(tabular.logits(params, rollout) / temperature)

  r = jax.tree.map(np.asarray, rollout)
  return Known(
      targets=r.tokens[:, 1:], mask=r.mask, sampler_logprobs=r.sampler_logprobs,
      policy_offset=r.policy_offset, student=rows(cast.before, o.temperature),
      teacher=rows(cast.teacher_params, o.teacher_temperature),
      reference=rows(cast.reference_params, o.temperature), rewards=REWARDS,
      noise=np.asarray(jax.random.uniform(key, r.mask.shape, r.mask.dtype)), group_size=2,
      step=STEP)


def run(o, cast, rollout, metrics=False):
  """(loss, gradient) of the package, by the program that gives metrics too or the other."""
  inputs = only_what_is_asked_for(o, *tabular.batch(o, cast, rollout, REWARDS, scorer))
  return gradient(o, metrics)(cast.params, *inputs, jnp.int32(STEP), jax.random.key(8))[:2]


@functools.cache
def scorer(temperature):
  """The compiled scoring."""
  return quick_jit(functools.partial(
      score.teacher_logprob_fn, model=model(), temperature=temperature,
      wants=Wants(logprobs=True, hidden=True), chunk_tokens=1000, microbatch_rows=0))


def assert_is_the_oracle(o, metrics=False):
  """Checks loss and gradient of an objective."""
  objective_rules.check(o)
  cast, rollout = new_cast(), ragged_rollout()
  loss, grads = run(o, cast, rollout, metrics)
  known = known_of(o, cast, rollout, jax.random.key(8))
  logits = tabular.logits(cast.params, rollout)
  want = oracle.losses(o, known, log_softmax(logits / o.temperature)).sum()
  error = 1e-7 if o.anneal != 'none' else EXACT  # the schedule computes in float32
  assert float(loss) == pytest.approx(want, rel=error, abs=error)
  by_params = tabular.by_params(oracle.gradient(o, known, logits), cast.params, rollout)
  assert np.linalg.norm(by_params['table']) > 1e-3, 'no gradient to compare'
  for name, value in by_params.items():
    np.testing.assert_allclose(grads[name], value, rtol=0, atol=error, err_msg=name)


# --- every value of every field, many to an objective ---

DIRECT = dict(route='direct', importance='none')
GRID = {
    'default': dict(),
    'later_returns': dict(importance='none', shaping='log', discount=0.7, returns='later',
                          baseline='batch_mean', temperature=0.8, teacher_temperature=1.3),
    'truncated': dict(importance='truncated(1.1)', shaping='clip(0.5)', divergence='forward_kl',
                      baseline='leave_one_out'),
    'two_sided': dict(importance='two_sided(0.8, 1.2)', shaping='power(0.7)', discount=0.9,
                      returns='later_mean', reduction='sequence_mean', baseline='leave_one_out'),
    'exact_of_the_sampler': dict(baseline='exact', importance='ppo_clip(0.1)',
                                 student_logprobs='sampler', window='tokens(start=1, count=3)'),
    'exact_rescored': dict(baseline='exact', token_gate='student_entropy(keep=0.5)',
                           reward_coef=0.3, reward_baseline='group_mean', temperature=1.2,
                           teacher_temperature=0.9, distill_coef=0.6),
    'fixed_negative': dict(signal='fixed_negative', row_gate='correct', likelihood_coef=0.1,
                           local=Local(coef=0.3, gate='negative')),  # where it is 0, too
    'jensen_shannon': dict(divergence='jensen_shannon(0.3)', row_gate='wrong', reward_coef=0.2,
                           token_gate='teacher_entropy(keep=0.4)'),
    'skew_kl': dict(divergence='skew_kl(0.2)', row_gate='reward_agrees', advantages='recomputed'),
    'skew_reverse_kl': dict(divergence='skew_reverse_kl(0.2)', row_gate='teacher_likelihood(0.5)',
                            token_gate='divergence(keep=0.5)', reduction='sequence_mean'),
    'alpha_divergence': dict(divergence='alpha_divergence(0.4)', window='tokens(0, 4)',
                             token_gate='soft_or(keep=0.6)'),
    'squared_hellinger': dict(divergence='squared_hellinger',
                              token_gate='teachability(keep=0.4, top_k=3)'),
    'total_variation': dict(divergence='total_variation', reference_kl='k2(0.2)', temperature=0.8),
    'scaled_jensen_shannon': dict(divergence='scaled_jensen_shannon(0.6)'),
    'extrapolated': dict(extrapolation=1.25, reference_kl='k3(0.3)', student_logprobs='sampler',
                         discount=1.0, teacher_temperature=1.2),
    'k2_extrapolated': dict(DIRECT, estimator='k2', extrapolation=1.5,
                            anneal='linear(steps=4, to=0.25)'),
    'k3_with_reward': dict(route='direct', estimator='k3', divergence='forward_kl',
                           importance='ppo_clip(0.2)', reward_coef=1.0,
                           reward_baseline='group_mean_std', row_gate='reward_agrees'),
    'full_extrapolated': dict(DIRECT, support='full', extrapolation=1.3, window='tokens(0, 2)',
                              temperature=0.9, teacher_temperature=1.4,
                              token_gate='teachability(keep=0.4, top_k=3)'),
    'drop': dict(DIRECT, support='teacher_top_k(4, tail="drop")', divergence='forward_kl',
                 reference_kl='full(0.1)'),
    'renormalize': dict(DIRECT, support='student_top_k(4, tail="renormalize")', extrapolation=0.7,
                        row_gate='reward_agrees', temperature=0.8, teacher_temperature=1.3),
    'bucket': dict(DIRECT, support='union_top_k(4, tail="bucket")',
                   divergence='scaled_jensen_shannon(0.3)', reduction='sequence_mean',
                   token_gate='teacher_entropy(keep=0.5)',
                   local=Local(coef=0.5, gate='teacher_entropy(1.5)')),
    'stop_gradient': dict(route='direct', support='teacher_top_k(4, tail="stop_gradient")',
                          importance='ratio', likelihood_coef=0.2),
    'sft': dict(distill_coef=0.0, likelihood_coef=1.0, importance='none',
                reduction='sequence_mean', token_gate='student_entropy(keep=0.5)'),
    'local_untrusted': dict(local=Local(
        coef=0.5, gate='untrusted', instead=True, support='teacher_top_k(3, tail="drop")')),
    'local_untrusted_by_the_sampler': dict(student_logprobs='sampler', local=Local(
        coef=0.5, gate='untrusted', support='student_top_k(3, tail="renormalize")')),
    'local_negative': dict(
        baseline='leave_one_out', discount=0.5, anneal='linear(steps=4, to=0.2)',
        reward_coef=0.7, row_gate='wrong', local=Local(
            coef=0.5, gate='negative', instead=True, divergence='squared_hellinger',
            support='union_top_k(3, tail="bucket")')),
    'local_everywhere': dict(discount=1.0, returns='later', extrapolation=1.2, local=Local(
        coef=2.0, divergence='reverse_kl')),
    'local_by_entropy': dict(temperature=0.8, teacher_temperature=1.3, baseline='exact',
                             local=Local(coef=1.5, divergence='reverse_kl',
                                         support='student_top_k(2, tail="stop_gradient")',
                                         gate='teacher_entropy(1.7)')),
}
