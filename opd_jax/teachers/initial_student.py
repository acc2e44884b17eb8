"""The student itself as it was before training, frozen: self-distillation."""

from __future__ import annotations

from typing import Any

from opd_jax.files.huggingface import LoadedModel


def load(path: str, student: LoadedModel, options: dict[str, Any], revision: str = ''
         ) -> LoadedModel:
  """Returns the student; `path` must be empty, since it would have no effect."""
  del options, revision  # a revision without a path is refused by rules/run.py
  if path:
    raise ValueError(f"teacher.path={path!r} has no effect with teacher.kind='initial_student'; "
                     "allowed: ''")
  return student
