"""GSM8K: 1,319 test and 7,473 training problems of school mathematics (MIT; arXiv 2110.14168).

Columns: question, answer (a worked solution that ends with '#### ' and the number).
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
      hub='openai/gsm8k', subset='main',
      revision='740312add88f781978c0658806c59bc2815b9866',
      prompt_column='question', answer_column='answer', answer_mark='####',
      train_split='train', eval_split='test')


load, prompt, group, measures = (
    _published.load, _published.prompt, _published.group, _published.measures)
grade, grade_all = _published.grade, _published.grade_all
example_options = functools.partial(_published.example_options, options=Options)
