"""The divergences and estimates of one token: over supports, at their limits, in float32, and far
out where an exponential overflows. (What their gradients are in expectation: test_expectations.py.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle_divergences
import pytest
from steps import DIVERGENCES

from opd_jax.algorithm import support as support_lib
from opd_jax.algorithm import update
from opd_jax.algorithm.choices import estimators
from opd_jax.algorithm.objective import KINDS, Objective

every_divergence = pytest.mark.parametrize('divergence', DIVERGENCES)


@pytest.mark.parametrize('name', estimators.ESTIMATES)
def test_k2_and_k3_are_their_definition(x64, name):
  # In expectation the gradient of k3 does not tell whether -log u is there: the variance does.
  log_u = np.array([-2.0, 0.0, 1.5])
  np.testing.assert_allclose(getattr(estimators, name)(jnp.asarray(log_u)),
                             oracle_divergences.ESTIMATORS[name](log_u), atol=1e-15)


def _rows(scale=1.0, seed=0):
  """Log-probs of two models at 30 places, over 7 tokens."""
  rng = np.random.RandomState(seed)
  return [jax.nn.log_softmax(jnp.asarray(scale * rng.standard_normal((30, 7)))) for _ in range(2)]


def _over(divergence, support='full'):
  """(student, teacher) -> the divergence over a support."""
  return Objective(divergence=divergence, support=support).over_support


@pytest.mark.parametrize('support', ['teacher_top_k', 'student_top_k', 'union_top_k'])
@every_divergence
def test_top_k_of_everything_is_the_divergence_itself(x64, support, divergence):
  student, teacher = _rows(2.0)
  want = _over(divergence)(student, teacher)
  for k, tail in ((7, 'renormalize'), (7, 'bucket'), (6, 'bucket')):
    got = _over(divergence, f'{support}({k}, {tail!r})')(student, teacher)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(('alpha', 'name'), [(1e-6, 'forward_kl'), (1 - 1e-6, 'reverse_kl'),
                                             (0.0, 'forward_kl'), (1.0, 'reverse_kl')])
def test_limits_of_the_scaled_jensen_shannon_divergence(x64, alpha, name):
  got, want = (_over(d)(*_rows()) for d in (f'scaled_jensen_shannon({alpha})', name))
  np.testing.assert_allclose(got, want, rtol=1e-4)  # the next term is of order 1e-6, amplified


@pytest.mark.parametrize(('divergence', 'limit'), [
    ('skew_kl(1e-9)', 'forward_kl'), ('skew_reverse_kl(1e-9)', 'reverse_kl'),
    ('alpha_divergence(1e-7)', 'reverse_kl'), (f'alpha_divergence({1 - 1e-7})', 'forward_kl'),
    ('alpha_divergence(0)', 'reverse_kl'), ('alpha_divergence(1)', 'forward_kl')])
def test_limits_of_the_families(x64, divergence, limit):
  got, want = (_over(d)(*_rows()) for d in (divergence, limit))
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(('name', 'generator'), [
    ('reverse_kl', lambda u: -jnp.log(u)), ('forward_kl', lambda u: u * jnp.log(u)),
    ('squared_hellinger', lambda u: (1.0 - jnp.sqrt(u))**2)])
def test_a_generator_is_enough(x64, name, generator):
  student, teacher = _rows(2.0)
  mine, theirs = support_lib.from_generator(generator), Objective(divergence=name).term
  np.testing.assert_allclose(mine(student, teacher), theirs(student, teacher), rtol=1e-12)
  log_u = teacher - student
  np.testing.assert_allclose(support_lib.score_weight(mine, log_u),
                             support_lib.score_weight(theirs, log_u), rtol=1e-10, atol=1e-13)
  assert np.isfinite(mine(jnp.array([-1e30, -1.0]), jnp.array([-1.0, -1e30]))).all()


@every_divergence
def test_weight_of_equal_probabilities_is_zero(x64, divergence):
  f = Objective(divergence=divergence).term
  assert float(support_lib.score_weight(f, jnp.zeros(3))[0]) == 0.0


@pytest.mark.parametrize(('divergence', 'weight'), [
    ('reverse_kl', lambda u: np.log(u)), ('forward_kl', lambda u: u - 1),
    ('jensen_shannon(0.5)', lambda u: 0.5 * np.log((1 + u) / 2))])
def test_weights_that_papers_give(x64, divergence, weight):
  u = np.array([1e-3, 0.2, 1.0, 3.0, 50.0])  # OPD+ (arXiv 2606.01039), up to a constant
  got = support_lib.score_weight(Objective(divergence=divergence).term, jnp.log(jnp.asarray(u)))
  np.testing.assert_allclose(got, weight(u), rtol=1e-12, atol=1e-12)


@every_divergence
def test_weights_in_float32_are_those_of_float64_and_zero_at_equality(x64, divergence):
  f = Objective(divergence=divergence).term

  def weights(dtype, fold):
    x = jnp.asarray([0.0, -1e4, -20.0, -1.0, 1.0, 12.0, 20.0], dtype)
    return np.asarray(fold(lambda x: support_lib.score_weight(f, x))(x))

  got = weights(jnp.float32, jax.jit)  # compiled: constants fold to other last bits
  assert got[0] == 0.0
  np.testing.assert_allclose(got, weights(jnp.float64, lambda f: f), rtol=2e-5, atol=2e-6)
  assert not np.any(np.isnan(support_lib.score_weight(f, jnp.array([200.0, -1e30], jnp.float32))))


OVERFLOW = [text for text in DIVERGENCES if 'alpha_divergence' not in text] + [
    f'alpha_divergence({alpha})' for alpha in (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)]


@pytest.mark.parametrize('divergence', OVERFLOW)
def test_no_divergence_overflows(divergence):
  f = Objective(divergence=divergence).term
  ratio = jnp.linspace(-1000.0, 1000.0, 401, dtype=jnp.float32)  # log p_T - log p_S
  student, teacher = jnp.minimum(-ratio, 0.0), jnp.minimum(ratio, 0.0)
  values, (slopes,) = jax.value_and_grad(lambda s: jnp.sum(f(s, teacher)), argnums=(0,))(student)
  weights = support_lib.score_weight(f, ratio)
  for x in (values, slopes, weights):
    assert np.isfinite(x).all()
  assert np.isfinite(np.square(weights)).all()  # which Adam keeps
  if divergence in ('alpha_divergence(2.0)', 'alpha_divergence(-1.0)'):
    # The tangent says in which direction to move, and its square is a number.
    ahead = ratio > 40 if divergence == 'alpha_divergence(2.0)' else ratio < -40
    assert np.isfinite(np.square(slopes)).all()
    assert (np.sign(slopes[ahead]) == -np.sign(ratio[ahead])).all()
    np.testing.assert_allclose(np.abs(slopes[ahead]), np.exp(30.0) / abs(
        2 if divergence == 'alpha_divergence(2.0)' else 1), rtol=1e-4)


@pytest.mark.parametrize('alpha', [-1.0, -0.8, 1.7, 2.0])
def test_alpha_divergence_is_its_definition_up_to_the_bound_and_its_tangent_beyond(x64, alpha):
  f = Objective(divergence=f'alpha_divergence({alpha})').term
  student, teacher = -jnp.linspace(0.0, 60.0, 301), -jnp.linspace(60.0, 0.0, 301)
  exponent = np.asarray(student + alpha * (teacher - student))
  got = f(student, teacher)
  s, t = np.exp(student), np.exp(teacher)
  linear = (1 - alpha) * s + alpha * t
  inside = exponent <= 30.0
  assert 0 < inside.sum() < len(inside)
  want = np.where(inside, np.exp(np.minimum(exponent, 30)),
                  np.exp(30.0) * (1 + exponent - 30)) - linear
  np.testing.assert_allclose(got, want / (alpha * (alpha - 1)), rtol=1e-9, atol=1e-12)


def test_k3_neither_overflows_nor_turns_round():
  log_u = jnp.linspace(-1000.0, 1000.0, 401, dtype=jnp.float32)
  k3 = KINDS['estimator'].functions['k3']
  values, slopes = k3(log_u), jax.grad(lambda x: jnp.sum(k3(x)))(log_u)
  assert np.isfinite(values).all() and np.isfinite(np.square(slopes)).all()
  assert (np.sign(slopes) == np.sign(log_u)).all()  # towards u = 1, from both sides
  assert (np.diff(slopes) >= 0).all()  # convex
  inside = np.asarray(log_u) <= 30
  want = np.exp(np.asarray(log_u, np.float64)[inside]) - 1 - np.asarray(log_u, np.float64)[inside]
  np.testing.assert_allclose(values[inside], want, rtol=1e-5)


def test_a_ratio_that_overflows_is_left_out_without_a_nan():
  o = Objective(importance='two_sided(0.5, 2)')
  one = jnp.ones((1, 1))
  got = jax.grad(lambda x: jnp.sum(update.surrogate(o, x, x + 200.0, -one)))(-one)
  assert float(got[0, 0]) == 0.0
