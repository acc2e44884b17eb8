"""Completions of a student with a teacher mixed in, token by token: the mixture, what is said about
it, and what cannot be mixed."""

from __future__ import annotations

import functools

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
from sampling import (
  DRAWS,
  PROMPT,
  PROMPTS,
  SCRIPT_EOS,
  SCRIPT_PAD,
  SCRIPT_VOCAB,
  WIDTH,
  agrees,
  check_bookkeeping,
  random_logits,
  real_sampler,
  real_scorer,
  sampler_of,
  scripted,
  tile,
  uniforms,
)

from opd_jax import models
from opd_jax.algorithm import sample
from opd_jax.types import UNUSED_LOGIT

MIX = dict(temperature=0.7, mix_temperature=1.6, mix_share=0.3)


def _mixture(student, teacher, temperature, mix_temperature, mix_share):
  """log(share p_T + (1 - share) p_S) and log p_S from logits, over the last axis, in float64."""
  own = numpy_log_softmax(np.asarray(student, np.float64) / temperature)
  theirs = numpy_log_softmax(np.asarray(teacher, np.float64) / mix_temperature)
  return np.log(mix_share * np.exp(theirs) + (1 - mix_share) * np.exp(own)), own


@pytest.mark.parametrize(('width', 'mix_width'), [(310, 300), (300, 310)])
def test_choose_mixed_samples_the_mixture_and_reports_its_logprobs(width, mix_width):
  own, theirs = random_logits(300, seed=3), random_logits(300, seed=4)
  want, student = _mixture(own, theirs, **MIX)
  padded = [tile(np.pad(x, (0, w - 300), constant_values=UNUSED_LOGIT))
            for x, w in ((own, width), (theirs, mix_width))]
  tokens, logprobs, offset = jax.jit(functools.partial(sample.choose_mixed, **MIX))(
      *padded, uniforms(4))
  assert agrees(tokens, np.exp(want))
  tokens = np.asarray(tokens)
  # float32 log-probs, of the student's down to -18: spacing 2e-6, and the sums of 300 terms.
  np.testing.assert_allclose(logprobs, want[tokens], atol=5e-6)
  np.testing.assert_allclose(offset, (student - want)[tokens], atol=1e-5)


def _walks():
  """Next-token log-probs of a student and of a teacher, tables [V, V] for `scripted`."""
  return numpy_log_softmax(1.5 * np.random.RandomState(8).standard_normal(
      (2, SCRIPT_VOCAB, SCRIPT_VOCAB)))


@functools.lru_cache
def _mixed_walk(**changes):
  student, teacher = (scripted(logits=table) for table in _walks())
  return functools.partial(sampler_of(student, mix_model=teacher, **{**MIX, **changes}),
                           mix_params={})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(prompts=st.lists(PROMPT, min_size=3, max_size=3), seed=st.integers(0, 2**31 - 1))
def test_masks_shifts_and_logprobs_of_mixed_completions(prompts, seed):
  rollout = _mixed_walk()({}, left_padded(prompts, WIDTH, SCRIPT_PAD), jax.random.key(seed))
  check_bookkeeping(rollout, prompts)
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
  assert agrees(seen, np.array(list(want.values())))


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
  sampler = real_sampler(model, jit=jit, mix_model=mix_model, **MIX)
  rollout = sampler(params, left_padded(PROMPTS, 6), jax.random.key(2), mix_params=mix_params)
  own, theirs = (
      real_scorer(m, temperature, jit=jit)(p, rollout).logprobs
      for (m, p), temperature in zip(pair, (0.7, 1.6), strict=True))
  want = jnp.logaddexp(np.log(0.3) + theirs, np.log(0.7) + own)
  chosen = np.asarray(rollout.mask) > 0
  assert chosen.sum() >= 12
  # The bound of test_sample.py, for two caches and two teacher-forced passes.
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
  plain, mixed = real_sampler(model), real_sampler(model, mix_model=mix_model, mix_share=0.0)
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
  model = scripted()
  knobs = dict(MIX, max_new_tokens=5, top_p=1.0, top_k=0, stop_tokens=(SCRIPT_EOS,),
               pad_token=SCRIPT_PAD, model=model, mix_model=model, mix_params={})
  knobs |= changes
  if knobs['mix_model'] == 'cut':
    knobs['mix_model'] = models.limit_vocabulary(model, 7)
  with pytest.raises(ValueError, match=words):
    sample.sample_fn({}, left_padded([[1]], WIDTH), jax.random.key(0), **knobs)
