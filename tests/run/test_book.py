"""What a run writes down of its steps."""

import json

import numpy as np
import pytest
import tiny

from opd_jax import config
from opd_jax.errors import ConfigError
from opd_jax.run import book, ledger


def a_step(pattern):
  """Metrics of an update on four rows of 20 tokens each, and what the student wrote."""
  tokens = np.tile(np.array(pattern)[:20], (4, 1)) + 100 * np.arange(4)[:, None]
  return {'loss': 1.0, 'grad_norm': 1.0, 'update_norm': 1.0, 'entropy_student': 1.0,
          'reverse_kl': 0.5, 'truncation_rate': 0.0, 'lengths': np.full(4, 20.0),
          'written': (tokens, np.ones(tokens.shape))}


@pytest.fixture
def keep(tmp_path):
  """(steps, history, restored) -> the history of a book that took these steps."""
  run = config.parse(tiny.config('opd_sampled', data__samples_per_prompt=1))

  def take(steps, history, restored=False):
    made = book.Book(run, tmp_path, history, restored=restored,
                     operations=lambda *_: ledger.Ledger(1.0), counts=lambda step, lengths: {})
    with made:
      for step, pattern in steps:
        made.train(step, a_step(pattern))
      made.flush()
    return made.history
  return take


def test_an_alarm_is_said_and_kept(keep, capsys):
  sound, wreck = list(range(20)), [1, 2] * 10
  history = keep([(s, sound) for s in range(1, 5)], book.new_history({}))
  assert not history.get('alarms') and 'ALARM' not in capsys.readouterr().out
  history['step'] = 4
  # After a resume, whose history has been through JSON, it goes on watching.
  history = keep([(s, wreck) for s in range(5, 12)], json.loads(json.dumps(history)), restored=True)
  (alarm,) = history['alarms']
  assert alarm['alarm'].startswith('repetition') and 4 < alarm['step'] < 12
  assert capsys.readouterr().out.count('ALARM repetition') == 1
  history['evals'] = [{'step': 0}, {'step': 12}]
  assert alarm in keep([], history, restored=True)['alarms']


def test_an_alarm_is_in_the_result(tmp_path):
  run = config.parse(tiny.config('opd_sampled'))
  history = {**book.new_history({}), 'evals': [{'step': 0}], 'alarms': [{'step': 3, 'alarm': 'x'}]}
  with book.Book(run, tmp_path, history, restored=True, operations=lambda *_: ledger.Ledger(1.0),
                 counts=lambda step, lengths: {}) as made:
    assert made.result()['alarms'] == history['alarms']


def test_the_ledger_goes_on_after_a_resume(keep):
  history = keep([(s, range(20)) for s in (1, 2)], book.new_history({}))
  history = keep([(3, range(20))], json.loads(json.dumps(history)), restored=True)
  assert history['flops'] == ledger.Ledger(student_training=3.0).parts()


def test_a_checkpoint_with_other_parts_is_refused(keep):
  history = {**book.new_history({}), 'step': 7, 'flops': {'student': 1.0}}
  with pytest.raises(ConfigError, match=r"checkpoint of step 7: flops has the parts \['student'\]"):
    keep([], history, restored=True)
