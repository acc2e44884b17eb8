"""AIME 2026: the 30 problems of both papers, with integer answers (Apache 2.0).

Columns: id, problem, answer.
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
      hub='math-ai/aime26',
      revision='79037aebdb6580008fb960d17cb21fd3099083e3',
      prompt_column='problem', answer_column='answer', train_split=None, eval_split='')


load, prompt, group, measures = (
    _published.load, _published.prompt, _published.group, _published.measures)
grade, grade_all = _published.grade, _published.grade_all
example_options = functools.partial(_published.example_options, options=Options)
