"""Rollouts in slots: the rows of the plain sampler, in fewer steps."""

from __future__ import annotations

import dataclasses
import functools

from conftest import family_config, left_padded, qwen3_config, sharp_params
import jax
import numpy as np
import pytest
from sampling import (
  SCRIPT_VOCAB,
  WIDTH,
  check_bookkeeping,
  real_sampler,
  sampler_of,
  scripted,
)

from opd_jax import models
from opd_jax.algorithm import sample
from opd_jax.algorithm import slots as slots_lib

ROWS = 24
STOPS = tuple(range(0, 48, 5))


def _prompts(width, vocab, seed=0, rows=ROWS):
  rng = np.random.RandomState(seed)
  return [rng.randint(1, vocab, rng.randint(1, width + 1)).tolist() for _ in range(rows)]


@functools.cache
def _walk(slots):
  """Rows of a table: its logits are the same to the bit in every batch, whatever its size."""
  logits = np.random.RandomState(5).standard_normal((SCRIPT_VOCAB, SCRIPT_VOCAB))
  return sampler_of(scripted(logits=logits), temperature=0.7, slots=slots)


@pytest.mark.parametrize('slots', [1, 3, 8, ROWS])
def test_rows_are_those_of_the_plain_sampler(slots):
  prompts = _prompts(WIDTH, SCRIPT_VOCAB - 1)
  rows, key = left_padded(prompts, WIDTH), jax.random.key(2)
  want, found = (_walk(n)({}, rows, key) for n in (0, slots))
  check_bookkeeping(found, prompts)
  assert len(np.unique(np.sum(want.mask, axis=1))) >= 3
  jax.tree.map(np.testing.assert_array_equal, want, found)


def _model(kind):
  """Of a family with full attention, and of one with a window that is shorter than a row."""
  model = models.build(qwen3_config() if kind == 'qwen3' else {
      **family_config(kind, True), 'vocab_size': 48})
  return model, sharp_params(model)


@pytest.mark.parametrize(('kind', 'slots', 'temperature'), [
    ('qwen3', ROWS, 1.0), ('qwen3', 5, 0.0), ('qwen3', 8, 1.0), ('gemma2', 5, 1.0)])
def test_rows_of_a_transformer(kind, slots, temperature):
  model, params = _model(kind)
  rows, key = left_padded(_prompts(6, 40), 6), jax.random.key(1)
  want, found = (real_sampler(model, temperature=temperature, max_new_tokens=20, slots=n,
                                     stop_tokens=STOPS)(params, rows, key) for n in (0, slots))
  lengths = np.sum(want.mask, axis=1)
  assert lengths.min() < 5 and lengths.max() > 8, 'rows that differ in length'
  np.testing.assert_array_equal(want.tokens, found.tokens)
  np.testing.assert_array_equal(want.mask, found.mask)
  np.testing.assert_array_equal(want.ended, found.ended)
  if slots == ROWS:  # the same programs on the same shapes
    np.testing.assert_array_equal(want.sampler_logprobs, found.sampler_logprobs)
  else:  # float32 sums in batches of another size
    np.testing.assert_allclose(want.sampler_logprobs, found.sampler_logprobs, atol=2e-5)


@pytest.mark.parametrize('slots', [0, 5, ROWS])
def test_a_cache_that_grows_changes_nothing(monkeypatch, slots):
  model, params = _model('gemma2')
  rows, key = left_padded(_prompts(6, 40), 6), jax.random.key(1)

  def written(**how):
    return jax.jit(functools.partial(
        sample.sample_fn, model=model, max_new_tokens=20, temperature=1.0, top_p=1.0, top_k=0,
        stop_tokens=STOPS[1:], pad_token=0, slots=slots, **how))(params, rows, key)

  want, seen = written(), []
  monkeypatch.setattr(slots_lib, 'LONG', 20)
  grow = model.grow
  model = dataclasses.replace(model, grow=lambda c, n: seen.append(n) or grow(c, n))
  for last, grown in ((0, [16, 26]), (2, [26])):  # from 11, or from 16: prompts of 6
    seen.clear()
    found = written(cache_lengths=last)
    assert seen == grown
    assert np.max(np.sum(want.mask, axis=1)) > 10
    np.testing.assert_array_equal(want.tokens, found.tokens)
    # Sums over fewer places.
    np.testing.assert_allclose(want.sampler_logprobs, found.sampler_logprobs, atol=2e-5)


def test_a_teacher_is_mixed_in_with_a_cache_of_its_own():
  (model, params), (teacher, theirs) = _model('qwen3'), _model('gemma2')
  rows, key = left_padded(_prompts(6, 40), 6), jax.random.key(4)
  want, found = (real_sampler(
      model, max_new_tokens=12, slots=n, stop_tokens=STOPS, mix_model=teacher, mix_share=0.5)(
          params, rows, key, mix_params=theirs) for n in (0, 7))
  np.testing.assert_array_equal(want.tokens, found.tokens)
  np.testing.assert_allclose(want.policy_offset, found.policy_offset, atol=4e-5)


def test_a_model_that_cannot_refill_its_cache_is_refused():
  model = dataclasses.replace(scripted(), refill=None)
  with pytest.raises(ValueError, match=r'slots=2.*scripted'):
    sampler_of(model, slots=2)({}, left_padded([[1]] * 4, WIDTH), jax.random.key(0))


# --- how many steps ---


@pytest.mark.parametrize('slots', [1, 3, 8, 16, ROWS])
def test_steps_are_counted_without_running_them(slots):
  spent, model = [], scripted(logits=np.random.RandomState(5).standard_normal(
      (SCRIPT_VOCAB, SCRIPT_VOCAB)))

  def forward(params, tokens, *others):
    if tokens.shape[1] == 1:
      jax.debug.callback(lambda: spent.append(len(tokens)))
    return model.forward(params, tokens, *others)

  sampler = sampler_of(dataclasses.replace(model, forward=forward), slots=slots, max_new_tokens=20)
  rows = left_padded(_prompts(WIDTH, SCRIPT_VOCAB - 1), WIDTH)
  found = jax.block_until_ready(sampler({}, rows, jax.random.key(2)))
  jax.effects_barrier()
  lengths = np.sum(np.asarray(found.mask), axis=1).astype(int)
  assert sum(spent) == slots_lib.slot_steps(lengths, slots)
  if slots == ROWS:
    assert sum(spent) == ROWS * (lengths.max() - 1)


@pytest.mark.parametrize(('shards', 'least'), [(1, 0.7), (4, 0.55)])
def test_most_slot_steps_are_useful_where_lengths_have_a_long_tail(shards, least):
  # 256 rows in 64 slots, log-normal lengths with sigma 0.7, room for 8 times the median.
  useful, plain = [], []
  for seed in range(5):
    draws = np.random.default_rng(seed).lognormal(np.log(100), 0.7, 256)
    lengths = np.clip(np.round(draws), 1, 800).astype(int)
    useful.append(lengths.sum() / slots_lib.slot_steps(lengths, 64, shards))
    plain.append(lengths.mean() / lengths.max())
  assert np.mean(plain) < 0.25 and np.mean(useful) >= least
