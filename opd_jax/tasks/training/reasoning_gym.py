"""Problems that `reasoning-gym` makes: puzzles, algebra, logic, games, each with a verifier.

    c.task = config_lib.task_config(
        'reasoning_gym', datasets=('chain_sum', 'knights_knaves'), train_examples=4096)

The library is an extra, `pip install -e '.[reasoning-gym]'` (Stojanovski et al. 2025, arXiv
2505.24760). Problems are functions of a data set, a seed and a number, so that nothing is stored.
The answer that is graded stands between <answer> and </answer>, as the library's own prompt asks.
"""

from __future__ import annotations

import base64
from concurrent import futures
import dataclasses
import importlib.util
import pathlib
import pickle
import re
from typing import Any

import datasets as datasets_lib

from opd_jax.tasks import _math, prompts

SUFFIX = ('\nGive the final answer between <answer> and </answer>: only the answer, in the form '
          'that is asked for.')
EVAL_SEED = 2**31 - 1  # of the held-out problems, whatever data_seed is
# What the library calls a data set and is none by itself: one that needs others, or a server.
OTHERS = ('composite',)


@dataclasses.dataclass(frozen=True)
class Options:
  """The knobs.

  Attributes:
    datasets: names of the library's data sets; of each as many problems.
    train_examples, eval_examples: sizes of the splits, of all data sets together. No training
      problem is a held-out one.
    data_seed: of the training problems; the held-out problems are always the same. The run's own
      seed only shuffles.
    suffix: appended to each prompt.
  """

  datasets: tuple[str, ...] = ('chain_sum',)
  train_examples: int = 4096
  eval_examples: int = 256
  data_seed: int = 0
  suffix: str = SUFFIX

  def __post_init__(self):
    if importlib.util.find_spec('reasoning_gym') is None:
      raise ValueError("task.name='reasoning_gym' needs reasoning-gym, which is not installed; "
                       "allowed: `pip install -e '.[reasoning-gym]'`, or another task")
    unknown = sorted(set(self.datasets) - set(names()))
    if unknown or not self.datasets:
      raise ValueError(f'task.options.datasets={self.datasets} has unknown names {unknown}; '
                       f'allowed: at least one of {names()}')
    for name in ('train_examples', 'eval_examples'):
      if getattr(self, name) < len(self.datasets):
        raise ValueError(f'task.options.{name}={getattr(self, name)}; allowed: at least '
                         f'{len(self.datasets)}, one of each data set')
    if not 0 <= self.data_seed < EVAL_SEED:
      raise ValueError(f'task.options.data_seed={self.data_seed}; allowed: 0 to {EVAL_SEED - 1}')


def names() -> list[str]:
  """Lists the data sets of the library."""
  from reasoning_gym import factory  # an extra
  return sorted(name for name in factory.DATASETS if name not in OTHERS and name[0] != '.')


def load(split: str, options: Options) -> datasets_lib.Dataset:
  """Makes the examples of 'eval' or 'train'.

  Raises:
    ValueError: another split.
  """
  if split not in ('eval', 'train'):
    raise ValueError(f"split={split!r}; allowed: ['eval', 'train']")
  held_out = _make(options, options.eval_examples, EVAL_SEED)
  if split == 'eval':
    return datasets_lib.Dataset.from_list(held_out)
  rows = datasets_lib.Dataset.from_list(_make(options, options.train_examples, options.data_seed))
  known = datasets_lib.Dataset.from_list(held_out)
  rows, told = prompts.leave_out(rows, known, f'reasoning_gym {options.datasets}')
  rows.info.description = ', '.join(told)
  return rows


def _make(o, count, seed):
  """Problems of all data sets in turn."""
  import reasoning_gym  # an extra
  size = -(-count // len(o.datasets))
  made = {name: reasoning_gym.create_dataset(name, size=size, seed=seed) for name in o.datasets}
  return [_row(name, made[name][i], o.suffix) for i in range(size) for name in o.datasets][:count]


def _row(name, entry, suffix):
  # With tuples and objects, which JSON does not keep, and some verifiers look at.
  kept = base64.b64encode(pickle.dumps(entry)).decode()
  return {'prompt': entry['question'] + suffix, 'dataset': name, 'problem': kept}


_pool = _math.Pool(lambda: _math.Worker(
    _math.JUDGES / 'reasoning_gym_scores.py', 'answers to reasoning-gym'))


def prompt(example: dict[str, Any]) -> str:
  """Returns the question, with what is said of the form of the answer."""
  return example['prompt']


def group(example: dict[str, Any]) -> str:
  """Returns the name of the data set."""
  return example['dataset']


def grade(example: dict[str, Any], text: str) -> float:
  """Asks the library for the score, 0 to 1, of what is in the last <answer>; 0 without one, or
  where its verifier does not come back in time."""
  found = re.findall(r'(?s)<answer>(.*?)</answer>', text)
  if not found or not found[-1].strip():
    return 0.0
  return float(_pool.ask(example['dataset'], example['problem'], found[-1].strip()) or 0.0)


def grade_all(examples: list[dict[str, Any]], texts: list[str]) -> list[float]:
  """Grades many at a time: threads wait for the processes that judge."""
  with futures.ThreadPoolExecutor(_math.WORKERS) as pool:
    return list(pool.map(grade, examples, texts))


def example_options(folder: pathlib.Path) -> dict[str, Any]:
  """Returns knobs for a few easy problems."""
  return dict(datasets=('chain_sum', 'leg_counting'), train_examples=100, eval_examples=40)
