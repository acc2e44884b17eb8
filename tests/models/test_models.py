"""What each family refuses of a config.json, and the mixture of experts by itself and on a mesh."""

from __future__ import annotations

import json
import subprocess
import sys

from conftest import family_config, quick_jit, sharp_params, ways_to_tie
import jax
import jax.numpy as jnp
import make_reference
import numpy as np
import pytest
import tiny

from opd_jax import models
from opd_jax.models import params
from opd_jax.models.families import qwen3_moe

each_family = pytest.mark.parametrize('family', models.names())


def _config(family, **changes):
  config = family_config(family, ways_to_tie(family)[0])
  return {**config, **changes}


def _refusal(config):
  with pytest.raises(ValueError) as error:
    models.build(config)
  return str(error.value)


# --- config.json ---


@each_family
@pytest.mark.parametrize(('name', 'value'), [
    ('attention_dropout', 0.1), ('hidden_act', 'relu'), ('attention_bias', True),
    ('quantization_config', {'bits': 4}), ('partial_rotary_factor', 0.5), ('auto_map', {'a': 'b'}),
    ('layer_types', ['linear_attention'] * 2), ('a_new_feature', 3), ('num_hidden_layers', 0),
    ('hidden_size', '16'), ('rms_norm_eps', None), ('tie_word_embeddings', 1), ('head_dim', 7),
    ('num_key_value_heads', 3), ('use_sliding_window', True), ('mlp_bias', True)])
def test_what_no_family_implements_is_refused_by_name(family, name, value):
  message = _refusal(_config(family, **{name: value}))
  assert f'{family} config.json' in message and 'allowed' in message
  assert name in message and (repr(value) in message or name in ('layer_types',
                                                                  'num_key_value_heads'))


OTHER_TYPES = (
    True, -1, 0, 1.5, 10**30, float('nan'), float('inf'), 'x', [], [1], [[]], {}, {'a': 1}, None,
    {'rope_type': []}, {'rope_type': 'linear', 'factor': 'x'}, {'rope_theta': [1]},
    {'full_attention': 1, 'sliding_attention': {}},
    {'full_attention': {'rope_theta': []}, 'sliding_attention': {'rope_type': {}}})


@each_family
def test_a_field_of_another_type_is_one_clear_error_or_no_matter(family):
  config = models.build(_config(family)).to_hf()
  fields = {*config, *_config(family), 'rope_parameters', 'rope_theta', 'layer_types',
            'num_local_experts', 'sliding_window_pattern', 'pruned_heads', 'unknown'}
  refused = 0
  for name in fields - {'model_type'}:
    for value in OTHER_TYPES:
      try:
        models.build({**config, name: value})
      except ValueError as e:  # and nothing else
        assert str(e).startswith(f'{family} config.json') and 'allowed: ' in str(e), (name, value)
        refused += 1
  assert refused > 100


@each_family
@pytest.mark.parametrize(('name', 'allowed'), [
    ('num_hidden_layers', 1000), ('hidden_size', 2**24), ('vocab_size', 2**24)])
def test_a_size_out_of_all_bounds(family, name, allowed):
  for value in (allowed + 1, 10**5000):
    assert f'{name}=' in (message := _refusal(_config(family, **{name: value})))
    assert f'at most {allowed}' in message and len(message) < 200


@each_family
def test_how_texts_are_generated_says_nothing_about_the_model(family):
  # transformers wrote these to config.json before version 5, and its own import still does.
  config = _config(family)
  old = dict(diversity_penalty=0.0, num_beam_groups=1, max_length=20, do_sample=True, top_k=50,
             temperature=0.6, repetition_penalty=1.1, length_penalty=1.0, typical_p=1.0,
             bad_words_ids=[[1]], suppress_tokens=[2], forced_eos_token_id=2, num_beams=1,
             num_return_sequences=1, unk_token_id=0, sep_token_id=3, cls_token_id=4,
             mask_token_id=5, decoder_start_token_id=1, pruned_heads={}, prefix='a',
             task_specific_params={'a': 1}, finetuning_task='b', torchscript=True)
  assert models.build({**config, **old}).config == models.build(config).config
  assert "pruned_heads={'0': [1]}" in _refusal({**config, 'pruned_heads': {'0': [1]}})


@each_family
@pytest.mark.parametrize('kind', ['yarn', 'dynamic', 'longrope', 'llama3', 'linear'])
def test_ways_to_stretch_rope(family, kind):
  implemented = {'llama': ('llama3', 'linear'), 'mistral': ('llama3', 'linear'),
                 'gemma3_text': ('linear',)}.get(family, ())
  theta = {'rope_theta': 100.0, 'rope_local_base_freq': 50.0, 'rope_parameters': None}
  if family != 'gemma3_text':
    del theta['rope_local_base_freq']
  scaling = {'rope_type': kind, 'factor': 2.0}
  if kind == 'llama3':
    scaling |= dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
  config = _config(family, **theta, rope_scaling=scaling)  # the way of checkpoints on the hub
  if kind not in implemented:
    message = _refusal(config)
    assert f'rope_type={kind!r}' in message and 'allowed' in message
    return
  c = models.build(config).config
  assert (c.rope_theta, c.rope_scaling.rope_type, c.rope_scaling.factor) == (100.0, kind, 2.0)
  for broken, name in (({**scaling, 'beta': 1}, 'beta'), ({'rope_type': kind}, 'factor')):
    assert name in _refusal({**config, 'rope_scaling': broken})


@each_family
def test_theta_has_one_value_and_a_place(family):
  if family != 'gemma3_text':  # whose theta is nested once more
    assert 'rope_theta' in _refusal(_config(family, rope_theta=7.0))
  assert 'rope_scaling' in _refusal(
      _config(family, rope_scaling={'rope_type': 'linear', 'factor': 2.0}))
  assert "lacks ['rope_theta'" in _refusal(_config(family, rope_parameters=None))


@pytest.mark.parametrize(('family', 'name', 'value', 'allowed'), [
    ('qwen3_moe', 'decoder_sparse_step', 2, '[1]'),
    ('qwen3_moe', 'mlp_only_layers', [1], '[[], None]'),
    ('qwen3_moe', 'num_experts_per_tok', 5, '1 to num_experts=4'),
    ('qwen2', 'use_mrope', True, '[False]'),
    ('mistral', 'sliding_window', 0, 'a whole number of at least 1, or null'),
    ('gemma2', 'tie_word_embeddings', False, '[True]'),
    ('gemma3_text', 'tie_word_embeddings', False, '[True]'),
    ('gemma3_text', 'attn_logit_softcapping', 50.0, '[None]'),
    ('gemma3_text', 'use_bidirectional_attention', True, '[None, False]'),
    ('gemma3_text', 'sliding_window_pattern', 6, 'that they say the same'),
    ('gemma2', 'layer_types', ['full_attention'], 'for each of the 2'),
])
def test_what_one_family_does_not_implement(family, name, value, allowed):
  message = _refusal(_config(family, **{name: value}))
  assert f'{name}={value!r}' in message and f'allowed: {allowed}' in message


@pytest.mark.parametrize('name', ['num_experts_per_tok', 'norm_topk_prob', 'moe_intermediate_size'])
def test_absent_fields_raise(name):
  config = _config('qwen3_moe')
  del config[name]
  assert name in _refusal(config)
  config = _config('mistral')
  del config['sliding_window']  # transformers would fill in 4096
  assert "lacks ['sliding_window']" in _refusal(config)


@pytest.mark.parametrize(('family', 'hub'), [
    ('qwen2', dict(use_mrope=False, max_window_layers=28, sliding_window=131072,
                   use_sliding_window=False, rope_theta=1000000, torch_dtype='bfloat16')),
    ('llama', dict(pretraining_tp=1, rope_theta=500000, eos_token_id=[1, 2], rope_scaling=dict(
        factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
        original_max_position_embeddings=8192, rope_type='llama3'))),
    ('qwen3_moe', dict(num_experts=4, decoder_sparse_step=1, mlp_only_layers=[],
                       router_aux_loss_coef=0.001, max_window_layers=48, rope_theta=1e6)),
    ('gemma3_text', dict(cache_implementation='hybrid', rope_local_base_freq=10000,
                         rope_theta=1000000, rope_scaling=None, sliding_window_pattern=2,
                         attn_logit_softcapping=None)),
    ('gemma2', dict(cache_implementation='hybrid', hidden_act='gelu_pytorch_tanh',
                    rope_theta=10000.0, final_logit_softcapping=30.0)),
])
def test_a_config_in_the_way_of_the_hub_is_read(family, hub):
  # Checkpoints published before transformers 5 have theta outside, no layer_types, and more fields.
  config = {**_config(family), **hub}
  for name in ('rope_parameters', 'layer_types', 'num_local_experts'):
    config.pop(name, None)
  model = models.build(config)
  assert model.config.rope_theta == hub['rope_theta']
  assert models.build(model.to_hf()).config == model.config
  if family.startswith('gemma'):
    assert model.attention_windows == (4, None)
    del config['tie_word_embeddings']  # as gemma's own files do
    assert models.build(config).config == model.config


def _published(family, layers, d, f, n, k, head, vocab, tied, **more):
  config = dict(
      model_type=family, num_hidden_layers=layers, hidden_size=d, intermediate_size=f,
      num_attention_heads=n, num_key_value_heads=k, vocab_size=vocab, tie_word_embeddings=tied,
      max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6, **more)
  return config | ({} if head is None else {'head_dim': head})


_LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_type='llama3',
               original_max_position_embeddings=8192)
PUBLISHED = {  # sizes from the models' config.json, and how many parameters their authors count
    'Qwen3-0.6B': (_published('qwen3', 28, 1024, 3072, 16, 8, 128, 151936, True), 596_049_920),
    'Qwen2.5-7B': (_published('qwen2', 28, 3584, 18944, 28, 4, None, 152064, False), 7_615_616_512),
    'Llama-3.1-8B': (_published('llama', 32, 4096, 14336, 32, 8, None, 128256, False,
                                rope_scaling=_LLAMA3), 8_030_261_248),
    'Mistral-7B-v0.1': (_published('mistral', 32, 4096, 14336, 32, 8, None, 32000, False,
                                   sliding_window=4096), 7_241_732_096),
    'Qwen3-30B-A3B': (_published(
        'qwen3_moe', 48, 2048, 6144, 32, 4, 128, 151936, False, moe_intermediate_size=768,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True), 30_532_122_624),
    'gemma-2-2b': (_published(
        'gemma2', 26, 2304, 9216, 8, 4, 256, 256000, True, query_pre_attn_scalar=256,
        sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
                   2_614_341_888),
    'gemma-3-1b': (_published(
        'gemma3_text', 26, 1152, 6912, 4, 1, 256, 262144, True, query_pre_attn_scalar=256,
        sliding_window=512, sliding_window_pattern=6, final_logit_softcapping=None,
        rope_local_base_freq=10000.0), 999_885_952),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_have_as_many_parameters_as_their_authors_count(name):
  config, count = PUBLISHED[name]
  model = models.build(config)
  assert params.count_params(model.specs) == count
  if name == 'Qwen3-30B-A3B':  # "A3B": 3.3 billion are used, of which the look-up is 0.3
    assert 3.0e9 < params.count_params(model.specs, matmul_only=True) < 3.1e9


# --- the mixture of experts ---


def _mixture(experts, k, tokens, seed=0):
  rng = np.random.RandomState(seed)
  x = rng.standard_normal((2, tokens, 6))
  gate, up = rng.standard_normal((2, experts, 6, 5))
  down = rng.standard_normal((experts, 5, 6))
  chosen = np.argsort(rng.rand(2, tokens, experts), axis=-1)[..., :k]
  return x, rng.rand(2, tokens, k), chosen.astype(np.int32), gate, up, down


def _one_by_one(x, weights, chosen, gate, up, down, held):
  out = np.zeros_like(x)
  for b, s, j in np.ndindex(*chosen.shape):
    e = chosen[b, s, j]
    if e in held:
      pre = x[b, s] @ gate[e]
      y = (pre / (1 + np.exp(-pre)) * (x[b, s] @ up[e])) @ down[e]
      out[b, s] += weights[b, s, j] * y
  return out


@pytest.mark.parametrize('held', [range(4), range(2), range(2, 4), range(3, 4)], ids=str)
def test_experts_against_one_token_at_a_time(x64, held):
  x, weights, chosen, *matrices = _mixture(4, 2, 5)
  chosen[0] = [0, 3]  # a whole row of one choice, so that groups are uneven and one may be empty
  part = [m[held.start:held.stop] for m in matrices]
  got = quick_jit(qwen3_moe.experts)(x, weights, chosen, *part, jnp.int32(held.start))
  want = _one_by_one(x, weights, chosen, *matrices, held)
  np.testing.assert_allclose(got, want, atol=1e-12)  # float64


def test_no_token_is_dropped_when_all_choose_one_expert(x64):
  x, weights, chosen, *matrices = _mixture(4, 1, 9)
  chosen[:] = 2
  got = quick_jit(qwen3_moe.experts)(x, weights, chosen, *matrices, jnp.int32(0))
  np.testing.assert_allclose(got, _one_by_one(x, weights, chosen, *matrices, range(4)), atol=1e-12)


@pytest.mark.parametrize('normalized', [False, True])
def test_the_router_takes_its_softmax_in_float32(normalized):
  config = {**make_reference.fields('qwen3_moe', 'grouped_untied'), 'model_type': 'qwen3_moe',
            'norm_topk_prob': normalized}
  c = models.build(config).config
  rng = np.random.RandomState(0)
  x, router = rng.standard_normal((2, 3, 24)), rng.standard_normal((24, 5))
  logits = x @ router
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  best = np.argsort(-p, axis=-1)[..., :2]
  want = np.take_along_axis(p, best, axis=-1)
  want = want / want.sum(-1, keepdims=True) if normalized else want
  weights, chosen = qwen3_moe.route(c, jnp.asarray(x, jnp.float32), jnp.asarray(router))
  np.testing.assert_array_equal(chosen, best)
  np.testing.assert_allclose(weights, want, atol=1e-6)
  program = str(jax.make_jaxpr(lambda x, r: qwen3_moe.route(c, x, r))(
      jnp.asarray(x, jnp.bfloat16), jnp.asarray(router)))
  assert 'bf16[2,3,5]' not in program  # neither logits nor probabilities are rounded to it


CHILD = '''
import pathlib, sys
sys.path[:0] = sys.argv[1:3]
import conftest
import test_models
test_models.on_meshes(pathlib.Path(sys.argv[3]))
'''
MESHES = {'expert': dict(expert=2), 'expert_fsdp': dict(expert=2, fsdp=2), 'fsdp': dict(fsdp=2),
          'expert_tensor': dict(expert=2, tensor=2), 'data_fsdp': dict(data=2, fsdp=2)}


def _loss(model):
  tokens = jnp.asarray(np.random.RandomState(4).randint(0, 64, (4, 6)), jnp.int32)

  def loss(p):
    positions = jnp.broadcast_to(jnp.arange(6)[None], tokens.shape)
    hidden, _ = model.forward(p, tokens, positions, jnp.ones(tokens.shape, bool), None)
    logits = model.head(p).logits(hidden)
    return jnp.sum(jnp.sin(logits)), logits

  return jax.value_and_grad(loss, has_aux=True)


def _flat(result):
  (loss, logits), grads = result
  return {'loss': loss, 'logits': logits, **params.flatten(grads)}


def on_meshes(folder):
  """What the child does: value, logits and gradients on each mesh, and where experts lie."""
  from opd_jax.parallel import sharding
  where = {}
  model = models.build(_config('qwen3_moe'), remat='layer')
  for name, sizes in MESHES.items():
    sizes = {axis: sizes.get(axis, 1) for axis in sharding.SIZES}
    devices = jax.devices()[:int(np.prod(list(sizes.values())))]
    mesh = sharding.make_mesh(sizes, devices)
    shardings = sharding.param_shardings(model.specs, mesh)
    placed = sharding.put(sharp_params(model), shardings)
    where[name] = placed['layers']['gate'].addressable_shards[0].data.shape
    with jax.set_mesh(mesh):
      result = quick_jit(_loss(model))(placed)
    np.savez(folder / f'{name}.npz', **jax.device_get(_flat(result)))
  (folder / 'where.json').write_text(json.dumps(where))


@pytest.fixture(scope='module')
def meshed(tmp_path_factory):
  """The results of `on_meshes` in a process with four devices."""
  folder = tmp_path_factory.mktemp('mesh')
  done = subprocess.run(
      [sys.executable, '-c', CHILD, str(tiny.ROOT / 'tests'),
       str(tiny.ROOT / 'tests' / 'models'), str(folder)], text=True,
      capture_output=True, timeout=tiny.PATIENCE_S,
      env=tiny.environment(devices=4))
  assert done.returncode == 0, done.stderr[-4000:]
  return folder


@pytest.mark.parametrize('name', MESHES)
def test_experts_on_a_mesh_equal_one_device(meshed, name):
  model = models.build(_config('qwen3_moe'))
  want = jax.device_get(_flat(quick_jit(_loss(model))(sharp_params(model))))
  got = np.load(meshed / f'{name}.npz')
  assert set(got) == set(want)
  for key in want:
    scale = max(np.abs(want[key]).max(), 1.0)
    # float32 sums in another order, forwards and backwards through two layers.
    np.testing.assert_allclose(got[key], want[key], atol=3e-5 * scale, err_msg=key)
  sizes = MESHES[name]
  assert json.loads((meshed / 'where.json').read_text())[name] == [
      2, 4 // sizes.get('expert', 1), 16 // sizes.get('fsdp', 1), 12 // sizes.get('tensor', 1)]
