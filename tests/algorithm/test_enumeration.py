"""Terms of the loss in expectation over every completion of a tiny language, against the exact
gradient of what they stand for. (Those of the plain routes, through a transformer, are in
test_expectations.py.)"""

from __future__ import annotations

import dataclasses
import functools
import itertools

from conftest import make_rollout, quick_jit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from opd_jax.algorithm import choices, score, signals, update
from opd_jax.algorithm.objective import KINDS, Local, Objective
from opd_jax.rules import objective as objective_rules
from opd_jax.types import Rollout, Wants

VOCAB, EOS, ROOM = 4, 0, 3
TEMPERATURE, TEACHER_TEMPERATURE = 0.8, 1.3  # each other than 1 and than the other
EXACT = 1e-10  # float64 rounds at 1e-16, and an error of a formula is of order one
MODEL = tabular.model(VOCAB, 8, 5)


def _completions(room):
  if room == 0:
    return [[]]
  return [[EOS]] + [[a, *rest] for a in range(1, VOCAB) for rest in _completions(room - 1)]


@dataclasses.dataclass(frozen=True)
class Language:
  """Every completion of two prompts, written by `sampler` (log-probs of each next token)."""

  cast: tabular.Cast
  rollout: Rollout
  probability: jax.Array  # [B, 1] of each row, 1 in all for each prompt
  teacher_temperature: float = TEACHER_TEMPERATURE

  def rows(self, params, temperature):
    """log p(. | prefix), [B, T-1, V], differentiable; of the score and update modules nothing."""
    valid = self.rollout.valid[:, :-1]
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    hidden = params['table'][positions, self.rollout.tokens[:, :-1]]
    return jax.nn.log_softmax(hidden @ params['head'] / temperature, axis=-1)

  def student(self, params):
    return self.rows(params, TEMPERATURE)

  @property
  def teacher(self):
    return self.rows(self.cast.teacher_params, self.teacher_temperature)

  @property
  def reference(self):
    return self.rows(self.cast.reference_params, TEMPERATURE)

  def chosen(self, rows):
    """Those of the sampled tokens, zero where the mask is."""
    targets = self.rollout.tokens[:, 1:, None]
    return jnp.take_along_axis(rows, targets, axis=-1)[..., 0] * self.rollout.mask

  def written_by(self, rows):
    """The same completions by a sampler of these log-probs."""
    logprobs = self.chosen(rows)
    offset = self.chosen(self.student(self.cast.before)) - logprobs
    return dataclasses.replace(
        self, rollout=self.rollout.replace(sampler_logprobs=logprobs, policy_offset=offset),
        probability=jnp.exp(jnp.sum(logprobs, axis=1, keepdims=True)))

  def weigh(self, o, group_size=1):
    """(rows, heads) of the package."""
    objective_rules.check(o)
    batch, heads = tabular.batch(o, self.cast, self.rollout, np.zeros(len(self.probability)),
                                 _scorer)
    rows, _ = update.weigh(o, batch, o.distill_coef, MODEL.head(self.cast.params), heads,
                           jax.random.key(0), group_size=group_size, chunk_tokens=10_000)
    return rows, heads

  def expected_gradient(self, o, weights=None, group_size=1):
    """Of the package's loss, each row with its probability."""
    weights = self.probability * self.rollout.mask if weights is None else weights
    rows, heads = self.weigh(o, group_size)
    return _gradient(o)(self.cast.params, rows, weights, heads)

  def gradients(self, o):
    """Of each row, [B, number of parameters]."""
    rows, heads = self.weigh(o)
    masks = jnp.eye(len(self.probability))[:, :, None] * self.rollout.mask[None]
    out = quick_jit(jax.vmap(_gradient(o).__wrapped__, (None, None, 0, None)))(
        self.cast.params, rows, masks, heads)
    return np.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(out)], axis=1)

  def exact(self, divergence):
    """Gradient of the sum over prefixes of p(prefix), held fixed, times a divergence of rows."""
    def total(params):
      return jnp.sum(self.probability * self.rollout.mask * divergence(self.student(params)))

    return quick_jit(jax.grad(total))(self.cast.params)


@functools.lru_cache
def _scorer(temperature):
  return quick_jit(functools.partial(
      score.teacher_logprob_fn, model=MODEL, temperature=temperature,
      wants=Wants(logprobs=True, hidden=True), chunk_tokens=10_000, microbatch_rows=0))


@functools.lru_cache
def _gradient(o):
  def loss(params, rows, weights, heads):
    if rows.local_weights is not None:
      rows = rows.replace(local_weights=weights * (rows.local_weights > 0))
    return update.loss_fn(params, rows.replace(weights=weights), o.distill_coef, heads, model=MODEL,
                          objective=o, chunk_tokens=10_000)[0]

  return quick_jit(jax.grad(loss))


@functools.lru_cache
def _language(prompts, room):
  completions = _completions(room)
  rollout = make_rollout([list(p) for p in prompts for _ in completions],
                         completions * len(prompts), prompt_width=3, room=room, dtype=jnp.float64)
  params, teacher, reference = (tabular.random_params(MODEL, seed) for seed in (0, 1, 2))
  one = Language(tabular.Cast(MODEL, params, params, teacher, reference), rollout, jnp.zeros(1))
  return one.written_by(one.student(params))


@pytest.fixture
def language(x64):
  out = _language(((1, 3), (2,)), ROOM)
  assert float(jnp.sum(out.probability)) == pytest.approx(2.0, abs=1e-12)
  return out


def _at(**fields):
  return Objective(temperature=TEMPERATURE, teacher_temperature=TEACHER_TEMPERATURE, **fields)


def _error(got, want):
  got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (got, want))
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def _reverse_kl(own, theirs):
  return jnp.sum(jnp.exp(own) * (own - theirs), axis=-1)


# --- MiniLLM's decomposition ---


def _sequence_kl(language):
  def total(params):
    own, theirs = (language.chosen(x) for x in (language.student(params), language.teacher))
    return jnp.sum(jnp.exp(jnp.sum(own, axis=1)) * jnp.sum(own - theirs, axis=1))

  return quick_jit(jax.grad(total))(language.cast.params)


def test_exact_term_and_later_returns_are_the_sequence_kl(language):
  local = Local(coef=1.0, divergence='reverse_kl')
  want = _sequence_kl(language)
  later = language.expected_gradient(_at(discount=1.0, returns='later', local=local))
  assert _error(later, want) < EXACT
  assert _error(language.expected_gradient(_at(discount=1.0)), want) < EXACT
  # Counted twice, or divided by the length, it is something else.
  for returns in ('inclusive', 'later_mean'):
    other = language.expected_gradient(_at(discount=1.0, returns=returns, local=local))
    assert _error(other, want) > 0.01


# --- the reference ---


@pytest.mark.parametrize(('estimator', 'forward'), [('k2', False), ('full', False), ('k3', True)])
def test_reference_terms_are_the_gradient_of_their_divergence(language, estimator, forward):
  # Of rewards of zero, nothing else is left.
  o = _at(distill_coef=0.0, reward_coef=1.0, reference_kl=f'{estimator}(0.7)')
  o = dataclasses.replace(o, teacher_temperature=1.0)
  got = language.expected_gradient(o)

  def divergence(own):
    pair = (language.reference, own) if forward else (own, language.reference)
    return 0.7 * _reverse_kl(*pair)

  assert _error(got, language.exact(divergence)) < EXACT


# --- extrapolation ---


@pytest.mark.parametrize('scale', [0.6, 1.25])
def test_extrapolation_goes_towards_the_normalized_teacher(language, scale):
  target = jax.nn.log_softmax(scale * language.teacher + (1 - scale) * language.reference)
  want = language.exact(lambda own: _reverse_kl(own, target))
  direct = dict(route='direct', importance='none')
  for fields in (dict(), dict(direct, support='full'), dict(direct, estimator='k2')):
    got = language.expected_gradient(_at(extrapolation=scale, **fields))
    assert _error(got, want) < EXACT, fields
  assert _error(want, language.exact(lambda own: _reverse_kl(own, language.teacher))) > 0.1


def test_extrapolation_without_a_step_is_the_teacher(language):
  got = language.expected_gradient(_at(extrapolation=1.0 + 1e-12))
  assert _error(got, language.expected_gradient(_at())) < EXACT


# --- baselines ---


@pytest.mark.parametrize('fields', [dict(), dict(student_logprobs='sampler')], ids=str)
def test_the_exact_baseline_keeps_the_mean(language, fields):
  got = language.expected_gradient(_at(baseline='exact', **fields))
  assert _error(got, language.exact(lambda own: _reverse_kl(own, language.teacher))) < EXACT


def test_leave_one_out_keeps_the_mean(x64):
  # Every pair of completions, as a group; the gradient of its first row.
  one = _language(((1, 3),), 2)
  number = len(one.probability)
  first, second = (np.array(x) for x in zip(
      *itertools.product(range(number), repeat=2), strict=True))
  order = np.stack([first, second], axis=1).reshape(-1)
  pairs = dataclasses.replace(
      one, rollout=jax.tree.map(lambda x: x[order], one.rollout), probability=jnp.zeros(len(order)))
  both = one.probability[first] * one.probability[second]
  weights = jnp.stack([both, 0 * both], axis=1).reshape(-1, 1) * pairs.rollout.mask
  for o, known in ((_at(baseline='leave_one_out', discount=1.0), _sequence_kl(one)),
                   (_at(baseline='leave_one_out'),
                    one.exact(lambda own: _reverse_kl(own, one.teacher)))):
    assert _error(pairs.expected_gradient(o, weights, group_size=2), known) < EXACT


@pytest.mark.parametrize('rows', [2, 3])
def test_the_mean_of_the_batch_is_biased_by_the_tokens_own_share(x64, rows):
  # Batches of so many completions of one token: what is left of the gradient is 1 - 1 / rows.
  one = _language(((1, 3),), 1)
  batches = np.array(list(itertools.product(range(len(one.probability)), repeat=rows)))
  values = one.chosen(one.teacher - one.student(one.cast.params))
  mask = one.rollout.mask[batches]

  def surrogate(params):
    baseline = choices.parse(KINDS['baseline'], 'batch_mean').function
    worth = jax.vmap(baseline)(values[batches], mask) * mask
    worth = worth * jnp.prod(one.probability[batches], axis=1)[:, None]
    return -jnp.sum(worth * one.chosen(one.student(params))[batches]) / rows

  got = quick_jit(jax.grad(surrogate))(one.cast.params)
  want = one.exact(lambda own: (1 - 1 / rows) * _reverse_kl(own, one.teacher))
  assert _error(got, want) < EXACT


def _variances(language):
  """E |g|^2 - |E g|^2 of one row's gradient, a prompt drawn evenly, by baseline."""
  prompts = 2
  share = np.asarray(language.probability)[:, 0] / prompts
  plain, exact = (language.gradients(dataclasses.replace(
      _at(baseline=b), teacher_temperature=language.teacher_temperature))
                  for b in ('none', 'exact'))
  mean = share @ plain
  assert np.linalg.norm(share @ exact - mean) < 1e-10 * np.linalg.norm(mean)
  out = {name: share @ (g**2).sum(1) - mean @ mean
         for name, g in (('none', plain), ('exact', exact))}
  # Leave-one-out: less m_j times the gradient of -log p(row i), j another sample of i's prompt.
  likelihood = language.gradients(Objective(
      distill_coef=0.0, likelihood_coef=1.0, importance='none', temperature=TEMPERATURE))
  signal = np.asarray(language.chosen(language.teacher - language.student(language.cast.params)))
  means = signal.sum(1) / np.asarray(language.rollout.mask).sum(1)
  half, total = len(share) // prompts, -mean @ mean
  for prompt in range(prompts):
    at = slice(prompt * half, (prompt + 1) * half)
    for other in range(half):
      g = plain[at] - means[at][other] * likelihood[at]
      total += share[at] @ (g**2).sum(1) * share[at][other] * prompts
  return out | {'leave_one_out': total}


@pytest.mark.parametrize(('noise', 'temperature', 'exact', 'leave_one_out'), [
    (None, TEACHER_TEMPERATURE, 1.363, 1.731),  # a teacher that has nothing to do with the student
    (0.0, TEMPERATURE / 2, 0.782, 0.998),  # the student itself, surer
    (0.3, TEMPERATURE, 0.797, 1.330),  # a neighbour, and another one just as near
    (-0.3, TEMPERATURE, 1.523, 1.883)])
def test_what_baselines_do_to_the_variance(x64, noise, temperature, exact, leave_one_out):
  # The mean of the signal is not what lowers the variance of its product with grad log p_S: rare
  # tokens have the large gradients, and what the teacher says of them may be far from the mean.
  language = _language(((1, 3), (2,)), ROOM)
  if noise is not None:
    teacher = tabular.moved(language.cast.params, 2, noise)
    language = dataclasses.replace(
        language, teacher_temperature=temperature,
        cast=dataclasses.replace(language.cast, teacher_params=teacher))
  variances = _variances(language)
  ratios = {name: value / variances['none'] for name, value in variances.items()}
  assert ratios['exact'] == pytest.approx(exact, abs=0.002)
  assert ratios['leave_one_out'] == pytest.approx(leave_one_out, abs=0.002)


# --- other samplers ---


def test_ratios_correct_for_a_mixture_with_the_teacher(language):
  own = language.student(language.cast.params)
  mixture = jnp.logaddexp(jnp.log(0.2) + language.teacher, jnp.log(0.8) + own)
  mixed = language.written_by(mixture)
  assert float(jnp.sum(mixed.probability)) == pytest.approx(2.0, abs=1e-12)
  want = mixed.exact(lambda own: _reverse_kl(own, language.teacher))  # at the mixture's prefixes
  for fields in (dict(), dict(baseline='exact'), dict(student_logprobs='sampler'),
                 dict(importance='truncated(1.3)')):  # p_S / p_mix is at most 1 / 0.8
    assert _error(mixed.expected_gradient(_at(**fields)), want) < EXACT, fields
  for fields in (dict(importance='none'), dict(importance='ppo_clip(0.2)')):
    assert _error(mixed.expected_gradient(_at(**fields)), want) > 0.01, fields


# --- what is drawn by chance ---


def test_untrusted_tokens_are_drawn_with_their_probability(language):
  o = _at(local=Local(coef=1.0, gate='untrusted'))
  batch, _ = tabular.batch(o, language.cast, language.rollout, np.zeros(1), _scorer)
  number = 1000
  noise = (jnp.arange(number) + 0.5) / number  # evenly, in place of at random
  gates = jax.vmap(lambda x: signals.local_gate(
      o, batch, {'noise': jnp.full(language.rollout.mask.shape, x)}))(noise)
  ratio = np.exp(np.asarray(language.chosen(language.teacher - language.student(
      language.cast.params))))
  want = (1 - np.minimum(ratio, 1)) * np.asarray(language.rollout.mask)
  np.testing.assert_allclose(jnp.mean(gates, axis=0), want, atol=1 / number)
  assert not np.any(np.asarray(gates)[:, ratio >= 1])
