"""What the teacher wrote before the first step, to be learned from again and again
(data.teacher_answers='fixed'): a data set of its samples, as off-policy distillation has it.

The file, a line of JSON an answer, lies in the run's work directory; the task `prompts` reads it
too (prompt_column='prompt', completion_column='completion'). Until all is written it has `.partial`
behind its name and grows by a batch at a time: a run that was ended goes on with the next one, and
since what is drawn for a batch depends on its number alone, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import contextlib
import json
import pathlib
from typing import Any

import numpy as np

from opd_jax.data import examples as examples_lib
from opd_jax.data.examples import Examples
from opd_jax.data.streams import Stream
from opd_jax.errors import ConfigError
from opd_jax.files import disk
from opd_jax.files.workdir import ANSWERS
from opd_jax.parallel import hosts
from opd_jax.types import Rollout

FIELDS = ('example', 'prompt', 'completion', 'tokens', 'ended')  # of a line


def prepare(workdir: pathlib.Path, stream: Stream, examples: Examples,
            rollout: Callable[[Stream, np.ndarray, int], Rollout], say: Callable[[str], None],
            end: Callable[[str], None]) -> Examples:
  """Reads the answers for a stream from the work directory, having those written that are not
  there.

  Args:
    workdir: of the run.
    stream: that learns from them.
    examples: its own, to which it takes `stream.samples` answers each.
    rollout: (stream, indices of examples, number of the block) -> rows that its writer writes.
    say: takes a line about how far it is.
    end: takes a line about how far it is when a block is on disk, and may raise: the next start
      goes on behind that block.

  Raises:
    ConfigError: the file is damaged, or of other examples.
    StorageError: it cannot be written.
  """
  file, samples = workdir / ANSWERS.format(stream.name), stream.samples
  if (found := read(file, examples, samples)) is not None:
    return found
  partial = file.with_name(f'{file.name}.partial')
  count, todo = len(examples) * samples, list(blocks(len(examples), stream.prompts))
  begun = hosts.decide(lambda: begin(partial, examples, samples, stream.rows))
  for i in range(begun, len(todo)):
    if i == begun or i % max(1, len(todo) // 10) == 0:
      say(f'the teacher writes {count} answers: {i / len(todo):.0%}')
    write(partial, examples, samples, i * stream.rows, rollout(
        stream, todo[i].repeat(samples), i))
    end(f'interrupted when the teacher had written {min((i + 1) * stream.rows, count)} of {count} '
        f'answers to {file}, which are kept')
  hosts.decide(lambda: disk.rename(partial, file))
  return read(file, examples, samples)


def blocks(examples: int, prompts: int) -> Iterable[np.ndarray]:
  """Cuts examples 0, 1, ... into as many as a batch has, int [prompts] each; the last begins
  again."""
  for first in range(0, examples, prompts):
    yield np.arange(first, first + prompts) % examples


def begin(partial: pathlib.Path, examples: Examples, samples: int, rows: int) -> int:
  """Counts the blocks that a run which was ended has written whole, and cuts off what is behind
  them; without a file, makes an empty one.

  Args:
    partial: the file.
    examples: that are answered.
    samples: answers of each.
    rows: answers of a block; of the last one only what `examples` takes of it.

  Raises:
    ConfigError: the file is damaged, or of other examples.
    StorageError: it cannot be written.
  """
  if not partial.exists():
    disk.write_bytes(partial, b'')
    return 0
  lines = disk.read_bytes(partial).split(b'\n')[:-1]  # behind the last end of a line is half of one
  if len(lines) < len(examples) * samples:
    lines = lines[:len(lines) // rows * rows]
  with refusing(partial):
    parse([line.decode() for line in lines], examples, samples)
  disk.truncate(partial, sum(len(line) + 1 for line in lines))
  return -(-len(lines) // rows)


def write(partial: pathlib.Path, examples: Examples, samples: int, first: int, rollout: Rollout
          ) -> None:
  """Writes the answers of a block behind those of the blocks before.

  Args:
    partial: the file.
    examples: that are answered.
    samples: answers of each.
    first: how many answers the file has.
    rollout: `samples` rows for each example of the block.

  Raises:
    StorageError: it cannot be written.
  """
  tokens, valid, ended = hosts.fetch((rollout.tokens, rollout.valid, rollout.ended))
  texts = examples_lib.completions(rollout, examples.tokenizer)
  written, alive = tokens[:, rollout.prompt_length:], valid[:, rollout.prompt_length:]
  lines = []
  for row, text in enumerate(texts[:len(examples) * samples - first]):
    example = (first + row) // samples
    lines.append(json.dumps(dict(zip(FIELDS, (
        example, examples.asked[example], text, written[row][alive[row]].tolist(),
        bool(ended[row])), strict=True))) + '\n')
  hosts.decide(lambda: disk.append_bytes(partial, ''.join(lines).encode()))


def read(file: pathlib.Path, examples: Examples, samples: int) -> Examples | None:
  """Reads the answers that `write` has written: an example for each, with what was written as its
  completion, so that the answers to example i are those from i * samples on; None without a file.

  Raises:
    ConfigError: the file is damaged, or of other examples.
  """
  if not hosts.decide(file.exists):
    return None
  lines = hosts.decide(lambda: disk.read_bytes(file).decode('utf-8', 'replace').splitlines())
  with refusing(file):
    if len(lines) != len(examples) * samples:
      raise ValueError(f'{len(lines)} lines instead of {len(examples) * samples}')
    found = parse(lines, examples, samples)
    return examples.answered(samples, [np.array(row['tokens'], np.int32) for row in found],
                             [bool(row['ended']) for row in found])


def parse(lines: list[str], examples: Examples, samples: int) -> list[dict[str, Any]]:
  """Parses the answers to the first examples.

  Raises:
    KeyError, TypeError, ValueError: they are none.
  """
  found = [json.loads(line) for line in lines]
  places = [row['example'] for row in found]
  if places != np.arange(len(examples)).repeat(samples)[:len(found)].tolist():
    raise ValueError('the examples are not in order')
  if any(row.keys() != set(FIELDS) for row in found):
    raise ValueError(f'fields other than {list(FIELDS)}')
  if [row['prompt'] for row in found] != [examples.asked[i] for i in places]:
    raise ValueError('other prompts')
  if not all(0 <= token < len(examples.tokenizer) for row in found for token in row['tokens']):
    raise ValueError('tokens that the tokenizer does not have')
  return found


@contextlib.contextmanager
def refusing(file: pathlib.Path) -> Iterator[None]:
  """Names the file in what is found wrong with it within.

  Raises:
    ConfigError: in place of that.
  """
  try:
    yield
  except (KeyError, TypeError, ValueError) as e:
    raise ConfigError(f'{file} is damaged ({type(e).__name__}: {e}); allowed: what this run wrote, '
                      'or no such file, and the teacher writes again') from e
