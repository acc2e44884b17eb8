"""Tokenizers as they are read, the tokens that end a text, and the tokenizer of characters."""

import json
import os
import subprocess
import sys

from chats import BEGIN, CHAT, END, OVER, QUIET, metaspace_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
import pytest
import tiny
import tokenizers
import transformers

from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface

UNTIMED = settings(deadline=None, derandomize=True)  # the machine is shared; failures must repeat
CHARACTERS = prompts_lib.character_tokenizer()
EOS = CHARACTERS.eos_token_id
PAD = CHARACTERS.pad_token_id


class TestStopTokens:

  def write(self, path, content):
    (path / 'generation_config.json').write_text(json.dumps(content))
    return prompts_lib.stop_tokens(path, CHAT)

  def test_the_union_sorted(self, tmp_path):
    assert prompts_lib.stop_tokens(tmp_path, CHAT) == (END,)  # the file is optional
    assert self.write(tmp_path, {}) == self.write(tmp_path, {'eos_token_id': None}) == (END,)
    assert self.write(tmp_path, {'eos_token_id': OVER}) == (END, OVER)
    assert self.write(tmp_path, {'eos_token_id': [OVER, BEGIN, OVER, END]}) == (END, BEGIN, OVER)
    assert self.write(tmp_path, {'eos_token_id': 0}) == (0, END)  # an id like any other

  @pytest.mark.parametrize('given', [OVER, [OVER, END]])
  def test_those_of_config_json_where_there_is_no_other_file(self, given, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': given}))
    assert prompts_lib.stop_tokens(tmp_path, CHAT) == (END, OVER)
    with pytest.raises(ValueError, match=r'/config\.json: eos_token_id='):
      (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': [10**6]}))
      prompts_lib.stop_tokens(tmp_path, CHAT)
    assert self.write(tmp_path, {}) == (END,)  # transformers reads one of them

  @pytest.mark.parametrize('bad', [10**6, [END, -1], ['<|end|>'], True, 1.0])
  def test_an_id_that_is_no_token(self, bad, tmp_path):
    with pytest.raises(ValueError, match='eos_token_id=.*allowed') as e:
      self.write(tmp_path, {'eos_token_id': bad})
    assert 'generation_config.json' in str(e.value) and str(len(CHAT)) in str(e.value)

  def test_a_checkpoint_is_loaded_with_them(self, tmp_path):
    loaded = huggingface.load(tiny.write_chat_model(tmp_path / 'model'), {})
    assert loaded.stop_tokens == (END, OVER)
    assert loaded.tokenizer.chat_template == tiny.CHAT
    # Added tokens lie above the learned ones, and the rest of the vocabulary is padding.
    assert (END, QUIET + 1) == (280, 285) and loaded.model.vocab_in_use == 285
    assert loaded.model.config.vocab_size == 320

  def test_files_are_utf_8_whatever_the_locale(self, tmp_path):
    path = tiny.write_chat_model(tmp_path / 'model', template=tiny.CHAT + '{# \u4e2d #}')
    (path / 'chat_template.jinja').unlink(missing_ok=True)  # it stands in tokenizer_config.json
    file = path / 'tokenizer_config.json'
    values = json.loads(file.read_text(encoding='utf-8')) | {'chat_template': tiny.CHAT + '\u4e2d'}
    file.write_text(json.dumps(values, ensure_ascii=False), encoding='utf-8')
    code = ('import pathlib; from opd_jax.data import prompts; '
            f'path = pathlib.Path({str(path)!r}); t = prompts.load(path); '
            'print(prompts.stop_tokens(path, t), ascii(t.chat_template[-1]))')
    out = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True,
                         env={**os.environ, 'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0',
                              'PYTHONUTF8': '0'}).stdout
    assert out == f"({END}, {OVER}) '\\u4e2d'\n"

  def test_a_tokenizer_of_another_model(self, tmp_path):
    # Its ids go beyond the rows of the embedding.
    path = tiny.write_chat_model(tmp_path / 'model')
    other = tiny.chat_tokenizer()
    other.add_tokens([f'word{i}' for i in range(36)])
    other.save_pretrained(path)
    with pytest.raises(ValueError, match=r'\b320, .*vocab_size .*320'):
      huggingface.load(path, {})


class TestLoading:

  @pytest.mark.parametrize('named', ['PreTrainedTokenizerFast', 'LlamaTokenizerFast',
                                     'Qwen2Tokenizer', 'TokenizersBackend', 'NoSuchTokenizer'])
  @pytest.mark.parametrize('family', ['qwen2', 'llama'])
  def test_tokenizer_json_is_what_counts(self, named, family, tmp_path):
    # transformers has classes of its own for these names and families, which split otherwise.
    tokens = metaspace_tokenizer()
    tokens.save_pretrained(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': family}))
    told = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({**told, 'tokenizer_class': named}))
    loaded = prompts_lib.load(tmp_path)
    text = 'What is one?\n two 12 é'
    assert prompts_lib.encode(loaded, [text]) == prompts_lib.encode(tokens, [text])
    assert loaded.get_vocab() == tokens.get_vocab() and loaded.eos_token == '</s>'

  def test_one_that_splits_otherwise(self, tmp_path, monkeypatch):
    CHAT.save_pretrained(tmp_path)
    other = tiny.chat_tokenizer()
    other.backend_tokenizer.normalizer = tokenizers.normalizers.Replace(' ', '')
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, 'from_pretrained',
                        lambda *args, **how: other)
    with pytest.raises(ValueError, match=r"'What is 123 plus 45\?' .*tokenizer"):
      prompts_lib.load(tmp_path)

  @pytest.mark.parametrize('content', ['[1]', '{', '[' * 10**5, b'\xff\xfe'])
  def test_a_file_that_is_none(self, content, tmp_path):
    CHAT.save_pretrained(tmp_path)
    file = tmp_path / 'tokenizer_config.json'
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r'tokenizer_config\.json .*allowed'):
      prompts_lib.load(tmp_path)

  def test_nothing_is_printed(self):
    code = 'from opd_jax.data import prompts; prompts.character_tokenizer()'
    clean = {k: v for k, v in tiny.environment().items() if 'ADVISORY' not in k}
    done = subprocess.run([sys.executable, '-c', code], env=clean, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


class TestCharacterTokenizer:

  @UNTIMED
  @given(st.text(prompts_lib.ALPHABET, max_size=40))
  def test_round_trip_one_token_a_character(self, text):
    assume('<eos>' not in text and '<pad>' not in text)  # written out, they are the tokens
    ids = prompts_lib.encode(CHARACTERS, [text])[0]
    assert len(ids) == len(text)
    assert CHARACTERS.decode(ids) == text

  def test_a_directory_that_transformers_opens(self, tmp_path):
    CHARACTERS.save_pretrained(tmp_path)
    text = '92-8=84;84-3=81#81 (a_b)'
    for loaded in (transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True),
                   prompts_lib.load(tmp_path)):
      assert loaded.get_vocab() == CHARACTERS.get_vocab()
      assert (loaded.eos_token_id, loaded.pad_token_id) == (EOS, PAD)
      ids = loaded(text, add_special_tokens=False)['input_ids']
      assert ids == prompts_lib.encode(CHARACTERS, [text])[0]
      assert loaded.decode(ids) == text
      assert prompts_lib.same_vocabulary(loaded, CHARACTERS)

  def test_vocabulary_size_is_round(self):
    assert len(CHARACTERS) == len(set(CHARACTERS.get_vocab().values())) == 64
    assert max(CHARACTERS.get_vocab().values()) == 63

  @pytest.mark.parametrize('text', ['é', 'A', '1\n', '中'])
  def test_an_unknown_character_raises(self, text):
    with pytest.raises(ValueError, match='cannot encode'):
      prompts_lib.encode(CHARACTERS, ['1+1', text])

  def test_other_alphabets_differ(self):
    assert not prompts_lib.same_vocabulary(
        CHARACTERS, prompts_lib.character_tokenizer('0123456789'))
    assert not prompts_lib.same_vocabulary(
        CHARACTERS, prompts_lib.character_tokenizer(prompts_lib.ALPHABET[::-1]))

  def test_missing_directory(self, tmp_path):
    with pytest.raises(FileNotFoundError, match='tokenizer_config.json'):
      prompts_lib.load(tmp_path)

  def test_without_eos(self, tmp_path):
    other = prompts_lib.character_tokenizer('01')
    other.eos_token = None
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='eos_token'):
      prompts_lib.load(tmp_path)

  def test_eos_pads_where_there_is_no_padding_token(self):
    other = prompts_lib.character_tokenizer('01')
    other.pad_token = None
    assert prompts_lib.pad_id(other) == other.eos_token_id
    assert prompts_lib.pad_id(CHARACTERS) == PAD
