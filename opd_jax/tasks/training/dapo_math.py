"""DAPO-Math-17k: mathematical problems with integer answers (Apache 2.0; arXiv 2503.14476).

Columns: prompt (messages), reward_model.ground_truth, data_source, ability, extra_info. The copy on
the hub has 1.79 million rows, each problem a hundred times: only the first of each is kept. A
prompt asks for a last line 'Answer: ...', and that is what is graded.
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
      hub='BytedTsinghua-SIA/DAPO-Math-17k',
      revision='65877096c24ffa7abc4e4fa5edb95cf3413a5674',
      messages_column='prompt', answer_column='reward_model.ground_truth',
      grader='answer_line')

  distinct: bool = True
  suffix: str = ''
  eval: str = 'aime24'


load, prompt, group, measures = (
    _published.load, _published.prompt, _published.group, _published.measures)
grade, grade_all = _published.grade, _published.grade_all
example_options = functools.partial(_published.example_options, options=Options)
