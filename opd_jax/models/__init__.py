"""Model families, one file per Hugging Face `model_type`, found by that name."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from typing import Any

from opd_jax.types import Model


def families() -> list[str]:
  """The names that `build` accepts: the files of this folder."""
  return sorted(p.stem for p in pathlib.Path(__file__).parent.glob('*.py') if p.stem[0] != '_')


def build(hf_config: dict[str, Any], *, vocab_in_use: int | None = None, **options: Any) -> Model:
  """The model that a Hugging Face config.json describes.

  Args:
    hf_config: the content of config.json; `model_type` picks the file.
    vocab_in_use: how many ids the tokenizer knows; by default all of `vocab_size`.
    **options: how to compute, the same for every family: `dtype`, `remat`, `layer_unroll`.

  Raises:
    ValueError: unknown `model_type`, a field that the family does not implement, or more ids in use
      than the vocabulary has.
  """
  family = hf_config.get('model_type')
  if family == 'flax':
    raise ValueError("model_type 'flax' is a Flax module, which only its own code can make; "
                     "allowed: with student.factory or teacher.factory='package.module:function'")
  if family not in families():
    raise ValueError(f'model_type {family!r} is not implemented; there are: {families()}')
  model = importlib.import_module(f'opd_jax.models.{family}').build(hf_config, **options)
  return model if vocab_in_use is None else limit_vocabulary(model, vocab_in_use)


def limit_vocabulary(model: Model, vocab_in_use: int) -> Model:
  """The model with `vocab_in_use` ids that are tokens, and the rest padding of the vocabulary.

  Raises:
    ValueError: more ids in use than the vocabulary has.
  """
  if not 0 < vocab_in_use <= model.config.vocab_size:
    raise ValueError(f'the tokenizer has the id {vocab_in_use - 1}, and vocab_size is '
                     f'{model.config.vocab_size}')
  return dataclasses.replace(
      model, vocab_in_use=vocab_in_use,
      head=lambda params: model.head(params).replace(vocab_in_use=vocab_in_use))
