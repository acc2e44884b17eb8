"""Every preset against the oracle of `oracle.py`; and that a batch holds what its loss reads, and
nothing of what is masked reaches it."""

from __future__ import annotations

import dataclasses
import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np
import pytest
import sides
from sides import GRID, REWARDS, STEP, VOCAB
import tabular
import tiny

from opd_jax import config as config_lib
from opd_jax import presets
from opd_jax.algorithm import choices, update
from opd_jax.algorithm.objective import Local, Objective
from opd_jax.data import streams


def _config(name):
  c = presets.apply(tiny.config('opd_sampled'), name)
  if c.data.source == 'dataset':
    c.data.split = 'corpus'
  if c.given.source == 'dataset':
    c.given.split = 'corpus'
  return c


def _small(part):
  """With a top-k for a vocabulary of 11: two tokens at least stay outside."""
  return dataclasses.replace(part, support=choices.at_most(
      part.KINDS['support'], part.support, VOCAB - 2))


def _objectives(name):
  """Those of a preset: of its own rows, of those off-policy, and of those given beside them."""
  every = [stream.objective for stream in streams.make(config_lib.parse(_config(name)))]
  return [_small(dataclasses.replace(o, local=_small(o.local))) for o in dict.fromkeys(every)]


EVERY = [(name, i) for name in presets.PRESETS for i in range(len(_objectives(name)))]
every_preset = pytest.mark.parametrize(('name', 'which'), EVERY)


@every_preset
def test_preset_is_the_oracle(x64, name, which):
  sides.assert_is_the_oracle(_objectives(name)[which], metrics=True)


def _pushes_into_its_support(part):
  """Whether the divergence falls while mass moves into the support, even between equals."""
  return (part.choice('divergence').name in ('forward_kl', 'skew_kl')
          and part.choice('support').arguments.get('tail') == 'drop')


@every_preset
def test_a_student_equal_to_its_teacher_stays(x64, name, which):
  o = _objectives(name)[which]
  if o.reward_coef or o.likelihood_coef:
    pytest.skip('it has more than a teacher')
  params = sides.new_cast().params
  cast = tabular.Cast(sides.model(), params, params, params, params)
  loss, grads = sides.run(o, cast, sides.ragged_rollout(), metrics=True)
  size = max(np.abs(np.asarray(g)).max() for g in grads.values())
  if o.local.coef and o.local.gate != 'untrusted' and _pushes_into_its_support(o.local):
    assert size > 1e-3  # of EOPD's top-k: it is made to be small beside the teacher's tail
  elif o.route == 'policy_gradient' and not o.local.coef and o.reference_kl == 'none':
    assert size == float(loss) == 0.0  # no rounding: Adam would make full steps of it
  else:
    assert size < 1e-12


# --- what is kept for the loss is what it reads ---


def _unread(f, *inputs):
  """Where in the inputs the arrays are that no output of f depends on. Of log-probs and entropy,
  which come together, one is enough; and what comes of a rollout is the same for all."""
  traced = jax.make_jaxpr(f)(*inputs)
  _, read = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.out_avals))
  places = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(inputs)]
  unread = {place for place, is_read in zip(places, read, strict=True) if not is_read}
  pair = {'logprobs': 'entropy', 'entropy': 'logprobs'}
  return {place for place in unread if 'rollout' not in place and (
      (parts := place.rpartition('.'))[0] + '.' + pair.get(parts[2], parts[2])) in unread}


@pytest.mark.parametrize('o', [
    *(pytest.param(Objective(**fields), id=name) for name, fields in GRID.items()),
    *(pytest.param(_objectives(name)[which], id=f'{name}-{which}') for name, which in EVERY)])
def test_what_is_held_for_the_loss_is_what_it_reads(x64, o):
  # What is missing cannot be traced.
  how = dict(model=sides.model(), chunk_tokens=7)
  batch, heads = sides.only_what_is_asked_for(
      o, *tabular.batch(o, sides.new_cast(), sides.ragged_rollout(), REWARDS, sides.scorer))
  params, head = sides.new_cast().params, sides.model().head(sides.new_cast().params)
  assert not _unread(lambda batch, heads: update.gradient(
      params, batch, heads, jnp.int32(STEP), jax.random.key(8), term=sides.term(o), **how)[:2],
      batch, heads)
  rows = jax.eval_shape(lambda batch, heads: update.weigh(
      o, batch, 1.0, head, heads, jax.random.key(8), group_size=2, chunk_tokens=7)[0], batch, heads)
  assert not _unread(lambda rows: update.loss_fn(
      params, rows, 1.0, heads, objective=o, **how)[0], rows)


# --- what stands where the mask is zero ---

UNREAD = VOCAB - 1  # a token that stands in no row


def _poisoned(batch, cast, value):
  """The batch with a value, NaN or infinite, at every masked place of every array, and a student
  whose hidden states are that on padding; tokens there are others."""
  rollout = batch.rollout
  completion = rollout.mask[:, rollout.prompt_length - 1:]

  def fill(x):
    keep = completion[:, :, None] if x.ndim == 3 else rollout.mask
    return jnp.where(keep > 0, x, value)

  rows = {name: x for name, x in vars(rollout).items()
          if name not in ('mask', 'tokens', 'valid', 'ended', 'prompt_length')}
  tokens = jnp.where(rollout.valid, rollout.tokens, UNREAD)
  params = dict(cast.params, table=cast.params['table'].at[:, UNREAD].set(value))
  return batch.replace(
      rollout=rollout.replace(tokens=tokens, **jax.tree.map(fill, rows)),
      **{name: jax.tree.map(fill, getattr(batch, name))
         for name in ('teacher', 'student', 'reference')}), params


def _same_bits(got, want):
  same = jax.tree.map(functools.partial(jnp.array_equal, equal_nan=True), got, want)
  return [jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(same) if not x]


@every_preset
def test_no_value_at_a_masked_place_reaches_loss_gradient_or_metrics(x64, name, which):
  o, cast = _objectives(name)[which], sides.new_cast()
  batch, heads = sides.only_what_is_asked_for(
      o, *tabular.batch(o, cast, sides.ragged_rollout(), REWARDS, sides.scorer))
  assert not np.any(np.asarray(batch.rollout.tokens) == UNREAD)

  def run(batch, params):
    return sides.gradient(o, metrics=True)(params, batch, heads, jnp.int32(STEP), jax.random.key(8))

  want = run(batch, cast.params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(want[:2]))
  for value in (np.nan, np.inf, -np.inf):
    poisoned, params = _poisoned(batch, cast, value)
    assert len(jax.tree.leaves(poisoned)) == len(jax.tree.leaves(batch))
    assert _same_bits(run(poisoned, params), want) == [], value


@functools.lru_cache
def _of_any_reading():
  """One program that reads every per-token array: gates, reference, local term, all of it."""
  return Objective(discount=0.5, reward_coef=0.3, reference_kl='k3(0.2)',
                   token_gate='soft_or(keep=0.7)', extrapolation=1.2,
                   baseline='leave_one_out', local=Local(coef=0.5, gate='untrusted'))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1))
def test_what_stands_in_masked_places_never_reaches_any_term(seed):
  o, rng = _of_any_reading(), np.random.RandomState(seed)
  with jax.enable_x64(True):
    cast, rollout = sides.new_cast(), sides.ragged_rollout()
    batch, heads = tabular.batch(o, cast, rollout, REWARDS, sides.scorer)

    def fill(x):
      other = np.where(rng.rand(*x.shape) < 0.1, np.nan, rng.uniform(-200, 200, x.shape))
      return jnp.where(rollout.mask > 0, x, other)

    def scores(s):
      return s.replace(logprobs=fill(s.logprobs), entropy=fill(s.entropy))

    tokens = jnp.where(rollout.valid, rollout.tokens, rng.randint(0, VOCAB, rollout.tokens.shape))
    other = batch.replace(
        rollout=rollout.replace(
            tokens=tokens.astype(rollout.tokens.dtype),
            sampler_logprobs=fill(rollout.sampler_logprobs),
            policy_offset=fill(rollout.policy_offset)),
        **{name: scores(getattr(batch, name)) for name in ('teacher', 'student', 'reference')})
    want, got = (sides.gradient(o, metrics=True)(
        cast.params, *sides.only_what_is_asked_for(o, b, heads), jnp.int32(STEP),
        jax.random.key(8)) for b in (batch, other))
    # The same program of the same numbers: not one bit may differ.
    assert _same_bits(got, want) == []
