"""Whole completions: where they begin and end, and that the sampler says of them what the scorer
does. (One token: test_draw.py. With a teacher mixed in: test_sample_mixed.py.)"""

from __future__ import annotations

from conftest import left_padded, numpy_log_softmax, numpy_rows, qwen3_config
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling import (
  DRAWS,
  PROMPT,
  PROMPTS,
  ROOM,
  SCRIPT_EOS,
  SCRIPT_PAD,
  SCRIPT_VOCAB,
  WIDTH,
  agrees,
  check_bookkeeping,
  real_sampler,
  real_scorer,
  sampler_of,
  scripted,
  truncated,
)

from opd_jax import models
from opd_jax.algorithm import sample
from opd_jax.models import params as params_lib


def test_positions_count_from_the_first_real_token():
  # Rotary positions would forgive a shift; learned positions, and the limit of a model, would not.
  valid = jnp.array([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]], bool)
  assert sample.positions_of(valid).tolist() == [
      [0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]]


# --- on a scripted model ---


@pytest.fixture(scope='module')
def chain():
  return sampler_of(scripted())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(prompts=st.lists(PROMPT, min_size=3, max_size=3))
def test_masks_shifts_and_ends_of_scripted_completions(chain, prompts):
  rollout = chain({}, left_padded(prompts, WIDTH, SCRIPT_PAD), jax.random.key(0))
  check_bookkeeping(rollout, prompts)
  for b, prompt in enumerate(prompts):
    # The script: count up from the last prompt token (after EOS comes 0) until EOS or no room.
    want, token = [], prompt[-1]
    while len(want) < ROOM and SCRIPT_EOS not in want:
      token = (token + 1) % SCRIPT_VOCAB
      want.append(token)
    assert rollout.tokens[b, WIDTH:WIDTH + len(want)].tolist() == want


@settings(max_examples=60, deadline=None, derandomize=True)
@given(prompts=st.lists(PROMPT, min_size=3, max_size=3), seed=st.integers(0, 2**31 - 1))
def test_masks_shifts_and_logprobs_of_random_completions(random_walk, prompts, seed):
  sampler, logits = random_walk
  rollout = sampler({}, left_padded(prompts, WIDTH, SCRIPT_PAD), jax.random.key(seed))
  check_bookkeeping(rollout, prompts)
  logprobs = numpy_log_softmax(logits / 0.7)
  for b, t in np.argwhere(np.asarray(rollout.mask)):
    last, token = rollout.tokens[b, t], rollout.tokens[b, t + 1]
    # float32 rounding of a softmax over 8 entries.
    assert abs(rollout.sampler_logprobs[b, t] - logprobs[last, token]) < 2e-6


@pytest.fixture(scope='module')
def random_walk():
  logits = np.random.RandomState(5).standard_normal((SCRIPT_VOCAB, SCRIPT_VOCAB))
  return sampler_of(scripted(logits=logits), temperature=0.7), logits


def test_first_token_may_be_eos(chain):
  rollout = chain({}, left_padded([[3, 6], [6], [2]], WIDTH, SCRIPT_PAD), jax.random.key(0))
  assert rollout.tokens[:, WIDTH:].tolist() == [[7, 0, 0, 0, 0], [7, 0, 0, 0, 0], [3, 4, 5, 6, 7]]
  assert rollout.mask.sum(axis=1).tolist() == [1, 1, 5]
  assert rollout.ended.all()


@pytest.mark.parametrize(('last', 'forwards'), [
    ([6, 6], 1),  # both rows end with the token that the prefill chose: no decode step
    ([6, 4], 3),  # EOS as third token: prefill and two steps
    ([1, 5], ROOM),  # no EOS within the room: prefill and one step for every other token
])
def test_decoding_stops_when_every_row_has_ended(last, forwards):
  calls = []
  sampler = sampler_of(scripted(on_forward=lambda: calls.append(1)))
  jax.block_until_ready(sampler({}, left_padded([[t] for t in last], WIDTH), jax.random.key(0)))
  jax.effects_barrier()
  assert len(calls) == forwards


def test_any_of_several_stop_tokens_ends_a_row():
  sampler = sampler_of(scripted(), stop_tokens=(4, SCRIPT_EOS))
  rollout = sampler({}, left_padded([[1], [4]], WIDTH), jax.random.key(0))
  assert rollout.tokens[:, WIDTH:].tolist() == [[2, 3, 4, 0, 0], [5, 6, 7, 0, 0]]


def test_tokens_of_a_row_are_drawn_independently():
  # The same distribution at every place, without EOS: the pair of the first two tokens must be
  # distributed as the product. One random key for both places would fill the diagonal.
  p = np.array([0.1, 0.2, 0.3, 0.05, 0.15, 0.05, 0.15, 0.0])
  with np.errstate(divide='ignore'):
    table = np.log(np.tile(p, (SCRIPT_VOCAB, 1)))
  sampler = sampler_of(scripted(logits=np.maximum(table, -1e30)), max_new_tokens=2)
  rollout = sampler({}, left_padded([[1]] * DRAWS, WIDTH), jax.random.key(6))
  pair = rollout.tokens[:, WIDTH] * SCRIPT_VOCAB + rollout.tokens[:, WIDTH + 1]
  assert agrees(pair, np.outer(p, p).reshape(-1))


# --- on a real model ---


@pytest.mark.parametrize('temperature', [0.6, 1.0, 1.7])
def test_sampler_and_scorer_agree(tiny_model, temperature):
  model, params = tiny_model
  prompts = left_padded(PROMPTS, 6)  # six places for at most four tokens: padding in every row
  # Compiled as the train loop compiles them: this is about rounding.
  sampler = real_sampler(model, jit=jax.jit, temperature=temperature)
  scorer = real_scorer(model, temperature, jit=jax.jit)
  gaps = []
  for seed in range(4):
    rollout = sampler(params, prompts, jax.random.key(seed))
    gaps.append(jnp.abs(scorer(params, rollout).logprobs - rollout.sampler_logprobs))
    assert jnp.sum(rollout.mask) >= 12
  # The promise of the design, for a cached decode against one teacher-forced pass in float32.
  assert float(jnp.max(jnp.stack(gaps))) < 1e-5
  if temperature != 1.0:
    # And the temperature is no decoration.
    other = real_scorer(model, 1.0, jit=jax.jit)(params, rollout)
    assert float(jnp.max(jnp.abs(other.logprobs - rollout.sampler_logprobs))) > 0.1


@pytest.mark.parametrize('knobs', [dict(top_p=0.8), dict(top_k=9, top_p=0.95)], ids=str)
def test_truncated_logprob_and_kept_mass_give_back_the_models_logprob(tiny_model, knobs):
  model, params = tiny_model
  rollout = real_sampler(model, temperature=0.6, **knobs)(params, left_padded(PROMPTS, 6),
                                                   jax.random.key(1))
  scores = real_scorer(model, 0.6)(params, rollout)
  whole = rollout.sampler_logprobs + rollout.policy_offset
  np.testing.assert_allclose(whole, scores.logprobs, atol=1e-5)  # the sampler/scorer bound again
  assert float(jnp.min(jnp.where(rollout.mask > 0, -rollout.policy_offset, 1.0))) > 0.01
  # The mass is that of the truncation: from the model's exact distribution, by hand.
  exact = numpy_rows(model, params, rollout, temperature=1.0)
  for b, t in np.argwhere(np.asarray(rollout.mask)):
    p, mass = truncated(exact[b, t], 0.6, knobs.get('top_k', 0), knobs.get('top_p', 1.0))
    assert rollout.policy_offset[b, t] == pytest.approx(np.log(mass), abs=1e-5)
    assert rollout.sampler_logprobs[b, t] == pytest.approx(
        np.log(p[rollout.tokens[b, t + 1]]), abs=1e-5)


def test_greedy_is_the_argmax_of_the_full_forward(tiny_model):
  model, params = tiny_model
  rollout = real_sampler(model, temperature=0.0)(params, left_padded(PROMPTS, 6), jax.random.key(0))
  exact = numpy_rows(model, params, rollout, temperature=1.0)
  chosen = np.argwhere(np.asarray(rollout.mask))
  assert len(chosen) >= 16
  for b, t in chosen:
    assert int(np.argmax(exact[b, t])) == int(rollout.tokens[b, t + 1])


def test_rows_do_not_see_each_other(tiny_model):
  model, params = tiny_model
  sampler = real_sampler(model, temperature=1.0)
  rows = [r for s in range(2) for r in [PROMPTS[0], PROMPTS[s + 1], PROMPTS[2]]]
  first = sampler(params, left_padded(rows[:3], 6), jax.random.key(3))
  second = sampler(params, left_padded(rows[3:], 6), jax.random.key(3))
  assert not jnp.array_equal(first.tokens[1], second.tokens[1])
  for row in (0, 2):
    same = jax.tree.map(lambda a, b, row=row: jnp.array_equal(a[row], b[row]), first, second)
    assert all(jax.tree.leaves(same))


def test_a_row_is_the_same_in_every_batch(tiny_model):
  model, params = tiny_model
  sampler = real_sampler(model, temperature=1.0)
  whole = sampler(params, left_padded(PROMPTS, 6), jax.random.key(3))
  rows = np.array([3, 1])
  part = left_padded([PROMPTS[i] for i in rows], 6).replace(rows=jnp.asarray(rows))
  found = sampler(params, part, jax.random.key(3))
  np.testing.assert_array_equal(found.tokens, whole.tokens[rows])
  assert not np.array_equal(
      sampler(params, part.replace(rows=None), jax.random.key(3)).tokens, whole.tokens[rows])


def test_decoding_makes_no_other_copy_of_the_embedding():
  # A head that is the embedding, transposed before the loop, would be one: as large as the largest
  # parameter, and read slowly.
  config = qwen3_config(vocab_size=8192, hidden_size=64, tie_word_embeddings=True)
  model = models.build(config)
  compiled = real_sampler(model, temperature=1.0).lower(
      params_lib.abstract_params(model.specs), left_padded(PROMPTS[:2], 6), jax.random.key(0)
  ).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 8192 * 64 * 4


def test_another_key_gives_other_samples_and_the_same_key_the_same(tiny_model):
  model, params = tiny_model
  sampler, prompts = real_sampler(model, temperature=1.0), left_padded(PROMPTS, 6)
  runs = [sampler(params, prompts, jax.random.key(s)) for s in (0, 0, 1)]
  assert jnp.array_equal(runs[0].tokens, runs[1].tokens)
  assert not jnp.array_equal(runs[0].tokens, runs[2].tokens)
