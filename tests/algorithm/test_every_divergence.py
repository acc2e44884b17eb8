"""What every divergence must satisfy: a new function of divergences.py is covered without an edit.
"""

from conftest import quick_jit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.algorithm.objective import KINDS, Objective
from opd_jax.types import UNUSED_LOGIT

EVERY = [text.replace('(alpha)', f'({alpha})') for text in KINDS['divergence'].names
         for alpha in ((0.1, 0.5) if '(' in text else (0.0,))]
each_divergence = pytest.mark.parametrize('name', EVERY)


def _logits(*shape, seed=0, scale=2.0):
  return scale * np.random.RandomState(seed).standard_normal(shape)


def _divergence(name, support='full'):
  return Objective(divergence=name, support=support).over_support


@each_divergence
def test_divergence_is_zero_at_equality_and_positive_elsewhere(x64, name):
  divergence = _divergence(name)
  p = jax.nn.log_softmax(jnp.asarray(_logits(200, 11)))
  q = jax.nn.log_softmax(jnp.asarray(_logits(200, 11, seed=1)))
  assert divergence(p, q).shape == (200,)
  np.testing.assert_allclose(divergence(p, p), 0.0, atol=1e-14)  # float64 sums of 11 terms
  assert np.all(np.asarray(divergence(p, q)) > 1e-4)


@each_divergence
def test_divergence_gradient_equals_finite_differences(x64, name):
  divergence = _divergence(name)
  teacher = jax.nn.log_softmax(jnp.asarray(_logits(3, 5, seed=1)))
  logits = _logits(3, 5)

  def total(logits):
    return jnp.sum(divergence(jax.nn.log_softmax(logits), teacher) * jnp.array([1.0, -2.0, 0.5]))

  grad, value = quick_jit(jax.grad(total))(jnp.asarray(logits)), quick_jit(total)
  for i, j in np.ndindex(*logits.shape):
    step = np.zeros_like(logits)
    step[i, j] = 1e-5
    slope = float(value(logits + step) - value(logits - step)) / 2e-5
    # Central differences: 1e-10 from the third derivative, 1e-11 from rounding.
    assert float(grad[i, j]) == pytest.approx(slope, abs=1e-8)


@each_divergence
@pytest.mark.parametrize('tail', ['', 'renormalize', 'bucket'])
def test_divergence_has_no_nan_at_extreme_logits(name, tail):
  support = f'union_top_k(2, {tail!r})' if tail else 'full'
  one_hot = [[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0], [80.0, -80.0, 80.0],
             [0.0, 1.0, UNUSED_LOGIT]]
  pairs = jnp.asarray([(a, b) for a in one_hot for b in one_hot], jnp.float32)
  # A token that is in nobody's vocabulary is in neither's.
  pairs = pairs.at[:, :, 2].set(jnp.where(jnp.any(pairs == UNUSED_LOGIT, (1, 2))[:, None],
                                          UNUSED_LOGIT, pairs[:, :, 2]))

  def total(logits):
    student, teacher = jax.nn.log_softmax(logits), jax.nn.log_softmax(pairs[:, 1])
    return jnp.sum(_divergence(name, support)(student, teacher))

  value, grad = jax.value_and_grad(total)(pairs[:, 0])
  assert np.isfinite(value) and np.all(np.isfinite(grad))
