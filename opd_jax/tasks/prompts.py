"""Reads prompts from any data set that `datasets` can read: a hub name, a file, a folder.

    c.task = config_lib.task_config(
        'prompts', source='problems.jsonl', prompt_column='problem', answer_column='solution',
        filters=("level >= 3", "source == 'math'"), holdout_examples=500, grader='boxed')

Rows go through: filters, held-out rows set aside, training rows that are also evaluation rows left
out. What became of how many is in the log. A row has a `prompt` (a text, or the messages of a
conversation that ends with the user's turn), perhaps an `answer` (or a list of accepted ones) and a
`completion`, and the name of the `grader`, so that `grade` needs nothing else. How files are read
is in `_tables.py`, columns in `_columns.py`, filters in `_filters.py`; what graders find and how
they compare in `_graders.py`. With `eval`, evaluation rows are those of a task in benchmarks/:

    c.task = config_lib.task_config('prompts', source='instructions.jsonl', eval='ifeval')
"""

from __future__ import annotations

from concurrent import futures
import dataclasses
import importlib.util
import json
import pathlib
from typing import Any

import datasets
import numpy as np

from opd_jax import tasks
from opd_jax.tasks import _columns, _filters, _graders, _instructions, _math, _tables
from opd_jax.tasks._columns import AUTO

GRADERS = ('none', AUTO, *_graders.FIND)
MOST_HELD_OUT = 64  # with holdout_examples=-1
BENCHMARKS = 'benchmarks'  # the folder of the tasks to evaluate on


@dataclasses.dataclass(frozen=True)
class Options:
  """The knobs.

  Attributes:
    source: a file (.jsonl, .json, .parquet, .csv), a folder of such files or one that
      `save_to_disk` wrote, or the name of a data set on the hub.
    subset: the configuration of a data set that has several.
    revision: of a data set on the hub: its commit, 40 hex digits, or a name (see `config.pin`).
    train_split: of the source; '' for the only one there is.
    prompt_column: column with the text of the prompt. Columns may be nested, as in
      'reward_model.ground_truth'. With 'auto' the only column that can be meant is taken, be it of
      texts or of conversations, and the log says which; several are refused.
    messages_column: in its place, column with a conversation, a list of {'role', 'content'} (or
      {'from', 'value'}); if it ends with the assistant's turn, that is the completion.
    suffix: appended to the prompt, or to the last turn of the user.
    answer_column: what the grader compares with, a text or a number, or a list of accepted ones;
      '' for none; 'auto' for the only column that can be meant.
    completion_column: what supervised learning learns, '' for none.
    filters: rows to keep, as 'COLUMN OPERATOR LITERAL', for all of which a row has to be right.
    holdout_examples: how many random training rows become the evaluation set, where nothing else is
      (eval_split, eval_source or eval); -1 for a fifth of them, at most 64.
    holdout_seed: which ones. The run's own seed only shuffles.
    eval: name of a task of benchmarks/ to evaluate on, of which eval_source and eval_revision are
      then `source` and `revision`; it brings its own columns and graders.
    eval_split: split with the evaluation rows.
    eval_source, eval_subset, eval_revision: of the evaluation rows, if not those of training.
    eval_prompt_column, eval_messages_column, eval_answer_column: '' for those of training.
    eval_filters: like `filters`, which are for training rows only.
    grader: 'none'; 'exact', the whole text; 'boxed', what is in the last \\boxed{}; 'last_number'.
      The last two compare as mathematics, and so does 'answer_line', the last line 'Answer: ...'.
      'choice': a letter, in the last box or such a line. 'auto' is 'last_number' where there is
      a column of answers, and 'none' without.
  """

  source: str = ''
  subset: str = ''
  revision: str = ''
  train_split: str = ''
  prompt_column: str = 'auto'
  messages_column: str = ''
  suffix: str = ''
  answer_column: str = 'auto'
  completion_column: str = ''
  filters: tuple[str, ...] = ()
  holdout_examples: int = 0
  holdout_seed: int = 0
  eval: str = ''
  eval_split: str = ''
  eval_source: str = ''
  eval_subset: str = ''
  eval_revision: str = ''
  eval_prompt_column: str = ''
  eval_messages_column: str = ''
  eval_answer_column: str = ''
  eval_filters: tuple[str, ...] = ()
  grader: str = 'none'

  def __post_init__(self):
    _check(self)


def _train_part(o):
  return _tables.Part('', o.source, o.subset, o.revision, o.train_split, _prompts(o),
                      o.messages_column, _answers(o), o.completion_column, o.filters)


def _prompts(o):
  return '' if o.messages_column and o.prompt_column == AUTO else o.prompt_column


def _answers(o):
  return '' if o.grader == 'none' and o.answer_column == AUTO else o.answer_column


def _eval_part(o):
  own = bool(o.eval_source)
  columns = o.eval_prompt_column, o.eval_messages_column
  if not any(columns):
    columns = _prompts(o), o.messages_column
  return _tables.Part('eval_', o.eval_source or o.source, o.eval_subset if own else o.subset,
                      o.eval_revision if own else o.revision, o.eval_split, *columns,
                      o.eval_answer_column or _answers(o), '', o.eval_filters)


def _check(o):
  if not o.source:
    raise ValueError("task.options.source=''; allowed: a file, a folder, or the name of a data set "
                     'on the hub')
  if o.grader not in GRADERS:
    raise ValueError(f'task.options.grader={o.grader!r}; allowed: {list(GRADERS)}')
  if o.grader not in ('none', 'exact', 'choice') and (
      importlib.util.find_spec('math_verify') is None):
    raise ValueError(f"task.options.grader={o.grader!r} needs math-verify, which is not installed; "
                     "allowed: `pip install 'math-verify>=0.9'`, or 'exact'")
  known = tasks.names(BENCHMARKS)
  if o.eval and o.eval not in known:
    raise ValueError(f"task.options.eval={o.eval!r}; allowed: '' or one of {known}")
  separate = bool(o.eval_split or o.eval_source or o.eval)
  if separate == bool(o.holdout_examples) or o.holdout_examples < -1:
    raise ValueError(
        f'task.options.holdout_examples={o.holdout_examples} with eval_split={o.eval_split!r}, '
        f'eval_source={o.eval_source!r}, eval={o.eval!r}; allowed: at least 1, -1, or 0 and one of '
        'the others: '
        'evaluation rows come from one place')
  if o.holdout_seed < 0 or o.holdout_seed and separate:
    raise ValueError(f'task.options.holdout_seed={o.holdout_seed}; allowed: at least 0, and 0 '
                     'where no rows are held out')
  for name in ('eval_split', 'eval_subset'):
    if o.eval and getattr(o, name):
      raise ValueError(f'task.options.{name}={getattr(o, name)!r} has no effect with '
                       f"eval={o.eval!r}; allowed: ''")
  for name in ('eval_subset', 'eval_revision'):
    if getattr(o, name) and not o.eval_source:
      raise ValueError(f"task.options.{name}={getattr(o, name)!r} has no effect without "
                       "eval_source; allowed: ''")
  for name in ('eval_prompt_column', 'eval_messages_column', 'eval_answer_column', 'eval_filters'):
    value = getattr(o, name)
    if value and (o.eval or not separate):
      where = f'those of eval={o.eval!r}' if o.eval else 'held out of the training rows'
      raise ValueError(f'task.options.{name}={value!r} has no effect where evaluation rows are '
                       f'{where}; allowed: {type(value)()!r}')
  for part in (_train_part(o),) if o.eval else (_train_part(o), _eval_part(o)):
    if bool(part.prompt_column) == bool(part.messages_column):
      raise ValueError(
          f'task.options.{part.prefix}prompt_column={part.prompt_column!r}, '
          f'{part.prefix}messages_column={part.messages_column!r}; allowed: one of them')
  answers = (_train_part(o) if o.eval else _eval_part(o)).answer_column
  if o.grader != AUTO and (o.grader != 'none') != bool(answers):
    raise ValueError(f'task.options.grader={o.grader!r} with answer_column={o.answer_column!r}, '
                     f"eval_answer_column={o.eval_answer_column!r}; allowed: 'none' without a "
                     'column of answers, another grader with one')
  for name in ('filters', 'eval_filters'):
    for text in getattr(o, name):
      _filters.parse(name, text)


def example_options(folder: pathlib.Path) -> dict[str, Any]:
  """Writes a small data set into `folder`; returns the knobs to read it with."""
  rows = [{'question': f'What is {a} plus {b}?', 'answer': f'{a} + {b} = {a + b}'}
          for a in range(15) for b in range(15)]
  (folder / 'sums.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return dict(source=str(folder / 'sums.jsonl'), prompt_column='question', answer_column='answer',
              holdout_examples=60, grader='last_number')


def load(split: str, options: Options) -> datasets.Dataset:
  """Reads the examples of 'eval' or 'train'.

  Raises:
    ValueError: another split; a source, split or column that is not there, a filter that does not
      fit its column, a row without what its columns promise, no rows left.
  """
  if split not in ('eval', 'train'):
    raise ValueError(f"split={split!r}; allowed: ['eval', 'train']")
  o = options
  held_out, suffix = None, o.suffix
  if o.eval:
    held_out, suffix = benchmark_rows(o.eval, o.eval_source, o.eval_revision)
    if split == 'eval':
      return held_out
  elif not o.holdout_examples:
    held_out, told = _rows(_eval_part(o), o)
    if split == 'eval':
      return _told(held_out, told)
  rows, told = _rows(_train_part(o), o)
  if held_out is None:
    count = min(max(len(rows) // 5, 1), MOST_HELD_OUT)
    rows, held_out = hold_out(rows, count if o.holdout_examples < 0 else o.holdout_examples,
                              o.holdout_seed)
    told += [f'{len(held_out)} held out']
    if split == 'eval':
      return _told(held_out, told)
  rows, left_out = leave_out(rows, held_out, o.source, (o.suffix, suffix))
  return _told(rows, told + left_out)


def benchmark_rows(name: str, source: str, revision: str) -> tuple[datasets.Dataset, str]:
  """Reads the rows of a task of benchmarks/ that another evaluates on, whose fields are eval_source
  and eval_revision: (those, the suffix that each of their prompts has).

  Raises:
    ValueError: as its `load`.
  """
  benchmark = tasks.get(name)
  options = benchmark.Options(source=source, revision=revision)
  return benchmark.load('eval', options, 'eval_'), options.suffix


def hold_out(rows: datasets.Dataset, count: int, seed: int
             ) -> tuple[datasets.Dataset, datasets.Dataset]:
  """Sets `count` random rows aside: (the others, in their order; those).

  Raises:
    ValueError: there are no more than that.
  """
  if count >= len(rows):
    raise ValueError(f'task.options.holdout_examples={count}; allowed: below the {len(rows)} '
                     'training rows')
  order = np.random.default_rng(seed).permutation(len(rows))
  return rows.select(np.sort(order[count:])), rows.select(order[:count])


def leave_out(rows: datasets.Dataset, held_out: datasets.Dataset, source: str,
              suffixes: tuple[str, str] = ('', '')) -> tuple[datasets.Dataset, list[str]]:
  """Leaves out the rows whose prompt is one of the evaluation set; (the others, what to say).
  `suffixes` are those of both, which do not count.

  Raises:
    ValueError: these are all; `source` is where they are from.
  """
  mine, theirs = map(key, suffixes)
  known = {key(p).removesuffix(theirs).rstrip() for p in held_out['prompt'][:]}
  fresh = [i for i, p in enumerate(rows['prompt'][:])
           if key(p).removesuffix(mine).rstrip() not in known]
  if not fresh:
    raise ValueError(f'task.options.source={source!r}: all of {len(rows)} training rows are '
                     'evaluation rows too; allowed: at least one that is not')
  return rows.select(fresh), [
      f'{len(rows) - len(fresh)} left out that are in the evaluation set']


def _told(rows, told):
  """The log shows what is in the description."""
  rows.info.description = ', '.join(told)
  return rows


def key(prompt: str | list[dict[str, str]]) -> str:
  """Computes what makes two prompts the same: their words, whatever the case, the white space and
  the system message."""
  if not isinstance(prompt, str):
    prompt = '\n'.join(m['content'] for m in prompt if m['role'] != 'system')
  return ' '.join(prompt.casefold().split())


def _rows(part, o):
  """(rows with the columns of this task, what to say about them)."""
  table = _tables.read(part)
  told = [f'{len(table)} rows read']
  # Training rows may have no answers where evaluation rows, of another place, have some.
  evaluated = bool(part.prefix or o.holdout_examples or o.eval and o.grader != 'none')
  part, guessed = _columns.guess(table, part, graded=evaluated and o.grader != AUTO)
  for name in ('prompt_column', 'messages_column', 'answer_column', 'completion_column'):
    column = getattr(part, name)
    if column and not table.has(column):
      raise ValueError(f'{part.field(name)}; allowed: a column of {part.source!r}, {table.names}')
  told += guessed
  if part.filters:
    table = _filters.apply(table, part)
    told += [f'{len(table)} kept by {part.prefix}filters']
  if not len(table):
    raise ValueError(f'{part.field("source")} with {part.prefix}filters={part.filters}: no rows '
                     'are left; allowed: at least one')
  columns: dict[str, Any] = {}
  if part.prompt_column:
    columns['prompt'] = [p + o.suffix for p in _columns.texts(table, part, 'prompt_column')]
  else:
    columns['prompt'], spoken = _columns.conversations(table, part, o.suffix)
    if spoken and not part.completion_column:
      columns['completion'] = spoken
  if part.completion_column:
    columns['completion'] = _columns.texts(table, part, 'completion_column')
  if part.answer_column:
    columns['answer'] = _columns.answers(table, part)
  grader = 'last_number' if o.grader == AUTO else o.grader
  columns['grader'] = [grader if part.answer_column else 'none'] * len(table)
  return datasets.Dataset.from_dict(columns), told


def prompt(example: dict[str, Any]) -> str | list[dict[str, str]]:
  """Returns the text, or the conversation."""
  return example['prompt']


def grade(example: dict[str, Any], text: str) -> float | None:
  """Returns 1.0 for a right answer, or one that follows all instructions, else 0.0; None without an
  answer to compare."""
  if example['grader'] == 'none':
    return None
  if example['grader'] == 'instructions':
    return float(all(_instructions.follow(example['instructions'], text)))
  answers = example['answer']
  return _graders.grade(example['grader'], [answers] if isinstance(answers, str) else answers, text)


def grade_all(examples: list[dict[str, Any]], texts: list[str]) -> list[float | None]:
  """Grades many at a time: threads wait for the processes that judge mathematics."""
  with futures.ThreadPoolExecutor(_math.WORKERS) as pool:
    return list(pool.map(grade, examples, texts))


def group(example: dict[str, Any]) -> str:
  """Returns the part of the data set that an example is of, '' where it has none."""
  return example['group'] if 'group' in example else ''


def measures(example: dict[str, Any], text: str) -> dict[str, list[float]]:
  """Returns what else is said of an answer to instructions; nothing of others."""
  if example['grader'] != 'instructions':
    return {}
  return _instructions.measures(example['instructions'], text)
