"""Graders: the verdicts of MATH, GSM8K and AIME, and the processes that judge mathematics."""

import collections
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from opd_jax.tasks import _graders, _math, prompts

FILE = pathlib.Path(__file__).with_name('answers.jsonl')
HANGS = '9^{9^{9^{9}}}'


@functools.cache
def answers():
  return [json.loads(line) for line in FILE.read_text(encoding='utf-8').splitlines()]


@functools.cache
def verdicts():
  """Those of all lines of the file, which were graded together as a run does."""
  rows = [{'grader': a['grader'], 'answer': a['gold']} for a in answers()]
  return prompts.grade_all(rows, [a['text'] for a in answers()])


def notations():
  return sorted({a['notation'] for a in answers()})


class TestVerdicts:

  @pytest.mark.parametrize('notation', notations())
  def test_as_in_the_file(self, notation):
    other = [a for a, got in zip(answers(), verdicts(), strict=True)
             if a['notation'] == notation and got != float(a['right'])]
    assert not other

  def test_the_file_has_what_people_write(self):
    assert len(answers()) >= 150
    counts = collections.Counter(a['notation'] for a in answers())
    assert {'fraction', 'mixed number', 'thousands', 'percent', 'currency', 'unit', 'degrees',
            'text', 'tuple', 'set', 'list', 'interval', 'matrix', 'equation', 'unterminated box',
            'two boxes', 'GSM8K', 'AIME', 'exact'} <= set(counts)
    for grader in _graders.FIND:
      assert {a['right'] for a in answers() if a['grader'] == grader} == {True, False}

  def test_one_of_several_accepted_answers_will_do(self):
    row = {'grader': 'boxed', 'answer': ['4', r'\frac{1}{2}']}
    assert prompts.grade_all([row] * 3, [r'\boxed{0.5}', r'\boxed{4}', r'\boxed{5}']) == [1, 1, 0]

  def test_what_needs_no_algebra_asks_no_process(self, monkeypatch):
    monkeypatch.setattr(_math, 'equal', None)  # a run grades thousands of such
    for wanted, text, right in (
        ('42', '42.0', 1), ('42', '43', 0), ('1,000', r'\$1000', 1), ('7', 'no idea', 0),
        (r'\frac{1}{2}', '0.5', 1), (r'(x+1)^2', '( x + 1 )^2', 1), ('7', '', 0),
        (r'\text{even}', 'Even', 1), ('25', r'25\%', 1)):
      assert _graders.grade('boxed', [wanted], rf'\boxed{{{text}}}') == right
    assert _graders.grade('exact', ['(x+1)^2'], 'x^2+2x+1') == 0  # and 'exact' never does
    assert _graders.grade('last_number', ['5'], 'It is 5, or 6?') == 0


class TestProcesses:

  @pytest.fixture(autouse=True)
  def fresh(self):
    _math.equal.cache_clear()
    _math.close()
    yield
    _math.equal.cache_clear()
    _math.close()

  def test_one_that_hangs_is_ended_and_others_go_on(self, monkeypatch):
    monkeypatch.setattr(_math, 'CPU_SECONDS', 1)
    rows = [{'grader': 'boxed', 'answer': 'x+1'}] * 4
    texts = [rf'\boxed{{{t}}}' for t in (HANGS, '1+x', HANGS + '+1', '1+1x')]
    assert prompts.grade_all(rows, texts) == [0.0, 1.0, 0.0, 1.0]

  def test_it_is_ended_by_the_time_it_computes(self, monkeypatch):
    monkeypatch.setattr(_math, 'CPU_SECONDS', 0.5)
    worker = _math.Worker()
    assert worker.ask('x+1', '1+x') is True and worker.ask('x+1', HANGS) is None
    assert worker._process.returncode == -signal.SIGPROF

  def test_what_a_judge_prepares_is_not_counted(self, tmp_path, monkeypatch):
    (tmp_path / 'judge.py').write_text('''
import time

def spend(seconds):
  end = time.process_time() + seconds
  while time.process_time() < end:
    pass

def prepare(before, within):
  spend(before)

def judge(before, within):
  spend(within)
  return [before, within]
''')
    monkeypatch.setattr(_math, 'CPU_SECONDS', 0.3)
    worker = _math.Worker(tmp_path / 'judge.py', 'seconds')
    assert worker.ask(0.6, 0.05) == [0.6, 0.05]
    assert worker.ask(0.0, 30.0) is None and worker._process.returncode == -signal.SIGPROF

  def test_what_a_library_prints_is_no_answer(self, tmp_path, monkeypatch):
    (tmp_path / 'math_verify.py').write_text(
        'def parse(text, parsing_timeout):\n  print("1", flush=True)\n  return text\n'
        'def verify(wanted, found, timeout_seconds):\n  return wanted == found\n')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    assert [_math.equal('1', '2'), _math.equal('2', '2'), _math.equal('3', '2')] == [0, 1, 0]

  def test_without_the_library(self, monkeypatch):
    monkeypatch.setattr(prompts.importlib.util, 'find_spec', lambda name: None)
    fields = dict(source='a.jsonl', prompt_column='q', answer_column='a', holdout_examples=1)
    with pytest.raises(ValueError, match="grader='boxed' needs math-verify.*allowed: .*'exact'"):
      prompts.Options(grader='boxed', **fields)
    prompts.Options(grader='exact', **fields)

  def test_one_that_is_stopped_is_killed(self, monkeypatch):
    monkeypatch.setattr(_math, 'WALL_SECONDS', 0.5)
    worker = _math.Worker()
    os.kill(worker._process.pid, signal.SIGSTOP)
    assert worker.ask('1', '2') is None
    assert worker._process.returncode == -signal.SIGKILL

  def test_they_are_kept(self):
    started = []
    worker = _math.Worker
    with pytest.MonkeyPatch.context() as m:
      m.setattr(_math, 'Worker', lambda: started.append(worker()) or started[-1])
      assert all(_math.equal(f'{i}+x', f'x+{i}') for i in range(5))
    assert len(started) == 1

  def test_not_only_in_the_main_thread(self):
    # The limits inside math-verify are signals, which other threads cannot set.
    out = []
    thread = threading.Thread(target=lambda: out.append(_math.equal('x+1', '1+x')))
    thread.start()
    thread.join()
    assert out == [True]

  def test_a_failure_between_question_and_answer_leaves_no_answer_behind(self, monkeypatch):
    real = _math.Worker.ask

    def interrupted(self, wanted, found):
      self._process.stdin.write(json.dumps([wanted, found]) + '\n')
      self._process.stdin.flush()
      raise KeyboardInterrupt

    with monkeypatch.context() as m:
      m.setattr(_math.Worker, 'ask', interrupted)
      with pytest.raises(KeyboardInterrupt):
        _math.equal('x', 'x')
    assert _math.Worker.ask is real and not _math.equal('x', 'y')

  def test_one_that_does_not_start(self, monkeypatch):
    monkeypatch.setattr(_math.sys, 'executable', '/bin/false')
    with pytest.raises(RuntimeError, match='math-verify.* did not start'):
      _math.equal('x', 'y')

  def test_none_outlives_the_run(self):
    code = ('import os, threading, time\n'
            'from opd_jax.tasks import _math\n'
            'worker = _math.Worker()\n'
            f'threading.Thread(target=worker.ask, args=("x", {HANGS!r})).start()\n'
            'time.sleep(0.5)\n'
            'print(worker._process.pid, flush=True)\n'
            'os._exit(0)\n')  # as if it were killed: nothing is cleaned up
    pid = int(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True,
                             text=True).stdout)
    for _ in range(600):
      stat = pathlib.Path(f'/proc/{pid}/stat')
      if not stat.exists() or stat.read_text().rsplit(')')[1].split()[0] == 'Z':
        return
      time.sleep(0.1)
    raise AssertionError(f'process {pid} is still there')
