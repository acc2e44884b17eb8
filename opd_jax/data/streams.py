"""Streams: who writes the rows of a step, on which prompts, and what they are for.

A run has one to three of them: the rows of `config.data`; the batches of those that the student
does not write (`data.on_policy_fraction`, `data.warm_steps`); and rows beside them in every step
(`config.given`). The loop treats all alike: it writes them, has them graded, and adds their
gradients.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from opd_jax.algorithm.objective import Objective
from opd_jax.settings import Run

SOURCES = ('student', 'teacher', 'dataset')
FOREIGN = SOURCES[1:]  # writers other than the student
OWN, OFF_POLICY, GIVEN = 'own', 'off_policy', 'given'


@dataclasses.dataclass(frozen=True)
class Stream:
  """A stream of rows.

  Attributes:
    name: OWN, OFF_POLICY or GIVEN; no two streams of a run have the same.
    writer: 'student', 'teacher' or 'dataset'.
    teacher_mix: the teacher's share in the distribution that the student samples from.
    objective: what the rows are for.
    split: of the task, where the prompts are from.
    prompts: of a step.
    samples: completions of each prompt.
    steps: the part of 0..1 that a step's draw (`step_draw`) must fall into for the stream to take
      part, the upper end excluded.
    microbatch_rows: rows per forward and backward pass, on all devices together; 0 for all.
    length_buckets: to how many lengths these are cut.
    warm_steps: the first steps of a run, in which the student writes nothing.
    fixed: whether what is written is written once, before the first step.
  """

  name: str
  writer: str
  teacher_mix: float
  objective: Objective
  split: str
  prompts: int
  samples: int
  steps: tuple[float, float]
  microbatch_rows: int
  length_buckets: int = 1
  warm_steps: int = 0
  fixed: bool = False

  @property
  def rows(self) -> int:
    """Rows of a step."""
    return self.prompts * self.samples

  def takes_part(self, step: int, draw: float) -> bool:
    """Tells whether a step is taken on rows of this stream too."""
    if step < self.warm_steps:
      return self.name != OWN
    return self.steps[0] <= draw < self.steps[1]

  @property
  def on_policy(self) -> bool:
    """Whether the student itself writes."""
    return self.writer == 'student'


def step_draw(seed: int, step: int) -> float:
  """Draws what decides who writes the batch of a step, uniform in 0..1: the same number on every
  host and after every restart."""
  # Four numbers where the order of an epoch is seeded with two: never the same stream.
  return float(np.random.default_rng((seed, step, 0, 1)).random())


def of_step(streams: tuple[Stream, ...], seed: int, step: int) -> tuple[Stream, ...]:
  """Picks the streams that take part in a step, the first of them the one of `config.data`."""
  draw = step_draw(seed, step)
  return tuple(s for s in streams if s.takes_part(step, draw))


def make(run: Run, shards: int = 1) -> tuple[Stream, ...]:
  """Makes the streams of a run on a mesh that splits rows into so many shards."""
  share, rows = run.data.on_policy_fraction, run.data.prompts_per_step * run.data.samples_per_prompt
  microbatch = min(run.compute.microbatch_rows * shards, rows)
  own = Stream(
      OWN, run.data.source, run.sample.teacher_mix if run.data.source == 'student' else 0.0,
      objective_of(run, run.data.source), run.data.split, run.data.prompts_per_step,
      run.data.samples_per_prompt, (0.0, share), microbatch, run.compute.length_buckets,
      run.data.warm_steps, _is_fixed(run, run.data.source))
  out = [own]
  if run.data.off_policy_source != 'none':
    writer = run.data.off_policy_source
    out.append(dataclasses.replace(own, name=OFF_POLICY, writer=writer, teacher_mix=0.0,
                                   objective=objective_of(run, writer), steps=(share, 1.0),
                                   fixed=_is_fixed(run, writer)))
  if run.given.source != 'none':
    rows = run.given.prompts_per_step
    out.append(Stream(GIVEN, run.given.source, 0.0, given_objective(run), run.given.split, rows, 1,
                      (0.0, 1.0), math.gcd(microbatch, rows), run.compute.length_buckets,
                      run.data.warm_steps, _is_fixed(run, run.given.source)))
  return tuple(out)


def _is_fixed(run: Run, writer: str) -> bool:
  return writer == 'teacher' and run.data.teacher_answers == 'fixed'


def objective_of(run: Run, writer: str) -> Objective:
  """Makes the objective of `config.objective` for rows of a writer.

  The temperature at which the student is distilled is the sampler's, on other text too; text that
  it only imitates is scored at temperature 1.
  """
  own = writer == 'student' or run.objective.needs_teacher
  return dataclasses.replace(run.objective, temperature=run.sample.temperature if own else 1.0)


def given_objective(run: Run) -> Objective:
  """Makes the objective of the rows of `config.given`."""
  g = run.given
  if not g.distill_coef:
    return Objective(distill_coef=0.0, importance='none', likelihood_coef=g.likelihood_coef,
                     reduction=run.objective.reduction)
  return Objective(
      route='direct', importance='none', distill_coef=g.distill_coef,
      likelihood_coef=g.likelihood_coef, divergence=g.divergence, support=g.support,
      reduction=run.objective.reduction, temperature=run.sample.temperature,
      teacher_temperature=run.objective.teacher_temperature)
