"""What the tasks of published data sets share: each is one small file that says where the rows are
and what they are called.

Rows come from the hub at the commit that the file has, or from a local copy with the same columns
(`source`). They are prompts as those of the task `prompts`: with an `answer` and the name of the
`grader`, so that the rows of an evaluation task can be graded by any of these tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import json
import pathlib
from typing import Any, ClassVar

import datasets

from opd_jax import tasks
from opd_jax.tasks import _columns, _filters, _tables, prompts

BOXED = '\nPlease reason step by step, and put your final answer within \\boxed{}.'
BLOCK = 4096  # rows that are looked at together


@dataclasses.dataclass(frozen=True)
class Data:
  """A published data set.

  Attributes:
    hub, subset, revision: its name on the hub, its configuration there, and the commit.
    prompt_column, messages_column: as in the task `prompts`; one of them.
    answer_column: '' where there are no answers.
    answer_mark: what the answer stands behind, in a column of worked solutions.
    group_column: of the parts whose accuracies an evaluation reports, '' for none. A local copy
      need not have it.
    grader: a name of the task `prompts`, 'none', or 'instructions'.
    train_split, eval_split: names of splits, '' for the only one there is; None where there is none
      for that. The rows of an evaluation set can be trained on too, where some are held out.
    make: (table, part, suffix) -> the columns of the rows; for what is no question and answer.
    needs: columns that `make` reads.
    gated: whether the hub asks for consent to terms.
  """

  hub: str
  revision: str
  subset: str = ''
  prompt_column: str = ''
  messages_column: str = ''
  answer_column: str = ''
  answer_mark: str = ''
  group_column: str = ''
  grader: str = 'boxed'
  train_split: str | None = ''
  eval_split: str | None = None
  make: Callable[[_tables.Table, _tables.Part, str], dict[str, list[Any]]] | None = None
  needs: tuple[str, ...] = ()
  gated: bool = False


@dataclasses.dataclass(frozen=True)
class Options:
  """The knobs.

  Attributes:
    source: '' for the published data set at the commit in the task's file; else a local copy with
      the same columns (a file, a folder), or another name on the hub.
    revision: of another name on the hub (see `config.pin`).
    filters: rows to keep of `source`, as in the task `prompts`.
    distinct: whether of training rows with the same prompt only the first is kept.
    train_examples: the most training rows to read, the first ones that the filters keep; 0 for all.
    suffix: appended to each prompt.
    eval: name of the task to evaluate on; '' for the evaluation split or held-out rows.
    eval_source, eval_revision: `source` and `revision` of that task.
    holdout_examples: how many random rows of the training split become the evaluation set.
    holdout_seed: which ones.
  """

  data: ClassVar[Data]

  source: str = ''
  revision: str = ''
  filters: tuple[str, ...] = ()
  distinct: bool = False
  train_examples: int = 0
  suffix: str = BOXED
  eval: str = ''
  eval_source: str = ''
  eval_revision: str = ''
  holdout_examples: int = 0
  holdout_seed: int = 0

  def __post_init__(self):
    known = tasks.names(prompts.BENCHMARKS)
    if self.eval and self.eval not in known:
      raise ValueError(f"task.options.eval={self.eval!r}; allowed: '' or one of {known}")
    if self.holdout_examples < 0 or self.eval and self.holdout_examples or not (
        self.eval or self.holdout_examples or self.data.eval_split is not None):
      raise ValueError(
          f'task.options.eval={self.eval!r} with holdout_examples={self.holdout_examples}; allowed:'
          f" one of {known} and 0, or '' and at least 1")
    if self.train_examples < 0:
      raise ValueError(f'task.options.train_examples={self.train_examples}; allowed: at least 0')
    if self.holdout_seed < 0 or self.holdout_seed and not self.holdout_examples:
      raise ValueError(f'task.options.holdout_seed={self.holdout_seed}; allowed: at least 0, and 0 '
                       'where no rows are held out')
    for name, needed in (('revision', 'source'), ('eval_revision', 'eval_source'),
                         ('eval_source', 'eval')):
      if getattr(self, name) and not getattr(self, needed):
        raise ValueError(f'task.options.{name}={getattr(self, name)!r} has no effect without '
                         f"{needed}; allowed: ''")
    for text in self.filters:
      _filters.parse('filters', text)


@dataclasses.dataclass(frozen=True)
class _Part(_tables.Part):
  """Columns are no options here: an error names them with the source."""

  def field(self, name: str) -> str:
    if name.endswith('_column'):
      return f'task.options.{self.prefix}source={self.source!r}, column {getattr(self, name)!r}'
    return super().field(name)

  def pick(self, splits: Sequence[str]) -> str:
    if len(splits) == 1:
      return splits[0]
    if self.split not in splits:
      raise ValueError(f'{self.field("source")} has the splits {list(splits)}; allowed: one split, '
                       f'or {self.split!r} among them')
    return self.split


def load(split: str, options: Options, prefix: str = '') -> datasets.Dataset:
  """Reads the examples of 'eval' or 'train'; errors name fields with `prefix`, for a task that
  evaluates on this one.

  Raises:
    ValueError: another split; data that are not there, or whose columns are not those of the
      published ones; no rows left.
  """
  if split not in ('eval', 'train'):
    raise ValueError(f"split={split!r}; allowed: ['eval', 'train']")
  o, data, held_out, suffix = options, options.data, None, options.suffix
  if o.eval:
    held_out, suffix = prompts.benchmark_rows(o.eval, o.eval_source, o.eval_revision)
  elif not o.holdout_examples:
    held_out = _told(*_read(o, prefix, data.eval_split))
  if split == 'eval' and held_out is not None:
    return held_out
  trained = data.eval_split if data.train_split is None else data.train_split
  if held_out is not None and not o.eval and data.train_split is None:
    raise ValueError(f'task.options.holdout_examples={o.holdout_examples} with eval={o.eval!r}: '
                     f'every row of {o.source or data.hub!r} is for evaluation; allowed: at least '
                     f'1, or eval as one of {tasks.names(prompts.BENCHMARKS)}')
  rows, told = _read(o, '', trained, training=True)
  if held_out is None:
    rows, held_out = prompts.hold_out(rows, o.holdout_examples, o.holdout_seed)
    told += [f'{len(held_out)} held out']
    if split == 'eval':
      return _told(held_out, told)
  rows, left_out = prompts.leave_out(rows, held_out, o.source or data.hub,
                                      (o.suffix, suffix))
  return _told(rows, told + left_out)


def _told(rows, told):
  """The log shows what is in the description."""
  rows.info.description = ', '.join(told)
  return rows


def _read(o, prefix, split, training=False):
  """(the rows of a split, what to say about them)."""
  data, source = o.data, o.source or o.data.hub
  local = pathlib.Path(source).exists()
  part = _Part(
      prefix, source, '' if local else data.subset, o.revision if o.source else data.revision,
      split, data.prompt_column, data.messages_column, data.answer_column, '', o.filters)
  table = _open(part, data, local)
  told = [f'{len(table)} rows read']
  if part.filters:
    table = _filters.apply(table, part)
    told += [f'{len(table)} kept by filters']
  if training and o.distinct:
    table = _distinct(table, data.prompt_column or data.messages_column)
    told += [f'{len(table)} with a prompt of their own']
  if training and 0 < o.train_examples < len(table):
    table = table.select(range(o.train_examples))
    told += [f'the first {len(table)} taken']
  if not len(table):
    raise ValueError(f'{part.field("source")} with filters={part.filters}: no rows are left; '
                     'allowed: at least one')
  columns = (data.make or _questions)(table, part, o.suffix)
  if data.answer_mark:
    columns['answer'] = [_behind(table, part, data.answer_mark, i, answer)
                         for i, answer in enumerate(columns['answer'])]
  if data.group_column and table.has(data.group_column):
    columns['group'] = [str(value) for value in table.column(data.group_column)]
  columns['grader'] = [data.grader] * len(table)
  return datasets.Dataset.from_dict(columns), told


def _open(part, data, local):
  """The table of a part, which has the columns that are needed."""
  try:
    table = _tables.read(part)
  except ValueError as e:
    if local or part.source != data.hub:
      raise
    terms = (f'consent to its terms at https://huggingface.co/datasets/{data.hub} and `hf auth '
             'login`, or ' if data.gated else '')
    raise ValueError(f'{str(e).partition("; allowed: ")[0]}; allowed: a machine that reaches the '
                     f'hub, {terms}task.options.{part.prefix}source as a local copy, a file or '
                     'folder with the same columns') from e
  wanted = data.needs or tuple(filter(None, (
      data.prompt_column, data.messages_column, data.answer_column)))
  missing = [name for name in wanted if not table.has(name)]
  if missing:
    raise ValueError(f'{part.field("source")} has no columns {missing}, only {list(table.names)}; '
                     f'allowed: data with the columns {list(wanted)} of {data.hub!r}')
  return table


def _distinct(table, column):
  """The first row with each value."""
  seen, kept = set(), []
  for start in range(0, len(table), BLOCK):  # a hundred copies of all need not be held at once
    block = table.select(range(start, min(start + BLOCK, len(table))))
    for i, value in enumerate(block.column(column), start):
      size = len(seen)
      seen.add(value if isinstance(value, str) else json.dumps(_asked(value)))
      if len(seen) > size:
        kept.append(i)
  return table.select(kept)


def _asked(turns):
  """A conversation without the answer at its end."""
  last = turns[-1] if turns else {}
  speaker = last.get('role', last.get('from')) if isinstance(last, dict) else ''
  answered = _columns.SPEAKERS.get(speaker, speaker) == 'assistant'
  return turns[:-1] if answered else turns


def _questions(table, part, suffix):
  """The columns of questions, or conversations, with their answers."""
  columns = {}
  if part.prompt_column:
    columns['prompt'] = [p + suffix for p in _columns.texts(table, part, 'prompt_column')]
  else:
    columns['prompt'], spoken = _columns.conversations(table, part, suffix)
    if spoken:
      columns['completion'] = spoken
  if part.answer_column:
    columns['answer'] = _columns.answers(table, part)
  return columns


def _behind(table, part, mark, place, text):
  before, found, answer = text.rpartition(mark)
  if not found or not answer.strip():
    raise ValueError(f'{part.field("answer_column")}: {table.where(place)} has '
                     f'{_tables.shown(before + found + answer)}; allowed: a text with {mark!r} and '
                     'the answer behind it')
  return answer.strip()


# Rows are those of `prompts`.
prompt, group, measures, grade, grade_all = (
    prompts.prompt, prompts.group, prompts.measures, prompts.grade, prompts.grade_all)


def example_options(folder: pathlib.Path, options: type[Options]) -> dict[str, Any]:
  """Writes small data with the columns of a published set into `folder`; returns the knobs to read
  them with."""
  data, name = options.data, options.__module__.rpartition('.')[2]
  rows = [_example(data, a, b) for a in range(10) for b in range(10)]
  path = folder / f'{name}.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  if data.grader != 'none':
    return dict(source=str(path), eval='', holdout_examples=30)
  other = folder / 'gsm8k.jsonl'  # nobody can grade its own rows
  rows = [_example(tasks.get('gsm8k').Options.data, a, b) for a in range(10, 16) for b in range(9)]
  other.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return dict(source=str(path), eval='gsm8k', eval_source=str(other))


def _example(data, a, b):
  """A row of sums with the columns of a published set."""
  question, answer = f'What is {a} plus {b}?', f'{data.answer_mark}{a + b}'
  row = {data.answer_column: answer} if data.answer_column else {}
  column, _, inner = data.answer_column.partition('.')
  row = {column: {inner: answer}} if inner else row
  turns = [{'role': 'user', 'content': question}]
  if data.messages_column and not data.answer_column:
    turns.append({'role': 'assistant', 'content': f'It is {answer}.'})
  return row | {data.prompt_column or data.messages_column: (
      question if data.prompt_column else turns)}
