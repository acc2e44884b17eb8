"""The loss that `objective.Objective` describes, token by token in NumPy and float64.

Written from the docstrings and the papers, in probabilities and with the formulas of each
divergence and of its derivative by hand, to share nothing with the package. `gradient` takes
complex steps: the imaginary part of loss(x + i h) is h times the derivative, and nothing cancels,
so that with h = 1e-30 it is exact to rounding. What the loss holds fixed is real here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

STEP = 1e-30


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


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """Over the last axis, of real or complex logits."""
  shifted = logits - logits.real.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# --- divergences: D = sum_v p_S f(p_T / p_S), as (f, its derivative) ---


def _sign(x):
  return np.sign(np.real(x))


def _jensen_shannon(u, b):
  m = b * u + 1 - b
  return b * u * np.log(u / m) - (1 - b) * np.log(m), b * np.log(u / m)


def _scaled_jensen_shannon(u, b):
  if b in (0.0, 1.0):
    return GENERATORS['reverse_kl' if b else 'forward_kl'](u, 0.0)
  return tuple(x / (b * (1 - b)) for x in _jensen_shannon(u, b))


def _skew_kl(u, a):
  m = a * u + 1 - a
  return u * np.log(u / m), np.log(u / m) + 1 - a * u / m


def _alpha_divergence(u, a):
  if a == 0.0:
    return -np.log(u) + u - 1, 1 - 1 / u
  if a == 1.0:
    return u * np.log(u) - u + 1, np.log(u)
  return (u**a - 1 - a * (u - 1)) / (a * (a - 1)), (u**(a - 1) - 1) / (a - 1)


# A new divergence needs its formula here.
GENERATORS = {
    'reverse_kl': lambda u, a: (-np.log(u), -1 / u),
    'forward_kl': lambda u, a: (u * np.log(u), np.log(u) + 1),
    'jensen_shannon': _jensen_shannon,
    'scaled_jensen_shannon': _scaled_jensen_shannon,
    'skew_kl': _skew_kl,
    'skew_reverse_kl': lambda u, a: (-np.log((1 - a) * u + a), -(1 - a) / ((1 - a) * u + a)),
    'total_variation': lambda u, a: (_sign(u - 1) * (u - 1) / 2, _sign(u - 1) / 2),
    'alpha_divergence': _alpha_divergence,
    'squared_hellinger': lambda u, a: ((1 - u**0.5)**2, 1 - u**-0.5),
}


def terms(name: str, alpha: float, s: np.ndarray, t: np.ndarray) -> np.ndarray:
  """p_S f(p_T / p_S), elementwise, of probabilities."""
  return s * GENERATORS[name](t / s, alpha)[0]


def weight(name: str, alpha: float, u: np.ndarray) -> np.ndarray:
  """w(u) - w(1), w = -f + u f'."""
  def w(u):
    f, slope = GENERATORS[name](u, alpha)
    return -f + u * slope

  return w(u) - w(np.ones_like(u))


def top(rows: np.ndarray, k: int) -> np.ndarray:
  """True at the k largest of each row."""
  order = np.argsort(-rows.real, axis=-1, kind='stable')[..., :k]
  member = np.zeros(rows.shape, bool)
  np.put_along_axis(member, order, True, axis=-1)
  return member


def divergence(o: Any, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
  """Of log-prob rows, over the support that an Objective or its Local names, [...]."""
  s, t = np.exp(student), np.exp(teacher)
  if o.support == 'full':
    return terms(o.divergence, o.divergence_alpha, s, t).sum(-1)
  inside = {'teacher_top_k': top(t, o.top_k), 'student_top_k': top(s, o.top_k),
            'union_top_k': top(t, o.top_k) | top(s, o.top_k)}[o.support]
  if o.tail == 'stop_gradient':
    return (inside * s * (student.real - teacher)).sum(-1)
  if o.tail == 'renormalize':
    s, t = (x / (inside * x).sum(-1, keepdims=True) for x in (s, t))
  out = (inside * terms(o.divergence, o.divergence_alpha, s, t)).sum(-1)
  if o.tail == 'bucket':
    # Sums of what is outside; where nothing is, both have the mass 0 and the term is 0.
    rest = [(~inside * x).sum(-1) + inside.all(-1) for x in (s, t)]
    out = out + ~inside.all(-1) * terms(o.divergence, o.divergence_alpha, *rest)
  return out


def sampled(estimator: str, log_u: np.ndarray) -> np.ndarray:
  """k2 and k3 (Schulman 2020)."""
  return log_u**2 / 2 if estimator == 'k2' else np.exp(log_u) - 1 - log_u


# --- advantages ---


def distill_coef(o: Any, k: Known) -> float:
  """The present weight of distillation."""
  if not o.anneal_steps:
    return o.distill_coef
  done = min(k.step / o.anneal_steps, 1.0)
  return o.distill_coef + done * (o.final_distill_coef - o.distill_coef)


def _own(o, k):
  if o.student_logprobs == 'sampler':
    return k.sampler_logprobs + k.policy_offset
  return k.chosen(k.student)


def _extrapolated(o, k):
  """What the teacher says of the sampled tokens, up to a constant of their prefix."""
  lam = o.extrapolation
  return lam * k.chosen(k.teacher) + (1 - lam) * k.chosen(k.reference)


def _signal(o, k):
  own, theirs = _own(o, k), _extrapolated(o, k)
  if o.signal == 'fixed_negative':
    return np.where(theirs < own, -1.0, 0.0)
  if o.shaping == 'power':
    return np.exp(theirs)**o.shaping_scale - np.exp(own)**o.shaping_scale
  x = weight(o.divergence, o.divergence_alpha, np.exp(theirs - own))
  if o.shaping == 'clip':
    return np.minimum(np.maximum(x, -o.shaping_scale), o.shaping_scale)
  return np.sign(x) * np.log(1 + np.abs(x)) if o.shaping == 'log' else x


def _returns(o, k):
  signal, out = _signal(o, k), np.zeros(k.mask.shape)
  for b in range(len(out)):
    places = k.places(b)
    for i, t in enumerate(places):
      first = i if o.returns == 'inclusive' else i + 1
      later = [o.discount**(j - i) * signal[b, places[j]] for j in range(first, len(places))]
      share = max(len(later), 1) if o.returns == 'later_mean' else 1
      out[b, t] = sum(later) / share
  return out


def distillation_advantage(o: Any, k: Known) -> np.ndarray:
  """Without distill_coef and the exact baseline; zero where the mask is."""
  out = _returns(o, k)
  size, rows = k.group_size, range(len(out))
  if o.baseline == 'batch_mean':
    return (out - np.mean(out[k.mask > 0])) * k.mask
  if o.baseline == 'leave_one_out':
    mean = []
    for b in rows:
      others = [out[c, t] for c in rows if c // size == b // size and c != b for t in k.places(c)]
      mean.append(np.mean(others) if others else 0.0)
    return (out - np.array(mean)[:, None]) * k.mask
  return out * k.mask


def reward_advantage(o: Any, k: Known) -> np.ndarray:
  """Of each row."""
  groups = k.rewards.reshape(-1, k.group_size)
  if o.reward_baseline != 'none':
    groups = groups - groups.mean(1, keepdims=True)
  if o.reward_baseline == 'group_mean_std':
    groups = groups / (groups.std(1, keepdims=True) + 1e-4)
  return groups.reshape(-1)


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


def _row_stays(o, k, counted):
  rows = [b for b in range(len(counted)) if counted[b].any()]
  if o.row_gate == 'correct':
    return {b for b in rows if k.rewards[b] == 1}
  if o.row_gate == 'wrong':
    return {b for b in rows if k.rewards[b] != 1}
  theirs, own = k.chosen(k.teacher), k.chosen(k.student)
  if o.row_gate == 'reward_agrees':
    lead = {b: (theirs - own)[b][counted[b]].sum() for b in rows}
    return {b for b in rows if (lead[b] > 0 if k.rewards[b] == 1 else lead[b] < 0)}
  return _highest({b: theirs[b][counted[b]].mean() for b in rows}, o.row_keep)


def _token_score(o, k, counted):
  entropy = _entropy(k.student)
  difference = np.abs(k.chosen(k.teacher) - k.chosen(k.student))
  if o.token_gate == 'teachability':
    s, t = np.exp(k.student), np.exp(k.teacher)
    reachable = (top(s, o.token_top_k) * t).sum(-1)
    return (s * np.log(s / t)).sum(-1) * reachable
  if o.token_gate == 'soft_or':
    e, d = entropy / entropy[counted].max(), difference / difference[counted].max()
    return e + d - e * d
  return {'student_entropy': entropy, 'teacher_entropy': _entropy(k.teacher),
          'divergence': difference}[o.token_gate]


def counted(o: Any, k: Known) -> np.ndarray:
  """Which tokens count, bool [B, T-1]: the window, of that the rows, of those the tokens."""
  out = k.mask > 0
  if o.window_tokens:
    for b in range(len(out)):
      places = k.places(b)
      inside = places[o.window_start:o.window_start + o.window_tokens]
      out[b] &= np.isin(np.arange(out.shape[1]), inside)
  if o.row_gate != 'none':
    stays = _row_stays(o, k, out)
    out &= np.array([b in stays for b in range(len(out))])[:, None]
  if o.token_gate != 'none':
    score = _token_score(o, k, out)
    stays = _highest({(b, t): score[b, t] for b, t in np.argwhere(out)}, o.token_keep)
    out = np.array([[(b, t) in stays for t in range(out.shape[1])] for b in range(len(out))])
  return out


def reduction_weights(o: Any, counts: np.ndarray) -> np.ndarray:
  """They sum to 1, or to 0 where no token counts."""
  if o.reduction == 'token_mean':
    return counts / max(counts.sum(), 1)
  rows = max(counts.any(axis=1).sum(), 1)
  return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) / rows


def local_gate(o: Any, k: Known, advantage: np.ndarray | None) -> np.ndarray:
  """Where the local term is, among the tokens that count."""
  if o.local.gate == 'teacher_entropy':
    return _entropy(k.teacher) > o.local.entropy
  if o.local.gate == 'untrusted':
    trusted = np.minimum(np.exp(k.chosen(k.teacher)) / np.exp(_own(o, k)), 1.0)
    return k.noise >= trusted
  if o.local.gate == 'negative':
    return advantage <= 0
  return np.ones(k.mask.shape, bool)


# --- the loss ---


def _surrogate(o, k, logprob, advantage):
  behaviour = k.sampler_logprobs
  if o.importance in ('two_sided', 'ppo_clip'):
    behaviour = behaviour + k.policy_offset
  ratio = np.exp(logprob - behaviour)
  fixed = ratio.real
  if o.importance == 'none':
    return logprob * advantage
  if o.importance == 'ratio':
    return ratio * advantage
  if o.importance == 'truncated':
    return np.where(fixed > o.ratio_high, o.ratio_high, fixed) * logprob * advantage
  if o.importance == 'two_sided':
    inside = (o.ratio_low <= fixed) & (fixed <= o.ratio_high)
    return inside * fixed * logprob * advantage
  low, high = 1 - o.clip_epsilon, 1 + o.clip_epsilon
  clipped = np.where(fixed < low, low, np.where(fixed > high, high, ratio))
  # The smaller of the two.
  return np.where(fixed * advantage <= clipped.real * advantage, ratio, clipped) * advantage


def losses(o: Any, k: Known, student: np.ndarray) -> np.ndarray:
  """What each token adds to the loss, [B, T-1]; `student` are the log-prob rows as they are now."""
  coef, lam = distill_coef(o, k), o.extrapolation
  teacher = log_softmax(lam * k.teacher + (1 - lam) * k.reference)
  logprob = k.chosen(student)
  weights = reduction_weights(o, counted(o, k))
  out = np.zeros(k.mask.shape, student.dtype)
  advantage = np.full(k.mask.shape, o.likelihood_coef) + 0.0
  if o.reward_coef:
    advantage += o.reward_coef * reward_advantage(o, k)[:, None]
  distils = bool(o.distill_coef or o.final_distill_coef)
  signal = None
  if distils and o.route == 'policy_gradient':
    signal = distillation_advantage(o, k)
    if o.baseline == 'exact':
      mine = k.student if o.student_logprobs == 'rescored' else student.real
      signal = signal + (np.exp(mine) * (mine - teacher)).sum(-1)
  elif distils and o.support == 'sampled':
    out += coef * sampled(o.estimator, _extrapolated(o, k) - logprob)
  elif distils:
    out += coef * divergence(o, student, teacher)
  if distils and o.local.coef:
    gate = local_gate(o, k, signal)
    out += gate * coef * o.local.coef * divergence(o.local, student, teacher)
    if o.local.instead:
      signal = signal * ~gate
  if signal is not None:
    advantage += coef * signal
  if o.reference_coef:
    if o.reference_estimator == 'full':
      kl = (np.exp(student) * (student - k.reference)).sum(-1)
    else:
      kl = sampled(o.reference_estimator, k.chosen(k.reference) - logprob)
    out += o.reference_coef * kl
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
