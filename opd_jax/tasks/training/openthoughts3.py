"""OpenThoughts3: 1.2 million answers of QwQ-32B to problems of mathematics, code and science, up to
16 to a problem, without verdicts (Apache 2.0; arXiv 2506.04178).

Columns: difficulty, source, domain, conversations (from, value). 28 GB: `train_examples` reads the
first ones only; `distinct` takes one answer to each problem.
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
      hub='open-thoughts/OpenThoughts3-1.2M',
      revision='61bcf9d4eb38b30295efc2021227a63cc5bb34c8',
      messages_column='conversations', grader='none')

  suffix: str = ''
  eval: str = 'aime24'


load, prompt, group, measures = (
    _published.load, _published.prompt, _published.group, _published.measures)
grade, grade_all = _published.grade, _published.grade_all
example_options = functools.partial(_published.example_options, options=Options)
