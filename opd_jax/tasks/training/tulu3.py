"""Tulu 3 SFT mixture: 939,343 conversations of many kinds and languages, without verdicts (ODC-BY
1.0, and parts under terms of their own; arXiv 2411.15124).

Columns: id, messages (role, content), source. What is learned, or asked, is the last turn.
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
      hub='allenai/tulu-3-sft-mixture',
      revision='b14afda60f1bbebe55d5d2fa1e4df5042f97f8be',
      messages_column='messages', grader='none')

  suffix: str = ''
  eval: str = 'ifeval'


load, prompt, group, measures = (
    _published.load, _published.prompt, _published.group, _published.measures)
grade, grade_all = _published.grade, _published.grade_all
example_options = functools.partial(_published.example_options, options=Options)
