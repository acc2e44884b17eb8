"""Properties of a step that hypothesis draws cases for: what never reaches it, what sums to one."""

from __future__ import annotations

import dataclasses

from conftest import make_rollout, numpy_log_softmax
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
from steps import PROMPTS, ROWS, SAMPLED, SFT, new_state

from opd_jax.algorithm import objective as objective_lib
from opd_jax.algorithm import signals
from opd_jax.types import Batch, Head, Heads, Model, Scores


@pytest.fixture(scope='module')
def masked_step():
  """One compiled step that uses every per-token input: distillation, reward and discount."""
  batch = steps.transformer_case('float32')
  objective = dataclasses.replace(SAMPLED, discount=0.5, reward_coef=0.3)
  step = steps.step(batch.student, objective, group_size=2)
  inputs = steps.inputs(objective, batch)
  return batch, inputs, lambda *x: step(new_state(batch.params), *x)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1))
def test_what_stands_in_masked_places_never_reaches_the_step(masked_step, seed):
  batch, (given, heads), step = masked_step
  rollout, teacher, student = given.rollout, given.teacher, given.student
  rng = np.random.RandomState(seed)

  def fill(x, keep):  # wherever the mask is 0: numbers whose exp is infinite, and what is none
    other = rng.choice([np.nan, np.inf, -np.inf, *rng.uniform(-200, 200, 7)], x.shape)
    return jnp.where(keep > 0, x, jnp.asarray(other, x.dtype))

  tokens = jnp.where(rollout.valid, rollout.tokens,
                     jnp.asarray(rng.randint(0, 11, rollout.tokens.shape)))
  mask = rollout.mask
  other = rollout.replace(
      tokens=tokens.astype(rollout.tokens.dtype),
      sampler_logprobs=fill(rollout.sampler_logprobs, mask),
      policy_offset=fill(rollout.policy_offset, mask))
  graded = [Scores(logprobs=fill(s.logprobs, mask), entropy=fill(s.entropy, mask), hidden=None)
            for s in (teacher, student)]
  want, metrics = step(given, heads)
  got, same = step(given.replace(rollout=other, teacher=graded[0], student=graded[1]), heads)
  # The same program of the same numbers: not one bit may differ.
  assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, got.params, want.params)))
  for name in metrics:
    assert jnp.array_equal(metrics[name], same[name]), name


def _context_free(vocab, width):
  """A model that predicts the same whatever it reads: only the targets can matter."""
  def forward(params, tokens, positions, valid, cache):
    hidden = jnp.broadcast_to(params['hidden'][None, None], (*tokens.shape, width))
    return hidden, cache

  return Model(family='context_free', config=None, vocab_in_use=vocab, specs={}, forward=forward,
               head=lambda params: Head(params['head'], vocab), init_cache=None, unstack=None,
               to_hf=dict)


@pytest.fixture(scope='module')
def context_free_step():
  model = _context_free(11, 4)
  rng = np.random.RandomState(0)
  params = {'hidden': jnp.asarray(rng.standard_normal(4), jnp.float32),
            'head': jnp.asarray(rng.standard_normal((4, 11)), jnp.float32)}
  step = steps.step(model, SFT)
  return params, lambda rollout: step(new_state(params), Batch(rollout), Heads())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(prompts=st.lists(st.lists(st.integers(0, 10), min_size=4, max_size=4),
                        min_size=6, max_size=6))
def test_prompt_tokens_are_never_targets(context_free_step, prompts):
  params, step = context_free_step
  lengths = [len(p) for p in PROMPTS]
  prompts = [p[:n] for p, n in zip(prompts, lengths, strict=True)]
  runs = [step(make_rollout(p, ROWS, prompt_width=5, room=5)) for p in (PROMPTS, prompts)]
  assert runs[0][1]['loss'] == runs[1][1]['loss']
  assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, runs[0][0].params, runs[1][0].params)))
  # The completion's tokens, all of them and EOS too, are what the loss is made of.
  logprobs = numpy_log_softmax(np.asarray(params['hidden']) @ np.asarray(params['head']))
  want = -np.mean([logprobs[token] for row in ROWS for token in row])
  assert float(runs[0][1]['loss']) == pytest.approx(want, rel=1e-5)  # float32 sum of 21 terms


_returns = jax.jit(signals.discounted_return, static_argnums=1)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rewards=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=7),
       discount=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_discounted_return_against_numpy(rewards, discount):
  width = 7  # one shape, so that the scan compiles once
  padded = np.array(rewards + [0.0] * (width - len(rewards)))
  rows = np.stack([padded, -2 * padded])
  got = _returns(jnp.asarray(rows, jnp.float32), discount)
  want = [[sum(discount**(k - t) * row[k] for k in range(t, width)) for t in range(width)]
          for row in rows]
  np.testing.assert_allclose(got, want, atol=1e-5)  # float32 sums of 7 terms of at most 10


@settings(max_examples=50, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 6), min_size=4, max_size=4))
def test_reduction_weights_sum_to_one(lengths):
  mask = jnp.asarray(np.arange(6)[None] < np.array(lengths)[:, None], jnp.float32)
  total = sum(lengths)
  for reduction in objective_lib.REDUCTIONS:
    weights = np.asarray(signals.reduction_weights(mask, reduction))
    assert not weights[np.asarray(mask) == 0].any()
    assert weights.sum() == pytest.approx(1.0 if total else 0.0, abs=1e-6)
    for b, length in enumerate(lengths):
      share = length / total if reduction == 'token_mean' and total else (
          (length > 0) / max(sum(n > 0 for n in lengths), 1))
      assert weights[b].sum() == pytest.approx(share, abs=1e-6)
