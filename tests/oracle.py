"""The loss that `objective.Objective` describes, token by token in NumPy and float64.

Written from the docstrings and the papers, in probabilities and with the formulas of each
divergence and of its derivative by hand, to share nothing with the package: it reads the texts of
the choices itself. `DEFINITIONS` has what there is of each field; a new choice needs its definition
there: a divergence, support, estimator or reference KL in `oracle_divergences.py`, any other in
`oracle_choices.py`.

`gradient` takes complex steps: the imaginary part of loss(x + i h) is h times the derivative, and
nothing cancels, so that with h = 1e-30 it is exact to rounding. What the loss holds fixed is real
here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle_choices as choices
from oracle_choices import Known
import oracle_divergences as divergences
from oracle_divergences import log_softmax, read

STEP = 1e-30
DEFINITIONS = divergences.DEFINITIONS | choices.DEFINITIONS


def reduction_weights(o: Any, counts: np.ndarray) -> np.ndarray:
  """They sum to 1, or to 0 where no token counts."""
  if o.reduction == 'token_mean':
    return counts / max(counts.sum(), 1)
  rows = max(counts.any(axis=1).sum(), 1)
  return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) / rows


def _surrogate(o, k, logprob, advantage):
  name, args, named = read(o.importance)
  ratio = np.exp(logprob - k.sampler_logprobs)
  moved = np.exp(logprob - (k.sampler_logprobs + k.policy_offset))
  return choices.IMPORTANCE[name](logprob, ratio, moved, advantage, *args, **named)


def losses(o: Any, k: Known, student: np.ndarray) -> np.ndarray:
  """What each token adds to the loss, [B, T-1]; `student` are the log-prob rows as they are now."""
  coef, lam = choices.distill_coef(o, k), o.extrapolation
  teacher = log_softmax(lam * k.teacher + (1 - lam) * k.reference)
  logprob = k.chosen(student)
  weights = reduction_weights(o, choices.counted(o, k))
  out = np.zeros(k.mask.shape, student.dtype)
  advantage = np.full(k.mask.shape, o.likelihood_coef) + 0.0
  if o.reward_coef:
    advantage += o.reward_coef * choices.reward_advantage(o, k)[:, None]
  distils = bool(o.distill_coef) or o.anneal != 'none'
  signal = None
  if distils and o.route == 'policy_gradient':
    signal = choices.distillation_advantage(o, k)
    if o.baseline == 'exact':
      mine = k.student if o.student_logprobs == 'rescored' else student.real
      signal = signal + (np.exp(mine) * (mine - teacher)).sum(-1)
  elif distils and o.support == 'sampled':
    out += coef * divergences.ESTIMATORS[o.estimator](choices.extrapolated(o, k) - logprob)
  elif distils:
    out += coef * divergences.divergence(o, student, teacher)
  if distils and o.local.coef:
    gate = choices.local_gate(o, k, signal)
    out += gate * coef * o.local.coef * divergences.divergence(o.local, student, teacher)
    if o.local.instead:
      signal = signal * ~gate
  if signal is not None:
    advantage += coef * signal
  if o.reference_kl != 'none':
    name, args, named = read(o.reference_kl)
    out += divergences.REFERENCES[name](
        student, k.reference, k.chosen(k.reference) - logprob, *args, **named)
  if signal is not None or o.reward_coef or o.likelihood_coef:
    out -= _surrogate(o, k, logprob, advantage)
  return np.where(weights > 0, weights * out, 0.0)


def gradient(o: Any, k: Known, logits: np.ndarray) -> np.ndarray:
  """The loss's gradient by the logits of every token, [B, T-1, V].

  A token's loss depends on its own logits only, so that one column of all tokens moves at once.
  """
  out = np.zeros(logits.shape)
  for v in range(logits.shape[-1]):
    moved = logits.astype(complex)
    moved[..., v] += 1j * STEP
    out[..., v] = losses(o, k, log_softmax(moved / o.temperature)).imag / STEP
  return out
