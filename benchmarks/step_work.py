"""The work of benchmarks/step.py and of the peers in third_party/: two models of random weights,
prompts, and given rows on which losses are compared, in a folder that all of them read.

  student/, teacher/   Hugging Face directories
  tokenizer/           the same words for peers, with an end of text beyond the vocabulary of the
                       models, which is therefore never written: every answer takes all of its room
  prompts.jsonl        for opd_jax and its task `prompts`; eval.jsonl, one row that is not used
  work.json            sizes; texts of the prompts; tokens, of the prompts and given completions
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import pre_tokenizers
import transformers

from opd_jax import models, types
from opd_jax.files import huggingface
from opd_jax.models import params

_QWEN3 = dict(model_type='qwen3', rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True)


def _shape(width: int, layers: int, heads: int, kv_heads: int, head: int, inner: int
           ) -> dict[str, Any]:
  return dict(_QWEN3, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
              num_key_value_heads=kv_heads, head_dim=head, intermediate_size=inner)


# (student, teacher); the first is that of the comparison with the peers, then the same at half and
# at twice the width (growth.py), and some for GPUs.
SHAPES = {
    'small': (_shape(256, 4, 8, 4, 32, 768), _shape(512, 8, 16, 8, 32, 1536)),
    'half': (_shape(128, 4, 4, 2, 32, 384), _shape(256, 8, 8, 4, 32, 768)),
    'double': (_shape(512, 4, 16, 8, 32, 1536), _shape(1024, 8, 32, 16, 32, 3072)),
    'tiny': (_shape(32, 2, 2, 1, 16, 64), _shape(64, 2, 4, 2, 16, 128)),  # of the test
    '0.6b': (_shape(1024, 28, 16, 8, 128, 3072), _shape(2048, 28, 16, 8, 128, 6144)),
    '1.7b': (_shape(2048, 28, 16, 8, 128, 6144), _shape(2048, 28, 16, 8, 128, 6144))}
SPECIAL = ('<pad>', '<end>')


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What the work is made of: names in SHAPES, and numbers of tokens and rows."""

  shapes: str = 'small'
  vocab: int = 2048
  rows: int = 32
  prompt: int = 32
  new: int = 128
  seed: int = 0


def model_of(sizes: Sizes, part: str) -> types.Model:
  """Builds the 'student' or the 'teacher', without weights."""
  shape = SHAPES[sizes.shapes][('student', 'teacher').index(part)]
  room = max(4096, sizes.prompt + sizes.new)
  return models.build(dict(shape, vocab_size=sizes.vocab, max_position_embeddings=room))


def _tokenizer(words: list[str], pad: str, end: str) -> transformers.PreTrainedTokenizerFast:
  """A token a word, with white space between words."""
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(words)}, unk_token='<unknown>'))
  inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner, pad_token=pad, eos_token=end, clean_up_tokenization_spaces=False)


def _draw(model: types.Model, seed: int, dtype: Any) -> types.Params:
  """Weights under which the next token is not uniform."""
  rng, values = np.random.default_rng(seed), {}
  for name, spec in params.flatten(model.specs).items():
    if len(spec.hf_shape) == 1:
      values[name] = np.ones(spec.shape, dtype)
    else:
      std = (3.0 if name == 'embed' else 1.0) * spec.hf_shape[-1]**-0.5
      values[name] = (std * rng.standard_normal(spec.shape, np.float32)).astype(dtype)
  return params.unflatten(values)


def make(folder: pathlib.Path, sizes: Sizes) -> pathlib.Path:
  """Writes the work into a folder that is not there yet, and returns it."""
  folder.mkdir(parents=True)
  words = [*SPECIAL, *(f'w{i}' for i in range(len(SPECIAL), sizes.vocab))]
  # Large weights in two bytes, as checkpoints of that size come; small ones exactly.
  dtype = np.float32 if sizes.shapes in ('small', 'half', 'double', 'tiny') else jnp.bfloat16
  for i, part in enumerate(('student', 'teacher')):
    model = model_of(sizes, part)
    huggingface.write_checkpoint(folder / part, model, _draw(model, sizes.seed + i, dtype),
                                 _tokenizer(words, *SPECIAL))
  _tokenizer([*words, '<padding>', '<never>'], '<padding>', '<never>').save_pretrained(
      folder / 'tokenizer')
  rng = np.random.default_rng(sizes.seed + 2)
  rows = rng.integers(len(SPECIAL), sizes.vocab, (sizes.rows + 1, sizes.prompt + sizes.new))
  texts = [' '.join(words[t] for t in row[:sizes.prompt]) for row in rows]
  for name, some in (('prompts', texts[:-1]), ('eval', texts[-1:])):
    (folder / f'{name}.jsonl').write_text(''.join(
        json.dumps({'prompt': text}) + '\n' for text in some))
  (folder / 'work.json').write_text(json.dumps(
      {**dataclasses.asdict(sizes), 'tokens': rows[:-1].tolist(), 'texts': texts[:-1]}))
  return folder


def read(folder: pathlib.Path) -> tuple[Sizes, np.ndarray]:
  """Reads the sizes, and the token ids [rows, prompt + new] of the given rows."""
  work = json.loads((folder / 'work.json').read_text())
  sizes = Sizes(**{f.name: work[f.name] for f in dataclasses.fields(Sizes)})
  return sizes, np.array(work['tokens'], np.int32)
