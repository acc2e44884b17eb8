"""Adapters on every model family: the identity at the start, the merged weights' forward after."""

from __future__ import annotations

import functools

from conftest import family_config, left_padded, quick_jit, sharp_params, ways_to_tie
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from opd_jax import models
from opd_jax.algorithm import sample
from opd_jax.models import lora, nn
from opd_jax.models import params as params_lib

SETTINGS = lora.Settings(rank=2, alpha=4.0)
ATTENTION = {'layers/q', 'layers/k', 'layers/v', 'layers/o'}
MLP = {'layers/gate', 'layers/up', 'layers/down'}
each_family = pytest.mark.parametrize('family', models.names())


@functools.cache
def _model(family):
  return models.build(family_config(family, ways_to_tie(family)[0]))


def _targets(specs):
  return {name.rpartition('/')[0] for name in params_lib.flatten(specs)}


def _adapter(model, b_scale, seed=3):
  """Adapter parameters: `a` at random, `b` zero or of size `b_scale`."""
  rng = np.random.RandomState(seed)
  flat = params_lib.flatten(lora.adapter_specs(model.specs, SETTINGS))
  return params_lib.unflatten({
      name: jnp.asarray((b_scale if name.endswith('/b') else 0.3) * rng.standard_normal(spec.shape),
                        jnp.float32) for name, spec in flat.items()})


BATCH = left_padded([[5, 9, 1, 2, 8, 30, 31], [7, 3, 3, 8]], 7)


def _logits(model, params):
  hidden, _ = model.forward(params, BATCH.tokens, sample.positions_of(BATCH.valid), BATCH.valid,
                            None)
  return model.head(params).logits(hidden)


@each_family
def test_a_fresh_adapter_is_the_identity_and_another_is_the_merged_weights(family):
  model = _model(family)
  base = sharp_params(model)
  real = np.asarray(BATCH.valid)
  run = quick_jit(lambda params: _logits(model, params))

  def adapted(b_scale):
    return lora.join(lora.Frozen(base, SETTINGS.scale), _adapter(model, b_scale))

  # Adding zero changes no bit of any product.
  plain = np.asarray(run(base))[real]
  np.testing.assert_array_equal(np.asarray(run(adapted(0.0)))[real], plain)
  other = np.asarray(run(adapted(0.2)))[real]
  assert np.abs(other - plain).max() > 0.1
  merged = lora.merge_all(adapted(0.2))
  assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
  # x W + s (x A) B against x (W + s A B): float32 rounding through two layers, logits of order 5.
  np.testing.assert_allclose(other, np.asarray(run(merged))[real], atol=5e-5)
  # Decoding meets the same leaves one layer at a time.
  unstacked = np.asarray(quick_jit(lambda p: _logits(model, model.unstack(p)))(adapted(0.2)))[real]
  np.testing.assert_allclose(unstacked, other, atol=5e-5)


@each_family
def test_what_an_export_holds_is_merged_in_float32_and_rounded_once(family):
  model = _model(family)
  base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), sharp_params(model))
  # Smaller than half a step of a bfloat16 weight of order 1: rounded away if it is rounded first.
  joined = lora.join(lora.Frozen(base, SETTINGS.scale), _adapter(model, 1e-3))
  merged = params_lib.flatten(lora.merge_all(joined))
  plain = params_lib.flatten(base)
  for name, leaf in params_lib.flatten(joined).items():
    if not isinstance(leaf, lora.LoRA):
      assert merged[name] is plain[name]
      continue
    assert merged[name].dtype == jnp.float32
    for layer in range(len(leaf.a)):
      a, b = (np.asarray(x[layer], np.float64) for x in (leaf.a, leaf.b))
      delta = SETTINGS.scale * (a.reshape(-1, SETTINGS.rank) @ b.reshape(SETTINGS.rank, -1))
      got = np.asarray(merged[name][layer], np.float64) - np.asarray(plain[name][layer], np.float64)
      np.testing.assert_allclose(got.reshape(delta.shape), delta, atol=2e-7)
      assert np.abs(delta).max() > 1e-4
  # To compute with what a directory in bfloat16 holds is to compute with those rounded numbers.
  rounded = params_lib.unflatten({name: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32)
                                  for name, x in merged.items()})
  run, real = quick_jit(lambda params: _logits(model, params)), np.asarray(BATCH.valid)
  got = np.asarray(run(lora.written_as(joined, 'bfloat16')))[real]
  np.testing.assert_allclose(got, np.asarray(run(rounded))[real], atol=1e-5)
  assert np.abs(got - np.asarray(run(joined))[real]).max() > 1e-4


@each_family
def test_gradients_reach_every_adapter_and_nothing_else(family):
  model = _model(family)
  base, adapter = sharp_params(model), _adapter(model, 0.2)

  def loss(adapter):
    logits = _logits(model, lora.join(lora.Frozen(base, SETTINGS.scale), adapter))
    return jnp.sum(jnp.where(BATCH.valid[..., None], jnp.sin(logits), 0.0))

  grads = params_lib.flatten(quick_jit(jax.grad(loss))(adapter))
  assert set(grads) == set(params_lib.flatten(adapter))
  for name, g in grads.items():
    per_layer = jnp.max(jnp.abs(g.reshape(g.shape[0], -1)), axis=-1)
    assert bool(jnp.all(per_layer > 1e-4)), name


@each_family
def test_presets_pick_what_they_say(family):
  model = _model(family)
  mixture = '{expert}' in ''.join(s.hf_name for s in params_lib.flatten(model.specs).values())

  def pick(targets):
    return _targets(lora.adapter_specs(model.specs, lora.Settings(2, 4.0, targets)))

  assert pick('attention') == ATTENTION
  assert pick('all') == (ATTENTION if mixture else ATTENTION | MLP)
  assert pick('layers/(q|v)') == {'layers/q', 'layers/v'}
  if mixture:  # experts and router carry none
    for targets in ('mlp', 'layers/router', 'layers/(q|gate)'):
      with pytest.raises(ValueError, match=r"lora\.targets='.*allowed: .*layers/k"):
        pick(targets)
  else:
    assert pick('mlp') == MLP


@each_family
def test_specs_are_those_of_the_layers_that_they_adapt(family):
  model = _model(family)
  specs, base = (params_lib.flatten(s) for s in (
      lora.adapter_specs(model.specs, SETTINGS), model.specs))
  start = params_lib.flatten(params_lib.init_params(
      lora.adapter_specs(model.specs, SETTINGS), jax.random.key(0)))
  for name in ATTENTION:
    a, b, whole = specs[f'{name}/a'], specs[f'{name}/b'], base[name]
    assert a.shape[-1] == b.shape[1] == 2 and a.matmul == b.matmul == 1
    assert (*a.shape[:-1], *b.shape[2:]) == whole.shape
    assert (*a.axes[:-1], *b.axes[2:]) == whole.axes  # sharded like the layer
    assert a.hf_shape == (2, whole.hf_shape[1]) and b.hf_shape == (whole.hf_shape[0], 2)
    module = 'base_model.model.' + whole.hf_name.removesuffix('.weight')
    assert (a.hf_name, b.hf_name) == (f'{module}.lora_A.weight', f'{module}.lora_B.weight')
    # Kaiming with a = sqrt(5): uniform up to 1 / sqrt(inputs).
    bound = whole.hf_shape[1]**-0.5
    assert 0.8 * bound < np.abs(start[f'{name}/a']).max() <= bound
    assert not np.any(start[f'{name}/b'])


@pytest.mark.parametrize(('settings', 'message'), [
    (lora.Settings(0, 4.0), r'lora\.rank=0.*allowed: a rank of at least 1'),
    (lora.Settings(2, 0.0), r'lora\.alpha=0\.0.*an alpha above 0'),
    (lora.Settings(2, float('nan')), r'lora\.alpha=nan'),
    (lora.Settings(2, 4.0, 'layers/(q'), r"lora\.targets='layers/\(q' is no regular expression"),
    (lora.Settings(2, 4.0, 'layers/x'), r"lora\.targets='layers/x' matches no parameter; allowed"),
    (lora.Settings(2, 4.0, '.*'), r"lora\.targets='\.\*' matches \['embed'"),
    (lora.Settings(2, 4.0, 'layers/q_norm'), r"matches \['layers/q_norm'\]; allowed")])
def test_refused_settings(settings, message):
  with pytest.raises(ValueError, match=message):
    lora.adapter_specs(_model('qwen3').specs, settings)


def test_a_product_with_an_adapter_is_in_the_dtype_of_the_activations():
  rng = np.random.RandomState(0)
  base, a, b = (jnp.asarray(rng.standard_normal(s), jnp.float32)
                for s in ((6, 4, 3), (6, 2), (2, 4, 3)))
  x = jnp.asarray(rng.standard_normal((2, 5, 6)), jnp.float32)
  weight = lora.LoRA(base, a, b, 0.5)
  got = nn.einsum('bsd,dnh->bsnh', x, weight)
  want = np.einsum('bsd,dnh->bsnh', x, base + 0.5 * np.einsum('dr,rnh->dnh', a, b))
  np.testing.assert_allclose(got, want, atol=1e-5)  # sums of 6 products of order one
  assert nn.einsum('bsd,dnh->bsnh', x.astype(jnp.bfloat16), weight).dtype == jnp.bfloat16
