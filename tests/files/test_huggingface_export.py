"""Checkpoints that are written: for which readers, onto what, on a full disk, and which are not."""

from __future__ import annotations

import errno
import json
import os

from checkpoints import (
  MODEL,
  OPTIONS,
  PARAMS,
  SETTINGS,
  adapters,
  change_json,
  copy_of,
  refusal,
  write_originals,
)
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from opd_jax.data import prompts as prompts_lib
from opd_jax.files import disk, huggingface, peft
from opd_jax.files import safetensors as safetensors_lib
from opd_jax.models import lora, params


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
  return write_originals(tmp_path_factory.mktemp('originals'))


@pytest.fixture
def single(originals, tmp_path):
  return copy_of(originals / 'single', tmp_path)


class TestExport:

  def test_stop_tokens_and_chat_template(self, tmp_path):
    characters = prompts_lib.character_tokenizer()
    characters.chat_template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, characters, stop_tokens=(7, 5))
    generation = json.loads((tmp_path / 'x' / 'generation_config.json').read_text())
    assert generation == {'eos_token_id': [1, 5, 7], 'pad_token_id': 0}
    loaded = huggingface.load(tmp_path / 'x', OPTIONS)
    assert loaded.tokenizer.chat_template == characters.chat_template
    text = loaded.tokenizer.apply_chat_template(
        [{'role': 'user', 'content': '1+1'}], tokenize=False)
    assert text == '1+1;'
    huggingface.write_checkpoint(tmp_path / 'y', MODEL, PARAMS, characters)
    generation = json.loads((tmp_path / 'y' / 'generation_config.json').read_text())
    assert generation['eos_token_id'] == 1

  def test_the_tokenizer_is_written_for_transformers_4_and_5(self, tmp_path):
    # Version 4 knows no class TokenizersBackend, and a list of extra_special_tokens is an error
    # there; that it reads what is written here is for tests/transformers4.py, run by .ci/run.
    tokens = tiny.chat_tokenizer(bos=True)
    tokens.add_special_tokens({'extra_special_tokens': ['<|tool|>', '<|call|>']})
    huggingface.save_tokenizer(tmp_path, tokens)
    written = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    assert written['tokenizer_class'] == 'PreTrainedTokenizerFast'
    assert written['additional_special_tokens'] == ['<|tool|>', '<|call|>']
    assert not {'extra_special_tokens', 'backend'} & set(written)
    loaded, text = prompts_lib.load(tmp_path), '<|tool|> what is 1+2?\n'
    assert loaded.all_special_ids == tokens.all_special_ids
    assert loaded(text)['input_ids'] == tokens(text)['input_ids']
    assert loaded.chat_template == tokens.chat_template

  @pytest.mark.parametrize('model', ['base', 'teacher'])
  def test_the_shipped_models_are_too(self, model):
    folder = tiny.ROOT / 'experiments' / 'assets' / model
    tokens = json.loads((folder / 'tokenizer_config.json').read_text())
    assert tokens['tokenizer_class'] == 'PreTrainedTokenizerFast' and 'backend' not in tokens
    written = json.loads((folder / 'config.json').read_text())
    assert written['rope_theta'] == 100.0 and 'rope_parameters' not in written
    characters = prompts_lib.character_tokenizer()
    assert prompts_lib.same_vocabulary(prompts_lib.load(folder), characters)

  def test_how_the_input_samples_is_kept(self, single, tmp_path):
    file = single / 'generation_config.json'
    change_json(file, temperature=0.6, top_p=0.95, top_k=20, do_sample=True, max_length=7)
    loaded = huggingface.load(single, OPTIONS)
    huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, loaded.tokenizer, stop_tokens=(5,),
                                 sampling=loaded.sampling)
    assert json.loads((tmp_path / 'x' / 'generation_config.json').read_text()) == {
        'temperature': 0.6, 'top_p': 0.95, 'top_k': 20, 'do_sample': True, 'eos_token_id': [1, 5],
        'pad_token_id': 0}
    file.unlink()
    assert huggingface.load(single, OPTIONS).sampling == {}

  @pytest.mark.parametrize(('name', 'value'), [
      ('temperature', 'hot'), ('top_k', 2.5), ('top_p', True), ('do_sample', 1)])
  def test_how_the_input_samples_is_of_the_right_types(self, single, name, value):
    change_json(single / 'generation_config.json', **{name: value})
    with pytest.raises(ValueError, match=f'generation_config.json: {name}={value!r}; allowed'):
      huggingface.load(single, OPTIONS)

  @pytest.mark.parametrize('kind', ['directory', 'file', 'dangling link'])
  def test_onto_something_that_exists(self, tmp_path, monkeypatch, kind):
    path = tmp_path / 'x'
    {'directory': path.mkdir, 'file': path.touch,
     'dangling link': lambda: path.symlink_to(tmp_path / 'nowhere')}[kind]()
    monkeypatch.setattr(safetensors_lib, 'stream', None)  # refused before any work
    for export in (lambda: huggingface.write_checkpoint(path, MODEL, PARAMS,
                                               prompts_lib.character_tokenizer()),
                   lambda: peft.write_adapter(path, MODEL, adapters(SETTINGS), SETTINGS,
                                              prompts_lib.character_tokenizer(), '')):
      with pytest.raises(FileExistsError, match='/x .*allowed'):
        export()
    assert [p.name for p in tmp_path.iterdir()] == ['x']

  def test_a_full_disk_leaves_nothing_behind(self, tmp_path, monkeypatch):
    room = 20000  # bytes; the weights are more

    class Full:  # what a file system without space does in the middle of a write
      def __init__(self, file):
        self.file, self.left = file, room

      def __enter__(self):
        return self

      def __exit__(self, *exc):
        self.file.close()

      def write(self, data):
        data = bytes(memoryview(data))
        self.file.write(data[:self.left])
        self.left -= len(data)
        if self.left < 0:
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = []

    def limited(file, mode):
      opened.append(file)
      return Full(open(file, mode))

    monkeypatch.setattr(safetensors_lib, 'open', limited, raising=False)
    with pytest.raises(disk.ExportError, match='No space left') as e:
      huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, prompts_lib.character_tokenizer())
    assert opened and str(tmp_path / 'x') in str(e.value) and '\n' not in str(e.value)
    assert not list(tmp_path.iterdir())

  def test_a_disk_that_is_full_when_the_tokenizer_is_saved(self, tmp_path):
    class Broken(type(prompts_lib.character_tokenizer())):
      def save_pretrained(self, *args, **kwargs):
        raise Exception('No space left on device (os error 28)')  # what its Rust side raises

    broken = prompts_lib.character_tokenizer()
    broken.__class__ = Broken
    for write in (lambda: huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, broken),
                  lambda: peft.write_adapter(tmp_path / 'x', MODEL, adapters(SETTINGS), SETTINGS,
                                             broken, '')):
      with pytest.raises(disk.ExportError, match='/x .*No space left'):
        write()
      assert not list(tmp_path.iterdir())

  def test_a_directory_that_cannot_be_made(self, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(disk.ExportError, match='/file/x '):
      huggingface.write_checkpoint(tmp_path / 'file' / 'x', MODEL, PARAMS,
                                   prompts_lib.character_tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ['file']

  def test_what_an_interrupted_export_left_is_replaced(self, tmp_path):
    (tmp_path / '.x.partial').mkdir()
    (tmp_path / '.x.partial' / 'junk').touch()
    huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, prompts_lib.character_tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ['x'] and not (tmp_path / 'x' / 'junk').exists()

  def test_parameters_that_cannot_be_written(self, tmp_path):
    def write(values, **options):
      return refusal(ValueError, huggingface.write_checkpoint, tmp_path / 'x', MODEL, values,
                     prompts_lib.character_tokenizer(), **options)

    nan = dict(PARAMS, embed=PARAMS['embed'].at[3, 4].set(jnp.nan))
    assert 'model.embed_tokens.weight' in write(nan)
    large = dict(PARAMS, embed=PARAMS['embed'].at[3, 4].set(1e6))
    message = write(large, dtype='float16')
    assert 'model.embed_tokens.weight' in message and 'float16' in message
    assert "['head']" in write({k: v for k, v in PARAMS.items() if k != 'head'})
    assert '(64, 16)' in write(dict(PARAMS, embed=PARAMS['embed'][:5]))
    assert 'int8' in write(PARAMS, dtype='int8') and 'max_shard_bytes=0' in write(
        PARAMS, max_shard_bytes=0)
    assert not list(tmp_path.iterdir())

  def test_adapters_are_merged(self, tmp_path):
    joined = lora.join(lora.Frozen(PARAMS, SETTINGS.scale), adapters(SETTINGS))
    huggingface.write_checkpoint(tmp_path / 'x', MODEL, joined, prompts_lib.character_tokenizer())
    got = params.flatten(huggingface.read_params(tmp_path / 'x', MODEL))
    for name, want in params.flatten(lora.merge_all(joined)).items():
      # Sums over a rank of 2 in one order or another: one rounding of float32.
      np.testing.assert_allclose(got[name], want, rtol=1e-6, atol=1e-7, err_msg=name)
    changed = [n for n in got if not np.array_equal(got[n], params.flatten(PARAMS)[n])]
    assert changed == ['layers/q', 'layers/v']
