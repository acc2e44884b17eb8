"""MATH-500: 500 test problems of MATH (arXiv 2305.20050), five levels, seven subjects.

Columns: problem, solution, answer, subject, level, unique_id. Accuracies are by level, too.
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
      hub='HuggingFaceH4/MATH-500',
      revision='6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be',
      prompt_column='problem', answer_column='answer', group_column='level',
      train_split=None, eval_split='')


load, prompt, group, measures = (
    _published.load, _published.prompt, _published.group, _published.measures)
grade, grade_all = _published.grade, _published.grade_all
example_options = functools.partial(_published.example_options, options=Options)
