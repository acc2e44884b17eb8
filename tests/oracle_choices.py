"""The oracle's choices, by hand: each annealing, signal, shaping, return, baseline, gate and
importance weight, of what is known of a batch.

A new one needs its definition here. (How and why: `oracle.py`.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from oracle_divergences import read, top, weight


@dataclasses.dataclass(frozen=True)
class Known:
  """What is fixed about a batch; rows of log-probs are [B, T-1, V], the rest [B, T-1] or [B]."""

  targets: np.ndarray  # tokens[:, 1:]
  mask: np.ndarray
  sampler_logprobs: np.ndarray
  policy_offset: np.ndarray
  student: np.ndarray  # as it was when the advantages were made
  teacher: np.ndarray
  reference: np.ndarray
  rewards: np.ndarray
  noise: np.ndarray  # of the gate 'untrusted'
  group_size: int
  step: int = 0  # gradient steps taken, for annealing

  def chosen(self, rows: np.ndarray) -> np.ndarray:
    """Those of the sampled tokens."""
    return np.take_along_axis(rows, self.targets[..., None], axis=-1)[..., 0]

  def places(self, row: int) -> list[int]:
    """Where a row's tokens are."""
    return np.flatnonzero(self.mask[row]).tolist()


# --- advantages ---


def _linear(coef, step, steps, to):
  return coef + min(step / steps, 1.0) * (to - coef)


SCHEDULES = {'linear': _linear}


def distill_coef(o: Any, k: Known) -> float:
  """The present weight of distillation."""
  if o.anneal == 'none':
    return o.distill_coef
  name, args, named = read(o.anneal)
  return SCHEDULES[name](o.distill_coef, k.step, *args, **named)


def _own(o, k):
  if o.student_logprobs == 'sampler':
    return k.sampler_logprobs + k.policy_offset
  return k.chosen(k.student)


def extrapolated(o: Any, k: Known) -> np.ndarray:
  """What the teacher says of the sampled tokens, up to a constant of their prefix."""
  lam = o.extrapolation
  return lam * k.chosen(k.teacher) + (1 - lam) * k.chosen(k.reference)


# Of the signal x and of the log-probs of the token.
SHAPINGS = {
    'none': lambda x, own, theirs: x,
    'clip': lambda x, own, theirs, limit: np.minimum(np.maximum(x, -limit), limit),
    'log': lambda x, own, theirs: np.sign(x) * np.log(1 + np.abs(x)),
    'power': lambda x, own, theirs, exponent: np.exp(theirs)**exponent - np.exp(own)**exponent,
}

SIGNALS = {
    'teacher': lambda x, own, theirs: x,
    'fixed_negative': lambda x, own, theirs: np.where(theirs < own, -1.0, 0.0),
}


def _signal(o, k):
  own, theirs = _own(o, k), extrapolated(o, k)
  name, args, named = read(o.shaping)
  x = SHAPINGS[name](weight(o.divergence, np.exp(theirs - own)), own, theirs, *args, **named)
  return SIGNALS[o.signal](x, own, theirs)


# Of a token's reward and those of the ones after it, each already discounted.
RETURNS = {
    'inclusive': lambda own, later: own + sum(later),
    'later': lambda own, later: sum(later),
    'later_mean': lambda own, later: sum(later) / max(len(later), 1),
}


def _returns(o, k):
  signal, out = _signal(o, k), np.zeros(k.mask.shape)
  for b in range(len(out)):
    places = k.places(b)
    for i, t in enumerate(places):
      later = [o.discount**(j - i) * signal[b, places[j]] for j in range(i + 1, len(places))]
      out[b, t] = RETURNS[o.returns](signal[b, t], later)
  return out


def _leave_one_out(values, k):
  rows, out = range(len(values)), []
  for b in rows:
    others = [values[c, t] for c in rows
              if c // k.group_size == b // k.group_size and c != b for t in k.places(c)]
    out.append(np.mean(others) if others else 0.0)
  return np.array(out)[:, None]


# What is subtracted from the returns.
BASELINES = {
    'none': lambda values, k: 0.0,
    'exact': lambda values, k: 0.0,  # in `oracle.losses`, which has the rows of the vocabulary
    'batch_mean': lambda values, k: np.mean(values[k.mask > 0]),
    'leave_one_out': _leave_one_out,
}


def distillation_advantage(o: Any, k: Known) -> np.ndarray:
  """Without distill_coef and the exact baseline; zero where the mask is."""
  values = _returns(o, k)
  return (values - BASELINES[o.baseline](values, k)) * k.mask


def _group_mean(groups):
  return groups - groups.mean(1, keepdims=True)


REWARD_BASELINES = {
    'none': lambda groups: groups,
    'group_mean': _group_mean,
    'group_mean_std': lambda groups: _group_mean(groups) / (
        groups.std(1, ddof=1, keepdims=True) + 1e-4),
}


def reward_advantage(o: Any, k: Known) -> np.ndarray:
  """Of each row."""
  return REWARD_BASELINES[o.reward_baseline](k.rewards.reshape(-1, k.group_size)).reshape(-1)


# --- gates ---


def _entropy(rows):
  return -(np.exp(rows) * rows).sum(-1)


def _highest(scores: dict, share: float) -> set:
  """The keys of the ceil(share * n) highest scores, and of those equal to the last of them: the
  first tokens of one prompt's samples always are."""
  if not scores:
    return set()
  least = sorted(scores.values(), reverse=True)[int(np.ceil(share * len(scores))) - 1]
  return {key for key, score in scores.items() if score >= least - 1e-12}


def _agrees(k, counted, b):
  lead = (k.chosen(k.teacher) - k.chosen(k.student))[b][counted[b]].sum()
  return lead > 0 if k.rewards[b] == 1 else lead < 0


def _likely(k, counted, rows, keep):
  theirs = k.chosen(k.teacher)
  return _highest({b: theirs[b][counted[b]].mean() for b in rows}, keep)


# Which of the rows that have tokens stay.
ROW_GATES = {
    'correct': lambda k, counted, rows: {b for b in rows if k.rewards[b] == 1},
    'wrong': lambda k, counted, rows: {b for b in rows if k.rewards[b] != 1},
    'reward_agrees': lambda k, counted, rows: {b for b in rows if _agrees(k, counted, b)},
    'teacher_likelihood': _likely,
}


def _difference(k):
  return np.abs(k.chosen(k.teacher) - k.chosen(k.student))


def _soft_or(k, counted):
  e, d = (x / x[counted].max() for x in (_entropy(k.student), _difference(k)))
  return e + d - e * d


def _teachability(k, counted, top_k):
  s, t = np.exp(k.student), np.exp(k.teacher)
  return (s * np.log(s / t)).sum(-1) * (top(s, top_k) * t).sum(-1)


def _most(score):
  """The gate that keeps the share of the tokens with the highest score."""
  def gate(k, counted, keep, *args, **named):
    values = score(k, counted, *args, **named)
    stays = _highest({(b, t): values[b, t] for b, t in np.argwhere(counted)}, keep)
    return np.array([[(b, t) in stays for t in range(counted.shape[1])]
                     for b in range(len(counted))])

  return gate


TOKEN_GATES = {
    'student_entropy': _most(lambda k, counted: _entropy(k.student)),
    'teacher_entropy': _most(lambda k, counted: _entropy(k.teacher)),
    'divergence': _most(lambda k, counted: _difference(k)),
    'soft_or': _most(_soft_or),
    'teachability': _most(_teachability),
}


def _window(places, start, count):
  return places[start:start + count]


WINDOWS = {'tokens': _window}


def counted(o: Any, k: Known) -> np.ndarray:
  """Which tokens count, bool [B, T-1]: the window, of that the rows, of those the tokens."""
  out = k.mask > 0
  if o.window != 'none':
    name, args, named = read(o.window)
    for b in range(len(out)):
      inside = WINDOWS[name](k.places(b), *args, **named)
      out[b] &= np.isin(np.arange(out.shape[1]), inside)
  if o.row_gate != 'none':
    name, args, named = read(o.row_gate)
    rows = [b for b in range(len(out)) if out[b].any()]
    stays = ROW_GATES[name](k, out, rows, *args, **named)
    out &= np.array([b in stays for b in range(len(out))])[:, None]
  if o.token_gate != 'none':
    name, args, named = read(o.token_gate)
    out = TOKEN_GATES[name](k, out, *args, **named)
  return out


# Of (what is known, log p_S as the signal takes it, the advantage of distillation).
LOCAL_GATES = {
    'none': lambda k, own, advantage: np.ones(k.mask.shape, bool),
    'teacher_entropy': lambda k, own, advantage, above: _entropy(k.teacher) > above,
    'untrusted': lambda k, own, advantage: k.noise >= np.minimum(
        np.exp(k.chosen(k.teacher)) / np.exp(own), 1.0),
    'negative': lambda k, own, advantage: advantage <= 0,
}


def local_gate(o: Any, k: Known, advantage: np.ndarray | None) -> np.ndarray:
  """Where the local term is, among the tokens that count."""
  name, args, named = read(o.local.gate)
  return LOCAL_GATES[name](k, _own(o, k), advantage, *args, **named)


# --- importance ---


def _truncated(logprob, ratio, moved, advantage, high):
  fixed = ratio.real
  return np.where(fixed > high, high, fixed) * logprob * advantage


def _two_sided(logprob, ratio, moved, advantage, low, high):
  fixed = moved.real
  return ((low <= fixed) & (fixed <= high)) * fixed * logprob * advantage


def _ppo_clip(logprob, ratio, moved, advantage, epsilon):
  low, high, fixed = 1 - epsilon, 1 + epsilon, moved.real
  clipped = np.where(fixed < low, low, np.where(fixed > high, high, moved))
  # The smaller of the two.
  return np.where(fixed * advantage <= clipped.real * advantage, moved, clipped) * advantage


# Of log p_S, p_S / p_sampler, the same by the policy before truncation, and the advantage.
IMPORTANCE = {
    'none': lambda logprob, ratio, moved, advantage: logprob * advantage,
    'ratio': lambda logprob, ratio, moved, advantage: ratio * advantage,
    'truncated': _truncated,
    'two_sided': _two_sided,
    'ppo_clip': _ppo_clip,
}

# {field of an Objective (of its Local: with 'local.' in front): {name: definition}}
DEFINITIONS = {
    'anneal': SCHEDULES, 'signal': SIGNALS, 'shaping': SHAPINGS, 'returns': RETURNS,
    'baseline': BASELINES, 'reward_baseline': REWARD_BASELINES, 'importance': IMPORTANCE,
    'window': WINDOWS, 'row_gate': ROW_GATES, 'token_gate': TOKEN_GATES, 'local.gate': LOCAL_GATES}
