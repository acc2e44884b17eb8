"""The loss that `objective.Objective` describes, token by token in NumPy and float64.

Written from the docstrings and the papers, in probabilities and with the formulas of each
divergence and of its derivative by hand, to share nothing with the package: it reads the texts of
the choices itself. `DEFINITIONS` has what there is of each field; a new choice needs its definition
there. `gradient` takes
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


def read(text: str) -> tuple[str, list, dict]:
  """(name, arguments, named arguments) of a choice."""
  name, _, inside = text.partition('(')
  args, named = eval(f'(lambda *a, **k: (a, k))({inside or ")"}')  # noqa: S307, the tests are ours
  return name, args, named


# --- divergences: D = sum_v p_S f(p_T / p_S), as (f, its derivative) ---


def _sign(x):
  return np.sign(np.real(x))


def _jensen_shannon(u, alpha):
  b = alpha
  m = b * u + 1 - b
  return b * u * np.log(u / m) - (1 - b) * np.log(m), b * np.log(u / m)


def _scaled_jensen_shannon(u, alpha):
  if alpha in (0.0, 1.0):
    return DIVERGENCES['reverse_kl' if alpha else 'forward_kl'](u)
  return tuple(x / (alpha * (1 - alpha)) for x in _jensen_shannon(u, alpha))


def _skew_kl(u, alpha):
  m = alpha * u + 1 - alpha
  return u * np.log(u / m), np.log(u / m) + 1 - alpha * u / m


def _skew_reverse_kl(u, alpha):
  m = (1 - alpha) * u + alpha
  return -np.log(m), -(1 - alpha) / m


def _alpha_divergence(u, alpha):
  a = alpha
  if a == 0.0:
    return -np.log(u) + u - 1, 1 - 1 / u
  if a == 1.0:
    return u * np.log(u) - u + 1, np.log(u)
  return (u**a - 1 - a * (u - 1)) / (a * (a - 1)), (u**(a - 1) - 1) / (a - 1)


DIVERGENCES = {
    'reverse_kl': lambda u: (-np.log(u), -1 / u),
    'forward_kl': lambda u: (u * np.log(u), np.log(u) + 1),
    'jensen_shannon': _jensen_shannon,
    'scaled_jensen_shannon': _scaled_jensen_shannon,
    'skew_kl': _skew_kl,
    'skew_reverse_kl': _skew_reverse_kl,
    'total_variation': lambda u: (_sign(u - 1) * (u - 1) / 2, _sign(u - 1) / 2),
    'alpha_divergence': _alpha_divergence,
    'squared_hellinger': lambda u: ((1 - u**0.5)**2, 1 - u**-0.5),
}


def generator(divergence: str, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(f(u), f'(u)) of a divergence with its parameter: 'skew_kl(0.1)'."""
  name, args, named = read(divergence)
  return DIVERGENCES[name](u, *args, **named)


def terms(divergence: str, s: np.ndarray, t: np.ndarray) -> np.ndarray:
  """p_S f(p_T / p_S), elementwise, of probabilities."""
  return s * generator(divergence, t / s)[0]


def weight(divergence: str, u: np.ndarray) -> np.ndarray:
  """w(u) - w(1), w = -f + u f'."""
  def w(u):
    f, slope = generator(divergence, u)
    return -f + u * slope

  return w(u) - w(np.ones_like(u))


def top(rows: np.ndarray, k: int) -> np.ndarray:
  """True at the k largest of each row."""
  order = np.argsort(-rows.real, axis=-1, kind='stable')[..., :k]
  member = np.zeros(rows.shape, bool)
  np.put_along_axis(member, order, True, axis=-1)
  return member


SUPPORTS = {
    'teacher_top_k': lambda s, t, k: top(t, k),
    'student_top_k': lambda s, t, k: top(s, k),
    'union_top_k': lambda s, t, k: top(t, k) | top(s, k),
    'full': lambda s, t: np.ones(s.shape, bool),
    'sampled': lambda s, t: np.ones(s.shape, bool),  # in expectation
}


def _support(k=None, tail='drop'):
  return ((k,) if k is not None else ()), tail


def divergence(o: Any, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
  """Of log-prob rows, over the support that an Objective or its Local names, [...]."""
  s, t = np.exp(student), np.exp(teacher)
  name, args, named = read(o.support)
  k, tail = _support(*args, **named)
  inside = SUPPORTS[name](s, t, *k)
  if tail == 'stop_gradient':
    return (inside * s * (student.real - teacher)).sum(-1)
  if tail == 'renormalize':
    s, t = (x / (inside * x).sum(-1, keepdims=True) for x in (s, t))
  out = (inside * terms(o.divergence, s, t)).sum(-1)
  if tail == 'bucket':
    # Sums of what is outside; where nothing is, both have the mass 0 and the term is 0.
    rest = [(~inside * x).sum(-1) + inside.all(-1) for x in (s, t)]
    out = out + ~inside.all(-1) * terms(o.divergence, *rest)
  return out


# What is differentiated at a sampled token (Schulman 2020).
ESTIMATORS = {'k2': lambda log_u: log_u**2 / 2, 'k3': lambda log_u: np.exp(log_u) - 1 - log_u}

# KL(p_S || p_ref) of (rows of p_S, rows of p_ref, log p_ref / p_S of the token), and its weight.
REFERENCES = {
    'full': lambda s, r, log_u, coef: coef * (np.exp(s) * (s - r)).sum(-1),
    'k2': lambda s, r, log_u, coef: coef * ESTIMATORS['k2'](log_u),
    'k3': lambda s, r, log_u, coef: coef * ESTIMATORS['k3'](log_u),
}


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


def _extrapolated(o, k):
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
  own, theirs = _own(o, k), _extrapolated(o, k)
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
    'exact': lambda values, k: 0.0,  # in `losses`, which has the rows of the vocabulary
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


def reduction_weights(o: Any, counts: np.ndarray) -> np.ndarray:
  """They sum to 1, or to 0 where no token counts."""
  if o.reduction == 'token_mean':
    return counts / max(counts.sum(), 1)
  rows = max(counts.any(axis=1).sum(), 1)
  return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) / rows


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


# --- the loss ---


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
    'divergence': DIVERGENCES, 'support': SUPPORTS, 'estimator': ESTIMATORS, 'anneal': SCHEDULES,
    'reference_kl': REFERENCES, 'signal': SIGNALS, 'shaping': SHAPINGS, 'returns': RETURNS,
    'baseline': BASELINES, 'reward_baseline': REWARD_BASELINES, 'importance': IMPORTANCE,
    'window': WINDOWS, 'row_gate': ROW_GATES, 'token_gate': TOKEN_GATES,
    'local.divergence': DIVERGENCES, 'local.support': SUPPORTS, 'local.gate': LOCAL_GATES}


def _surrogate(o, k, logprob, advantage):
  name, args, named = read(o.importance)
  ratio = np.exp(logprob - k.sampler_logprobs)
  moved = np.exp(logprob - (k.sampler_logprobs + k.policy_offset))
  return IMPORTANCE[name](logprob, ratio, moved, advantage, *args, **named)


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
  distils = bool(o.distill_coef) or o.anneal != 'none'
  signal = None
  if distils and o.route == 'policy_gradient':
    signal = distillation_advantage(o, k)
    if o.baseline == 'exact':
      mine = k.student if o.student_logprobs == 'rescored' else student.real
      signal = signal + (np.exp(mine) * (mine - teacher)).sum(-1)
  elif distils and o.support == 'sampled':
    out += coef * ESTIMATORS[o.estimator](_extrapolated(o, k) - logprob)
  elif distils:
    out += coef * divergence(o, student, teacher)
  if distils and o.local.coef:
    gate = local_gate(o, k, signal)
    out += gate * coef * o.local.coef * divergence(o.local, student, teacher)
    if o.local.instead:
      signal = signal * ~gate
  if signal is not None:
    advantage += coef * signal
  if o.reference_kl != 'none':
    name, args, named = read(o.reference_kl)
    out += REFERENCES[name](student, k.reference, k.chosen(k.reference) - logprob, *args, **named)
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
