"""Every value of every field of an objective against the oracle of `oracle.py`, a step with given
rows, and the oracle's own formulas. (Every preset: test_oracle_presets.py.)"""

from __future__ import annotations

import dataclasses
import functools

from conftest import quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
import optax
import oracle
import oracle_choices
from oracle_divergences import generator, log_softmax, terms
import pytest
import sides
from sides import DIRECT, GRID, REWARDS, ROWS, STEP
import tabular

from opd_jax.algorithm import choices, update
from opd_jax.algorithm import objective as objective_lib
from opd_jax.algorithm.choices import shapings
from opd_jax.algorithm.objective import KINDS, LOCAL_KINDS, Local, Objective
from opd_jax.errors import ConfigError
from opd_jax.rules import objective as objective_rules
from opd_jax.types import TrainState


@pytest.mark.parametrize('name', GRID)
def test_objective_is_the_oracle(x64, name):
  sides.assert_is_the_oracle(Objective(**GRID[name]))


# --- every choice by itself, with arguments from the bounds of its parameters ---

# What it stands beside: the first of these that the rules let it stand beside.
BESIDE = (
    dict(), dict(discount=0.7), dict(reward_coef=0.5), dict(DIRECT, support='full'), DIRECT,
    dict(DIRECT, divergence='forward_kl'), dict(distill_coef=0.0, reward_coef=1.0),
    dict(DIRECT, support='full', divergence='forward_kl'), dict(local=Local(coef=0.5)),
    dict(local=Local(coef=0.5, divergence='reverse_kl')))
EVERY_FIELD = KINDS | {f'local.{field}': kind for field, kind in LOCAL_KINDS.items()}


def _with(fields, field, text):
  """Fields with one more, that of the local term too."""
  if not field.startswith('local.'):
    return Objective(**dict(fields, **{field: text}))
  local = dataclasses.replace(fields['local'], **{field.removeprefix('local.'): text})
  return Objective(**dict(fields, local=local))


def alone(field, text):
  """An objective of a choice, beside as little as possible; None where the rules have none."""
  for fields in BESIDE:
    if field.startswith('local.') and 'local' not in fields:
      continue
    try:
      o = _with(fields, field, text)
      objective_rules.check(o)
    except ConfigError:
      continue
    return o
  return None


CHOICES = [(field, text) for field, kind in EVERY_FIELD.items() for text in tabular.examples(kind)]


@pytest.mark.parametrize(('field', 'text'), CHOICES)
def test_choice_by_itself_is_the_oracle(x64, field, text):
  name = text.partition('(')[0]
  where = 'choices' if field in oracle_choices.DEFINITIONS else 'divergences'
  assert name in oracle.DEFINITIONS[field], (
      f'objective.{field} has a new choice {name!r}: tests/oracle_{where}.py needs a definition of '
      'it that shares nothing with the package')
  o = alone(field, text)
  if o is None:
    # Of a support's tails and divergences only some pairs mean something; no name is refused.
    assert any(alone(field, other) for f, other in CHOICES
               if f == field and other.partition('(')[0] == name) or text == 'sampled'
    pytest.skip('refused beside every other')
  sides.assert_is_the_oracle(o)


def test_a_new_shaping_runs_as_its_one_function(x64, monkeypatch):
  def squash(signal: Float[Array, 'B t'], *, width: choices.Positive) -> Float[Array, 'B t']:
    return signal / (1.0 + jnp.abs(signal) / width)

  squash.__module__ = shapings.__name__
  monkeypatch.setattr(shapings, 'squash', squash, raising=False)
  assert 'squash(width=0.3)' in tabular.examples(KINDS['shaping'])  # the grid has it
  with pytest.raises(AssertionError, match='tests/oracle_choices.py needs a definition'):
    test_choice_by_itself_is_the_oracle(None, 'shaping', 'squash(width=0.3)')
  monkeypatch.setitem(oracle_choices.SHAPINGS, 'squash',
                      lambda x, own, theirs, width: np.sign(x) / (1 / np.abs(x) + 1 / width))
  sides.assert_is_the_oracle(alone('shaping', 'squash(width=0.3)'))


@pytest.mark.parametrize('field', EVERY_FIELD)
def test_the_oracle_defines_what_there_is(field):
  assert {*oracle.DEFINITIONS[field]} - {'none'} == {*EVERY_FIELD[field].functions}


@pytest.mark.parametrize(('field', 'values'), [
    ('route', objective_lib.ROUTES), ('advantages', objective_lib.ADVANTAGES),
    ('reduction', objective_lib.REDUCTIONS), ('student_logprobs', objective_lib.STUDENT_LOGPROBS)])
def test_no_value_is_left_without_an_oracle(field, values):
  assert {getattr(Objective(**fields), field) for fields in GRID.values()} == {*values}


def test_no_field_is_left_without_an_oracle():
  everything = [Objective(**fields) for fields in GRID.values()]
  for field in dataclasses.fields(Objective):
    assert any(getattr(o, field.name) != field.default for o in everything), field.name
  for field in dataclasses.fields(Local):
    assert any(getattr(o.local, field.name) != field.default for o in everything), field.name


# --- a step: given rows beside the student's, and the metrics of gates and schedules ---


def test_a_step_adds_the_gradient_of_given_rows(x64):
  cast, rollout, key = sides.new_cast(), sides.ragged_rollout(), jax.random.key(8)
  o = Objective(shaping='clip(0.5)', window='tokens(0, 3)', anneal='linear(steps=4, to=0.2)',
                local=Local(coef=0.5, gate='untrusted', instead=True))
  beside = Objective(route='direct', support='full', importance='none', divergence='skew_kl(0.1)',
                     distill_coef=0.3)
  order = np.array([5, 4, 3, 0])  # other rows
  written = jax.tree.map(lambda x: x[order], rollout)
  optimizer = optax.sgd(1.0)
  step = quick_jit(functools.partial(
      update.update_fn, model=sides.model(), optimizer=optimizer, chunk_tokens=7,
      terms=(sides.term(o), sides.term(beside, 'given'))))
  batch, heads = sides.only_what_is_asked_for(
      o, *tabular.batch(o, cast, rollout, REWARDS, sides.scorer))
  given = sides.only_what_is_asked_for(beside, *tabular.batch(
      beside, cast, written, REWARDS[order], sides.scorer))[0]
  state = TrainState(step=jnp.int32(STEP), params=cast.params,
                     opt_state=optimizer.init(cast.params))
  after, metrics = step(state, (batch, given), heads, None, key)

  losses, slopes = [], {'table': 0.0, 'head': 0.0}
  for objective, rows in ((o, rollout), (beside, written)):
    known, logits = sides.known_of(objective, cast, rows, key), tabular.logits(cast.params, rows)
    losses.append(oracle.losses(objective, known, log_softmax(logits)).sum())
    more = tabular.by_params(oracle.gradient(objective, known, logits), cast.params, rows)
    slopes = {name: slopes[name] + more[name] for name in slopes}
  for name, slope in slopes.items():  # 1e-7: the schedule computes in float32
    np.testing.assert_allclose(cast.params[name] - after.params[name], slope, atol=1e-7)

  known = sides.known_of(o, cast, rollout, key)
  mask, counts = known.mask > 0, oracle_choices.counted(o, known)
  untrusted = oracle_choices.local_gate(o, known, None)
  signal = known.chosen(known.teacher - known.student)
  want = {'loss': sum(losses), 'given_loss': losses[1], 'distill_coef': 0.4,
          'counted_rate': counts.sum() / mask.sum(), 'local_rate': untrusted[counts].mean(),
          'shaped_rate': (np.abs(signal[mask]) >= 0.5).mean()}
  for name, value in want.items():
    assert float(metrics[name]) == pytest.approx(value, rel=1e-6), name
  assert metrics['given_lengths'].tolist() == [len(ROWS[b]) for b in order]
  assert int(after.step) == STEP + 1


# --- properties ---


def _divergences():
  """Every divergence, with parameters all over their bounds."""
  for name, f in KINDS['divergence'].functions.items():
    hints = [*choices.parameters(f).values()]
    if not hints:
      yield name
    for bounds in map(choices.bounds, hints):
      yield from (f'{name}({x})' for x in np.linspace(bounds.low, bounds.high, 9).tolist()
                  if x in bounds)


def _may_be_dropped_anywhere():
  """Divergences whose terms may be left out on any support."""
  fields = dict(DIRECT, support='student_top_k(4, tail="drop")')
  for divergence in _divergences():
    try:
      objective_rules.check(Objective(divergence=divergence, **fields))
    except ConfigError as refused:
      assert "tail=\"drop\"" in str(refused)
      continue
    yield divergence


@settings(max_examples=60, deadline=None, derandomize=True)
@given(student=st.floats(-12.0, 0.0), teacher=st.floats(-12.0, 0.0))
def test_terms_that_may_be_dropped_are_never_negative(student, teacher):
  may = list(_may_be_dropped_anywhere())
  assert {text.partition('(')[0] for text in may} == {*KINDS['divergence'].functions} - {
      'forward_kl', 'reverse_kl', 'skew_kl', 'skew_reverse_kl'}
  s, t = np.exp(student), np.exp(teacher)
  for divergence in may:
    with jax.enable_x64(True):
      got = float(Objective(divergence=divergence).term(jnp.float64(student), jnp.float64(teacher)))
    assert got >= -1e-13 * (s + t), divergence  # rounding
    assert got == pytest.approx(terms(divergence, s, t), rel=1e-6, abs=1e-12), divergence


def test_formulas_of_the_oracle_are_divergences():
  # Its derivatives by complex steps of its functions, and f(1) = 0 and f convex.
  u = np.exp(np.linspace(-3, 3, 41))
  for divergence in _divergences():
    f, slope = generator(divergence, u)
    stepped = generator(divergence, u + 1j * oracle.STEP)[0].imag / oracle.STEP
    np.testing.assert_allclose(slope, stepped, rtol=1e-11, atol=1e-11, err_msg=divergence)
    assert abs(generator(divergence, np.ones(1))[0][0]) < 1e-15
    assert np.all(np.diff(slope) >= -1e-11), divergence
