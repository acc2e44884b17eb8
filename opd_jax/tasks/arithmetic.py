"""Chained addition and subtraction with a written-out chain of thought.

    prompt       92-8-3-3+4=
    completion   92-8=84;84-3=81;81-3=78;78+4=82#82

Every partial result lies in 0..99. The verifier reads the integer after '#'. The corpus generator
writes the text that a base model is pretrained on: clean chains, direct answers without any chain,
and sloppy chains in which each step may be wrong and is carried on consistently. A base trained on
the mixture knows how to do it right, and mostly does not: it has both a habit and a skill to fix.
"""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import datasets


@dataclasses.dataclass(frozen=True)
class Options:
  """The knobs.

  Attributes:
    operations: how many operations a training problem may have (drawn uniformly).
    eval_operations: how many a held-out problem has.
    operand_max: operands are 1..operand_max.
    train_examples, eval_examples, corpus_examples: sizes of the splits. No training or corpus
      problem is a held-out one.
    clean, direct, sloppy: relative weights of the kinds of text in the corpus.
    sloppy_error: probability that a step of a sloppy chain is wrong.
    data_seed: of the training problems and the corpus; the held-out problems are always the same.
      The run's own seed only shuffles.
  """

  operations: tuple[int, ...] = (4,)
  eval_operations: int = 4
  operand_max: int = 9
  train_examples: int = 16384
  eval_examples: int = 1024
  corpus_examples: int = 65536
  clean: float = 1.0
  direct: float = 0.0
  sloppy: float = 0.0
  sloppy_error: float = 0.3
  data_seed: int = 0

  def __post_init__(self):
    if not self.operations or min((*self.operations, self.eval_operations)) < 1:
      raise ValueError(f'task.options.operations={self.operations}, eval_operations='
                       f'{self.eval_operations}; allowed: at least one operation each')
    if not 1 <= self.operand_max <= 99:
      raise ValueError(f'task.options.operand_max={self.operand_max}; allowed: 1 to 99')
    if min(self.clean, self.direct, self.sloppy) < 0 or not self.clean + self.direct + self.sloppy:
      raise ValueError(
          f'task.options.clean, direct, sloppy={(self.clean, self.direct, self.sloppy)}; '
          'allowed: weights of at least 0, not all 0')
    if not 0 <= self.sloppy_error <= 1:
      raise ValueError(f'task.options.sloppy_error={self.sloppy_error}; allowed: 0 to 1')
    if self.eval_examples > 100 * (2 * self.operand_max) ** self.eval_operations // 20:
      raise ValueError(f'task.options.eval_examples={self.eval_examples}; allowed: at most a few '
                       'per cent of the distinct problems, or training problems run out')


def make_problem(rng: random.Random, operations: int, operand_max: int) -> str:
  """Makes a random chain whose partial results all lie in 0..99."""
  value = rng.randint(0, 99)
  text = str(value)
  for _ in range(operations):
    while True:
      sign, operand = rng.choice((-1, 1)), rng.randint(1, operand_max)
      if 0 <= value + sign * operand <= 99:
        break
    value += sign * operand
    text += f'{"+" if sign > 0 else "-"}{operand}'
  return text


def _steps(problem: str) -> tuple[int, list[int]]:
  """'92-8+3' -> (92, [-8, 3])."""
  start, *signed = re.findall(r'^\d+|[+-]\d+', problem)
  return int(start), [int(s) for s in signed]


def solve(problem: str) -> int:
  """Computes the right answer."""
  start, signed = _steps(problem)
  return start + sum(signed)


def write_chain(problem: str, rng: random.Random | None = None, error: float = 0.0) -> str:
  """Writes the chain of thought and the answer; with `error`, each step is off by 1, 2 or 10 with
  that probability and the chain carries on from the wrong value. Results are clipped to 0..99."""
  value, signed = _steps(problem)
  parts = []
  for operand in signed:
    result = value + operand
    if error and rng.random() < error:
      result += rng.choice((-10, -2, -1, 1, 2, 10))
    result = min(max(result, 0), 99)  # a wrong value may lead a right step out of the range
    parts.append(f'{value}{"+" if operand > 0 else "-"}{abs(operand)}={result}')
    value = result
  return ';'.join(parts) + f'#{value}'


def load(split: str, options: Options) -> datasets.Dataset:
  """Makes the examples of 'eval', 'train' (problem, answer) or 'corpus' (and completion).

  Raises:
    ValueError: another split.
  """
  o = options
  held_out: dict[str, None] = {}  # a dict, for its order
  rng = random.Random('0/eval')  # whatever data_seed is: nobody trains on anybody's held-out set
  while len(held_out) < o.eval_examples:
    held_out[make_problem(rng, o.eval_operations, o.operand_max)] = None
  if split == 'eval':
    problems = list(held_out)
  elif split in ('train', 'corpus'):
    rng = random.Random(f'{o.data_seed}/{split}')
    problems = []
    while len(problems) < (o.train_examples if split == 'train' else o.corpus_examples):
      problem = make_problem(rng, rng.choice(o.operations), o.operand_max)
      if problem not in held_out:
        problems.append(problem)
  else:
    raise ValueError(f"split={split!r}; allowed: ['corpus', 'eval', 'train']")
  columns: dict[str, Any] = {'problem': problems, 'answer': [solve(p) for p in problems]}
  if split == 'corpus':
    kinds = rng.choices(('clean', 'direct', 'sloppy'), (o.clean, o.direct, o.sloppy),
                        k=len(problems))
    columns['completion'] = [
        f'#{solve(p)}' if kind == 'direct' else
        write_chain(p, rng, o.sloppy_error if kind == 'sloppy' else 0.0)
        for p, kind in zip(problems, kinds, strict=True)]
  return datasets.Dataset.from_dict(columns)


def prompt(example: dict[str, Any]) -> str:
  """Writes '92-8-3-3+4='."""
  return example['problem'] + '='


def grade(example: dict[str, Any], text: str) -> float:
  """Gives 1.0 if the text ends in '#' and the right integer, else 0.0."""
  match = re.search(r'#(\d+)$', text)
  return float(bool(match) and int(match[1]) == example['answer'])
