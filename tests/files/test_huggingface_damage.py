"""Checkpoints that are refused: cut, without an index or with a wrong one, of other weights, with
numbers that are none."""

from __future__ import annotations

import json
import shutil

from checkpoints import (
  CONFIG,
  DTYPES,
  MODEL,
  OPTIONS,
  change_json,
  copy_of,
  float32,
  raw,
  refusal,
  write_originals,
  write_raw,
)
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from opd_jax import config
from opd_jax.files import huggingface
from opd_jax.files import safetensors as safetensors_lib


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
  return write_originals(tmp_path_factory.mktemp('originals'))


@pytest.fixture
def single(originals, tmp_path):
  return copy_of(originals / 'single', tmp_path)


@pytest.fixture
def sharded(originals, tmp_path):
  return copy_of(originals / 'sharded', tmp_path)


class TestDamage:

  def test_truncated(self, single):
    file = single / huggingface.WEIGHTS
    data = file.read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
      file.write_bytes(data[:size])
      message = refusal(ValueError, huggingface.load, single, OPTIONS)
      assert str(file) in message and 'allowed' in message
    file.write_bytes(data + b'x')
    assert str(file) in refusal(ValueError, huggingface.load, single, OPTIONS)
    file.write_bytes((3).to_bytes(8, 'little') + b'{"a' + data)
    assert str(file) in refusal(ValueError, huggingface.load, single, OPTIONS)

  def test_one_of_several_truncated(self, sharded):
    file = sorted(sharded.glob('*.safetensors'))[2]
    file.write_bytes(file.read_bytes()[:-5])
    assert str(file) in refusal(ValueError, huggingface.load, sharded, OPTIONS)

  def test_an_index_that_names_a_missing_file(self, sharded):
    files = sorted(f.name for f in sharded.glob('*.safetensors'))
    (sharded / files[1]).unlink()
    message = refusal(FileNotFoundError, huggingface.load, sharded, OPTIONS)
    assert huggingface.INDEX in message and f"['{files[1]}']" in message

  def test_an_index_that_is_not_what_the_files_hold(self, sharded):
    index = sharded / huggingface.INDEX
    weight_map = json.loads(index.read_text())['weight_map']
    first, last = weight_map['model.embed_tokens.weight'], weight_map['lm_head.weight']
    assert first != last
    change_json(index, weight_map={**weight_map, 'lm_head.weight': first, 'ghost': last})
    message = refusal(ValueError, huggingface.load, sharded, OPTIONS)
    assert all(part in message for part in ('lm_head.weight', last, "['ghost']"))
    # Stored twice: nobody knows which of the two counts.
    change_json(index, weight_map=weight_map)
    twice = {**raw(sharded / last), 'model.embed_tokens.weight': float32(np.zeros((64, 16)))}
    write_raw(sharded / last, twice)
    message = refusal(ValueError, huggingface.load, sharded, OPTIONS)
    assert "['model.embed_tokens.weight']" in message

  @pytest.mark.parametrize('weight_map', [None, [], {'a': 3}, {'a': '../secret.safetensors'}])
  def test_an_index_that_is_none(self, sharded, weight_map):
    change_json(sharded / huggingface.INDEX, weight_map=weight_map)
    assert 'weight_map=' in refusal(ValueError, huggingface.load, sharded, OPTIONS)

  def test_one_file_and_an_index(self, single, sharded):
    shutil.copy(sharded / huggingface.INDEX, single)
    message = refusal(ValueError, huggingface.load, single, OPTIONS)
    assert all(part in message for part in (huggingface.WEIGHTS, huggingface.INDEX, 'allowed'))

  def test_other_weights(self, single):
    (single / huggingface.WEIGHTS).rename(single / 'pytorch_model.bin')
    message = refusal(FileNotFoundError, huggingface.load, single, OPTIONS)
    assert huggingface.WEIGHTS in message and "['pytorch_model.bin']" in message
    assert f"x.from_pretrained('{single}').save_pretrained('NEW')" in message

  def test_a_gguf_file(self, tmp_path, single):
    file = tmp_path / 'model-q4.gguf'
    file.write_bytes(b'GGUF')
    how = f"dict(pretrained_model_name_or_path='{tmp_path}', gguf_file='model-q4.gguf')"
    c = tiny.config('grpo', student__path=str(file))
    with pytest.raises(config.ConfigError, match=r"^student\.path='.*'.*allowed") as e:
      config.parse(c)
    assert how in str(e.value)
    message = refusal(FileNotFoundError, huggingface.load, tmp_path, OPTIONS)
    assert how in message and 'config.json' in message
    # A file of the right kind: its directory is what is asked for.
    message = refusal(ValueError, huggingface.load, single / huggingface.WEIGHTS, OPTIONS)
    assert f"path='{single / huggingface.WEIGHTS}'" in message and 'allowed' in message
    assert 'from_pretrained' not in message  # nothing to convert

  def test_names_without_their_prefix(self, single):
    stored = raw(single / huggingface.WEIGHTS)
    write_raw(single / huggingface.WEIGHTS,
              {n.removeprefix('model.'): t for n, t in stored.items()})
    message = refusal(ValueError, huggingface.load, single, OPTIONS)
    for part in ("'layers.0.mlp.down_proj.weight'", "'norm.weight'",  # what is there
                 "'model.layers.0.mlp.down_proj.weight'"):  # what should be
      assert part in message
    assert 'lm_head' not in message

  def test_two_parameters_that_want_one_tensor(self):
    table = {**MODEL.specs, 'twin': MODEL.specs['final_norm']}
    message = refusal(ValueError, safetensors_lib.check, {}, table, 'here')
    assert "['model.norm.weight']" in message

  @pytest.mark.parametrize('dtype', ['F8_E4M3', 'I8', 'F64'])
  def test_a_dtype_that_is_none(self, single, dtype):
    stored = raw(single / huggingface.WEIGHTS)
    data = bytes(16 * (8 if dtype == 'F64' else 1))
    write_raw(single / huggingface.WEIGHTS, {**stored, 'model.norm.weight': (dtype, [16], data)})
    message = refusal(ValueError, huggingface.load, single, OPTIONS)
    for part in ('model.norm.weight', dtype, "['F32', 'BF16', 'F16']"):
      assert part in message

  @pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
  @pytest.mark.parametrize('stored', DTYPES)
  def test_numbers_that_are_none(self, single, stored, value):
    name = 'model.layers.1.mlp.up_proj.weight'
    bad = np.ones((20, 16), jnp.dtype(stored))
    bad[13, 5] = value
    code = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}[stored]
    file = single / huggingface.WEIGHTS
    write_raw(file, {**raw(file), name: (code, [20, 16], bad.tobytes())})
    loaded = huggingface.load(single, OPTIONS)  # opening reads no weights
    for dtype in (jnp.float32, jnp.bfloat16):
      message = refusal(ValueError, loaded.read, dtype)
      assert name in message and str(file) in message

  def test_a_number_too_large_for_the_dtype(self, single):
    file = single / huggingface.WEIGHTS
    write_raw(file, {**raw(file), 'model.norm.weight': float32(np.full(16, 1e6))})
    loaded = huggingface.load(single, OPTIONS)
    loaded.read()
    message = refusal(ValueError, loaded.read, jnp.float16)
    assert 'model.norm.weight' in message and 'float16' in message

  @pytest.mark.parametrize(('content', 'parts'), [
      ('{"model_type": "gpt17"}', ("model_type='gpt17'", 'qwen3')),
      ('{"hidden_size": 4}', ('model_type=None', 'qwen3')),
      ('{"model_type": ', ('config.json',)),
      ('[1]', ('config.json', 'list', 'allowed')),
      (json.dumps({**CONFIG, 'quantization_config': {'quant_method': 'fp8'}}),
       ('quantization_config', "'fp8'", 'bfloat16')),
  ])
  def test_config_json(self, single, content, parts):
    (single / 'config.json').write_text(content)
    message = refusal(ValueError, huggingface.load, single, OPTIONS)
    assert all(part in message for part in (str(single), *parts)), message

  def test_no_config_json(self, single):
    (single / 'config.json').unlink()
    assert 'config.json' in refusal(FileNotFoundError, huggingface.load, single, OPTIONS)
