"""GPQA Diamond: 198 questions of graduate science with four choices (CC BY 4.0; arXiv 2311.12022).

Columns: Question, Correct Answer, Incorrect Answer 1 to 3, High-level domain, and others. The hub
asks for consent to its terms, and for not publishing the questions. The choices of a question are
in an order that is a function of its text. Accuracies are by domain, too.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
from typing import Any, ClassVar

from opd_jax.tasks import _published, _tables
from opd_jax.tasks._published import Data

QUESTION, RIGHT = 'Question', 'Correct Answer'
WRONG = tuple(f'Incorrect Answer {i}' for i in (1, 2, 3))
LETTERS = 'ABCD'


def _make(table: _tables.Table, part: _tables.Part, suffix: str) -> dict[str, list[Any]]:
  columns = {name: table.column(name) for name in (QUESTION, RIGHT, *WRONG)}
  prompts, answers = [], []
  for i, row in enumerate(zip(*columns.values(), strict=True)):
    if not all(isinstance(text, str) and text.strip() for text in row):
      raise ValueError(f'{part.field("source")}: {table.where(i)} has {_tables.shown(row)}; '
                       f'allowed: a text in each of {list(columns)}')
    question, *choices = (text.strip() for text in row)
    right = choices[0]
    random.Random(question).shuffle(choices)
    listed = ''.join(f'\n{letter}) {c}' for letter, c in zip(LETTERS, choices, strict=True))
    prompts.append(f'{question}\n{listed}\n{suffix}')
    answers.append(LETTERS[choices.index(right)])
  return {'prompt': prompts, 'answer': answers}


@dataclasses.dataclass(frozen=True)
class Options(_published.Options):
  """See `_published.Options`."""

  data: ClassVar[Data] = Data(
      hub='Idavidrein/gpqa', subset='gpqa_diamond',
      revision='633f5ee89ab8ad4522a9f850766b73f62147ffdd', grader='choice',
      group_column='High-level domain', train_split=None, eval_split='', gated=True, make=_make,
      needs=(QUESTION, RIGHT, *WRONG))

  suffix: str = ('\nPlease reason step by step, and put the letter of your final answer within '
                 '\\boxed{}.')


load, prompt, group, measures = (
    _published.load, _published.prompt, _published.group, _published.measures)
grade, grade_all = _published.grade, _published.grade_all


def example_options(folder: pathlib.Path) -> dict[str, Any]:
  """Writes questions with the published columns into `folder`; returns the knobs to read them."""
  rows = [{QUESTION: f'What is {i} plus 1?', RIGHT: str(i + 1), 'High-level domain': 'Sums',
           **{name: str(i + 10 * k) for k, name in enumerate(WRONG, 1)}} for i in range(50)]
  path = folder / 'gpqa_diamond.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return dict(source=str(path), holdout_examples=25)
