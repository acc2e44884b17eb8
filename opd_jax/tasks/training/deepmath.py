"""DeepMath-103K: 103,022 hard mathematical problems with one final answer each (MIT; arXiv
2504.11456).

Columns: question, final_answer, difficulty, topic, r1_solution_1 to 3.
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
      hub='zwhe99/DeepMath-103K',
      revision='5cf055d1fe3d7a2eb19719ac020211469736ae44',
      prompt_column='question', answer_column='final_answer',
      group_column='difficulty')

  eval: str = 'aime24'


load, prompt, group, measures = (
    _published.load, _published.prompt, _published.group, _published.measures)
grade, grade_all = _published.grade, _published.grade_all
example_options = functools.partial(_published.example_options, options=Options)
