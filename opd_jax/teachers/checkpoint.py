"""A Hugging Face checkpoint directory, frozen."""

from __future__ import annotations

from typing import Any

from opd_jax import hf, models, tokenizer
from opd_jax.teachers import Teacher


def load(path: str, student: Teacher, options: dict[str, Any]) -> Teacher:
  """Reads `path`; the student is not looked at."""
  del student
  if not path:
    raise ValueError("teacher.path='' with teacher.kind='checkpoint'; allowed: a directory")
  model = models.build(hf.read_config(path), **options)
  return Teacher(model, hf.read_params(path, model), tokenizer.load(path))
