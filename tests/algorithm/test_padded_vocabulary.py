"""Vocabularies padded beyond the ids in use (Qwen: 151936 and 152064 wide, one tokenizer), from the
head through sampling and scoring to the gradient."""

from __future__ import annotations

import functools

from conftest import left_padded, quick_jit, qwen3_config, sharp_params
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax import models
from opd_jax.algorithm import divergences, sample, score, update
from opd_jax.models.params import flatten
from opd_jax.types import Batch, Head, Heads, TrainState, Wants

IN_USE = 11
PROMPTS = left_padded([[5, 9, 1], [7, 3, 8, 2]], 4)


@functools.lru_cache
def _model(width, tied):
  return models.build(qwen3_config(vocab_size=width, tie_word_embeddings=tied, num_hidden_layers=1),
                      dtype=jnp.float64, vocab_in_use=IN_USE)


def _params(model, seed):
  """Rows that no token has are large: without the mask they would take nearly all the mass."""
  params = sharp_params(model, seed, jnp.float64)
  params['embed'] = params['embed'].at[IN_USE:].multiply(20.0)
  if 'head' in params:
    params['head'] = params['head'].at[:, IN_USE:].multiply(20.0)
  return params


def _cut(model, params):
  """The same model without the padding."""
  small = models.build(dict(model.to_hf(), vocab_size=IN_USE), dtype=jnp.float64)
  params = dict(params, embed=params['embed'][:IN_USE])
  if 'head' in params:
    params['head'] = params['head'][:, :IN_USE]
  return small, params


@functools.lru_cache
def _sampler(model, **knobs):
  return quick_jit(functools.partial(
      sample.sample_fn, model=model, max_new_tokens=6,
      **dict(dict(temperature=1.0, top_p=1.0, top_k=0), **knobs), stop_tokens=(4,), pad_token=0))


@pytest.mark.parametrize(('tied', 'knobs'), [
    (False, dict(temperature=0.0)), (True, dict(temperature=50.0, top_p=0.999999)),
    (False, dict(top_k=IN_USE))], ids=str)
def test_no_id_beyond_those_in_use_is_sampled(x64, tied, knobs):
  model = _model(16, tied)
  params = _params(model, 0)
  hidden, _ = model.forward(params, PROMPTS.tokens, sample.positions_of(PROMPTS.valid),
                            PROMPTS.valid, None)
  bare = model.head(params).replace(vocab_in_use=16).logits(hidden)
  assert int(jnp.max(jnp.argmax(bare, axis=-1))) >= IN_USE  # they would be, without the mask
  prompts = jax.tree.map(lambda x: jnp.tile(x, (64, 1)), PROMPTS)
  rollout = _sampler(model, **knobs)(params, prompts, jax.random.key(0))
  assert int(jnp.max(rollout.tokens)) < IN_USE
  small, cut = _cut(model, params)  # and those in use are drawn as if there were no others
  same = _sampler(small, **knobs)(cut, prompts, jax.random.key(0))
  np.testing.assert_array_equal(rollout.tokens, same.tokens)
  np.testing.assert_allclose(rollout.sampler_logprobs, same.sampler_logprobs, atol=1e-12)


def _step(student, params, teacher, teacher_params, rollout, objective):
  """Loss and gradient of one update (whose SGD step of size one is the gradient)."""
  exact = objective.support == 'full'
  grade = functools.partial(score.teacher_logprob_fn, temperature=1.0, chunk_tokens=5,
                            microbatch_rows=0)
  graded = grade(teacher_params, rollout, model=teacher,
                 wants=Wants(logprobs=not exact, hidden=exact))
  own = None if exact else grade(params, rollout, model=student, wants=Wants(logprobs=True))
  optimizer = optax.sgd(1.0)
  state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))
  after, metrics = quick_jit(functools.partial(
      update.update_fn, model=student, optimizer=optimizer, terms=(update.Term('own', objective),),
      chunk_tokens=5))(
          state, (Batch(rollout, graded, own),),
          Heads(teacher.head(teacher_params) if exact else None))
  grads = jax.tree.map(lambda a, b: np.asarray(a - b), params, after.params)
  return metrics, flatten(grads)


@pytest.mark.parametrize(('mine', 'theirs', 'tied'), [(16, 13, False), (13, 16, True)])
@pytest.mark.parametrize('objective', [
    update.Objective(), update.Objective(route='direct', support='full', importance='none')],
                         ids=lambda o: o.support)
def test_training_across_widths_is_training_without_the_padding(x64, mine, theirs, tied, objective):
  student, teacher = _model(mine, tied), _model(theirs, not tied)
  params, teacher_params = _params(student, 0), _params(teacher, 1)
  rollout = _sampler(student)(params, PROMPTS, jax.random.key(3))
  rollout = rollout.replace(mask=rollout.mask.astype(jnp.float64))
  metrics, grads = _step(student, params, teacher, teacher_params, rollout, objective)
  wanted, cut = _step(*_cut(student, params), *_cut(teacher, teacher_params), rollout, objective)
  for name in ('loss', 'entropy_student', 'entropy_teacher', 'reverse_kl'):
    assert float(metrics[name]) == pytest.approx(float(wanted[name]), rel=1e-12), name
  for name, grad in grads.items():
    if name in ('embed', 'head'):  # what is not in use gets no gradient: exactly none
      grad = np.moveaxis(grad, -1, 0) if name == 'head' else grad
      want = np.moveaxis(cut[name], -1, 0) if name == 'head' else cut[name]
      assert not np.any(grad[IN_USE:]) and np.any(grad[:IN_USE])
      np.testing.assert_allclose(grad[:IN_USE], want, atol=1e-12, err_msg=name)
    else:
      np.testing.assert_allclose(grad, cut[name], atol=1e-12, err_msg=name)


def test_the_exact_divergences_are_those_of_the_renormalised_distributions(x64):
  hidden = [np.random.RandomState(i).standard_normal((3, 6)) for i in range(2)]
  heads = [np.random.RandomState(7 + w).standard_normal((6, w)) for w in (16, 13)]
  rows = []
  for h, matrix in zip(hidden, heads, strict=True):
    p = np.exp(h @ matrix)[:, :IN_USE]
    rows.append(p / p.sum(-1, keepdims=True))
  pair = score.same_width(*(score.log_softmax(jnp.asarray(h), Head(jnp.asarray(m), IN_USE), 1.0)
                            for h, m in zip(hidden, heads, strict=True)))
  for divergence, (p, q) in ((divergences.reverse_kl, rows), (divergences.forward_kl, rows[::-1])):
    np.testing.assert_allclose(jnp.sum(divergence(*pair), axis=-1),
                               np.sum(p * np.log(p / q), axis=-1), rtol=1e-12)
