"""AIME 2024: the 30 problems of both papers, with integer answers.

Columns: id, problem, solution, answer, url, year.
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
      hub='HuggingFaceH4/aime_2024',
      revision='2fe88a2f1091d5048c0f36abc874fb997b3dd99a',
      prompt_column='problem', answer_column='answer', train_split=None, eval_split='')


load, prompt, group, measures = (
    _published.load, _published.prompt, _published.group, _published.measures)
grade, grade_all = _published.grade, _published.grade_all
example_options = functools.partial(_published.example_options, options=Options)
