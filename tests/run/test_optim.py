"""Learning-rate schedules at their corners, and the optimizers."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax.run import optim

ADAM = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=0.0)


def at(schedule, step):
  return float(schedule(step))


@pytest.mark.parametrize('kind', optim.SCHEDULES)
def test_corners_without_warmup(kind):
  schedule = optim.make_schedule(kind, 0.8, 0.2, 0, 100)
  assert at(schedule, 0) == pytest.approx(0.8)
  assert at(schedule, 100) == pytest.approx(0.8 if kind == 'constant' else 0.2)
  assert at(schedule, 500) == pytest.approx(0.8 if kind == 'constant' else 0.2)
  middle = {'constant': 0.8, 'linear': 0.5, 'cosine': 0.5}[kind]
  assert at(schedule, 50) == pytest.approx(middle)
  quarter = {'constant': 0.8, 'linear': 0.65, 'cosine': 0.2 + 0.6 * (1 + 2 ** -0.5) / 2}[kind]
  assert at(schedule, 25) == pytest.approx(quarter)


@pytest.mark.parametrize('kind', optim.SCHEDULES)
def test_corners_with_warmup(kind):
  schedule = optim.make_schedule(kind, 0.8, 0.2, 4, 104)
  np.testing.assert_allclose([at(schedule, s) for s in range(5)],
                             [0.16, 0.32, 0.48, 0.64, 0.8], rtol=1e-6)
  # After the warm-up the whole decay fits into what is left.
  assert at(schedule, 54) == pytest.approx(0.8 if kind == 'constant' else 0.5)
  assert at(schedule, 104) == pytest.approx(0.8 if kind == 'constant' else 0.2)


@pytest.mark.parametrize('kind', optim.SCHEDULES)
def test_first_step_moves_and_nothing_exceeds_the_peak(kind):
  for warmup in (0, 1, 7, 20):
    values = [at(optim.make_schedule(kind, 0.5, 0.0, warmup, 20), s) for s in range(20)]
    assert 0 < values[0] and max(values) <= 0.5 + 1e-7
    assert np.isfinite(values).all()


@pytest.mark.parametrize('kind', optim.SCHEDULES)
def test_learning_rate_zero(kind):
  assert at(optim.make_schedule(kind, 0.0, 0.0, 2, 10), 5) == 0.0


def test_unknown_names_list_what_exists():
  with pytest.raises(ValueError, match=r"schedule='step'.*\['constant', 'linear', 'cosine'\]"):
    optim.make_schedule('step', 1.0, 0.0, 0, 10)
  with pytest.raises(ValueError, match=r"name='lion'.*\['adamw', 'sgd'\]"):
    optim.make_optimizer('lion', lambda _: 1.0, **ADAM)


def one_step(name, grads, params, steps=1, rate=0.1, **settings):
  rule = optim.make_optimizer(name, optax.constant_schedule(rate), **{**ADAM, **settings})
  state = rule.init(params)
  for _ in range(steps):
    updates, state = rule.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return np.asarray(params)


def test_adamw_by_hand():
  grads, params = jnp.array([3.0, -0.5]), jnp.array([1.0, 2.0])
  # The first step of Adam is the sign of the gradient; weight decay is added to it.
  np.testing.assert_allclose(one_step('adamw', grads, params), [0.9, 2.1], rtol=1e-5)
  np.testing.assert_allclose(one_step('adamw', grads, params, weight_decay=0.5),
                             [0.9 - 0.1 * 0.5 * 1.0, 2.1 - 0.1 * 0.5 * 2.0], rtol=1e-5)


def test_sgd_by_hand():
  grads, params = jnp.array([3.0, -0.5]), jnp.array([1.0, 2.0])
  np.testing.assert_allclose(one_step('sgd', grads, params, steps=2, b1=0.0), [0.4, 2.1],
                             rtol=1e-5)
  # Momentum: the second update is 1.9 gradients.
  np.testing.assert_allclose(one_step('sgd', grads, params, steps=2, b1=0.9),
                             [1.0 - 0.1 * 2.9 * 3.0, 2.0 + 0.1 * 2.9 * 0.5], rtol=1e-5)


def test_clipping_is_by_the_global_norm():
  params = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
  grads = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
  rule = optim.make_optimizer('sgd', optax.constant_schedule(1.0),
                              **{**ADAM, 'b1': 0.0, 'clip_norm': 1.0})
  updates, _ = rule.update(grads, rule.init(params), params)
  np.testing.assert_allclose([updates['a'][0], updates['b'][0]], [-0.6, -0.8], rtol=1e-6)
