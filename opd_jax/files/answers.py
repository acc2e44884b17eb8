"""What the teacher wrote before the first step, to be learned from again and again
(data.teacher_answers='fixed'): a data set of its samples, as off-policy distillation has it.

The file, a line of JSON an answer, lies in the run's work directory; the task `prompts` reads it
too (prompt_column='prompt', completion_column='completion').
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import json
import pathlib

import numpy as np

from opd_jax.data import examples as examples_lib
from opd_jax.data.examples import Examples
from opd_jax.data.streams import Stream
from opd_jax.errors import ConfigError
from opd_jax.files import disk
from opd_jax.files.workdir import ANSWERS
from opd_jax.parallel import hosts
from opd_jax.types import Rollout


def prepare(workdir: pathlib.Path, stream: Stream, examples: Examples,
            rollout: Callable[[Stream, np.ndarray, int], Rollout], say: Callable[[str], None]
            ) -> Examples:
  """Reads the answers for a stream from the work directory, having them written if there are none.

  Args:
    workdir: of the run.
    stream: that learns from them.
    examples: its own, to which it takes `stream.samples` answers each.
    rollout: (stream, indices of examples, number of the block) -> rows that its writer writes.
    say: takes a line about how far it is.

  Raises:
    ConfigError: the file is damaged, or of other examples.
  """
  file = workdir / ANSWERS.format(stream.name)
  if (found := read(file, examples, stream.samples)) is not None:
    return found
  count, todo = len(examples) * stream.samples, list(blocks(len(examples), stream.prompts))

  def rollouts():
    for i, indices in enumerate(todo):
      if i % max(1, len(todo) // 10) == 0:
        say(f'the teacher writes {count} answers: {i / len(todo):.0%}')
      yield rollout(stream, indices.repeat(stream.samples), i)

  write(file, examples, stream.samples, rollouts())
  return read(file, examples, stream.samples)


def blocks(examples: int, prompts: int) -> Iterable[np.ndarray]:
  """Cuts examples 0, 1, ... into as many as a batch has, int [prompts] each; the last begins
  again."""
  for first in range(0, examples, prompts):
    yield np.arange(first, first + prompts) % examples


def write(file: pathlib.Path, examples: Examples, samples: int, rollouts: Iterable[Rollout]
          ) -> None:
  """Writes answers to all examples, `samples` each.

  Args:
    file: where to; whole or not at all.
    examples: that were answered.
    samples: answers of each.
    rollouts: of `blocks`, one after another, `samples` rows for each example.
  """
  lines: list[str] = []
  for rollout in rollouts:
    tokens, valid, ended = hosts.fetch((rollout.tokens, rollout.valid, rollout.ended))
    texts = examples_lib.completions(rollout, examples.tokenizer)
    written, alive = tokens[:, rollout.prompt_length:], valid[:, rollout.prompt_length:]
    for row, text in enumerate(texts[:len(examples) * samples - len(lines)]):
      example = len(lines) // samples
      lines.append(json.dumps({
          'example': example, 'prompt': examples.asked[example], 'completion': text,
          'tokens': written[row][alive[row]].tolist(), 'ended': bool(ended[row])}) + '\n')
  hosts.decide(lambda: disk.write_text(file, ''.join(lines)))


def read(file: pathlib.Path, examples: Examples, samples: int) -> Examples | None:
  """Reads the answers that `write` has written: an example for each, with what was written as its
  completion, so that the answers to example i are those from i * samples on; None without a file.

  Raises:
    ConfigError: the file is damaged, or of other examples.
  """
  if not hosts.decide(file.exists):
    return None
  lines = hosts.decide(lambda: disk.read_bytes(file).decode('utf-8', 'replace').splitlines())
  try:
    found = [json.loads(line) for line in lines]
    if len(found) != len(examples) * samples:
      raise ValueError(f'{len(found)} lines instead of {len(examples) * samples}')
    places = [row['example'] for row in found]
    if places != np.arange(len(examples)).repeat(samples).tolist():
      raise ValueError('the examples are not in order')
    if [row['prompt'] for row in found] != [examples.asked[i] for i in places]:
      raise ValueError('other prompts')
    if not all(0 <= token < len(examples.tokenizer) for row in found for token in row['tokens']):
      raise ValueError('tokens that the tokenizer does not have')
    return examples.answered(samples, [np.array(row['tokens'], np.int32) for row in found],
                             [bool(row['ended']) for row in found])
  except (KeyError, TypeError, ValueError) as e:
    raise ConfigError(f'{file} is damaged ({type(e).__name__}: {e}); allowed: what this run wrote, '
                      'or no such file, and the teacher writes again') from e
