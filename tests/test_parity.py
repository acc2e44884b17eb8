"""Qwen3 against transformers' Qwen3ForCausalLM on random weights in float32.

Live where torch is installed (the `parity` extra); against committed logits everywhere. The error
is the largest difference between two logits over the largest absolute value of transformers'
logits, over all real positions of the batch; it must stay below 1e-4. Both sides compute in
float32, and 1e-6 is usual.
"""

from __future__ import annotations

import importlib.util
import json

from conftest import quick_jit
import jax.numpy as jnp
import make_reference
import numpy as np
import pytest
from safetensors.numpy import save_file

from opd_jax import hf, models, sample, tokenizer

LIMIT = 1e-4
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec('torch') is None, reason='torch is not installed (extra: parity)')

SHAPES = {  # every pattern of heads; head width times heads above, equal to and below the width
    'grouped': dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=8),
    'full': dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8),
    'single': dict(hidden_size=40, num_attention_heads=4, num_key_value_heads=1, head_dim=6),
}


def _error(got, want, valid):
  """The largest relative error over real positions."""
  got, want = np.asarray(got, np.float64)[valid], np.asarray(want, np.float64)[valid]
  return np.abs(got - want).max() / np.abs(want).max()


def _logits(model, params, tokens, valid):
  def run(params, tokens, valid):
    hidden, _ = model.forward(params, tokens, sample.positions_of(valid), valid, None)
    return model.head(params).logits(hidden)

  return quick_jit(run)(params, jnp.asarray(tokens), jnp.asarray(valid))


def _cached_logits(model, params, tokens, valid, prefill):
  """The same, a prefill of `prefill` positions and then one position at a time."""
  def run(params, tokens, valid):
    positions = sample.positions_of(valid)
    cache, out = model.init_cache(*tokens.shape), []
    for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, tokens.shape[1]))]:
      hidden, cache = model.forward(params, tokens[:, start:end], positions[:, start:end],
                                    valid[:, start:end], cache)
      out.append(model.head(params).logits(hidden))
    return jnp.concatenate(out, axis=1)

  return quick_jit(run)(params, jnp.asarray(tokens), jnp.asarray(valid))


@pytest.mark.parametrize('name', make_reference.CONFIGS)
def test_logits_equal_the_committed_reference(name, tmp_path):
  config = make_reference.CONFIGS[name]
  save_file(make_reference.tensors(config), str(tmp_path / 'model.safetensors'))
  (tmp_path / 'config.json').write_text(json.dumps(config))
  model = models.build(hf.read_config(tmp_path))
  params = hf.read_params(tmp_path, model)
  tokens, valid = make_reference.inputs()
  want = np.load(make_reference.FILE)[name]
  assert _error(_logits(model, params, tokens, valid), want, valid) < LIMIT
  assert _error(_cached_logits(model, params, tokens, valid, 9), want, valid) < LIMIT


def test_the_reference_is_small():
  assert make_reference.FILE.stat().st_size < 100_000


@pytest.fixture(scope='module', params=[(s, t) for s in SHAPES for t in (False, True)],
                ids=lambda p: f'{p[0]}-{"tied" if p[1] else "untied"}')
def live(request, tmp_path_factory):
  """A model made, and saved, by transformers: (torch model, its directory)."""
  torch = pytest.importorskip('torch')
  import transformers
  shape, tied = request.param
  torch.manual_seed(0)
  config = transformers.Qwen3Config(
      vocab_size=64, intermediate_size=48, num_hidden_layers=3, max_position_embeddings=64,
      tie_word_embeddings=tied, rope_parameters=dict(rope_type='default', rope_theta=500.0),
      attn_implementation='eager', **SHAPES[shape])
  model = transformers.Qwen3ForCausalLM(config).float().eval()
  with torch.no_grad():
    for parameter in model.parameters():  # transformers starts gains at 1 and matrices near 0
      if parameter.ndim == 1:
        parameter.normal_(1.0, 0.3)
      else:
        parameter.normal_(0.0, 1.5 * parameter.shape[1]**-0.5)
  path = tmp_path_factory.mktemp(f'{shape}_{tied}') / 'model'
  model.save_pretrained(path)
  return model, path


def _torch_logits(model, tokens, valid):
  import torch
  with torch.no_grad():
    return model(input_ids=torch.tensor(tokens).long(),
                 attention_mask=torch.tensor(valid).long()).logits.numpy()


def _ragged():
  tokens = np.random.RandomState(2).randint(0, 64, (3, 12)).astype(np.int32)
  return tokens, np.arange(12)[None] >= np.array([[0], [4], [10]])


@needs_torch
def test_logits_equal_transformers(live):
  torch_model, path = live
  model = models.build(hf.read_config(path))
  params = hf.read_params(path, model)
  tokens, valid = _ragged()
  everything = np.ones_like(valid)
  unpadded = _torch_logits(torch_model, tokens, everything)
  assert _error(_logits(model, params, tokens, everything), unpadded, everything) < LIMIT
  padded = _torch_logits(torch_model, tokens, valid)
  assert _error(_logits(model, params, tokens, valid), padded, valid) < LIMIT
  assert _error(_cached_logits(model, params, tokens, valid, 10), padded, valid) < LIMIT
  # The reference itself heeds the padding: otherwise the comparisons above show nothing about it.
  assert _error(unpadded, padded, valid) > 0.01


@needs_torch
def test_an_export_opens_in_transformers_with_the_same_logits(live, tmp_path):
  import torch
  import transformers
  torch_model, path = live
  model = models.build(hf.read_config(path))
  params = hf.read_params(path, model)
  hf.write_checkpoint(tmp_path / 'export', model, params, tokenizer.character_tokenizer())
  again, report = transformers.Qwen3ForCausalLM.from_pretrained(
      tmp_path / 'export', dtype=torch.float32, attn_implementation='eager',
      output_loading_info=True)
  assert not any(report[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), report
  for (name, a), (same, b) in zip(torch_model.named_parameters(), again.named_parameters(),
                                  strict=True):
    assert name == same and torch.equal(a, b), name
  tokens, valid = _ragged()
  # The same weights in the same program, with the same config: the same bits.
  np.testing.assert_array_equal(_torch_logits(again, tokens, valid),
                                _torch_logits(torch_model, tokens, valid))
