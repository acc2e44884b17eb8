"""Passes of rows alike in length: the numbers of passes over the whole room, with less work."""

from __future__ import annotations

import functools

from conftest import make_rollout
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax.algorithm import buckets, score, update
from opd_jax.algorithm.objective import Objective
from opd_jax.types import Batch, Heads, TrainState, Wants

ROOM, PROMPT = 16, 3
COMPLETIONS = [1, 14, 2, 3, 16, 4, 5, 2, 8, 1, 3, 7]


@pytest.fixture(scope='module')
def rollout():
  rng = np.random.RandomState(0)
  return make_rollout(
      [rng.randint(1, 40, rng.randint(1, PROMPT + 1)).tolist() for _ in COMPLETIONS],
      [rng.randint(1, 40, n).tolist() for n in COMPLETIONS], prompt_width=PROMPT, room=ROOM)


@pytest.mark.parametrize(('room', 'count', 'want'), [
    (16, 0, [16]), (255, 0, [255]), (256, 0, [128, 256]), (600, 0, [150, 300, 600]),
    (16384, 0, [2048, 4096, 8192, 16384]), (16, 3, [4, 8, 16]), (7, 3, [2, 4, 7]), (1, 4, [1]),
    (16384, 1, [16384])])
def test_lengths(room, count, want):
  assert buckets.lengths_of(room, count) == want


def test_scores_are_those_of_the_whole_room(tiny_model, rollout):
  model, params = tiny_model
  want, found = (jax.jit(functools.partial(
      score.teacher_logprob_fn, model=model, temperature=0.7, chunk_tokens=24, microbatch_rows=3,
      wants=Wants(logprobs=True, hidden=True, top_k=4), length_buckets=n))(params, rollout)
      for n in (1, 4))
  mask = np.asarray(score.to_completion(rollout.mask, rollout))
  # What stands behind the ends is nobody's.
  for name in ('logprobs', 'entropy'):
    np.testing.assert_allclose(getattr(found, name), getattr(want, name), rtol=2e-6, atol=2e-6)
  np.testing.assert_allclose(found.hidden * mask[..., None], want.hidden * mask[..., None],
                             atol=1e-5)
  np.testing.assert_array_equal(found.top.tokens * mask[..., None].astype(int),
                                want.top.tokens * mask[..., None].astype(int))
  assert want.hidden.shape == found.hidden.shape


@pytest.mark.parametrize('objective', [
    Objective(), Objective(route='direct', support='full', importance='none')],
    ids=['sampled', 'exact'])
def test_a_step_is_that_of_the_whole_room(tiny_model, rollout, objective):
  model, params = tiny_model
  teacher = jax.tree.map(lambda x: x * 1.1, params)
  scores = score.teacher_logprob_fn(
      teacher, rollout, model=model, temperature=1.0, chunk_tokens=24, microbatch_rows=0,
      wants=Wants(logprobs=True, hidden=True))
  own = score.teacher_logprob_fn(params, rollout, model=model, temperature=1.0, chunk_tokens=24,
                                 microbatch_rows=0, wants=Wants(logprobs=True))
  optimizer = optax.sgd(1.0)
  state = TrainState(jnp.int32(0), params, optimizer.init(params))
  batch = Batch(rollout, scores, own)
  (want, before), (found, after) = (jax.jit(functools.partial(
      update.update_fn, model=model, optimizer=optimizer, chunk_tokens=24,
      terms=(update.Term('own', objective, microbatch_rows=3, length_buckets=n),)))(
          state, (batch,), Heads(model.head(teacher))) for n in (1, 4))
  # Sums over tokens in another order, in float32; gradients of order one.
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6, rtol=2e-5),
               want.params, found.params)
  assert set(before) == set(after)
  np.testing.assert_array_equal(before['lengths'], after['lengths'])
  assert after['loss'] == pytest.approx(float(before['loss']), rel=1e-5)
  tokens = sum(COMPLETIONS)
  assert before['scored_useful'] == pytest.approx(tokens / (ROOM * len(COMPLETIONS)))
  # Sorted by threes: up to 2, 3, 7 and 16 tokens, of 2, 4, 8 and 16.
  assert after['scored_useful'] == pytest.approx(tokens / (3 * (2 + 4 + 8 + 16)))


def test_short_rows_are_cut():
  def passes(lengths, count):
    rows = make_rollout([[1, 2]] * 4, [[3] * n for n in lengths], prompt_width=2, room=32)
    seen = []
    _, _, useful = buckets.scan_rows(
        lambda _, r: (None, seen.append(r.tokens.shape) or r.mask), None, rows, rows,
        microbatch_rows=2, buckets=count)
    return seen, float(useful)

  assert passes([2, 30, 2, 29], 1) == ([(2, 34)], pytest.approx(63 / 128))
  shapes, useful = passes([2, 30, 2, 29], 4)
  assert set(shapes) == {(2, 2 + n) for n in (4, 8, 16, 32)}
  assert useful == pytest.approx(63 / (2 * 4 + 2 * 32))


def test_a_mask_with_gaps_is_cut_behind_its_last_token():
  rows = make_rollout([[1, 2]] * 4, [[3] * n for n in (2, 6, 2, 6)], prompt_width=2, room=8)
  rows = rows.replace(mask=jnp.asarray(rows.mask).at[:, 2:6].set(0.0))  # of 6, the first and last
  _, out, useful = buckets.scan_rows(lambda _, r: (None, r.mask), None, rows, rows,
                                     microbatch_rows=2, buckets=3)
  np.testing.assert_array_equal(out, rows.mask)
  assert useful == pytest.approx(6 / (2 * 2 + 2 * 8))


def test_most_places_hold_a_token_where_lengths_have_a_long_tail():
  # Log-normal lengths with sigma 0.7, room for 8 times the median, 256 rows by fours.
  useful, plain = [], []
  for seed in range(3):
    lengths = np.clip(np.round(np.random.default_rng(seed).lognormal(
        np.log(128), 0.7, 256)), 1, 1024).astype(int)
    mask = (np.arange(1024) < lengths[:, None]).astype(np.float32)
    rows = make_rollout([[1]] * 256, [[2]] * 256, prompt_width=1, room=1024)
    rows = rows.replace(mask=jnp.asarray(mask))
    for found, count in ((useful, 0), (plain, 1)):
      found.append(float(buckets.scan_rows(lambda _, r: (None, r.ended), None, rows, rows,
                                           microbatch_rows=4, buckets=count)[2]))
  assert np.mean(plain) < 0.2 and np.mean(useful) > 0.6, (plain, useful)
