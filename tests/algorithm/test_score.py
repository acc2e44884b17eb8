"""Scoring: the same numbers whatever the chunks and microbatches, each at its own place."""

from __future__ import annotations

import functools
import itertools

from conftest import (
  make_rollout,
  numpy_log_softmax,
  numpy_logits,
  numpy_rows,
  quick_jit,
  qwen3_config,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import models
from opd_jax.algorithm import buckets, score, update
from opd_jax.algorithm.objective import Local, Objective
from opd_jax.algorithm.update import Term
from opd_jax.models import params as params_lib
from opd_jax.rules import objective as objective_rules
from opd_jax.types import Batch, Head, Heads, Rollout, Scores, Wants, Weighted

# A shift by one, wrong padding or another position would show at every length used here.
PROMPTS = [[5, 9, 11, 2], [7], [3, 3, 8], [1, 2, 30, 41], [17, 9], [20]]
COMPLETIONS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 35, 8, 9], [7, 9, 3], [2], [38, 46, 2, 6, 4]]
WIDTH, ROOM = 5, 5  # one place of padding in the longest prompt


@pytest.fixture(scope='module')
def rollout():
  return make_rollout(PROMPTS, COMPLETIONS, prompt_width=WIDTH, room=ROOM)


@functools.lru_cache  # one program for all tests with the same settings
def _scorer(model, *, jit=quick_jit, **changes):
  settings = dict(temperature=1.0, wants=Wants(logprobs=True), chunk_tokens=1000, microbatch_rows=0)
  return jit(functools.partial(
      score.teacher_logprob_fn, model=model, **{**settings, **changes}))


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_logprobs_and_entropy_against_one_row_at_a_time(tiny_model, rollout, temperature):
  model, params = tiny_model
  scores = _scorer(model, temperature=temperature)(params, rollout)
  exact = numpy_rows(model, params, rollout, temperature)
  mask = np.asarray(rollout.mask)
  assert scores.logprobs.shape == scores.entropy.shape == mask.shape
  assert scores.hidden is None
  assert mask.sum() == sum(map(len, COMPLETIONS))
  for b, t in np.ndindex(*mask.shape):
    if mask[b, t]:  # 2e-5: float32 logits of order 5 after two layers, against float64
      want = exact[b, t, rollout.tokens[b, t + 1]]
      assert scores.logprobs[b, t] == pytest.approx(want, abs=2e-5)
      entropy = -np.sum(np.exp(exact[b, t]) * exact[b, t])
      assert scores.entropy[b, t] == pytest.approx(entropy, abs=2e-5)
    else:
      assert scores.logprobs[b, t] == 0 and scores.entropy[b, t] == 0


def test_hidden_states_stand_where_they_predict_the_completion(tiny_model, rollout):
  model, params = tiny_model
  scores = _scorer(model, wants=Wants(hidden=True))(params, rollout)
  assert scores.logprobs is None and scores.entropy is None
  assert scores.hidden.shape == (len(PROMPTS), ROOM, model.config.hidden_size)
  logits = np.asarray(scores.hidden) @ np.asarray(model.head(params).matrix)
  for b, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
    want = numpy_logits(model, params, prompt + completion)
    for c in range(len(completion)):  # completion token c is predicted from all before it
      np.testing.assert_allclose(logits[b, c], want[len(prompt) - 1 + c], atol=3e-5)


@pytest.mark.parametrize('chunk_tokens', [1, 7, 10])  # 30 tokens: 30 chunks, a ragged last, even
def test_chunks_change_nothing(tiny_model, rollout, chunk_tokens):
  model, params = tiny_model
  dense = _scorer(model)(params, rollout)
  chunked = _scorer(model, chunk_tokens=chunk_tokens)(params, rollout)
  # Same sums, other tilings of the matrix product: float32 rounding of logits of order 5.
  np.testing.assert_allclose(chunked.logprobs, dense.logprobs, atol=4e-6)
  np.testing.assert_allclose(chunked.entropy, dense.entropy, atol=4e-6)


@pytest.mark.parametrize('wants', [Wants(logprobs=True), Wants(hidden=True)], ids=str)
@pytest.mark.parametrize('rows', [1, 2])
def test_microbatches_change_nothing(tiny_model, rollout, rows, wants):
  model, params = tiny_model
  whole = _scorer(model, wants=wants)(params, rollout)
  parts = _scorer(model, wants=wants, microbatch_rows=rows)(params, rollout)
  assert jax.tree.structure(whole) == jax.tree.structure(parts)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)  # as above; hidden states are of order 3


def test_bfloat16_logits_are_accumulated_and_kept_in_float32():
  # Rounded to bfloat16, logits of order 10 would be off by 0.03: nats, and a token's whole
  # advantage late in training.
  rng = np.random.RandomState(0)
  hidden = jnp.asarray(4 * rng.standard_normal((20, 64)), jnp.bfloat16)
  head = jnp.asarray(rng.standard_normal((64, 100)) / 8, jnp.float32)
  exact = np.asarray(hidden, np.float64) @ np.asarray(head.astype(jnp.bfloat16), np.float64)
  want = numpy_log_softmax(exact / 0.7)
  got = jax.jit(score.log_softmax, static_argnums=2)(hidden, Head(head, 100), 0.7)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=1e-4)  # float32 sums of 64 terms, logits of order 20


def test_a_scorer_is_asked_for_something(tiny_model, rollout):
  with pytest.raises(ValueError, match='allowed: .*logprobs.*hidden'):
    score.teacher_logprob_fn(tiny_model[1], rollout, model=tiny_model[0], temperature=1.0,
                             wants=Wants(), chunk_tokens=8, microbatch_rows=0)


def test_what_is_wanted_is_what_is_there():
  everything = Scores(jnp.zeros(1), jnp.ones(1), jnp.zeros(2))
  for logprobs, hidden in itertools.product((False, True), repeat=2):
    got = score.only(everything, Wants(logprobs, hidden))
    assert (got.logprobs is not None, got.entropy is not None, got.hidden is not None) == (
        logprobs, logprobs, hidden)
  assert Wants(logprobs=True) | Wants(hidden=True) == Wants(True, True)
  assert [bool(Wants(*pair)) for pair in itertools.product((False, True), repeat=2)] == [
      False, True, True, True]


def test_split_rows_and_join_rows_are_inverse(rollout):
  for rows, count in ((0, 1), (1, 6), (2, 3), (6, 1)):
    parts = buckets.split_rows(rollout, rows)
    assert parts.tokens.shape[:2] == (count, 6 // count)
    assert parts.prompt_length == rollout.prompt_length
    same = jax.tree.map(jnp.array_equal, buckets.join_rows(parts), rollout)
    assert all(jax.tree.leaves(same))


def test_split_rows_refuses_a_size_that_does_not_divide(rollout):
  with pytest.raises(ValueError, match=r'microbatch_rows=4 .*\b6 '):
    buckets.split_rows(rollout, 4)


# --- memory: no [B, T, V] array, in either direction ---

VOCAB, ROWS, LONG = 8192, 8, 32
LOGITS_BYTES = ROWS * LONG * VOCAB * 4  # one float32 array of all logits of the completions, 8 MiB


@pytest.fixture(scope='module')
def wide():
  model = models.build(qwen3_config(vocab_size=VOCAB, num_hidden_layers=1))
  rollout = make_rollout([[1]] * ROWS, [[1] * LONG] * ROWS, prompt_width=2, room=LONG)
  return model, params_lib.abstract_params(model.specs), rollout


def _temporary_bytes(jitted, *args):
  return jitted.lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('objective', [
    Objective(route='direct', support='full'), Objective(),
    Objective(route='direct', support='union_top_k(8, tail="bucket")')],
    ids=['full', 'sampled', 'top_k'])
def test_the_loss_never_holds_the_logits_of_the_batch(wide, objective):
  model, params, rollout = wide
  hidden = head = None
  if objective.support != 'sampled':
    hidden, head = jnp.zeros((ROWS, LONG, 16)), Head(jnp.zeros((16, VOCAB)), VOCAB)

  def used(chunk_tokens):
    grad = jax.jit(jax.grad(functools.partial(
        update.loss_fn, model=model, objective=objective, chunk_tokens=chunk_tokens), has_aux=True))
    rows = Weighted(rollout, rollout.mask, rollout.mask, teacher_hidden=hidden)
    return _temporary_bytes(grad, params, rows, 1.0, Heads(head))

  # 8 of 256 tokens at a time: a handful of chunk-sized arrays (0.25 MiB each), and the gradients of
  # the embedding and the head, of a chunk and of all (0.5 MiB each). At the size of a real
  # vocabulary: test_vocabulary.
  assert used(8) < 0.5 * LOGITS_BYTES
  # The measure has teeth: with one chunk for all tokens it exceeds what it must stay below.
  assert used(ROWS * LONG) > LOGITS_BYTES


def test_scoring_never_holds_the_logits_of_the_batch(wide):
  model, params, rollout = wide
  used = [_temporary_bytes(_scorer(model, chunk_tokens=n, jit=jax.jit), params, rollout)
          for n in (16, ROWS * LONG)]
  assert used[0] < 0.25 * LOGITS_BYTES
  assert used[1] >= LOGITS_BYTES


QWEN, PADDED, MANY = 151936, 152064, 1024  # Qwen's vocabulary as two of its models pad it
EVERYTHING = dict(  # four models' rows of the vocabulary at each token
    baseline='exact', token_gate='teachability(keep=0.5, top_k=16)', reference_kl='full(0.1)',
    local=Local(coef=1.0, divergence='jensen_shannon(0.5)',
                support='union_top_k(32, tail="bucket")'))


@pytest.mark.parametrize('fields', [
    dict(), dict(route='direct', support='full', importance='none'), EVERYTHING],
    ids=['sampled', 'full', 'everything'])
def test_a_step_never_holds_the_logits_of_the_batch_at_a_real_vocabulary(fields):
  o = Objective(**fields)
  objective_rules.check(o)
  rows, width = 16, 16
  model = models.build(qwen3_config(vocab_size=PADDED, num_hidden_layers=1, hidden_size=width,
                                    max_position_embeddings=2 * MANY))
  logits = rows * MANY * PADDED * 4  # 10 GiB

  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  per_token, per_place = (rows, MANY + 1), (rows, MANY + 2)
  rollout = Rollout(
      tokens=array(*per_place, dtype=jnp.int32), valid=array(*per_place, dtype=bool),
      mask=array(*per_token), sampler_logprobs=array(*per_token), policy_offset=array(*per_token),
      ended=array(rows, dtype=bool), prompt_length=2)
  scores = Scores(array(*per_token), array(*per_token), array(rows, MANY, width))
  head = Head(array(width, QWEN), QWEN)
  step = jax.jit(functools.partial(
      update.gradient, model=model, term=Term('own', o, microbatch_rows=1), chunk_tokens=64))
  used = _temporary_bytes(
      step, params_lib.abstract_params(model.specs), Batch(rollout, scores, scores, scores),
      Heads(head, head), array(dtype=jnp.int32), None)
  # 64 tokens have rows of 37 MiB; a parameter of the vocabulary and its gradient have 9 MiB each.
  assert used < 0.08 * logits
