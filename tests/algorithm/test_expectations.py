"""Expectations over every completion, against the gradient of what they stand for: the plain routes
through a transformer, every divergence, support and estimate through a table. (Other terms of the
loss: test_enumeration.py. One token's values: test_divergences.py.)"""

from __future__ import annotations

import dataclasses
import functools

from conftest import make_rollout, quick_jit, sharp_params
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_divergences
from oracle_divergences import log_softmax
import pytest
import steps
from steps import ALPHA, DIVERGENCES, ORACLE, SAMPLED, relative_error, scorer
import tabular

from opd_jax.algorithm import choices, update
from opd_jax.algorithm import objective as objective_lib
from opd_jax.algorithm.choices import estimators
from opd_jax.algorithm.objective import KINDS, Objective
from opd_jax.rules import objective as objective_rules
from opd_jax.types import Batch, Heads, Model, Params, Rollout

VOCAB, EOS = 5, 0
COMPLETIONS = [[EOS]] + [[a, b] for a in range(1, VOCAB) for b in range(VOCAB)]
TEMPERATURE, TEACHER_TEMPERATURE = 0.8, 1.3  # each other than 1 and than the other


@functools.cache  # one program for all tests of an objective
def _gradient(student, objective):
  return quick_jit(jax.grad(functools.partial(
      update.loss_fn, model=student, objective=objective, chunk_tokens=50), has_aux=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Enumeration:
  """Every completion of two prompts (EOS, or two tokens), with a student and a teacher."""

  student: Model
  params: Params
  older: Params  # of a sampler that is not the student
  teacher: Model
  teacher_params: Params
  rollout: Rollout

  def logprobs(self, model, params, temperature):
    """log p(. | prefix), [B, T-1, V], differentiable; of the score and update modules nothing."""
    valid = self.rollout.valid
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    hidden, _ = model.forward(params, self.rollout.tokens, positions, valid, None)
    logits = model.head(params).logits(hidden[:, :-1])
    return jax.nn.log_softmax(logits / temperature, axis=-1)

  def chosen(self, logprobs):
    """Those of the tokens that were chosen, zero elsewhere, [B, T-1]."""
    targets = self.rollout.tokens[:, 1:, None]
    return jnp.take_along_axis(logprobs, targets, axis=-1)[..., 0] * self.rollout.mask

  @functools.cached_property
  def student_rows(self):
    """The compiled log-probs of the student."""
    return quick_jit(lambda params: self.logprobs(self.student, params, TEMPERATURE))

  @functools.cached_property
  def teacher_rows(self):
    """The teacher's log-probs."""
    return quick_jit(lambda params: self.logprobs(self.teacher, params, TEACHER_TEMPERATURE))(
        self.teacher_params)

  @functools.cached_property
  def pull_back(self):
    """A gradient by the student's log-probs -> that by its parameters, compiled."""
    rows = functools.partial(self.logprobs, self.student, temperature=TEMPERATURE)
    return quick_jit(lambda slopes: jax.vjp(rows, self.params)[1](slopes)[0])

  def behaviour(self, params):
    """The rollout as a sampler with `params` would return it, and p(row) of each row."""
    logprobs = self.chosen(self.student_rows(params))
    rollout = self.rollout.replace(sampler_logprobs=logprobs)
    return rollout, jnp.exp(jnp.sum(logprobs, axis=1, keepdims=True))

  def expected_gradient(self, objective, sampler_params):
    """Sum over rows of p(row) times the gradient of the row's loss, by the package's own code."""
    _, probability = self.behaviour(sampler_params)
    return self.gradient_of_rows(objective, sampler_params)(probability * self.rollout.mask)

  def variance(self, objective, sampler_params):
    """E |g|^2 - |E g|^2 of the gradient g of one sampled row, a prompt drawn evenly."""
    _, probability = self.behaviour(sampler_params)
    gradient, prompts = self.gradient_of_rows(objective, sampler_params), 2

    squares = jnp.array([
        sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(one[:, None] * self.rollout.mask)))
        for one in jnp.eye(len(self.rollout.tokens))])
    mean = self.expected_gradient(objective, sampler_params)
    return (jnp.sum(probability[:, 0] * squares) / prompts
            - sum(jnp.sum((g / prompts)**2) for g in jax.tree.leaves(mean)))

  def gradient_of_rows(self, objective, sampler_params):
    """weights [B, T-1] -> the gradient of the loss with those weights."""
    rollout, _ = self.behaviour(sampler_params)
    asked = objective_lib.wants(objective)
    teacher = scorer(self.teacher, TEACHER_TEMPERATURE, asked['teacher'])(
        self.teacher_params, rollout)
    student = None
    if asked['student']:
      student = scorer(self.student, TEMPERATURE, asked['student'])(self.params, rollout)
    heads = Heads(self.teacher.head(self.teacher_params))
    rows, _ = update.weigh(objective, Batch(rollout, teacher, student), objective.distill_coef,
                           self.student.head(self.params), heads, None, group_size=1,
                           chunk_tokens=50)
    return lambda weights: _gradient(self.student, objective)(
        self.params, rows.replace(weights=weights), objective.distill_coef, heads)[0]

  def token_level_gradient(self, sampler_params, o=SAMPLED):
    """Of the sum over prefixes of p(prefix), held fixed, times D(p_S, p_T)(prefix), the divergence
    of an objective over its support as the oracle defines it; by default the reverse KL."""
    _, probability = self.behaviour(sampler_params)
    own = self.student_rows(self.params)
    slopes = np.zeros(own.shape)
    for v in range(VOCAB):  # by complex steps; log-probs are logits that log_softmax leaves alone
      moved = np.asarray(own, complex)
      moved[..., v] += 1j * oracle.STEP
      value = oracle_divergences.divergence(
          o, log_softmax(moved), np.asarray(self.teacher_rows))
      slopes[..., v] = value.imag / oracle.STEP
    slopes = jnp.asarray(slopes) * (probability * self.rollout.mask)[..., None]
    return self.pull_back(slopes)

  def sequence_level_gradient(self):
    """Of KL(p_S || p_T) between distributions over whole completions; nothing held fixed."""
    def objective(params):
      own = self.chosen(self.logprobs(self.student, params, TEMPERATURE))
      theirs = self.chosen(self.logprobs(self.teacher, self.teacher_params, TEACHER_TEMPERATURE))
      return jnp.sum(jnp.exp(jnp.sum(own, axis=1)) * jnp.sum(own - theirs, axis=1))

    return quick_jit(jax.grad(objective))(self.params)


@functools.cache
def _transformers():
  student, teacher = (steps.transformer(wide, 'float64', VOCAB) for wide in (False, True))
  return _enumerate(student, teacher, lambda *x: sharp_params(*x, jnp.float64))


@functools.cache
def _tables():
  student, teacher = (steps.table(wide, VOCAB, max_len=5) for wide in (False, True))
  return _enumerate(student, teacher, tabular.random_params)


def _enumerate(student, teacher, random_params):
  prompts = [[1, 3], [2]]
  rollout = make_rollout(
      [p for p in prompts for _ in COMPLETIONS], COMPLETIONS * len(prompts), prompt_width=3, room=2,
      dtype=jnp.float64)
  case = Enumeration(student, random_params(student, 0), random_params(student, 7), teacher,
                     random_params(teacher, 1), rollout)
  _, probability = case.behaviour(case.params)
  assert float(jnp.sum(probability)) == pytest.approx(2.0, abs=1e-12)  # 1 for each prompt
  return case


@pytest.fixture
def transformers(x64):
  return _transformers()


@pytest.fixture
def tables(x64):
  return _tables()


def _at_temperatures(**fields):
  return Objective(temperature=TEMPERATURE, teacher_temperature=TEACHER_TEMPERATURE, **fields)


@pytest.mark.parametrize('importance', ['none', 'ratio', 'ppo_clip(0.2)'])
def test_expected_policy_gradient_is_the_gradient_of_the_reverse_kl(transformers, importance):
  e = transformers
  objective = _at_temperatures(importance=importance)
  got = e.expected_gradient(objective, e.params)
  want = e.token_level_gradient(e.params)
  assert relative_error(got, want) < ORACLE


def test_importance_ratio_corrects_for_an_older_sampler(transformers):
  # Prefixes still come from the sampler's distribution; at each of them the gradient is exact.
  e = transformers
  older = e.older
  want = e.token_level_gradient(older)
  assert relative_error(e.expected_gradient(_at_temperatures(), older), want) < ORACLE
  uncorrected = e.expected_gradient(_at_temperatures(importance='none'), older)
  assert relative_error(uncorrected, want) > 0.1


def test_expected_policy_gradient_with_discount_1_is_that_of_the_sequence_kl(transformers):
  e = transformers
  got = e.expected_gradient(_at_temperatures(discount=1.0), e.params)
  want = e.sequence_level_gradient()
  assert relative_error(got, want) < ORACLE
  # It is another gradient than that of the token-level objective.
  assert relative_error(e.expected_gradient(_at_temperatures(), e.params), want) > 0.01


def test_sampler_logprobs_in_the_advantage_are_the_same_in_exact_arithmetic(transformers):
  e = transformers
  got = e.expected_gradient(_at_temperatures(student_logprobs='sampler'), e.params)
  want = e.token_level_gradient(e.params)
  assert relative_error(got, want) < ORACLE


def test_full_support_is_the_gradient_of_the_reverse_kl(transformers):
  e = transformers
  got = e.expected_gradient(_at_temperatures(route='direct', support='full'), e.params)
  want = e.token_level_gradient(e.params)
  assert relative_error(got, want) < ORACLE


# --- baselines and other importance weights ---


def test_the_exact_baseline_keeps_the_mean_of_the_gradient(transformers):
  e = transformers
  plain, exact = (_at_temperatures(baseline=b) for b in ('none', 'exact'))
  want = e.token_level_gradient(e.params)
  assert relative_error(e.expected_gradient(exact, e.params), want) < ORACLE
  # It lowers the spread of the advantage by construction, and not always that of the gradient: rare
  # tokens have the large grad log p_S, and the mean is far from what the teacher says of them. With
  # these two models, which are far apart, the variance doubles.
  variances = [float(e.variance(o, e.params)) for o in (plain, exact)]
  assert variances[1] / variances[0] == pytest.approx(2.04, abs=0.05)


def test_a_very_high_bound_on_the_ratio_is_no_bound(tables):
  e = tables
  older = e.older
  want = e.expected_gradient(_at_temperatures(), older)
  for importance in ('truncated(1e9)', 'two_sided(1e-9, 1e9)'):
    got = e.expected_gradient(_at_temperatures(importance=importance), older)
    assert relative_error(got, want) < ORACLE


@pytest.mark.parametrize('importance', ['truncated(1.5)', 'two_sided(0.5, 1.5)'])
def test_bounded_ratios_are_their_definition(tables, importance):
  e = tables
  older = e.older
  objective = _at_temperatures(importance=importance)
  objective_rules.check(objective)
  rollout, probability = e.behaviour(older)
  theirs = e.chosen(e.logprobs(e.teacher, e.teacher_params, TEACHER_TEMPERATURE))
  now = e.chosen(e.logprobs(e.student, e.params, TEMPERATURE))
  ratio = np.exp(np.asarray(now - rollout.sampler_logprobs))
  bounded = np.minimum(ratio, 1.5) if importance == 'truncated(1.5)' else np.where(
      (ratio >= 0.5) & (ratio <= 1.5), ratio, 0.0)
  assert not np.allclose(bounded, ratio)  # or nothing is tested
  worth = probability * bounded * (theirs - now) * rollout.mask

  def surrogate(params):
    return -jnp.sum(worth * e.chosen(e.logprobs(e.student, params, TEMPERATURE)))

  want = quick_jit(jax.grad(surrogate))(e.params)
  assert relative_error(e.expected_gradient(objective, older), want) < ORACLE


# --- every divergence, every support and every estimate against the definition ---

every_divergence = pytest.mark.parametrize('divergence', DIVERGENCES)


@every_divergence
def test_score_function_weights_estimate_the_gradient_of_every_divergence(tables, divergence):
  e = tables
  objective = _at_temperatures(divergence=divergence)
  got = e.expected_gradient(objective, e.params)
  assert relative_error(got, e.token_level_gradient(e.params, objective)) < ORACLE


@every_divergence
def test_full_support_is_the_gradient_of_every_divergence(tables, divergence):
  e = tables
  objective = _at_temperatures(route='direct', support='full', importance='none',
                               divergence=divergence)
  got = e.expected_gradient(objective, e.params)
  assert relative_error(got, e.token_level_gradient(e.params, objective)) < ORACLE


@pytest.mark.parametrize(('estimator', 'name'), estimators.ESTIMATES.items())
def test_k2_and_k3_differentiated_at_the_sampled_token(tables, estimator, name):
  e = tables
  objective = _at_temperatures(route='direct', estimator=estimator, divergence=name,
                               importance='none')
  got = e.expected_gradient(objective, e.params)
  assert relative_error(got, e.token_level_gradient(e.params, objective)) < ORACLE
  # The other one is not what it estimates.
  (other,) = set(estimators.ESTIMATES.values()) - {name}
  assert relative_error(got, e.token_level_gradient(e.params, Objective(divergence=other))) > 0.1


def test_k1_differentiated_at_the_sampled_token_is_nothing(tables, monkeypatch):
  # Why it is refused: E_S[grad log p_S] = 0.
  e = tables
  parse = choices.parse
  k1 = dataclasses.replace(parse(KINDS['estimator'], 'k2'), function=lambda log_u: -log_u)
  monkeypatch.setattr(choices, 'parse', lambda kind, text: k1 if text == 'k2' else parse(
      kind, text))
  monkeypatch.setitem(globals(), '_gradient', _gradient.__wrapped__)  # not that of the real k2
  objective = _at_temperatures(route='direct', estimator='k2', importance='none')
  got = e.expected_gradient(objective, e.params)
  scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(e.token_level_gradient(e.params)))
  assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(got)) < ORACLE * scale


@pytest.mark.parametrize('support', ['teacher_top_k', 'student_top_k', 'union_top_k'])
@pytest.mark.parametrize(('divergence', 'tail'), [
    ('reverse_kl', 'renormalize'), ('reverse_kl', 'bucket'), ('reverse_kl', 'stop_gradient'),
    ('forward_kl', 'drop'), ('forward_kl', 'bucket'), (f'jensen_shannon({ALPHA})', 'renormalize'),
    ('total_variation', 'bucket')])
def test_top_k_is_its_definition(tables, support, divergence, tail):
  if (tail, support) == ('drop', 'student_top_k'):
    pytest.skip('refused')
  e = tables
  objective = _at_temperatures(route='direct', support=f'{support}(2, {tail!r})',
                               divergence=divergence, importance='none')
  objective_rules.check(objective)
  got = e.expected_gradient(objective, e.params)
  assert relative_error(got, e.token_level_gradient(e.params, objective)) < ORACLE
