"""Measures of texts against counting by hand, and what is said of a run that goes wrong."""

import json

import numpy as np
import pytest

from opd_jax.run import texts


def by_hand(rows, samples):
  """distinct_4 and shared_4 of lists of tokens, with sets."""
  grams = [[tuple(r[i:i + 4]) for i in range(len(r) - 3)] for r in rows]
  distinct, shared = [], []
  for i, mine in enumerate(grams):
    if mine:
      others = {g for j, row in enumerate(grams) if j // samples != i // samples for g in row}
      distinct.append(len(set(mine)) / len(mine))
      shared.append(np.mean([g in others for g in set(mine)]))
  return np.mean(distinct), np.mean(shared)


def as_arrays(rows, start=2, width=40):
  """Completions that begin at `start`, among tokens that nobody chose."""
  tokens = np.full((len(rows), width), 7)
  chosen = np.zeros(tokens.shape)
  for i, row in enumerate(rows):
    tokens[i, start:start + len(row)], chosen[i, start:start + len(row)] = row, 1.0
  return tokens, chosen


@pytest.mark.parametrize('samples', [1, 2])
def test_text_metrics_are_those_counted_by_hand(samples):
  rng = np.random.default_rng(0)
  rows = [list(rng.integers(0, 3, rng.integers(0, 30))) for _ in range(12)]
  assert min(map(len, rows)) < 4  # too short for a 4-gram: left out
  found = texts.text_metrics(*as_arrays(rows), samples)
  distinct, shared = by_hand(rows, samples)
  assert found == {'distinct_4': pytest.approx(distinct), 'shared_4': pytest.approx(shared)}
  assert 0 < shared < 1 and 0 < distinct < 1


def test_what_prompt_and_padding_hold_is_not_read():
  tokens, chosen = as_arrays([[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]])
  other = np.where(chosen > 0, tokens, 1)
  assert texts.text_metrics(tokens, chosen, 1) == texts.text_metrics(other, chosen, 1)


def test_extremes():
  assert texts.text_metrics(*as_arrays([[1, 2, 3]]), 1) == {}
  assert texts.text_metrics(*as_arrays([[1] * 23]), 1) == {'distinct_4': 1 / 20}
  loop = texts.text_metrics(*as_arrays([[5, 6] * 10, [6, 5] * 10]), 1)
  assert loop == {'distinct_4': pytest.approx(2 / 17), 'shared_4': 1.0}
  # The same loop for two samples of one prompt says nothing of other prompts.
  assert 'shared_4' not in texts.text_metrics(*as_arrays([[5, 6] * 10, [6, 5] * 10]), 2)


def test_compression_tells_a_loop_from_a_text():
  text = 'Take the train at nine, change in York, and be there before the shops close at noon.'
  assert texts.compression([text]) < 1.3 < 5.0 < texts.compression(['-\n' * 40])
  assert texts.compression([text, '-\n' * 40]) == pytest.approx(
      (texts.compression([text]) + texts.compression(['-\n' * 40])) / 2)
  assert texts.compression([]) == 0.0


HEALTHY = dict(entropy_student=2.0, reverse_kl=1.0, truncation_rate=0.1, length=40.0,
               text=dict(distinct_4=0.95, shared_4=0.1))
WRECKS = {
    'repetition': dict(text=dict(distinct_4=0.2, shared_4=0.1)),
    'alike': dict(text=dict(distinct_4=0.95, shared_4=0.9)),
    'entropy': dict(entropy_student=0.09, reverse_kl=1.06),
    'longer': dict(truncation_rate=0.9),
    'shorter': dict(length=5.0),
}


def watched(rows, memory=None):
  """[(step, alarm)] of a run with these rows, whose memory goes through a checkpoint each step."""
  memory, out = {} if memory is None else memory, []
  for step, row in enumerate(rows):
    memory = json.loads(json.dumps(memory))
    out += [(step, alarm) for alarm in texts.Watch(memory).look(row)]
  return out


@pytest.mark.parametrize('name', WRECKS)
def test_each_wreck_is_said_once_and_with_what_was_seen(name):
  said = watched([HEALTHY] * 4 + [{**HEALTHY, **WRECKS[name]}] * 9)
  assert [alarm.split(' (')[0] for _, alarm in said] == [name]
  # Once most of the last steps are so; not at the first odd batch.
  assert 4 < said[0][0] < 4 + 2 * texts.WINDOW
  assert ' -> ' in said[0][1] and 'docs/troubleshooting.md' in said[0][1]


@pytest.mark.parametrize('name,first,now', [
    ('repetition', dict(text=dict(distinct_4=0.05, shared_4=0.1)), {}),  # a wreck from the start
    ('longer', dict(truncation_rate=0.3), dict(truncation_rate=1.0)),
    ('longer', dict(length=40.0), dict(length=400.0))])
def test_what_is_bad_whatever_it_was_at_first(name, first, now):
  first = {**HEALTHY, **first}
  said = watched([first] * 4 + [{**first, **now}] * 9)
  assert [alarm.split(' (')[0] for _, alarm in said] == [name]


def test_every_alarm_is_among_them():
  assert set(WRECKS) == set(texts.ALARMS)


@pytest.mark.parametrize('rows', [
    [HEALTHY] * 12,
    # A student that has learned is sure of itself, and near its teacher.
    [HEALTHY] * 4 + [dict(HEALTHY, entropy_student=0.02, reverse_kl=0.01)] * 9,
    # Short answers in few symbols are alike from the start.
    [dict(HEALTHY, text=dict(distinct_4=1.0, shared_4=0.95))] * 12,
    # From word salad to English: more is shared, not all.
    [HEALTHY] * 4 + [dict(HEALTHY, text=dict(distinct_4=0.9, shared_4=0.4))] * 9,
    [HEALTHY] * 6 + [dict(HEALTHY, **WRECKS['repetition'])] + [HEALTHY] * 6,
    # No teacher, and rows too short for a 4-gram.
    [dict(entropy_student=1.0, truncation_rate=0.0, length=3.0, text={})] * 12,
], ids=['steady', 'learned', 'arithmetic', 'salad', 'one batch', 'short'])
def test_it_is_quiet_where_nothing_is_wrong(rows):
  assert not watched(rows)
