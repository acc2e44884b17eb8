"""Adapters in PEFT's files: there and back, and those that are refused."""

from __future__ import annotations

import dataclasses
import json

from checkpoints import (
  CONFIG,
  MODEL,
  SETTINGS,
  adapters,
  assert_same,
  cast,
  change_json,
  float32,
  raw,
  refusal,
  write_raw,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import models
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import peft
from opd_jax.models import lora


@pytest.fixture
def adapter(tmp_path):
  peft.write_adapter(tmp_path / 'adapter', MODEL, adapters(SETTINGS), SETTINGS,
                     prompts_lib.character_tokenizer(), 'acme/base')
  return tmp_path / 'adapter'


class TestAdapters:

  @pytest.mark.parametrize(('targets', 'read_as'), [
      ('all', 'all'), ('attention', 'attention'), ('layers/(q|k|v|o)', 'attention'),
      ('mlp', 'mlp'), ('layers/(q|v)', r'layers/q|layers/v'), ('layers/o', 'layers/o')])
  def test_there_and_back(self, tmp_path, targets, read_as):
    settings = lora.Settings(rank=3, alpha=4.5, targets=targets)
    values = adapters(settings)
    peft.write_adapter(tmp_path / 'x', MODEL, values, settings,
                       prompts_lib.character_tokenizer(), '')
    again, read = peft.read_adapter(tmp_path / 'x', MODEL)
    assert again == dataclasses.replace(settings, targets=read_as)
    assert_same(read(), jax.tree.map(np.asarray, values))
    assert_same(read(jnp.bfloat16), cast(values, jnp.bfloat16))
    assert prompts_lib.load(tmp_path / 'x').get_vocab() == (
        prompts_lib.character_tokenizer().get_vocab())

  def test_of_a_base_on_the_hub_it_names_the_commit(self, tmp_path):
    for folder, revision in (('a', 'c' * 40), ('b', '')):
      peft.write_adapter(tmp_path / folder, MODEL, adapters(SETTINGS), SETTINGS,
                         prompts_lib.character_tokenizer(), 'acme/base', base_revision=revision)
      config = json.loads((tmp_path / folder / peft.CONFIG).read_text())
      assert config['revision'] == (revision or None)

  def test_files(self, adapter):
    config = json.loads((adapter / peft.CONFIG).read_text())
    assert config['target_modules'] == ['q_proj', 'v_proj'] and config['r'] == 2
    assert config['lora_alpha'] == 3 and config['base_model_name_or_path'] == 'acme/base'
    stored = raw(adapter / peft.WEIGHTS)
    assert len(stored) == 2 * 2 * 2
    q = adapters(SETTINGS)['layers']['q']
    name = 'base_model.model.model.layers.1.self_attn.q_proj'
    assert stored[f'{name}.lora_A.weight'] == float32(q['a'][1].T)
    assert stored[f'{name}.lora_B.weight'] == float32(q['b'][1].reshape(2, 24).T)

  @pytest.mark.parametrize('changes', [
      dict(num_hidden_layers=3), dict(num_hidden_layers=1), dict(hidden_size=32),
      dict(num_attention_heads=4)], ids=str)
  def test_another_base(self, adapter, changes):
    base = models.build(dict(CONFIG, **changes))
    message = refusal(ValueError, peft.read_adapter, adapter, base)
    assert str(adapter / peft.WEIGHTS) in message and 'q_proj' in message

  def test_modules_of_another_base(self, adapter):
    file = adapter / peft.WEIGHTS
    write_raw(file, {n.replace('self_attn', 'attn'): t for n, t in raw(file).items()})
    message = refusal(ValueError, peft.read_adapter, adapter, MODEL)
    assert 'qwen3' in message and 'layers.0.attn.q_proj' in message
    assert 'layers/gate' in message

  def test_the_name_of_another_base_is_a_warning(self, adapter, recwarn):
    peft.read_adapter(adapter, MODEL, base_name='models/base')
    peft.read_adapter(adapter, MODEL)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="'acme/base'.*'models/other'"):
      peft.read_adapter(adapter, MODEL, base_name='models/other')

  @pytest.mark.parametrize(('field', 'value'), [
      ('peft_type', 'IA3'), ('peft_type', None), ('task_type', 'SEQ_CLS'), ('bias', 'lora_only'),
      ('use_rslora', True), ('use_dora', True), ('modules_to_save', ['lm_head']),
      ('rank_pattern', {'q_proj': 4}), ('alpha_pattern', {'q_proj': 4}), ('fan_in_fan_out', True),
      ('lora_bias', True), ('layers_to_transform', [0]), ('target_parameters', ['experts']),
      ('trainable_token_indices', [3]), ('init_lora_weights', 'pissa'), ('of_the_future', {'a': 1}),
      ('r', 0), ('r', 2.5), ('r', True), ('lora_alpha', 'much'), ('lora_alpha', -1),
      ('target_modules', ['q_proj'])])
  def test_other_methods(self, adapter, field, value):
    change_json(adapter / peft.CONFIG, **{field: value})
    message = refusal(ValueError, peft.read_adapter, adapter, MODEL)
    assert f'{field}={value!r}' in message and 'allowed' in message

  def test_another_rank(self, adapter):
    change_json(adapter / peft.CONFIG, r=4)
    message = refusal(ValueError, peft.read_adapter, adapter, MODEL)
    assert all(part in message for part in ('r=4', '(2, 16)', '(4, 16)'))

  def test_damage(self, adapter):
    file = adapter / peft.WEIGHTS
    stored = raw(file)
    first = next(iter(stored))
    write_raw(file, {n: t for n, t in stored.items() if n != first})
    assert f"['{first}']" in refusal(ValueError, peft.read_adapter, adapter, MODEL)
    write_raw(file, {**stored, first: ('F32', stored[first][1], b'\xff' * len(stored[first][2]))})
    _, read = peft.read_adapter(adapter, MODEL)
    assert first in refusal(ValueError, read)
    file.write_bytes(file.read_bytes()[:-1])
    assert str(file) in refusal(ValueError, peft.read_adapter, adapter, MODEL)
    file.unlink()
    assert file.name in refusal(FileNotFoundError, peft.read_adapter, adapter, MODEL)
    (adapter / peft.CONFIG).unlink()
    assert peft.CONFIG in refusal(FileNotFoundError, peft.read_adapter, adapter, MODEL)
