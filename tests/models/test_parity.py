"""Every family against transformers' own model on random weights in float32.

Live where torch is installed (the `parity` extra); against committed logits everywhere. The error
is the largest difference between two logits over the largest absolute value of transformers'
logits, over all real positions of the batch; it must stay below 1e-4. Both sides compute in
float32, and 1e-6 is usual.

What is tried of each family is the table of make_reference.py; a new family without an entry there
is tried at transformers' defaults.
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

from opd_jax import models
from opd_jax.algorithm import sample
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface, peft
from opd_jax.models import lora
from opd_jax.models import params as params_lib

LIMIT = 1e-4
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec('torch') is None, reason='torch is not installed (extra: parity)')
CASES = [(family, variant) for family in models.names()
         for variant in make_reference.VARIANTS.get(family, make_reference.DEFAULT)]
each_case = pytest.mark.parametrize(('family', 'variant'), CASES,
                                    ids=[f'{f}-{v}' for f, v in CASES])


def _error(got, want):
  """The largest relative error."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
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


@each_case
def test_logits_equal_the_committed_reference(family, variant, tmp_path):
  file = make_reference.file(family)
  assert file.exists(), f'python tests/make_reference.py {family}'
  stored = np.load(file)
  layout = json.loads(str(stored[f'{variant}/layout']))
  save_file(make_reference.tensors(layout), str(tmp_path / 'model.safetensors'))
  (tmp_path / 'config.json').write_text(str(stored[f'{variant}/config']))
  model = models.build(huggingface.read_config(tmp_path))
  params = huggingface.read_params(tmp_path, model)
  tokens, valid = make_reference.inputs()
  want, keep = stored[f'{variant}/logits'], make_reference.excerpt
  assert _error(keep(_logits(model, params, tokens, valid)), want) < LIMIT
  assert _error(keep(_cached_logits(model, params, tokens, valid, 9)), want) < LIMIT


def test_the_reference_is_small():
  files = list(make_reference.FOLDER.glob('*_reference.npz'))
  assert files and sum(f.stat().st_size for f in files) < 100_000


@pytest.fixture(scope='module', params=CASES, ids=[f'{f}-{v}' for f, v in CASES])
def live(request, tmp_path_factory):
  """A model that transformers made and saved: (torch model, its directory)."""
  pytest.importorskip('torch')
  path = tmp_path_factory.mktemp('live') / 'model'
  return make_reference.make(*request.param, path)[0], path


def _ragged():
  tokens = np.random.RandomState(2).randint(0, 64, (3, 14)).astype(np.int32)
  return tokens, np.arange(14)[None] >= np.array([[0], [4], [10]])


@needs_torch
def test_logits_equal_transformers(live):
  torch_model, path = live
  model = models.build(huggingface.read_config(path))
  params = huggingface.read_params(path, model)
  tokens, valid = _ragged()
  everything = np.ones_like(valid)
  unpadded = make_reference.logits(torch_model, tokens, everything)
  assert _error(_logits(model, params, tokens, everything), unpadded) < LIMIT
  padded = make_reference.logits(torch_model, tokens, valid)
  assert _error(_logits(model, params, tokens, valid)[valid], padded[valid]) < LIMIT
  assert _error(_cached_logits(model, params, tokens, valid, 10)[valid], padded[valid]) < LIMIT
  # The reference itself heeds the padding: otherwise the comparisons above show nothing about it.
  assert _error(unpadded[valid], padded[valid]) > 0.01


@needs_torch
def test_an_export_opens_in_transformers_with_the_same_logits(live, tmp_path):
  import torch
  import transformers
  torch_model, path = live
  model = models.build(huggingface.read_config(path))
  params = huggingface.read_params(path, model)
  huggingface.write_checkpoint(tmp_path / 'export', model, params,
                               prompts_lib.character_tokenizer())
  again, report = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'export', dtype=torch.float32, attn_implementation='eager',
      output_loading_info=True)
  assert type(again) is type(torch_model)
  assert not any(report[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), report
  for (name, a), (same, b) in zip(torch_model.named_parameters(), again.named_parameters(),
                                  strict=True):
    assert name == same and torch.equal(a, b), name
  tokens, valid = _ragged()
  # The same weights in the same program, with the same config: the same bits.
  np.testing.assert_array_equal(make_reference.logits(again, tokens, valid),
                                make_reference.logits(torch_model, tokens, valid))


@needs_torch
def test_an_adapter_on_every_linear_layer_does_in_peft_what_it_does_here(live, tmp_path):
  library = pytest.importorskip('peft')
  torch_model, path = live
  model = models.build(huggingface.read_config(path))
  base = huggingface.read_params(path, model)
  settings = lora.Settings(rank=3, alpha=5.0)
  specs, rng = lora.adapter_specs(model.specs, settings), np.random.RandomState(4)
  adapter = params_lib.unflatten({
      name: (0.2 * rng.standard_normal(spec.shape)).astype(np.float32)
      for name, spec in params_lib.flatten(specs).items()})
  peft.write_adapter(tmp_path / 'adapter', model, adapter, settings,
                     prompts_lib.character_tokenizer(), str(path))
  tokens, valid = _ragged()
  plain = make_reference.logits(torch_model, tokens, valid)[valid]
  wrapped = library.PeftModel.from_pretrained(torch_model, tmp_path / 'adapter')
  try:
    want = make_reference.logits(wrapped.eval(), tokens, valid)[valid]
  finally:
    wrapped.unload()  # PEFT puts its layers into the model that the other tests share
  joined = lora.join(lora.Frozen(base, settings.scale), adapter)
  assert _error(plain, want) > 0.1
  assert _error(_logits(model, joined, tokens, valid)[valid], want) < LIMIT
