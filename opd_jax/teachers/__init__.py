"""Kinds of teacher, one file each, found by name, and what a teacher is to the loop.

A teacher module offers
  load(path, student, options, revision) -> LoadedModel, where `student` is the student before
  training, `options` are the compute options of `models.build`, and `revision` is the commit of a
  path on the hub, '' elsewhere. Its field `gives` says what can be asked of it; an objective that
  asks for more is refused at start.
The teacher's vocabulary must be the student's; the doctor compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import importlib
import pathlib
from typing import Any

from opd_jax.data.streams import Stream
from opd_jax.files.huggingface import LoadedModel
from opd_jax.types import Head, Params, Rollout, Scores

NONE = 'none'


@dataclasses.dataclass(frozen=True)
class Grader:
  """A teacher, or a reference model, as the loop sees it.

  A local model closes over its compiled program and its arrays; whatever else can grade a rollout
  (a server, a cache) closes over what it needs, and the loop does not know.

  Attributes:
    score: (rollout, stream) -> what the stream's objective wants of it, and nothing else; at the
      objective's temperature.
    head: of its hidden states; None where no objective wants them.
    params: of a model in this process, which may also write; None elsewhere.
  """

  score: Callable[[Rollout, Stream], Scores]
  head: Head | None
  params: Params | None


def names() -> list[str]:
  """Lists the kinds there are: the files of this folder, and 'none'."""
  here = pathlib.Path(__file__).parent
  return [NONE, *sorted(p.stem for p in here.glob('*.py') if p.stem[0] != '_')]


def load(kind: str, path: str, student: LoadedModel, options: dict[str, Any], revision: str = ''
         ) -> LoadedModel:
  """Opens the teacher of a kind.

  Raises:
    ValueError: there is no such kind; lists those there are.
  """
  if kind not in names() or kind == NONE:
    raise ValueError(f'teacher.kind={kind!r}; allowed: {names()}')
  return importlib.import_module(f'opd_jax.teachers.{kind}').load(path, student, options, revision)
