"""Kinds of teacher, one file each, found by name.

A teacher module offers
  load(path, student, options) -> hf.LoadedModel, where `student` is the student before training and
  `options` are the compute options of `models.build`.
The teacher's vocabulary must be the student's; `doctor` compares the two.
"""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

from opd_jax.hf import LoadedModel

NONE = 'none'


def names() -> list[str]:
  """The kinds there are: the files of this folder, and 'none'."""
  here = pathlib.Path(__file__).parent
  return [NONE, *sorted(p.stem for p in here.glob('*.py') if p.stem[0] != '_')]


def load(kind: str, path: str, student: LoadedModel, options: dict[str, Any]) -> LoadedModel:
  """The teacher of a kind.

  Raises:
    ValueError: there is no such kind; lists those there are.
  """
  if kind not in names() or kind == NONE:
    raise ValueError(f'teacher.kind={kind!r}; allowed: {names()}')
  return importlib.import_module(f'opd_jax.teachers.{kind}').load(path, student, options)
