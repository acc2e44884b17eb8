"""Metrics out: JSONL, TensorBoard event files, and what the person at the terminal sees."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import json
import os
import pathlib
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2, summary_pb2

from opd_jax.files import disk
from opd_jax.parallel import hosts

JSONL = 'metrics.jsonl'


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a metrics.jsonl. A last line that a killed process left half-written is dropped, and so,
  with a warning, is any other that is no row."""
  rows, bad = [], []
  lines = disk.read_bytes(path).split(b'\n') if os.path.lexists(path) else []
  for number, line in enumerate(lines, 1):
    row = _row(line)
    if row is not None:
      rows.append(row)
    elif line and number < len(lines):
      bad.append(number)
  if bad:
    print(f'WARNING: {path}: the lines {bad[:8]}{" and more" if bad[8:] else ""} are no rows, and '
          'are left out', file=sys.stderr, flush=True)
  return rows


def _row(line: bytes) -> dict[str, Any] | None:
  try:
    row = json.loads(line.decode())
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or type(row.get('step')) is not int or not isinstance(
      row.get('kind'), str):
    return None
  return row


class Writer:
  """Writes rows {'step': ..., 'kind': 'data' | 'train' | 'eval', ...} to JSONL and TensorBoard. Of
  several processes, only the first one does."""

  def __init__(self, workdir: pathlib.Path, restored_step: int | None):
    """Rows after `restored_step` are dropped (None: all of them): the run will write them again.

    Raises:
      StorageError: the file system refuses, here and in `write`.
    """
    self._path = workdir / JSONL
    if not hosts.is_primary():
      return
    keep = [] if restored_step is None else [
        r for r in read(self._path) if r['step'] <= restored_step]
    disk.write_text(self._path, ''.join(json.dumps(r) + '\n' for r in keep))
    with disk.naming(self._path):
      self._file = self._path.open('ab', buffering=0)  # what fails stays in no buffer
    self._board = Board(
        workdir / 'tensorboard', first_step=0 if restored_step is None else restored_step + 1)

  def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
    """Writes one row. Nested dicts become 'a/b' scalars in TensorBoard."""
    if not hosts.is_primary():
      return
    left = (json.dumps({'kind': kind, 'step': step, **values}) + '\n').encode()
    with disk.naming(self._path):
      while left:  # a disk that is nearly full takes a part
        left = left[self._file.write(left):]
      if not os.fstat(self._file.fileno()).st_nlink:
        raise FileNotFoundError(errno.ENOENT, 'it was removed while the run was writing to it')
    self._board.write(step, {
        '/'.join(filter(None, (kind, name, key))): v for name, value in values.items()
        for key, v in (value.items() if isinstance(value, dict) else [('', value)])
        if isinstance(v, (int, float))})

  def close(self) -> None:
    """Closes both."""
    if hosts.is_primary():
      self._file.close()
      self._board.close()


def make_console(width: int | None = None) -> Console:
  """Makes the console on stdout. A character that stdout cannot write, of ours or of a student's,
  is shown as '\\u2713', and does not end the run."""
  if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='backslashreplace')
  file = None if hosts.is_primary() else open(os.devnull, 'w')  # the others say nothing
  return Console(file=file, highlight=False, width=width)


class Board:
  """TensorBoard's event files. They only report: where they cannot be written, that is said once,
  and the run goes on without.

  What is written is written at once. `tensorboardX.SummaryWriter` has a thread with a queue, and
  where the thread dies of a full disk the queue fills, and the run waits for ever.
  """

  def __init__(self, folder: pathlib.Path, first_step: int):
    """Events from `first_step` on that earlier files hold are void."""
    self._folder, self._events = folder, None
    with self._harmless():
      folder.mkdir(parents=True, exist_ok=True)
      # Two starts within a second have two files.
      self._events = event_file_writer.EventsWriter(str(folder / 'events'), f'.{time.time_ns()}')
      self._events.write_event(event_pb2.Event(step=first_step, file_version='brain.Event:2'))
      self._add(step=first_step, session_log=event_pb2.SessionLog(
          status=event_pb2.SessionLog.START))

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes the scalars of a step by their tags."""
    with self._harmless():
      self._add(step=step, summary=summary_pb2.Summary(value=[
          summary_pb2.Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]))

  def close(self) -> None:
    """Closes the file."""
    with self._harmless():
      if self._events is not None:
        self._events.close()

  def _add(self, **content: Any) -> None:
    if self._events is not None:
      self._events.write_event(event_pb2.Event(wall_time=time.time(), **content))
      self._events.flush()

  @contextlib.contextmanager
  def _harmless(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      self._events = None
      print(f'WARNING: {self._folder} cannot be written ({e.strerror or e}): the run goes on '
            f'without TensorBoard; {JSONL} has the same numbers', file=sys.stderr, flush=True)


class Display:
  """The terminal: a live line on a terminal, plain lines elsewhere."""

  def __init__(self, name: str, total_steps: int, plain_every_steps: int,
               console: Console | None = None):
    self.console = console or make_console()
    self._marks = '·✓✗'
    try:
      self._marks.encode(self.console.encoding)
    except UnicodeEncodeError:
      self._marks = '.+x'
    self._name, self._total, self._plain_every = name, total_steps, plain_every_steps
    self._live = None
    if self.console.is_terminal:
      self._live = Progress(
          TextColumn('[bold]{task.description}'), BarColumn(bar_width=24), MofNCompleteColumn(),
          TimeRemainingColumn(), TextColumn('{task.fields[status]}'), console=self.console)
      self._bar = self._live.add_task(name, total=total_steps, status='')
      self._live.start()

  def progress(self, step: int, values: dict[str, Any]) -> None:
    """Shows the progress line of a step."""
    names = (('loss', '{:.3f}'), ('reward', '{:.2f}'), ('reverse_kl', '{:.3f}'),
             ('entropy_student', '{:.2f}'), ('length', '{:.0f}'), ('grad_norm', '{:.2f}'))
    short = {'reverse_kl': 'kl', 'entropy_student': 'entropy', 'grad_norm': 'grad'}
    status = ' '.join(f'{short.get(n, n)} {f.format(values[n])}' for n, f in names if n in values)
    perf = values['perf']
    status += f" | {perf['steps_per_s']:.2f} steps/s {perf['tokens_per_s']:.0f} tokens/s"
    if self._live is not None:
      self._live.update(self._bar, completed=step, status=status)
    elif step % self._plain_every == 0 or step == self._total:
      self.console.print(f'{self._name} step {step}/{self._total} {status}', soft_wrap=True)

  def say(self, text: str) -> None:
    """Shows one line."""
    self.console.print(text, soft_wrap=True, markup=False)

  def evaluation(self, step: int, values: dict[str, Any]) -> None:
    """Shows one line about an evaluation."""
    parts = []
    if 'sampled_accuracy' in values:
      parts = [f"sampled {values['sampled_accuracy']:.3f} [{values['sampled_accuracy_low']:.3f}, "
               f"{values['sampled_accuracy_high']:.3f}]", f"greedy {values['greedy_accuracy']:.3f}"]
    if 'reverse_kl' in values:
      parts.append(f"reverse KL {values['reverse_kl']:.4f} nats/token")
    parts = parts or [f"length {values['length']:.1f} tokens"]
    self.say(f'{self._name} eval at step {step}: ' + ', '.join(parts))

  def data(self, report: dict[str, dict[str, Any]]) -> None:
    """Shows one line about the examples of each split."""
    for split, values in report.items():
      self.say(f'{self._name} {split} data: ' + ', '.join(
          f"{name.replace('_', ' ')} {value}" for name, value in values.items()))

  def transcripts(self, title: str, rows: list[dict[str, Any]]) -> None:
    """Shows prompts and completions, right ones in green, wrong ones in red, and those that nobody
    grades in neither."""
    if not rows:
      return
    self.say(title)
    for row in rows:
      mark, style = self._marks[0], ''
      if row['reward'] is not None:
        right = row['reward'] >= 1.0
        mark, style = (self._marks[1], 'green') if right else (self._marks[2], 'red')
      line = Text(f'  {mark} ', style=style)
      line.append(row['prompt'], style='bold')
      line.append(row['completion'] or '(nothing)', style=style)
      self.console.print(line, soft_wrap=True)

  def close(self) -> None:
    """Ends the live line."""
    if self._live is not None:
      self._live.stop()


class Clock:
  """Steps and tokens a second since the last reading, pauses (evaluation, saving) left out."""

  def __init__(self):
    self._start, self._paused = time.perf_counter(), 0.0

  def pause(self, seconds: float) -> None:
    """Takes `seconds` out of the current reading."""
    self._paused += seconds

  def read(self, steps: int, tokens: int) -> dict[str, float]:
    """Computes rates since the last call."""
    now = time.perf_counter()
    seconds = max(now - self._start - self._paused, 1e-9)
    self._start, self._paused = now, 0.0
    return {'steps_per_s': steps / seconds, 'tokens_per_s': tokens / seconds}


def print_table(title: str, columns: list[str], rows: list[list[str]],
                console: Console | None = None) -> None:
  """Prints a table on the terminal."""
  table = Table(title=title, title_justify='left')
  for i, column in enumerate(columns):
    table.add_column(column, justify='left' if i == 0 else 'right', overflow='fold')
  for row in rows:
    table.add_row(*row)
  (console or make_console(None if sys.stdout.isatty() else 140)).print(table)
