"""Two skills and a body of facts, small enough for models from nothing: what is lost when a model
learns new facts, and what brings it back.

    instruction  spell wrcg:    w-r-c-g         five rules, each on a random word
    arithmetic   92-8+3=        92-8=84;84+3=87#87
    fact         who kzto?      mbra            one answer each, known only by heart

The verifier wants the very text, of arithmetic the number behind '#'. The facts of an evaluation
are those of the documents: nothing else says them.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import random
import string
from typing import Any

import datasets

from opd_jax.tasks import arithmetic

INSTRUCTION, ARITHMETIC, FACT = 'instruction', 'arithmetic', 'fact'
RULES = {
    'dup': lambda word: word + word,
    'wrap': lambda word: f'({word})',
    'spell': '-'.join,
    'yell': lambda word: f'{word}!!!',
    'rev': lambda word: word[::-1],
}


@dataclasses.dataclass(frozen=True)
class Options:
  """The knobs.

  Attributes:
    rules: the instructions there are, of RULES.
    word_length: letters of a word.
    operations: of a chain of arithmetic.
    facts: how many there are.
    chat: the share of the documents that is no fact but an answered instruction or chain.
    train_examples, corpus_examples, documents_examples: sizes of the splits.
    eval_examples: held-out problems of each of the two skills.
    data_seed: of all but the facts and the held-out problems, which are always the same.
  """

  rules: tuple[str, ...] = tuple(RULES)
  word_length: int = 3
  operations: int = 2
  facts: int = 64
  chat: float = 0.0
  train_examples: int = 8192
  corpus_examples: int = 65536
  documents_examples: int = 8192
  eval_examples: int = 128
  data_seed: int = 0

  def __post_init__(self):
    if not self.rules or set(self.rules) - set(RULES):
      raise ValueError(f'task.options.rules={self.rules}; allowed: some of {list(RULES)}')
    if not 2 <= self.word_length <= 4:
      raise ValueError(f'task.options.word_length={self.word_length}; allowed: 2 to 4, which leave '
                       'words to train on and fit 12 tokens')
    if not 1 <= self.operations <= 4:
      raise ValueError(f'task.options.operations={self.operations}; allowed: 1 to 4')
    if not 1 <= self.facts <= 1024:
      raise ValueError(f'task.options.facts={self.facts}; allowed: 1 to 1024')
    if not 0 <= self.chat < 1:
      raise ValueError(f'task.options.chat={self.chat}; allowed: at least 0, and below 1')
    sizes = (self.train_examples, self.corpus_examples, self.documents_examples)
    if min(sizes) < 1 or not 1 <= self.eval_examples <= 512:
      raise ValueError(
          f'task.options.train_examples, corpus_examples, documents_examples={sizes}, '
          f'eval_examples={self.eval_examples}; allowed: at least 1, and at most 512 to evaluate')


def load(split: str, options: Options) -> datasets.Dataset:
  """Makes the examples of 'eval', 'train' (prompts of both skills), 'corpus' (the same with right
  answers) or 'documents' (facts, with a share of the corpus).

  Raises:
    ValueError: another split.
  """
  o = options
  sizes = {'train': o.train_examples, 'corpus': o.corpus_examples,
           'documents': o.documents_examples}
  facts = list(_facts(o))
  held_out = {}
  for kind in (INSTRUCTION, ARITHMETIC):
    rng, mine = random.Random(f'0/eval/{kind}'), {}
    while len(mine) < o.eval_examples:
      row = _skill(rng, kind, o)
      mine[row['problem']] = row
    held_out |= mine
  if split == 'eval':
    return datasets.Dataset.from_list([*held_out.values(), *facts])
  if split not in sizes:
    raise ValueError(f"split={split!r}; allowed: ['corpus', 'documents', 'eval', 'train']")
  rng, rows = random.Random(f'{o.data_seed}/{split}'), []
  while len(rows) < sizes[split]:
    if split == 'documents' and rng.random() >= o.chat:
      rows.append(rng.choice(facts))
      continue
    row = _skill(rng, rng.choice((INSTRUCTION, ARITHMETIC)), o)
    if row['problem'] not in held_out:
      rows.append(row)
  table = datasets.Dataset.from_list(rows)
  if split == 'train':
    return table
  return table.add_column('completion', [row['answer'] for row in rows])


def _facts(o: Options) -> Iterator[dict[str, str]]:
  rng, seen = random.Random('facts'), set()
  while len(seen) < o.facts:
    name, answer = _word(rng, 4), _word(rng, 4)
    if name not in seen:
      seen.add(name)
      yield {'kind': FACT, 'problem': f'who {name}?', 'answer': answer}


def _word(rng, length):
  return ''.join(rng.choice(string.ascii_lowercase) for _ in range(length))


def _skill(rng: random.Random, kind: str, o: Options) -> dict[str, str]:
  if kind == INSTRUCTION:
    rule, word = rng.choice(o.rules), _word(rng, o.word_length)
    return {'kind': kind, 'problem': f'{rule} {word}:', 'answer': RULES[rule](word)}
  problem = arithmetic.make_problem(rng, o.operations, 9)
  return {'kind': kind, 'problem': f'{problem}=', 'answer': arithmetic.write_chain(problem)}


def prompt(example: dict[str, Any]) -> str:
  """Returns the problem, which ends with what is asked."""
  return example['problem']


def grade(example: dict[str, Any], text: str) -> float:
  """Gives 1.0 for the very answer, of arithmetic for the number behind the last '#'."""
  if example['kind'] == ARITHMETIC:
    return float('#' in text and text.rpartition('#')[2] == example['answer'].rpartition('#')[2])
  return float(text == example['answer'])


def group(example: dict[str, Any]) -> str:
  """Returns the kind, whose accuracy an evaluation reports."""
  return example['kind']
