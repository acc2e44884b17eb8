"""A Linen transformer and an NNX one as student and teacher: logits, samples, gradients, caches."""

from __future__ import annotations

import dataclasses
import functools

from conftest import left_padded, quick_jit, qwen3_config, sharp_params
from flax import linen, nnx
from flax_modules import (
  CONFIG,
  FLOAT32,
  KINDS,
  NNXLM,
  ROWS,
  VOCAB,
  LinenLM,
  each_kind,
  inputs,
  linen_model,
  logits_of,
  nnx_model,
  tied,
  trained,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import models
from opd_jax.algorithm import objective as objective_lib
from opd_jax.algorithm import sample, score
from opd_jax.models import flax_module
from opd_jax.models import params as params_lib
from opd_jax.parallel import sharding
from opd_jax.run import flops
from opd_jax.types import Wants


@each_kind
def test_logits_are_the_modules_own(kind):
  model, params = KINDS[kind]()
  if kind.startswith('linen'):
    want = quick_jit(LinenLM(logits=True).apply)({'params': params}, *inputs())
  else:
    want = nnx.jit(NNXLM.__call__)(NNXLM(nnx.Rngs(0)), *inputs())
  got = logits_of(model, params, *inputs())
  assert got.shape == (3, 6, VOCAB) and float(jnp.std(got)) > 0.3
  np.testing.assert_allclose(got, want, **FLOAT32)
  # The table describes exactly the parameters, by names that a file can have.
  specs, arrays = params_lib.flatten(model.specs), params_lib.flatten(params)
  assert list(specs) == list(arrays)
  assert all(specs[n].shape == a.shape and specs[n].hf_name == n for n, a in arrays.items())
  assert (model.head(params).matrix is None) == kind.endswith('logits')


@each_kind
def test_the_sampler_and_the_scorer_agree_whatever_the_padding(kind):
  model, params = KINDS[kind]()
  rollout = quick_jit(functools.partial(
      sample.sample_fn, model=model, max_new_tokens=7, temperature=1.0, top_p=1.0, top_k=0,
      stop_tokens=(1,), pad_token=0))(params, left_padded(ROWS, 6), jax.random.key(0))
  scores = quick_jit(functools.partial(
      score.teacher_logprob_fn, model=model, temperature=1.0, wants=Wants(logprobs=True),
      chunk_tokens=8, microbatch_rows=0))(params, rollout)
  assert float(rollout.mask.sum()) > 10
  np.testing.assert_allclose(scores.logprobs, rollout.sampler_logprobs, atol=1e-5)
  # The same rows without the padding on the left (behind a row, a causal model sees nothing).
  real = [np.asarray(t)[np.asarray(v)] for t, v in zip(rollout.tokens, rollout.valid, strict=True)]
  tokens = np.stack([np.pad(r, (0, 13 - len(r))) for r in real])
  logits = logits_of(model, params, tokens, np.tile(np.arange(13), (3, 1)), tokens >= 0)
  logprobs = np.asarray(jax.nn.log_softmax(logits))
  for row, prompt in enumerate(ROWS):
    want = [logprobs[row, i, t] for i, t in enumerate(real[row][1:])][len(prompt) - 1:]
    np.testing.assert_allclose(scores.logprobs[row, 5:5 + len(want)], want, atol=1e-5)


def test_exact_distillation_from_a_qwen3_teacher(tiny_model):
  model, params = KINDS['linen']()
  assert tiny_model[0].config.vocab_size == VOCAB
  objective = objective_lib.Objective(route='direct', support='full', importance='none')
  losses, after, rollout = trained(model, params, objective, tiny_model)
  assert losses[-1] < 0.8 * losses[0]
  # The first loss is the reverse KL, here from whole rows of logits.
  arguments = rollout.tokens, sample.positions_of(rollout.valid), rollout.valid
  own, theirs = (jax.nn.log_softmax(logits_of(m, p, *arguments))
                 for m, p in ((model, params), tiny_model))
  kl = jnp.sum(jnp.exp(own) * (own - theirs), axis=-1)[:, :-1]
  want = float(jnp.sum(kl * rollout.mask) / jnp.sum(rollout.mask))
  assert losses[0] == pytest.approx(want, rel=1e-5)
  # Every parameter of the module learns, and nothing else is in the state.
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, after)
  still = {name for name, m in params_lib.flatten(moved).items() if not m}
  # Softmax does not see what a key's bias adds to all of them.
  assert still <= {n for n in params_lib.flatten(params) if n.endswith('key/bias')}


def test_a_foreign_teacher_of_a_qwen3_student(tiny_model):
  model, params = tiny_model
  objective = objective_lib.Objective(route='direct', support='full', importance='none')
  losses, _, _ = trained(model, params, objective, KINDS['nnx_logits']())
  assert losses[-1] < 0.9 * losses[0]


class RunningMean(linen.Module):
  """The mean of the embeddings so far: its cache is a sum and a count."""

  def setup(self):
    self.embed = linen.Embed(VOCAB, VOCAB)

  def __call__(self, tokens, positions, valid):
    return jnp.cumsum(self.embed(tokens) * valid[..., None], axis=1) / (positions + 1)[..., None]

  def step(self, tokens, positions, valid, total):
    sums = total[:, None] + jnp.cumsum(self.embed(tokens) * valid[..., None], axis=1)
    return sums / (positions + 1)[..., None], sums[:, -1]


def test_a_modules_own_cache_is_used():
  module = RunningMean()
  variables = quick_jit(module.init)(jax.random.key(0), *inputs())
  traced = []

  def step(params, *arguments):
    traced.append(arguments[0].shape)
    return module.apply({'params': params}, *arguments, method='step')

  decoding = flax_module.Decoding(lambda batch, length: jnp.zeros((batch, VOCAB)), step)
  out = {}
  for name, d in (('cache', decoding), ('again', None)):
    model, params = flax_module.from_linen(module, variables, CONFIG, decoding=d)
    out[name] = quick_jit(functools.partial(
        sample.sample_fn, model=model, max_new_tokens=5, temperature=1.0, top_p=1.0, top_k=0,
        stop_tokens=(1,), pad_token=0))(params, left_padded(ROWS, 6), jax.random.key(0))
  assert traced and set(traced) == {(3, 6), (3, 1)}  # the prompts, then token by token
  np.testing.assert_array_equal(out['cache'].tokens, out['again'].tokens)
  np.testing.assert_allclose(out['cache'].sampler_logprobs, out['again'].sampler_logprobs,
                             atol=1e-6)


def test_axis_names_and_flops():
  model, params = linen_model(layers=2)
  specs = params_lib.flatten(model.specs)
  assert specs['embed/embedding'].axes == ('vocab', 'embed')
  assert specs['up_0/kernel'].axes == ('embed', None)  # a name that layout.TRAIN has not
  assert specs['up_0/bias'].axes == (None,)
  specs = params_lib.flatten(nnx_model(layers=2)[0].specs)
  assert specs['blocks/1/up/kernel'].axes == ('embed', 'mlp')
  sharding.param_shardings(model.specs, sharding.make_mesh(dict(data=1, fsdp=1, tensor=1,
                                                               expert=1)))
  # 2 a matrix entry and token: kernels, and the embedding since it is the head too.
  matrices = 48 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 24)
  assert flops.forward_flops(model, np.array([3, 5])) == 2 * matrices * 8
  known = dataclasses.replace(model, config=dataclasses.replace(
      model.config, num_hidden_layers=2, num_attention_heads=2, head_dim=8))
  assert flops.forward_flops(known, np.array([3])) == 2 * matrices * 3 + 4 * 2 * 2 * 8 * 6
  with pytest.raises(ValueError, match='Flax module.*allowed'):
    params_lib.init_params(model.specs, jax.random.key(0))
  assert params['embed']['embedding'].shape == (48, 16)


def test_what_models_return_on_padding_reaches_no_gradient():
  module = LinenLM()
  variables = quick_jit(module.init)(jax.random.key(0), *inputs())

  def apply(params, tokens, positions, valid):
    out = module.apply({'params': params}, tokens, positions, valid)
    return jnp.where(valid[:, :, None], out, params['padding'])

  variables['params']['padding'] = jnp.float32(0.0)  # a parameter, so that it is one program
  model, teacher = flax_module.from_linen(module, variables, CONFIG, head=tied, apply=apply)
  student = jax.tree.map(lambda x: 0.7 * x, teacher)
  objective, steps = objective_lib.Objective(route='direct', support='full', importance='none'), []
  for value in (0.0, jnp.nan):
    own, theirs = (dict(params, padding=jnp.float32(value)) for params in (student, teacher))
    losses, after, rollout = trained(model, own, objective, (model, theirs), steps=1)
    assert not np.asarray(rollout.valid)[:, 6:].all()  # some row has ended
    steps.append((losses, {name: x for name, x in after.items() if name != 'padding'}))
  flax_module.check(model, own)
  flax_module.check_gradient(model, own)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(steps))
  jax.tree.map(np.testing.assert_array_equal, *steps)


def test_models_build_names_the_factory():
  with pytest.raises(ValueError, match=r'model_type .flax.*student\.factory'):
    models.build({'model_type': 'flax'})
  assert 'flax' not in models.names()
  assert models.build(qwen3_config(), vocab_in_use=40).vocab_in_use == 40
  with pytest.raises(ValueError, match='48.*vocab_size'):
    models.limit_vocabulary(models.build(qwen3_config()), 49)
  assert sharp_params(linen_model()[0])['embed']['embedding'].shape == (48, 16)
