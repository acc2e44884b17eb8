"""IFEval: 541 prompts with instructions that a program can check (Apache 2.0; arXiv 2311.07911).

Columns: prompt, instruction_id_list, kwargs, key. The reward is 1 if all instructions of a prompt
are followed, strictly; evaluations report the loose accuracy, those of single instructions, and
those of each kind, too. Prompts of your own with the same columns are `source`; a column `group`
names parts of them, whose accuracies are reported as well:

    {"prompt": "Name three rivers, without commas.",
     "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

The instructions are in `_instructions/`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, ClassVar

from opd_jax.tasks import _columns, _instructions, _published, _tables
from opd_jax.tasks._published import Data


def _make(table: _tables.Table, part: _tables.Part, suffix: str) -> dict[str, list[Any]]:
  prompts = [p + suffix for p in _columns.texts(table, part, 'prompt_column')]
  ids, settings = table.column('instruction_id_list'), table.column('kwargs')
  instructions = []
  for i, (names, values) in enumerate(zip(ids, settings, strict=True)):
    try:
      instructions.append(_instructions.parse(names, values))
    except ValueError as e:
      raise ValueError(f'{part.field("source")}: {table.where(i)} has {e}') from None
  return {'prompt': prompts, 'instructions': instructions}


@dataclasses.dataclass(frozen=True)
class Options(_published.Options):
  """See `_published.Options`."""

  data: ClassVar[Data] = Data(
      hub='google/IFEval', revision='966cd89545d6b6acfd7638bc708b98261ca58e84',
      prompt_column='prompt', group_column='group', grader='instructions', train_split=None,
      eval_split='', make=_make,
      needs=('prompt', 'instruction_id_list', 'kwargs'))

  suffix: str = ''


load, prompt, group, measures = (
    _published.load, _published.prompt, _published.group, _published.measures)
grade, grade_all = _published.grade, _published.grade_all


def example_options(folder: pathlib.Path) -> dict[str, Any]:
  """Writes prompts with the published columns into `folder`; returns the knobs to read them."""
  rows = [{'prompt': f'Say {i} in at least {n} words, without commas.', 'key': i,
           'instruction_id_list': ['punctuation:no_comma', 'length_constraints:number_words'],
           'kwargs': [{}, {'num_words': n, 'relation': 'at least'}]}
          for i in range(10) for n in range(2, 7)]
  path = folder / 'ifeval.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return dict(source=str(path), holdout_examples=25)
