"""A Hugging Face checkpoint, frozen: a directory, or a repository of the hub at a commit."""

from __future__ import annotations

from typing import Any

from opd_jax.files import huggingface


def load(path: str, student: huggingface.LoadedModel, options: dict[str, Any], revision: str = ''
         ) -> huggingface.LoadedModel:
  """Reads `path`; the student is not looked at."""
  del student
  if not path:
    raise ValueError("teacher.path='' with teacher.kind='checkpoint'; allowed: a directory")
  return huggingface.load(path, options, revision)
