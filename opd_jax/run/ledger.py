"""The ledger: the operations that a run spent, by who spent them and on what, and how two runs
compare by them.

What is in it are the operations that the method needs (flops.py) for the tokens that there were.
Not in it: evaluations, making the teacher, and writing a data set that is given as a file.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from opd_jax.algorithm.objective import wants
from opd_jax.data.streams import Stream
from opd_jax.errors import ConfigError
from opd_jax.run import flops
from opd_jax.types import Model


@dataclasses.dataclass(frozen=True)
class Ledger:
  """Floating-point operations by part; their sum is all that a run spent.

  Attributes:
    student_training: forward and backward passes of gradient steps.
    student_scoring: log p_S of the rows before a step, and what gates look at.
    student_sampling: the student's writing.
    teacher_scoring: the teacher's grading, and its head in the loss.
    teacher_sampling: the teacher's writing: text to imitate, or its share in a mixture with the
      student.
    reference_scoring: the reference's grading.
  """

  student_training: float = 0.0
  student_scoring: float = 0.0
  student_sampling: float = 0.0
  teacher_scoring: float = 0.0
  teacher_sampling: float = 0.0
  reference_scoring: float = 0.0

  def __add__(self, other: Ledger) -> Ledger:
    return Ledger(*(a + b for a, b in zip(self.values, other.values, strict=True)))

  def __mul__(self, times: float) -> Ledger:
    return Ledger(*(times * v for v in self.values))

  @property
  def values(self) -> tuple[float, ...]:
    """The parts in their order."""
    return dataclasses.astuple(self)

  @property
  def total(self) -> float:
    """All parts together."""
    return sum(self.values)

  @property
  def with_text_given(self) -> float:
    """All but the teacher's writing: what a run costs whose text somebody has already paid for."""
    return self.total - self.teacher_sampling

  def parts(self) -> dict[str, float]:
    """Makes the `flops` of metrics.jsonl, result.json and checkpoints: {part: operations}."""
    return dataclasses.asdict(self)


PARTS = tuple(f.name for f in dataclasses.fields(Ledger))


def read(parts: Mapping[str, Any], where: str) -> Ledger:
  """Reads what `Ledger.parts` wrote.

  Args:
    parts: the operations by part.
    where: they are from, for the message.

  Raises:
    ConfigError: the parts are others, or no numbers of at least 0.
  """
  if set(parts) != set(PARTS):
    raise ConfigError(f'{where}: flops has the parts {sorted(parts)}; allowed: {list(PARTS)}. '
                      'Other versions of opd_jax have others: run it again elsewhere')
  for name, value in parts.items():
    if type(value) not in (int, float) or not 0 <= value < math.inf:
      raise ConfigError(f'{where}: flops.{name}={value!r}; allowed: a finite number of at least 0')
  return Ledger(**parts)


@dataclasses.dataclass(frozen=True)
class Counter:
  """Counts what the steps of a run spend.

  Attributes:
    student, teacher, reference: the models; None where there is none.
    adapter_specs: of the adapters that are trained instead of the student; None without.
    updates: gradient steps on the rows of a batch.
  """

  student: Model
  teacher: Model | None
  reference: Model | None
  adapter_specs: dict[str, Any] | None
  updates: int

  def stream(self, stream: Stream, lengths: np.ndarray) -> Ledger:
    """Counts a step on the rows of a stream.

    Args:
      stream: who wrote the rows, and what they are for.
      lengths: prompt plus completion tokens of each row.
    """
    o, updates = stream.objective, self.updates
    asked = wants(o)
    own = flops.forward_flops(self.student, lengths)
    if self.adapter_specs is not None:
      own += flops.matrix_flops(self.adapter_specs, lengths)
    theirs = flops.forward_flops(self.teacher, lengths) if self.teacher is not None else 0.0
    training = updates * flops.update_flops(self.student, lengths, self.adapter_specs)
    passes = updates if o.advantages == 'recomputed' else 1
    heads = {part: times * flops.head_flops(getattr(self, part), lengths)
             for part, times in o.extra_heads(updates, passes).items() if times}
    return Ledger(
        student_training=training,
        student_scoring=own * passes * bool(asked['student']) + heads.get('student', 0.0),
        student_sampling=own * (stream.writer == 'student'),
        teacher_scoring=theirs * o.needs_teacher + heads.get('teacher', 0.0),
        teacher_sampling=theirs * (
            stream.writer == 'teacher' and not stream.fixed or stream.teacher_mix > 0.0),
        reference_scoring=(flops.forward_flops(self.reference, lengths) if asked['reference']
                           else 0.0) + heads.get('reference', 0.0))

  def answers(self, lengths: np.ndarray) -> Ledger:
    """Counts what the teacher writes before the first step, by the tokens of each row."""
    return Ledger(teacher_sampling=flops.forward_flops(self.teacher, lengths))

  def step(self, streams: tuple[Stream, ...], lengths: dict[str, np.ndarray]) -> Ledger:
    """Counts a step on the rows of all its streams, the first of which has lengths without its name
    in front: 'lengths' and 'prompt_lengths' [B], then 'given_lengths', ..."""
    total = Ledger()
    for i, stream in enumerate(streams):
      prefix = f'{stream.name}_' if i else ''
      total += self.stream(stream, lengths[f'{prefix}lengths'] + lengths[f'{prefix}prompt_lengths'])
    return total


@dataclasses.dataclass(frozen=True)
class Efficiency:
  """How many times the compute of a method a baseline needs.

  Attributes:
    charged: with all that either of them spent.
    text_given: without what the teacher spent on writing the baseline's text, which is there
      already, or will be used again and again.
  """

  charged: float
  text_given: float


def efficiency(baseline: Ledger, method: Ledger) -> Efficiency | None:
  """Compares the compute of two ways to the same accuracy, as the Thinking Machines post does
  (1.5e21 over 8.4e19 + 8.2e19 is 9 times, with the teacher's writing 30); None for a method that
  spent nothing."""
  if not method.total:
    return None
  return Efficiency(baseline.total / method.total, baseline.with_text_given / method.total)
