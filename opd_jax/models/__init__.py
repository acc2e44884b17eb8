"""Models: `build` makes one from a config.json; its family is a file in `families/`, found by the
`model_type`."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from typing import Any

import jax.numpy as jnp

from opd_jax.models import decoder
from opd_jax.types import Model


def names() -> list[str]:
  """Lists the names that `build` accepts: the files of `families/`."""
  here = pathlib.Path(__file__).parent / 'families'
  return sorted(p.stem for p in here.glob('*.py') if p.stem[0] != '_')


def build(hf_config: dict[str, Any], *, vocab_in_use: int | None = None, dtype: Any = jnp.float32,
          attention: str = 'auto', remat: str = 'none', layer_unroll: int = 1) -> Model:
  """Makes the model that a Hugging Face config.json describes.

  Args:
    hf_config: the content of config.json; `model_type` picks the file with its `FAMILY`.
    vocab_in_use: how many ids the tokenizer knows; by default all of `vocab_size`.
    dtype: of the activations.
    attention: of `attention.NAMES`.
    remat: of `decoder.REMATS`, what a gradient computes again in place of keeping it.
    layer_unroll: how many layers share one iteration of the scan.

  Raises:
    ValueError: unknown `model_type`, a field that the family does not implement, or more ids in use
      than the vocabulary has.
  """
  family = hf_config.get('model_type')
  if family == 'flax':
    raise ValueError("model_type 'flax' is a Flax module, which only its own code can make; "
                     "allowed: with student.factory or teacher.factory='package.module:function'")
  if family not in names():
    raise ValueError(f'model_type={family!r} is not implemented; allowed: {names()}')
  module = importlib.import_module(f'opd_jax.models.families.{family}')
  model = decoder.make_model(module.FAMILY, hf_config, dtype, attention, remat, layer_unroll)
  return model if vocab_in_use is None else limit_vocabulary(model, vocab_in_use)


def limit_vocabulary(model: Model, vocab_in_use: int) -> Model:
  """Returns the model with `vocab_in_use` ids that are tokens; the rest pads the vocabulary.

  Raises:
    ValueError: more ids in use than the vocabulary has.
  """
  if not 0 < vocab_in_use <= model.config.vocab_size:
    raise ValueError(f'the tokenizer has the id {vocab_in_use - 1}, and vocab_size is '
                     f'{model.config.vocab_size}; allowed: ids below it')
  return dataclasses.replace(
      model, vocab_in_use=vocab_in_use,
      head=lambda params: model.head(params).replace(vocab_in_use=vocab_in_use))
