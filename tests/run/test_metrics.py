"""Metrics out: the JSONL file across restarts, event files, and the console."""

import errno
import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading

import pytest
from rich.console import Console
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from opd_jax.run import metrics

PERF = {'steps_per_s': 2.0, 'tokens_per_s': 100.0}


def write(workdir, restored, steps):
  writer = metrics.Writer(workdir, restored)
  for step in steps:
    writer.write('train', step, {'loss': 10.0 * step, 'flops': {'student': 1.0, 'teacher': 2.0}})
  writer.close()


def steps(workdir):
  return [r['step'] for r in map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())]


def events(workdir):
  """[(step, tag, value)] of every event file, in order, with their checksums verified."""
  out = []
  for file in sorted((workdir / 'tensorboard').glob('events.out.tfevents.*')):
    blob, at = file.read_bytes(), 0
    while at < len(blob):
      size = int.from_bytes(blob[at:at + 8], 'little')
      body = blob[at + 12:at + 12 + size]
      for payload, crc in ((blob[at:at + 8], blob[at + 8:at + 12]),
                           (body, blob[at + 12 + size:at + 16 + size])):
        assert int.from_bytes(crc, 'little') == masked_crc32c(payload)
      event = event_pb2.Event.FromString(body)
      out += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
      at += size + 16
  return out


class TestWriter:

  def test_rows(self, tmp_path):
    write(tmp_path, None, [1, 2])
    assert metrics.read(tmp_path / 'metrics.jsonl') == [
        {'kind': 'train', 'step': s, 'loss': 10.0 * s, 'flops': {'student': 1.0, 'teacher': 2.0}}
        for s in (1, 2)]

  def test_a_row_is_on_disk_at_once(self, tmp_path):
    writer = metrics.Writer(tmp_path, None)
    writer.write('train', 1, {'loss': 1.0})
    assert steps(tmp_path) == [1]  # not only at the end: a killed run keeps its rows
    writer.close()

  def test_rows_after_the_restored_step_are_dropped(self, tmp_path):
    write(tmp_path, None, range(8))
    write(tmp_path, 4, [5, 6])
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6]

  def test_a_fresh_start_drops_everything(self, tmp_path):
    write(tmp_path, None, range(8))
    write(tmp_path, None, [1])
    assert steps(tmp_path) == [1]

  def test_restored_at_step_zero_keeps_step_zero(self, tmp_path):
    write(tmp_path, None, [0, 1])
    write(tmp_path, 0, [])
    assert steps(tmp_path) == [0]

  @pytest.mark.parametrize('cut', [1, 5, 30])
  def test_a_half_written_last_line_is_dropped(self, tmp_path, cut):
    write(tmp_path, None, [1, 2, 3])
    file = tmp_path / 'metrics.jsonl'
    file.write_bytes(file.read_bytes()[:-cut - 1])
    assert [r['step'] for r in metrics.read(file)] == [1, 2]
    write(tmp_path, 3, [4])
    assert steps(tmp_path) == [1, 2, 4]  # every line is whole again

  def test_no_file_yet(self, tmp_path):
    assert metrics.read(tmp_path / 'metrics.jsonl') == []
    write(tmp_path, 7, [8])
    assert steps(tmp_path) == [8]

  def test_tensorboard_events(self, tmp_path):
    write(tmp_path, None, [1, 2])
    assert events(tmp_path) == [
        (s, tag, value) for s in (1, 2) for tag, value in
        (('train/loss', 10.0 * s), ('train/flops/student', 1.0), ('train/flops/teacher', 2.0))]


class TestDisplay:

  def display(self, terminal=False, every=2):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, highlight=False)
    return metrics.Display('name', 5, every, console), out

  def test_plain_lines_for_every_nth_and_the_last_step(self):
    display, out = self.display()
    for step in range(1, 6):
      display.progress(step, {'loss': 0.5, 'reverse_kl': 0.25, 'perf': PERF})
    display.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ['2/5', '4/5', '5/5']
    assert all('loss 0.500' in line and 'kl 0.250' in line for line in lines)
    assert all('2.00 steps/s' in line and '100 tokens/s' in line for line in lines)

  def test_one_live_line_on_a_terminal(self):
    display, out = self.display(terminal=True)
    for step in range(1, 6):
      display.progress(step, {'loss': 0.5, 'perf': PERF})
    display.close()
    assert '5/5' in out.getvalue() and 'tokens/s' in out.getvalue()

  def test_evaluation_line(self):
    display, out = self.display()
    values = {'sampled_accuracy': 0.5, 'sampled_accuracy_low': 0.4, 'sampled_accuracy_high': 0.6,
              'greedy_accuracy': 0.75}
    display.evaluation(3, values)
    display.evaluation(4, values | {'reverse_kl': 0.125})
    first, second = out.getvalue().splitlines()
    assert 'step 3' in first and '0.500 [0.400, 0.600]' in first and '0.750' in first
    assert 'KL' not in first and 'reverse KL 0.1250' in second

  def test_transcripts_mark_right_and_wrong(self):
    display, out = self.display()
    display.transcripts('title:', [
        {'prompt': '1+1=', 'completion': '#2', 'reward': 1.0},
        {'prompt': '[bold]', 'completion': '', 'reward': 0.0}])
    assert out.getvalue().splitlines() == ['title:', '  ✓ 1+1=#2', '  ✗ [bold](nothing)']

  def test_no_title_without_transcripts(self):
    display, out = self.display()
    display.transcripts('title:', [])
    assert out.getvalue() == ''

  def test_names_are_not_markup(self):
    # A square bracket in a run's name or a path must be printed, not parsed.
    out = io.StringIO()
    console = Console(file=out, width=200, highlight=False)
    display = metrics.Display('run[1]', 1, 1, console)
    display.progress(1, {'loss': 0.5, 'perf': PERF})
    display.say('saved in [tmp]')
    assert 'run[1] step 1/1' in out.getvalue() and 'saved in [tmp]' in out.getvalue()


class TestOtherConsoles:
  """What is no UTF-8 must not end a run."""

  SHOW = (
      'from opd_jax.run import metrics\n'
      'd = metrics.Display("caf\\u00e9", 1, 1)\n'
      'd.transcripts("title", [{"prompt": "\\u4e2d", "completion": "\\ud800", "reward": r}\n'
      '                        for r in (None, 1.0, 0.0)])\n'
      'd.say("3 \\u2013 4")\n'
      'metrics.print_table("\\u2013", ["", "x"], [["\\u4e2d", "1"]])\n')

  def output(self, encoding, *command):
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONUTF8'}
    out = subprocess.run([sys.executable, *command], capture_output=True, check=True, env={
        **env, 'PYTHONIOENCODING': encoding})
    return out.stdout

  @pytest.mark.parametrize(('encoding', 'marks', 'name', 'dash'), [
      ('utf-8', '\u00b7\u2713\u2717', '\u4e2d', '\u2013'), ('ascii', '.+x', r'\u4e2d', r'\u2013'),
      ('latin-1', '.+x', r'\u4e2d', r'\u2013'), ('cp1252', '.+x', r'\u4e2d', '\u2013')])
  def test_what_it_cannot_write_is_escaped(self, encoding, marks, name, dash):
    lines = self.output(encoding, '-c', self.SHOW).decode(encoding).splitlines()
    assert lines[:5] == ['title', *(rf'  {m} {name}\ud800' for m in marks), f'3 {dash} 4']
    assert any(name in line for line in lines[5:])  # the table

  def test_the_command_writes_on_it_too(self, tmp_path):
    folder = tmp_path / 'experiments'
    folder.mkdir()
    (folder / 'mine.py').write_text('"""A \u4e2d."""\n', encoding='utf-8')
    code = (f'import os, sys; os.chdir({str(tmp_path)!r}); sys.argv = ["opd", "train", "--help"]\n'
            'from opd_jax.__main__ import main; main()')
    assert rb'mine.py: A \u4e2d' in self.output('ascii', '-c', code)


class TestClock:

  def test_rates_leave_pauses_out(self, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now[0])
    clock = metrics.Clock()
    now[0] += 6.0
    clock.pause(4.0)
    assert clock.read(1, 50) == {'steps_per_s': 0.5, 'tokens_per_s': 25.0}
    now[0] += 1.0  # the pause belonged to the reading before
    assert clock.read(2, 10) == {'steps_per_s': 2.0, 'tokens_per_s': 10.0}

  def test_no_time_at_all(self, monkeypatch):
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: 1.0)
    assert all(map(math.isfinite, metrics.Clock().read(1, 1).values()))


def test_a_table_shows_every_cell():
  out = io.StringIO()
  metrics.print_table('a title', ['', 'accuracy'], [['base', '0.1'], ['OPD', '0.9']],
                      Console(file=out, width=80, highlight=False))
  for text in ('a title', 'accuracy', 'base', '0.1', 'OPD', '0.9'):
    assert text in out.getvalue()


class TestDamaged:
  """A metrics.jsonl as a fault left it: rows are read, the rest is said and left out."""

  @pytest.mark.parametrize('line', [
      b'\xff\xfe', b'\x00' * 40, b'[1, 2]', b'3', b'null', b'{"loss": 1.0}', b'{"step": "1"}',
      b'{"step": 1.5, "kind": "train"}', b'{"step": true, "kind": "train"}', b'{"step": 2}',
      b'{"kind": "train", "step": 2, "text": "\xe9"}', b'[' * 100_000])
  def test_a_line_that_is_no_row(self, line, tmp_path, capsys):
    write(tmp_path, None, [1, 2, 3])
    file = tmp_path / 'metrics.jsonl'
    first, *rest = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + line + b'\n' + b''.join(rest))
    write(tmp_path, 3, [4])
    assert steps(tmp_path) == [1, 2, 3, 4]
    err = capsys.readouterr().err
    assert 'metrics.jsonl: the lines [2] are no rows' in err and err.count('\n') == 1

  def test_a_half_written_last_line_is_nothing_to_warn_about(self, tmp_path, capsys):
    write(tmp_path, None, [1, 2])
    file = tmp_path / 'metrics.jsonl'
    file.write_bytes(file.read_bytes()[:-5])
    assert len(metrics.read(file)) == 1 and capsys.readouterr().err == ''


class TestFull:
  """A disk that is full."""

  def test_metrics_stop_the_run_with_their_path(self, tmp_path):
    writer = metrics.Writer(tmp_path, None)
    writer.write('train', 1, {'loss': 1.0})
    writer._file.close()
    writer._file = open('/dev/full', 'ab', buffering=0)
    with pytest.raises(OSError, match=r'metrics\.jsonl cannot be written: No space left') as e:
      writer.write('train', 2, {'loss': 1.0})
    assert '\n' not in str(e.value)
    writer.close()  # nothing is left in a buffer that would fail again
    assert steps(tmp_path) == [1]

  def test_a_row_that_is_written_in_two_parts(self, tmp_path):
    writer = metrics.Writer(tmp_path, None)

    class Slow:
      def __init__(self, file):
        self.file = file

      def write(self, data):
        return self.file.write(data[:7])

      def __getattr__(self, name):
        return getattr(self.file, name)

    writer._file = Slow(writer._file)
    writer.write('train', 1, {'loss': 1.0})
    writer.close()
    assert steps(tmp_path) == [1]

  def test_a_directory_that_was_removed(self, tmp_path):
    (tmp_path / 'run').mkdir()
    writer = metrics.Writer(tmp_path / 'run', None)
    shutil.rmtree(tmp_path / 'run')
    with pytest.raises(OSError, match=r'metrics\.jsonl cannot be written: it was removed'):
      writer.write('train', 1, {'loss': 1.0})
    writer.close()

  @pytest.mark.parametrize('name', ['write', 'flush'])
  def test_tensorboard_ends_and_the_run_goes_on(self, name, tmp_path, monkeypatch, capsys):
    writer = metrics.Writer(tmp_path, None)
    writer.write('train', 1, {'loss': 1.0})

    def full(*args):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
      m.setattr(record_writer.RecordWriter, name, full)
      writer.write('train', 2, {'loss': 1.0})
    for step in range(3, 60):  # more than a queue would hold
      writer.write('train', step, {'loss': 1.0})
    writer.close()
    assert steps(tmp_path) == list(range(1, 60))
    err = capsys.readouterr().err
    assert err.count('No space left on device') == 1 and 'goes on without TensorBoard' in err

  def test_tensorboard_that_cannot_begin(self, tmp_path, capsys):
    (tmp_path / 'tensorboard').touch()
    write(tmp_path, None, [1, 2])
    assert steps(tmp_path) == [1, 2]
    assert 'goes on without TensorBoard' in capsys.readouterr().err

  def test_no_thread_writes_events(self, tmp_path):
    before = threading.active_count()
    writer = metrics.Writer(tmp_path, None)
    writer.write('train', 1, {'loss': 1.0})
    assert threading.active_count() == before
    assert ('train/loss', 1.0) in [e[1:] for e in events(tmp_path)]  # on disk at once
    writer.close()

  def test_two_starts_within_a_second(self, tmp_path):
    write(tmp_path, None, [1])
    write(tmp_path, 1, [2])
    assert [e[0] for e in events(tmp_path) if e[1] == 'train/loss'] == [1, 2]
