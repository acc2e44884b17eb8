"""Tokenizers are Hugging Face fast-tokenizer directories, loaded through transformers."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

PAD, EOS = '<pad>', '<eos>'
# 64 symbols with PAD and EOS, a round number so that every mesh divides the vocabulary.
ALPHABET = '0123456789abcdefghijklmnopqrstuvwxyz' + '+-*/=;#:?!.,<>()[]_|\'"@&%' + ' '


def character_tokenizer(alphabet: str = ALPHABET) -> Any:
  """One token a character, as a `PreTrainedTokenizerFast`: what `save_pretrained` writes is an
  ordinary Hugging Face directory. A character outside the alphabet raises when encoded."""
  transformers = _transformers()
  vocab = {token: i for i, token in enumerate([PAD, EOS, *alphabet])}
  inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='<unknown>'))
  # Every character by itself, the newline included (which '.' would leave out).
  inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
  inner.decoder = decoders.Fuse()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False)


def load(path: str | os.PathLike[str]) -> Any:
  """The tokenizer in a local directory.

  Raises:
    FileNotFoundError: no tokenizer there.
    ValueError: it has no EOS token.
  """
  file = pathlib.Path(path) / 'tokenizer_config.json'
  if not file.exists():
    raise FileNotFoundError(f'no tokenizer in {path} (tokenizer_config.json is missing)')
  loader = _transformers().AutoTokenizer
  # For some model types (qwen2) transformers overrules the generic class that a file names by one
  # that adds tokens of its own.
  if json.loads(file.read_text()).get('tokenizer_class') == 'TokenizersBackend':
    loader = _transformers().PreTrainedTokenizerFast
  tokenizer = loader.from_pretrained(str(path), local_files_only=True)
  for how_it_was_loaded in ('local_files_only', 'is_local'):  # or save_pretrained would store it
    tokenizer.init_kwargs.pop(how_it_was_loaded, None)
  if tokenizer.eos_token_id is None:
    raise ValueError(f'the tokenizer in {path} has no eos_token, so no completion could end')
  return tokenizer


def pad_id(tokenizer: Any) -> int:
  """The padding id; EOS pads where a tokenizer has no padding token (padding is masked anyway)."""
  return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
  """Token ids without special tokens."""
  try:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False,
                     return_token_type_ids=False)['input_ids'] if texts else []
  except Exception as e:  # the Rust side raises bare Exceptions
    raise ValueError(f'the tokenizer cannot encode one of {texts[:3]}...: {e}') from e


def same_vocabulary(a: Any, b: Any) -> bool:
  """Whether two tokenizers map the same strings to the same ids."""
  return a.get_vocab() == b.get_vocab()


def _transformers() -> Any:
  import transformers  # takes seconds to import: only when a tokenizer is really needed
  return transformers
