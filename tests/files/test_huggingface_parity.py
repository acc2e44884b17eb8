"""Against transformers and PEFT themselves, where torch is installed (extra: parity)."""

from __future__ import annotations

from checkpoints import (
  MODEL,
  OPTIONS,
  PARAMS,
  adapters,
  assert_same,
  cast,
  write_originals,
)
from conftest import quick_jit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.algorithm import sample
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface, peft
from opd_jax.models import lora

TOKENS = np.random.RandomState(3).randint(0, 64, (2, 11)).astype(np.int32)
# Of the largest logit. Both sides compute in float32 with two layers; 1e-6 is usual.
LIMIT = 1e-5


def logits(values):
  def run(values):
    valid = jnp.ones(TOKENS.shape, bool)
    hidden, _ = MODEL.forward(values, jnp.asarray(TOKENS), sample.positions_of(valid), valid, None)
    return MODEL.head(values).logits(hidden)

  return np.asarray(quick_jit(run)(jax.tree.map(jnp.asarray, values)))


def error(got, want):
  return np.abs(got - want).max() / np.abs(want).max()


def torch_logits(model):
  import torch
  with torch.no_grad():
    return model.eval()(input_ids=torch.tensor(TOKENS).long()).logits.numpy()


def opened(path):
  """The model as any user of transformers opens it."""
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32, attn_implementation='eager', output_loading_info=True)
  assert not any(report[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), report
  return model


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
  return write_originals(tmp_path_factory.mktemp('originals'))


class TestAgainstTransformers:

  @pytest.mark.parametrize('name', ['single', 'sharded'])
  def test_a_full_export_has_the_same_logits(self, originals, name):
    pytest.importorskip('torch')
    model = opened(originals / name)
    assert error(logits(PARAMS), torch_logits(model)) < LIMIT
    transformers = pytest.importorskip('transformers')
    assert transformers.AutoTokenizer.from_pretrained(originals / name)('1+1')['input_ids'] == (
        prompts_lib.character_tokenizer()('1+1')['input_ids'])

  def test_every_stop_token_ends_a_generation(self, tmp_path):
    pytest.importorskip('torch')
    huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, prompts_lib.character_tokenizer(),
                        stop_tokens=(5, 7))
    assert opened(tmp_path / 'x').generation_config.eos_token_id == [1, 5, 7]

  def test_its_own_sharded_bfloat16_is_read_exactly(self, originals, tmp_path):
    torch = pytest.importorskip('torch')
    model = opened(originals / 'single').to(torch.bfloat16)
    model.save_pretrained(tmp_path / 'x', max_shard_size='8KB')
    prompts_lib.character_tokenizer().save_pretrained(tmp_path / 'x')
    assert (tmp_path / 'x' / huggingface.INDEX).exists()
    assert_same(huggingface.load(tmp_path / 'x', OPTIONS).read(),
                cast(PARAMS, jnp.bfloat16, np.float32))

  @pytest.mark.parametrize('targets', ['all', 'layers/(q|v)'])
  def test_an_adapter_opens_in_peft_with_the_same_logits(self, originals, tmp_path, targets):
    library = pytest.importorskip('peft')
    settings = lora.Settings(rank=2, alpha=3.0, targets=targets)
    values = adapters(settings)
    peft.write_adapter(tmp_path / 'x', MODEL, values, settings, prompts_lib.character_tokenizer(),
                       str(originals / 'single'))
    model = library.PeftModel.from_pretrained(opened(originals / 'single'), tmp_path / 'x')
    joined = lora.join(lora.Frozen(PARAMS, settings.scale), values)
    want = torch_logits(model)
    assert error(logits(PARAMS), want) > 0.05  # the adapter does something
    assert error(logits(joined), want) < LIMIT
    huggingface.write_checkpoint(tmp_path / 'merged', MODEL, joined,
                                 prompts_lib.character_tokenizer())
    assert error(torch_logits(opened(tmp_path / 'merged')), want) < LIMIT

  @pytest.mark.parametrize(('modules', 'targets'), [
      (['q_proj', 'v_proj'], 'layers/q|layers/v'), ('all-linear', 'all'),
      (r'.*\.(gate|up|down)_proj', 'mlp')])
  def test_an_adapter_that_peft_made(self, originals, tmp_path, modules, targets):
    library, torch = pytest.importorskip('peft'), pytest.importorskip('torch')
    torch.manual_seed(0)
    model = library.get_peft_model(opened(originals / 'single'), library.LoraConfig(
        r=3, lora_alpha=5, target_modules=modules, task_type='CAUSAL_LM', lora_dropout=0.1))
    with torch.no_grad():
      for name, parameter in model.named_parameters():
        if 'lora_' in name:
          parameter.normal_()
    model.save_pretrained(tmp_path / 'x')
    settings, read = peft.read_adapter(tmp_path / 'x', MODEL, str(originals / 'single'))
    assert settings == lora.Settings(rank=3, alpha=5.0, targets=targets)
    joined = lora.join(lora.Frozen(PARAMS, settings.scale), jax.tree.map(jnp.asarray, read()))
    assert error(logits(joined), torch_logits(model)) < LIMIT
