"""AIME 2025: the 30 problems of both papers, with integer answers (Apache 2.0).

Columns: problem, answer, id.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

from opd_jax.tasks import _published
from opd_jax.tasks._published import Data


@dataclasses.dataclass(frozen=True)
class Options(_published.Options):
  """See `_published.Options`."""

  data: ClassVar[Data] = Data(
      hub='math-ai/aime25',
      revision='563bb8404243c5f09de6ec262f2db674fe5bce9b',
      prompt_column='problem', answer_column='answer', train_split=None, eval_split='')


load, prompt, group, measures = (
    _published.load, _published.prompt, _published.group, _published.measures)
grade, grade_all = _published.grade, _published.grade_all
example_options = functools.partial(_published.example_options, options=Options)
