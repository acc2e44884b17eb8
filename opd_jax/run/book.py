"""What a run writes down: its history, its metrics, what the person at the terminal sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import math
import pathlib
import time
from typing import Any

import numpy as np

from opd_jax.parallel import hosts
from opd_jax.run import ledger, metrics, texts
from opd_jax.run.ledger import Ledger
from opd_jax.settings import Run


class NonFiniteError(FloatingPointError):
  """The loss or the gradient is not finite; the message has the step."""


def new_history(settings: dict[str, Any]) -> dict[str, Any]:
  """Makes the history of a run that has not begun: what a checkpoint holds beside the train state.

  'step', 'flops' so far by part (`Ledger.parts`), 'evals', and the config; later 'teacher', its
  evaluation, 'answers', what it wrote before the first step, 'stopped_at', where a goal ended the
  run early, 'watch' (`texts.Watch`) and the 'alarms' that it gave.
  """
  return {'step': 0, 'flops': Ledger().parts(), 'evals': [], 'config': settings}


class Book:
  """The records of a run, as a context that closes its files.

  Attributes:
    history: see `new_history`.
  """

  def __init__(self, run: Run, workdir: pathlib.Path, history: dict[str, Any], *, restored: bool,
               operations: Callable[[int, dict[str, np.ndarray]], Ledger],
               counts: Callable[[int, np.ndarray], dict[str, float]]):
    """Opens the records.

    Args:
      run: for its name, its seed, its steps, and when to log, to evaluate and to stop.
      workdir: where metrics go.
      history: of a new run, or of the checkpoint that was restored, whose later rows are dropped.
      restored: which of the two.
      operations: (step, lengths) -> the operations of the step that led to `step`; lengths are
        those metrics of the update that are arrays [B].
      counts: (step, lengths of its rows) -> what is counted for `perf`: compiled programs, bytes
        moved.
    """
    self._run, self.history = run, history
    self._ledger = ledger.read(history['flops'], f'the checkpoint of step {history["step"]}')
    self._operations, self._counts = operations, counts
    self._writer = metrics.Writer(workdir, history['step'] if restored else None)
    self._display = metrics.Display(run.name, run.steps, run.log.plain_every_steps)
    self._clock, self._pending = metrics.Clock(), None
    self._watch = texts.Watch(history.setdefault('watch', {}))
    if restored:
      self.say(f'{run.name}: resumed from the checkpoint of step {history["step"]}')

  def __enter__(self) -> Book:
    return self

  def __exit__(self, *exc: Any) -> None:
    self._writer.close()
    self._display.close()

  def say(self, text: str) -> None:
    """Shows a line."""
    self._display.say(text)

  @property
  def begun(self) -> bool:
    """Whether the student before training has been evaluated."""
    return bool(self.history['evals'])

  @property
  def reached_goal(self) -> bool:
    """Whether the run has ended early, at eval.stop_at_sampled_accuracy."""
    return self.history.get('stopped_at') is not None

  def begin(self, report: dict[str, Any], teacher: dict[str, Any] | None) -> None:
    """Records what a new run begins with: its data, and its teacher's evaluation if there is one.
    """
    self._writer.write('data', 0, report)
    self._display.data(report)
    if teacher is None:
      return
    self.history['teacher'] = teacher
    if 'sampled_accuracy' in teacher:  # the task grades
      self.say(f"{self._run.name}: the teacher's sampled accuracy is "
               f"{teacher['sampled_accuracy']:.3f}, greedy {teacher['greedy_accuracy']:.3f}")

  def answers(self, lengths: np.ndarray, spent: Ledger) -> None:
    """Records, once, what the teacher wrote before the first step.

    Args:
      lengths: tokens of each prompt and the answer behind it.
      spent: the operations.
    """
    if 'answers' not in self.history:
      self.history['answers'] = {'examples': len(lengths), 'tokens': int(lengths.sum())}
      self._ledger += spent
      self.history['flops'] = self._ledger.parts()
      self._writer.write('answers', 0, self.history['answers'])
      self.say(f'{self._run.name}: the teacher wrote {len(lengths)} answers before the first step')

  def train(self, step: int, values: dict[str, Any]) -> None:
    """Takes the metrics of the update that led to `step`, and records those of the one before:
    reading them now would wait for the device, which is still at work on this step."""
    self.flush()
    self._pending = (step, hosts.replicate(values))

  def flush(self) -> None:
    """Records what `train` has taken.

    Raises:
      NonFiniteError, FloatingPointError: see `check_finite`.
    """
    if self._pending is None:
      return
    (step, values), self._pending = self._pending, None
    values = hosts.fetch(values)
    written = values.pop('written', None)
    lengths = {name: values.pop(name) for name in [n for n in values if n.endswith('lengths')]}
    self._ledger += self._operations(step, lengths)
    self.history['flops'] = self._ledger.parts()
    row = {name: float(v) for name, v in values.items()}
    # Of no tokens there is no quantile.
    row = {n: v for n, v in row.items() if not (n.startswith('log_ratio') and math.isnan(v))}
    check_finite(row, step, self._run.log.max_sampler_gap)
    own = lengths['lengths']
    row |= {'length': float(own.mean()), 'flops': dict(self.history['flops']),
            # What is of this process, and not of the run.
            'perf': {**self._clock.read(1, int(own.sum())), **self._counts(step, own)}}
    if written:
      row['text'] = texts.text_metrics(*written, self._run.data.samples_per_prompt)
      for alarm in self._watch.look(row):
        self.say(f'{self._run.name} step {step}: ALARM {alarm}')
        self.history.setdefault('alarms', []).append({'step': step, 'alarm': alarm})
    if step % self._run.log.every_steps == 0:
      self._writer.write('train', step, row)
    self._display.progress(step, row)

  def title(self, step: int) -> str:
    """Names the transcripts of an evaluation; '' where none are shown."""
    steps, every = self._run.steps, self._run.eval.every_steps
    if step == 0:
      return 'before training:'
    middle = steps // 2 <= step < steps // 2 + max(every, 1)
    return 'after training:' if step == steps else 'halfway:' if middle else ''

  def evaluation(self, step: int, evaluate: Callable[[int], tuple[dict[str, Any], list[Any]]]
                 ) -> dict[str, Any]:
    """Evaluates, records it, and returns the values.

    Args:
      step: of the student that is evaluated.
      evaluate: (number of transcripts) -> (values, transcripts).
    """
    with self.pause():
      title = self.title(step)
      values, shown = evaluate(self._run.log.transcripts if title else 0)
      row = {**values, 'flops': dict(self.history['flops'])}
      self._writer.write('eval', step, row)
      self._display.evaluation(step, values)
      self._display.transcripts(title, shown)
      self.history['evals'].append({'step': step, **row})
    goal = self._run.eval.stop_at_sampled_accuracy
    if step and 0 < goal <= values.get('sampled_accuracy', 0.0):
      self.history['stopped_at'] = step
      self.say(f'{self._run.name}: sampled accuracy {values["sampled_accuracy"]:.3f} reached '
               f'{goal} at step {step}; stopping')
    return values

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Leaves what is done within out of the rates."""
    began = time.perf_counter()
    yield
    self._clock.pause(time.perf_counter() - began)

  def result(self) -> dict[str, Any]:
    """Makes the content of result.json."""
    h = self.history
    return {'name': self._run.name, 'seed': self._run.seed, 'steps': h['step'],
            'flops': h['flops'], 'before': h['evals'][0], 'after': h['evals'][-1],
            'evals': h['evals'], 'teacher': h.get('teacher'), 'alarms': h.get('alarms', [])}


def check_finite(row: dict[str, float], step: int, max_gap: float) -> None:
  """Stops the run rather than train on nonsense.

  Raises:
    NonFiniteError: the loss or the gradient norm is not finite.
    FloatingPointError: sampler and scorer disagree by more than `log.max_sampler_gap`.
  """
  bad = {n: row[n] for n in ('loss', 'grad_norm', 'update_norm') if not math.isfinite(row[n])}
  if bad:
    raise NonFiniteError(f'step {step}: {bad} is not finite; training stopped, the last good '
                         'checkpoint is kept')
  # A NaN gap stops too; rows that the student did not write have none.
  if max_gap and 'gap_max' in row and not row['gap_max'] <= max_gap:
    raise FloatingPointError(
        f"step {step}: sampler and scorer differ by {row['gap_max']:.3g} nats; log.max_sampler_gap"
        f'={max_gap}')
