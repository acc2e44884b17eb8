"""AMC 2023: 40 problems of AMC 12, with numbers as answers.

Columns: id, answer, url, question.
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
      hub='math-ai/amc23',
      revision='80815d37005feb82cd7f8fbc6901d5d3eff43057',
      prompt_column='question', answer_column='answer', train_split=None, eval_split='')


load, prompt, group, measures = (
    _published.load, _published.prompt, _published.group, _published.measures)
grade, grade_all = _published.grade, _published.grade_all
example_options = functools.partial(_published.example_options, options=Options)
