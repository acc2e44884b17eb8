"""The sampler: what it draws, what it says about it, and where a completion begins and ends."""

from __future__ import annotations

import functools
import types

from conftest import (
  left_padded,
  numpy_log_softmax,
  numpy_rows,
  quick_jit,
  qwen3_config,
  sharp_params,
)
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from opd_jax import models
from opd_jax.algorithm import sample, score
from opd_jax.types import UNUSED_LOGIT, Head, Model, Wants

# Keys are fixed, so a chi-square test gives the same p-value every time. A right sampler fails a
# threshold of 1e-3 for one key in a thousand (then choose another key); a wrong probability of a
# few per cent, seen 20,000 times, gives p-values far below it.
P_VALUE = 1e-3
DRAWS = 20_000


def _agrees(tokens, probabilities):
  """Chi-square of the drawn tokens; tokens expected less than 5 times are counted together."""
  counts = np.bincount(np.asarray(tokens), minlength=len(probabilities)).astype(float)
  assert len(counts) == len(probabilities), 'a token outside the vocabulary'
  assert not counts[probabilities == 0].any(), 'a token of probability zero'
  expected = probabilities * counts.sum()
  rare = expected < 5
  if expected[rare].sum() >= 5:
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
  else:
    counts, expected = counts[~rare], expected[~rare]
  return scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > P_VALUE


def _logits(vocab, seed=0):
  return (2 * np.random.RandomState(seed).standard_normal(vocab)).astype(np.float32)


def _tile(logits, rows=DRAWS):
  return jnp.asarray(np.tile(np.asarray(logits, np.float32), (rows, 1)))


# --- draw ---


@pytest.mark.parametrize('vocab', [7, 256, 300, 700])  # one block; one full; two; three, 188 short
def test_draw_frequencies(vocab):
  logits = _logits(vocab)
  tokens = jax.jit(sample.draw)(_tile(logits), jax.random.key(1))
  assert _agrees(tokens, np.exp(numpy_log_softmax(logits)))


def test_draw_never_picks_probability_zero():
  logits = np.full(1100, -np.inf, np.float32)  # five blocks, the last one padded
  # First and last token of a block, a whole block of zeros (256..511), one token alone in a block.
  allowed = [0, 1, 254, 512, 700, 767, 900, 1099]
  logits[allowed] = [0, -3, 1, 2, -8, 0, 1, -1]
  tokens = jax.jit(sample.draw)(_tile(logits), jax.random.key(2))
  assert _agrees(tokens, np.exp(numpy_log_softmax(logits)))
  assert set(np.unique(tokens)) <= set(allowed)


@pytest.mark.parametrize('uniform', [0.0, 1 - 2**-23])  # all that jax.random.uniform can return
def test_draw_at_the_ends_of_the_uniform(monkeypatch, uniform):
  monkeypatch.setattr(jax.random, 'uniform',
                      lambda key, shape, dtype: jnp.full(shape, uniform, dtype))
  logits = np.full(600, -np.inf, np.float32)
  allowed = [258, 300, 510]
  logits[allowed] = [0.3, -1, 0.1]
  token = int(sample.draw(_tile(logits, 1), jax.random.key(0))[0])
  assert token == (258 if uniform == 0.0 else 510)


def test_draw_where_rounding_makes_cumulative_sums_go_down_and_up(monkeypatch):
  # XLA sums long rows in a tree, so float32 cumulative sums are not monotone: one may rise at a
  # token of weight zero. With 151,936 tokens there are 594 blocks; here blocks of one token.
  monkeypatch.setattr(sample, '_BLOCK', 1)
  rng = np.random.RandomState(0)
  logits = (3 * rng.standard_normal((64, 600))).astype(np.float32)
  logits[rng.rand(64, 600) < 0.5] = -np.inf
  weights = jnp.exp(logits - logits.max(1, keepdims=True))
  sums = np.asarray(jnp.cumsum(weights, axis=-1))
  places = np.argwhere((np.asarray(weights)[:, 1:] == 0) & (np.diff(sums, axis=1) > 0))
  uniforms, rows = [], []
  for row, i in places:  # a uniform whose target falls into the step at token i + 1
    total = sums[row, -1]
    uniform = np.float32(sums[row, i] / total)
    for u in (uniform, np.nextafter(uniform, np.float32(1)), np.nextafter(uniform, np.float32(0))):
      if sums[row, i] <= u * total < sums[row, i + 1]:
        uniforms.append(u)
        rows.append(row)
        break
  if not rows:
    pytest.skip('cumulative sums are monotone on this machine')
  monkeypatch.setattr(
      jax.random, 'uniform',
      lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(uniforms)[None], shape))
  drawn = sample.draw(jnp.asarray(logits[rows]), jax.random.key(0))
  picked = jnp.take_along_axis(jnp.asarray(logits[rows]), drawn[:, None], axis=1)
  assert bool(jnp.all(jnp.isfinite(picked))), 'a token of probability zero was drawn'


def test_draw_where_no_cumulative_sum_reaches_the_target(monkeypatch):
  # Rounding again: the total may come out above the sum up to the last token of positive weight,
  # and the largest uniform then points behind it. One row in twenty here.
  monkeypatch.setattr(sample, '_BLOCK', 1)
  monkeypatch.setattr(jax.random, 'uniform',
                      lambda key, shape, dtype: jnp.full(shape, 1 - 2**-23, dtype))
  rng = np.random.RandomState(0)
  logits = (3 * rng.standard_normal((1000, 600))).astype(np.float32)
  logits[np.arange(600)[None] >= rng.randint(100, 580, (1000, 1))] = -np.inf
  drawn = np.asarray(sample.draw(jnp.asarray(logits), jax.random.key(0)))
  assert np.all((drawn >= 0) & (drawn < 600))
  assert np.all(np.isfinite(logits[np.arange(1000), drawn])), 'a token of probability zero'


# --- truncate, choose ---


def _truncated(logits, temperature, top_k, top_p):
  """The renormalized distribution of one row and the mass kept, float64: tokens enter the nucleus
  from the most likely down until its mass reaches top_p."""
  p = np.exp(numpy_log_softmax(np.asarray(logits, np.float64) / temperature))
  kept = np.ones(len(p), bool)
  if top_k:
    kept = p >= np.sort(p)[-top_k]
  inside = np.where(kept, p, 0) / p[kept].sum()
  nucleus, mass = np.zeros(len(p), bool), 0.0
  for token in np.argsort(-inside):
    if mass >= top_p:
      break
    nucleus[token], mass = True, mass + inside[token]
  kept &= nucleus
  return np.where(kept, p, 0) / p[kept].sum(), p[kept].sum()


KNOBS = [dict(temperature=1.0, top_k=0, top_p=1.0), dict(temperature=0.6, top_k=0, top_p=1.0),
         dict(temperature=1.5, top_k=9, top_p=1.0), dict(temperature=1.0, top_k=0, top_p=0.8),
         dict(temperature=0.8, top_k=40, top_p=0.9)]


@pytest.mark.parametrize('knobs', KNOBS, ids=str)
def test_choose_samples_the_truncated_distribution_and_reports_its_logprobs(knobs):
  logits = _logits(300, seed=3)
  want, mass = _truncated(logits, **knobs)
  tokens, logprobs, logmass = jax.jit(functools.partial(sample.choose, **knobs))(
      _tile(logits), jax.random.key(4))
  assert _agrees(tokens, want)
  # float32 log-probs down to -10: spacing 1e-6, plus the rounding of a sum of 300 terms.
  np.testing.assert_allclose(logprobs, np.log(want[np.asarray(tokens)]), atol=5e-6)
  np.testing.assert_allclose(logmass, np.log(mass), atol=2e-6)
  if mass == 1.0:
    assert not np.any(np.asarray(logmass)), 'nothing was cut: exactly zero'


def test_choose_at_temperature_zero_is_a_point_mass_on_the_argmax():
  logits = jnp.asarray(np.stack([_logits(300, seed=s) for s in range(5)]))
  tokens, logprobs, mass = sample.choose(logits, jax.random.key(0), temperature=0.0, top_p=1.0,
                                         top_k=0)
  np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
  assert not np.any(np.asarray(logprobs)) and not np.any(np.asarray(mass))


def test_truncate_keeps_ties_and_at_least_one_token():
  logits = jnp.log(jnp.array([[0.1, 0.3, 0.3, 0.2, 0.1], [0.05, 0.05, 0.7, 0.1, 0.1]]))

  def kept(top_k, top_p):
    return np.isfinite(sample.truncate(logits, top_k, top_p)).astype(int).tolist()

  assert kept(1, 1.0) == [[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]
  assert kept(0, 0.01) == [[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]
  assert kept(0, 0.65) == [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]
  assert kept(0, 0.75) == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
  assert kept(3, 1.0) == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
  assert kept(0, 1.0) == [[1] * 5] * 2
  # top_p acts on what top_k left, renormalized: 0.3/0.6 each in the first row.
  assert kept(2, 0.45) == [[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]


def test_positions_count_from_the_first_real_token():
  # Rotary positions would forgive a shift; learned positions, and the limit of a model, would not.
  valid = jnp.array([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]], bool)
  assert sample.positions_of(valid).tolist() == [
      [0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]]


# --- sample_fn on a scripted model ---

SCRIPT_VOCAB, SCRIPT_EOS, SCRIPT_PAD = 8, 7, 0


def _scripted(on_forward=lambda: None, logits=None) -> Model:
  """A `Model` whose next-token logits are a function of the last token: by default token k is
  followed by k + 1 (so a prompt that ends in k reaches EOS = 7 after 7 - k tokens), or by the
  table `logits` [V, V]."""
  table = np.asarray(60 * np.eye(SCRIPT_VOCAB)[(np.arange(SCRIPT_VOCAB) + 1) % SCRIPT_VOCAB]
                     if logits is None else logits, np.float32)

  def forward(params, tokens, positions, valid, cache):
    jax.debug.callback(on_forward)
    return jnp.asarray(table)[tokens], cache

  return Model(family='scripted', config=types.SimpleNamespace(vocab_size=SCRIPT_VOCAB),
               vocab_in_use=SCRIPT_VOCAB, specs={}, forward=forward,
               head=lambda params: Head(None, SCRIPT_VOCAB),
               init_cache=lambda batch, length: {}, unstack=lambda params: params, to_hf=dict)


def _sampler(model, **changes):
  knobs = dict(max_new_tokens=5, temperature=1.0, top_p=1.0, top_k=0, stop_tokens=(SCRIPT_EOS,),
               pad_token=SCRIPT_PAD)
  return quick_jit(functools.partial(sample.sample_fn, model=model, **{**knobs, **changes}))


WIDTH, ROOM = 4, 5
PROMPT = st.lists(st.integers(1, SCRIPT_VOCAB - 1), min_size=1, max_size=WIDTH)


@pytest.fixture(scope='module')
def chain():
  return _sampler(_scripted())


def _check_bookkeeping(rollout, prompts):
  """Everything that must hold for any rollout, in plain loops over `types.py`'s convention."""
  r = jax.tree.map(np.asarray, rollout)
  tokens, mask = r.tokens, r.mask
  total = WIDTH + ROOM
  assert r.prompt_length == WIDTH and tokens.shape == (len(prompts), total)
  assert mask.shape == (len(prompts), total - 1)
  assert r.sampler_logprobs.shape == r.policy_offset.shape == mask.shape
  for b, prompt in enumerate(prompts):
    assert tokens[b, :WIDTH].tolist() == [SCRIPT_PAD] * (WIDTH - len(prompt)) + prompt
    completion = tokens[b, WIDTH:].tolist()
    ends = SCRIPT_EOS in completion
    length = completion.index(SCRIPT_EOS) + 1 if ends else ROOM
    assert bool(r.ended[b]) == ends
    assert completion[length:] == [SCRIPT_PAD] * (ROOM - length), 'something after EOS'
    for t in range(total):
      real = WIDTH - len(prompt) <= t < WIDTH + length
      assert bool(r.valid[b, t]) == real
    for t in range(total - 1):
      chosen = WIDTH <= t + 1 < WIDTH + length  # entry t belongs to tokens[t + 1]
      assert mask[b, t] == float(chosen)
      if not chosen:
        assert r.sampler_logprobs[b, t] == 0 and r.policy_offset[b, t] == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(prompts=st.lists(PROMPT, min_size=3, max_size=3))
def test_masks_shifts_and_ends_of_scripted_completions(chain, prompts):
  rollout = chain({}, left_padded(prompts, WIDTH, SCRIPT_PAD), jax.random.key(0))
  _check_bookkeeping(rollout, prompts)
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
  _check_bookkeeping(rollout, prompts)
  logprobs = numpy_log_softmax(logits / 0.7)
  for b, t in np.argwhere(np.asarray(rollout.mask)):
    last, token = rollout.tokens[b, t], rollout.tokens[b, t + 1]
    # float32 rounding of a softmax over 8 entries.
    assert abs(rollout.sampler_logprobs[b, t] - logprobs[last, token]) < 2e-6


@pytest.fixture(scope='module')
def random_walk():
  logits = np.random.RandomState(5).standard_normal((SCRIPT_VOCAB, SCRIPT_VOCAB))
  return _sampler(_scripted(logits=logits), temperature=0.7), logits


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
  sampler = _sampler(_scripted(on_forward=lambda: calls.append(1)))
  jax.block_until_ready(sampler({}, left_padded([[t] for t in last], WIDTH), jax.random.key(0)))
  jax.effects_barrier()
  assert len(calls) == forwards


def test_any_of_several_stop_tokens_ends_a_row():
  sampler = _sampler(_scripted(), stop_tokens=(4, SCRIPT_EOS))
  rollout = sampler({}, left_padded([[1], [4]], WIDTH), jax.random.key(0))
  assert rollout.tokens[:, WIDTH:].tolist() == [[2, 3, 4, 0, 0], [5, 6, 7, 0, 0]]


def test_tokens_of_a_row_are_drawn_independently():
  # The same distribution at every place, without EOS: the pair of the first two tokens must be
  # distributed as the product. One random key for both places would fill the diagonal.
  p = np.array([0.1, 0.2, 0.3, 0.05, 0.15, 0.05, 0.15, 0.0])
  with np.errstate(divide='ignore'):
    table = np.log(np.tile(p, (SCRIPT_VOCAB, 1)))
  sampler = _sampler(_scripted(logits=np.maximum(table, -1e30)), max_new_tokens=2)
  rollout = sampler({}, left_padded([[1]] * DRAWS, WIDTH), jax.random.key(6))
  pair = rollout.tokens[:, WIDTH] * SCRIPT_VOCAB + rollout.tokens[:, WIDTH + 1]
  assert _agrees(pair, np.outer(p, p).reshape(-1))


# --- sample_fn on a real model ---

PROMPTS = [[5, 9, 11, 2], [7], [3, 3, 8], [1, 2]]
EOS = 4


@functools.lru_cache  # one program for all tests with the same settings
def _real(model, jit=quick_jit, **changes):
  knobs = dict(max_new_tokens=8, temperature=1.0, top_p=1.0, top_k=0, stop_tokens=(EOS,),
               pad_token=0)
  return jit(functools.partial(sample.sample_fn, model=model, **{**knobs, **changes}))


@functools.lru_cache
def _scores(model, temperature, jit=quick_jit):
  return jit(functools.partial(
      score.teacher_logprob_fn, model=model, temperature=temperature, wants=Wants(logprobs=True),
      chunk_tokens=1000, microbatch_rows=0))


@pytest.mark.parametrize('temperature', [0.6, 1.0, 1.7])
def test_sampler_and_scorer_agree(tiny_model, temperature):
  model, params = tiny_model
  prompts = left_padded(PROMPTS, 6)  # six places for at most four tokens: padding in every row
  # Compiled as the train loop compiles them: this is about rounding.
  sampler = _real(model, jit=jax.jit, temperature=temperature)
  scorer = _scores(model, temperature, jit=jax.jit)
  gaps = []
  for seed in range(4):
    rollout = sampler(params, prompts, jax.random.key(seed))
    gaps.append(jnp.abs(scorer(params, rollout).logprobs - rollout.sampler_logprobs))
    assert jnp.sum(rollout.mask) >= 12
  # The promise of the design, for a cached decode against one teacher-forced pass in float32.
  assert float(jnp.max(jnp.stack(gaps))) < 1e-5
  if temperature != 1.0:
    # And the temperature is no decoration.
    other = _scores(model, 1.0, jit=jax.jit)(params, rollout)
    assert float(jnp.max(jnp.abs(other.logprobs - rollout.sampler_logprobs))) > 0.1


@pytest.mark.parametrize('knobs', [dict(top_p=0.8), dict(top_k=9, top_p=0.95)], ids=str)
def test_truncated_logprob_and_kept_mass_give_back_the_models_logprob(tiny_model, knobs):
  model, params = tiny_model
  rollout = _real(model, temperature=0.6, **knobs)(params, left_padded(PROMPTS, 6),
                                                   jax.random.key(1))
  scores = _scores(model, 0.6)(params, rollout)
  whole = rollout.sampler_logprobs + rollout.policy_offset
  np.testing.assert_allclose(whole, scores.logprobs, atol=1e-5)  # the sampler/scorer bound again
  assert float(jnp.min(jnp.where(rollout.mask > 0, -rollout.policy_offset, 1.0))) > 0.01
  # The mass is that of the truncation: from the model's exact distribution, by hand.
  exact = numpy_rows(model, params, rollout, temperature=1.0)
  for b, t in np.argwhere(np.asarray(rollout.mask)):
    p, mass = _truncated(exact[b, t], 0.6, knobs.get('top_k', 0), knobs.get('top_p', 1.0))
    assert rollout.policy_offset[b, t] == pytest.approx(np.log(mass), abs=1e-5)
    assert rollout.sampler_logprobs[b, t] == pytest.approx(
        np.log(p[rollout.tokens[b, t + 1]]), abs=1e-5)


def test_greedy_is_the_argmax_of_the_full_forward(tiny_model):
  model, params = tiny_model
  rollout = _real(model, temperature=0.0)(params, left_padded(PROMPTS, 6), jax.random.key(0))
  exact = numpy_rows(model, params, rollout, temperature=1.0)
  chosen = np.argwhere(np.asarray(rollout.mask))
  assert len(chosen) >= 16
  for b, t in chosen:
    assert int(np.argmax(exact[b, t])) == int(rollout.tokens[b, t + 1])


def test_rows_do_not_see_each_other(tiny_model):
  model, params = tiny_model
  sampler = _real(model, temperature=1.0)
  rows = [r for s in range(2) for r in [PROMPTS[0], PROMPTS[s + 1], PROMPTS[2]]]
  first = sampler(params, left_padded(rows[:3], 6), jax.random.key(3))
  second = sampler(params, left_padded(rows[3:], 6), jax.random.key(3))
  assert not jnp.array_equal(first.tokens[1], second.tokens[1])
  for row in (0, 2):
    same = jax.tree.map(lambda a, b, row=row: jnp.array_equal(a[row], b[row]), first, second)
    assert all(jax.tree.leaves(same))


def test_another_key_gives_other_samples_and_the_same_key_the_same(tiny_model):
  model, params = tiny_model
  sampler, prompts = _real(model, temperature=1.0), left_padded(PROMPTS, 6)
  runs = [sampler(params, prompts, jax.random.key(s)) for s in (0, 0, 1)]
  assert jnp.array_equal(runs[0].tokens, runs[1].tokens)
  assert not jnp.array_equal(runs[0].tokens, runs[2].tokens)


# --- a teacher mixed in ---

MIX = dict(temperature=0.7, mix_temperature=1.6, mix_share=0.3)


def _mixture(student, teacher, temperature, mix_temperature, mix_share):
  """log(share p_T + (1 - share) p_S) and log p_S from logits, over the last axis, in float64."""
  own = numpy_log_softmax(np.asarray(student, np.float64) / temperature)
  theirs = numpy_log_softmax(np.asarray(teacher, np.float64) / mix_temperature)
  return np.log(mix_share * np.exp(theirs) + (1 - mix_share) * np.exp(own)), own


@pytest.mark.parametrize(('width', 'mix_width'), [(310, 300), (300, 310)])
def test_choose_mixed_samples_the_mixture_and_reports_its_logprobs(width, mix_width):
  own, theirs = _logits(300, seed=3), _logits(300, seed=4)
  want, student = _mixture(own, theirs, **MIX)
  padded = [_tile(np.pad(x, (0, w - 300), constant_values=UNUSED_LOGIT))
            for x, w in ((own, width), (theirs, mix_width))]
  tokens, logprobs, offset = jax.jit(functools.partial(sample.choose_mixed, **MIX))(
      *padded, jax.random.key(4))
  assert _agrees(tokens, np.exp(want))
  tokens = np.asarray(tokens)
  # float32 log-probs, of the student's down to -18: spacing 2e-6, and the sums of 300 terms.
  np.testing.assert_allclose(logprobs, want[tokens], atol=5e-6)
  np.testing.assert_allclose(offset, (student - want)[tokens], atol=1e-5)


def _walks():
  """Next-token log-probs of a student and of a teacher, tables [V, V] for `_scripted`."""
  return numpy_log_softmax(1.5 * np.random.RandomState(8).standard_normal(
      (2, SCRIPT_VOCAB, SCRIPT_VOCAB)))


@functools.lru_cache
def _mixed_walk(**changes):
  student, teacher = (_scripted(logits=table) for table in _walks())
  return functools.partial(_sampler(student, mix_model=teacher, **{**MIX, **changes}),
                           mix_params={})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(prompts=st.lists(PROMPT, min_size=3, max_size=3), seed=st.integers(0, 2**31 - 1))
def test_masks_shifts_and_logprobs_of_mixed_completions(prompts, seed):
  rollout = _mixed_walk()({}, left_padded(prompts, WIDTH, SCRIPT_PAD), jax.random.key(seed))
  _check_bookkeeping(rollout, prompts)
  mixed, own = _mixture(*_walks(), **MIX)
  for b, t in np.argwhere(np.asarray(rollout.mask)):
    place = rollout.tokens[b, t], rollout.tokens[b, t + 1]
    # float32 rounding of a softmax over 8 entries, twice.
    assert abs(rollout.sampler_logprobs[b, t] - mixed[place]) < 4e-6
    assert abs(rollout.policy_offset[b, t] - (own - mixed)[place]) < 4e-6


@pytest.fixture(scope='module')
def mixed_rows():
  """Many mixed completions of one prompt, at most three tokens each, from token 1."""
  return _mixed_walk(max_new_tokens=3)({}, left_padded([[1]] * DRAWS, WIDTH, SCRIPT_PAD),
                                       jax.random.key(7))


def _completions(table, start=1, room=3):
  """(tokens, log-probability) of every completion under the next-token log-probs `table`."""
  for token in range(SCRIPT_VOCAB):
    logprob = table[start, token]
    if token == SCRIPT_EOS or room == 1:
      yield (token,), logprob
    else:
      for rest, more in _completions(table, token, room - 1):
        yield (token, *rest), logprob + more


def test_every_token_is_drawn_from_the_mixture(mixed_rows):
  # Not each row from one of the models: that would give other pairs of neighbours.
  mixed, _ = _mixture(*_walks(), **MIX)
  want = {tokens: np.exp(logprob) for tokens, logprob in _completions(mixed)}
  assert sum(want.values()) == pytest.approx(1.0)
  number = {tokens: i for i, tokens in enumerate(want)}
  seen = [number[tuple(row[:int(n)])] for row, n in zip(
      np.asarray(mixed_rows.completion_targets).tolist(), mixed_rows.mask.sum(axis=1), strict=True)]
  assert _agrees(seen, np.array(list(want.values())))


def test_weights_from_the_offset_make_mixed_samples_the_students(mixed_rows):
  # E_mix[p_S / p_mix g] = E_S[g] over whole completions, with g the sum of their tokens.
  _, own = _mixture(*_walks(), **MIX)
  want = sum(np.exp(logprob) * sum(tokens) for tokens, logprob in _completions(own))
  r = jax.tree.map(np.asarray, mixed_rows)
  value = np.sum(r.tokens[:, 1:] * r.mask, axis=1)
  weight = np.exp(np.sum(r.policy_offset, axis=1, dtype=np.float64))
  assert weight.max() <= (1 - MIX['mix_share'])**-3 * (1 + 1e-5)  # why mixing tames the weights
  error = np.std(weight * value) / np.sqrt(DRAWS)
  # Four standard errors, by chance once in 16,000 keys; without weights it is over ten.
  assert abs(np.mean(weight * value) - want) < 4 * error
  assert abs(np.mean(value) - want) > 10 * error


@pytest.fixture(scope='module')
def wide_model():
  """Another model of as many tokens as `tiny_model`, in a vocabulary padded beyond them; the
  padding would take nearly all the mass."""
  model = models.build(qwen3_config(vocab_size=53, num_hidden_layers=1), vocab_in_use=48)
  params = sharp_params(model, seed=1)
  return model, dict(params, head=params['head'].at[:, 48:].multiply(20.0))


@pytest.mark.parametrize(('student_is_wider', 'jit'), [
    (False, jax.jit),  # as the train loop compiles them: this is about rounding
    (True, quick_jit)], ids=['wider_teacher', 'wider_student'])
def test_mixed_logprobs_are_those_of_both_scorers(tiny_model, wide_model, student_is_wider, jit):
  pair = (tiny_model, wide_model)[::-1 if student_is_wider else 1]
  (model, params), (mix_model, mix_params) = pair
  sampler = _real(model, jit=jit, mix_model=mix_model, **MIX)
  rollout = sampler(params, left_padded(PROMPTS, 6), jax.random.key(2), mix_params=mix_params)
  own, theirs = (
      _scores(m, temperature, jit=jit)(p, rollout).logprobs
      for (m, p), temperature in zip(pair, (0.7, 1.6), strict=True))
  want = jnp.logaddexp(np.log(0.3) + theirs, np.log(0.7) + own)
  chosen = np.asarray(rollout.mask) > 0
  assert chosen.sum() >= 12
  # The bound of `test_sampler_and_scorer_agree`, for two caches and two teacher-forced passes.
  np.testing.assert_allclose(rollout.sampler_logprobs[chosen], want[chosen], atol=1e-5)
  np.testing.assert_allclose(rollout.sampler_logprobs + rollout.policy_offset, own, atol=1e-5)
  # And from the equations, without padding on the left or of the vocabulary.
  logits = [numpy_rows(m, p, rollout, temperature=1.0)[..., :48] for m, p in pair]
  mixed, exact_own = _mixture(*logits, **MIX)
  for b, t in np.argwhere(chosen):
    token = rollout.tokens[b, t + 1]
    assert rollout.sampler_logprobs[b, t] == pytest.approx(mixed[b, t, token], abs=1e-5)
    assert rollout.policy_offset[b, t] == pytest.approx(
        (exact_own - mixed)[b, t, token], abs=1e-5)


def test_a_share_of_zero_is_the_program_without_a_teacher(tiny_model, wide_model):
  (model, params), (mix_model, mix_params) = tiny_model, wide_model
  args = params, left_padded(PROMPTS, 6), jax.random.key(3)
  plain, mixed = _real(model), _real(model, mix_model=mix_model, mix_share=0.0)
  assert plain.lower(*args).as_text() == mixed.lower(*args, mix_params=mix_params).as_text()
  same = jax.tree.map(jnp.array_equal, plain(*args), mixed(*args, mix_params=mix_params))
  assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(('changes', 'words'), [
    (dict(mix_share=1.0), 'mix_share=1.0; allowed: from 0'),
    (dict(mix_share=-0.1), 'mix_share=-0.1; allowed: from 0'),
    (dict(mix_share=float('nan')), 'mix_share=nan; allowed: from 0'),
    (dict(mix_params=None), 'mix_params=None; allowed'),
    (dict(mix_model=None), 'mix_model=None; allowed'),
    (dict(mix_temperature=0.0), 'mix_temperature=0.0; allowed: above 0'),
    (dict(temperature=0.0), 'mix_share=0.3 with temperature=0.0.* allowed: above 0'),
    (dict(top_p=0.9), 'mix_share=0.3 with top_p=0.9 and top_k=0.* allowed: top_p=1.0'),
    (dict(top_k=5), 'mix_share=0.3 with top_p=1.0 and top_k=5.* allowed: top_p=1.0'),
    (dict(mix_model='cut'), 'a mix_model of 7 tokens; allowed: the 8')], ids=str)
def test_what_cannot_be_mixed_is_refused(changes, words):
  model = _scripted()
  knobs = dict(MIX, max_new_tokens=5, top_p=1.0, top_k=0, stop_tokens=(SCRIPT_EOS,),
               pad_token=SCRIPT_PAD, model=model, mix_model=model, mix_params={})
  knobs |= changes
  if knobs['mix_model'] == 'cut':
    knobs['mix_model'] = models.limit_vocabulary(model, 7)
  with pytest.raises(ValueError, match=words):
    sample.sample_fn({}, left_padded([[1]], WIDTH), jax.random.key(0), **knobs)
