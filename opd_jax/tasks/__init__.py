"""Tasks, one file each, found by name: here, in training/ and in benchmarks/.

A task module offers
  Options: a frozen dataclass, the knobs (`config.task.options`);
  load(split, options) -> datasets.Dataset of examples; the split 'eval' is the held-out one, and
    the 'corpus' split, where a task has one, also has a column 'completion'. The log shows the
    Dataset's `info.description`. An unknown split is a ValueError "split='NAME'; allowed: [...]";
  prompt(example) -> what a student is given: a text, or for a chat template a list of messages
    {'role': ..., 'content': ...} that ends with the user's;
  grade(example, text) -> the reward of a completed answer without its thinking, 0 to 1; None,
    whatever the text, for the examples of a split that nobody can grade. At the start, every
    example is asked for its grade of '';
  grade_all(examples, texts) -> their rewards; only where that is faster than one after the other;
  group(example) -> the name of a part of the examples, '' for none, where evaluations are to report
    the accuracy of each part;
  measures(example, text) -> {name: values}, what an evaluation reports besides the reward, each the
    mean of the values of all answers;
  example_options(folder) -> knobs that work, for the contract tests; only where the default Options
    do not, because the task reads files: it writes a small one into `folder`.
Knobs that name a file or a folder are called `source` or end in `_source`: a run does not go on
when what they contain has changed.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from types import ModuleType
from typing import Any


def names(folder: str = '') -> list[str]:
  """Lists the tasks there are, or those of one folder: the files here and one level below."""
  return sorted(name for name, inside in _places().items() if folder in ('', inside))


def _places():
  """The folder of each task, '' for this one."""
  here = pathlib.Path(__file__).parent
  files = [p.relative_to(here) for p in (*here.glob('*.py'), *here.glob('*/*.py'))]
  return {p.stem: str(p.parent).strip('.') for p in files
          if not any(part[0] in '_.' for part in p.parts)}


def get(name: str) -> ModuleType:
  """Finds the task called `name`.

  Raises:
    ValueError: there is none; lists those there are.
  """
  places = _places()
  if name not in places:
    raise ValueError(f'task.name={name!r}; allowed: {names()}')
  return importlib.import_module('.'.join(filter(None, ('opd_jax.tasks', places[name], name))))


def options(task: ModuleType, values: dict[str, Any]) -> Any:
  """Makes the task's Options.

  Raises:
    ValueError: a knob that the task does not have, or a value that it refuses.
  """
  known = [f.name for f in dataclasses.fields(task.Options)]
  unknown = sorted(set(values) - set(known))
  if unknown:
    raise ValueError(f'task.options has unknown fields {unknown}; allowed: {known}')
  for name, value in values.items():
    default = getattr(task.Options, name)
    wanted = type(default)
    number = wanted is float and type(value) is int
    same = number or type(value) is wanted
    if wanted is tuple and same:
      same = {type(x) for x in value} <= ({type(x) for x in default} or {str})  # () is of texts
    if not same:
      raise ValueError(f'task.options.{name}={value!r}; allowed: a {wanted.__name__} like '
                       f'{default!r}')
  return task.Options(**values)


def sources(values: Any) -> dict[str, pathlib.Path]:
  """Lists the files and folders that a task's Options name, by the knob. Names on the hub are none:
  they are at a commit."""
  named = {name: pathlib.Path(value) for name, value in vars(values).items()
           if (name == 'source' or name.endswith('_source')) and value}
  return {name: path for name, path in named.items() if path.exists()}
