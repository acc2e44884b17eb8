"""What completions look like as texts, and when a run has begun to go wrong in them.

A student can come nearer to its teacher by every metric of the loss and be a wreck: a text that the
teacher finds likely once it has begun is a minimum of the reverse KL on the student's own states.
It shows in what is written, and so that is measured on every batch that the student writes.
"""

from __future__ import annotations

import math
from typing import Any
import zlib

import numpy as np

N = 4  # tokens of an n-gram
WINDOW = 3  # steps that are averaged, at the beginning and now


def text_metrics(tokens: np.ndarray, chosen: np.ndarray, samples: int) -> dict[str, float]:
  """Measures repetition within completions and likeness between them.

  Args:
    tokens: int [B, T-1].
    chosen: [B, T-1], above 0 on the tokens of completions.
    samples: completions of a prompt, which are neighbours.

  Returns:
    'distinct_4': 4-grams of a completion that differ, over its 4-grams, mean over completions (Li
    et al. 2016, arXiv 1510.03055, within each text); 'shared_4': the share of a completion's
    4-grams that completions of other prompts have too. Without a completion of 4 tokens, nothing.
  """
  own = [row[c > 0] for row, c in zip(np.asarray(tokens), np.asarray(chosen), strict=True)]
  prompts = [i // samples for i, t in enumerate(own) if len(t) >= N]
  own = [t.astype(np.int64) for t in own if len(t) >= N]
  if not own:
    return {}
  ids = _grams(own)
  distinct = [np.unique(row) for row in ids]
  # In how many prompts each is; those of one prompt count once.
  pairs = np.unique(np.concatenate([d * (prompts[-1] + 1) + p
                                    for d, p in zip(distinct, prompts, strict=True)]))
  spread = np.bincount(pairs // (prompts[-1] + 1))
  out = {'distinct_4': float(np.mean([len(d) / len(row)
                                      for d, row in zip(distinct, ids, strict=True)]))}
  if len(set(prompts)) > 1:
    out['shared_4'] = float(np.mean([(spread[d] > 1).mean() for d in distinct]))
  return out


def _grams(rows):
  """Numbers the 4-grams of rows, equal ones alike: pairs of tokens, and then pairs of those. (To
  sort integers takes a tenth of the time that sorting tuples of four takes.)"""
  for apart in (1, N // 2):
    base = max(int(row.max()) for row in rows) + 1
    pairs = [row[:-apart] * base + row[apart:] for row in rows]
    _, ids = np.unique(np.concatenate(pairs), return_inverse=True)
    rows = np.split(ids, np.cumsum([len(row) for row in pairs])[:-1])
  return rows


def compression(texts: list[str]) -> float:
  """Computes bytes over bytes compressed (zlib), mean over texts: about 2 for a page of English,
  below 1 for a few words, above 5 for what repeats itself."""
  sizes = [(len(b), len(zlib.compress(b, 9))) for b in (t.encode() for t in texts)]
  return float(np.mean([plain / small for plain, small in sizes])) if sizes else 0.0


# Each looks at a change, and where a value is bad whatever it was at first, at the value: a student
# may begin as a wreck.
def _repeats(first, now):
  return now['distinct_4'] < 0.5 and (
      now['distinct_4'] < first['distinct_4'] - 0.1 or now['distinct_4'] < 0.2)


def _alike(first, now):
  return now['shared_4'] > 0.8 and first['shared_4'] < 0.5


def _collapsed(first, now):
  # Sure of itself where the teacher is not of its mind; a student that has learned is near it.
  return (now['entropy_student'] < 0.2 * first['entropy_student']
          and now['reverse_kl'] > max(0.2, 2.0 * now['entropy_student']))


def _grows(first, now):
  return (now['length'] > 4.0 * first['length'] or
          now['truncation_rate'] > max(0.5, first['truncation_rate'] + 0.3))


def _shrinks(first, now):
  return now['length'] < first['length'] / 4.0


START = ("begin with the teacher's text and the forward KL (presets 'warm_start', 'seq_kd'), mix "
         "that text in ('gkd', 'distillm'), or take fewer steps")
# name: (condition of the first and the present values, what they are, likely cause and change)
ALARMS = {
    'repetition': (_repeats, ('distinct_4',), 'completions repeat themselves: a loop that the '
                   'teacher finds likely once it has begun is a minimum of the reverse KL; '
                   f'{START}, or reference_kl'),
    'alike': (_alike, ('shared_4',), 'completions of different prompts have become alike: the '
              f'student writes one text whatever it is asked; {START}'),
    'entropy': (_collapsed, ('entropy_student', 'reverse_kl'), 'the entropy has collapsed far from '
                f'the teacher: the reverse KL seeks modes; {START}, or terms '
                "where the teacher is uncertain ('eopd')"),
    'longer': (_grows, ('truncation_rate', 'length'), 'completions no longer end: end tokens that '
               'student and teacher do not share (doctor stop_tokens), or repetition; '
               "'stable_opd', a window of the first tokens, or a shorter data.max_new_tokens"),
    'shorter': (_shrinks, ('length',), 'completions have become very short: an end that the '
                'teacher finds likely, or a reward that a short text gets; look at transcripts'),
}


class Watch:
  """Looks for a run that goes wrong while its loss falls; says each thing once.

  Its whole memory is a dict in the history of the run, so that a resumed run goes on watching.
  """

  def __init__(self, memory: dict[str, Any]):
    self._memory = memory
    for name, empty in (('first', {}), ('last', {}), ('said', [])):
      memory.setdefault(name, empty)

  def look(self, row: dict[str, Any]) -> list[str]:
    """Takes the metrics of a step on the student's own rows, and returns new alarms."""
    values = {n: v for n, v in {**row, **row.get('text', {})}.items()
              if n in {name for _, shown, _ in ALARMS.values() for name in shown}}
    first, last = self._memory['first'], self._memory['last']
    for name, value in values.items():
      if not math.isfinite(value):
        continue
      if len(first.setdefault(name, [])) < WINDOW:
        first[name].append(value)
      else:
        last[name] = [*last.get(name, []), value][-WINDOW:]
    began, now = ({name: float(np.mean(v)) for name, v in seen.items() if len(v) == WINDOW}
                  for seen in (first, last))
    out = []
    for name, (broken, shown, advice) in ALARMS.items():
      if name not in self._memory['said'] and set(shown) <= set(now) and broken(began, now):
        self._memory['said'].append(name)
        seen = ', '.join(f'{n} {began[n]:.2f} -> {now[n]:.2f}' for n in shown)
        out.append(f'{name} ({seen}): {advice}; docs/troubleshooting.md')
    return out
