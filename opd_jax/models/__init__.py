"""Model families, one file per Hugging Face `model_type`, found by that name."""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

from opd_jax.types import Model


def families() -> list[str]:
  """The names that `build` accepts: the files of this folder."""
  return sorted(p.stem for p in pathlib.Path(__file__).parent.glob('*.py') if p.stem[0] != '_')


def build(hf_config: dict[str, Any], **options: Any) -> Model:
  """The model that a Hugging Face config.json describes.

  Args:
    hf_config: the content of config.json; `model_type` picks the file.
    **options: how to compute, the same for every family: `dtype`, `remat`, `layer_unroll`.

  Raises:
    ValueError: unknown `model_type`, or a field that the family does not implement.
  """
  family = hf_config.get('model_type')
  if family not in families():
    raise ValueError(f'model_type {family!r} is not implemented; there are: {families()}')
  return importlib.import_module(f'opd_jax.models.{family}').build(hf_config, **options)
