"""Kinds of teacher, one file each, found by name.

A teacher module offers
  load(path, student, options) -> Teacher, where `student` is the student's (model, host params,
  tokenizer) before training, and `options` the compute options of `models.build`.
The student's vocabulary must be the teacher's; `get_teacher` in `train.py` compares the two.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from typing import Any

from opd_jax.types import Model, Params

NONE = 'none'


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A model that grades, with its host parameters and tokenizer."""

  model: Model
  params: Params
  tokenizer: Any


def names() -> list[str]:
  """The kinds there are: the files of this folder, and 'none'."""
  here = pathlib.Path(__file__).parent
  return [NONE, *sorted(p.stem for p in here.glob('*.py') if p.stem[0] != '_')]


def load(kind: str, path: str, student: Teacher, options: dict[str, Any]) -> Teacher:
  """The teacher of a kind.

  Raises:
    ValueError: there is no such kind; lists those there are.
  """
  if kind not in names() or kind == NONE:
    raise ValueError(f'teacher.kind={kind!r}; allowed: {names()}')
  return importlib.import_module(f'opd_jax.teachers.{kind}').load(path, student, options)
