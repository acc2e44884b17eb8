"""The oracle's divergences, supports and estimators, by hand and in probabilities.

A new one needs its definition here. (How and why: `oracle.py`.)
"""

from __future__ import annotations

from typing import Any

import numpy as np


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

# {field of an Objective (of its Local: with 'local.' in front): {name: definition}}
DEFINITIONS = {
    'divergence': DIVERGENCES, 'support': SUPPORTS, 'estimator': ESTIMATORS,
    'reference_kl': REFERENCES, 'local.divergence': DIVERGENCES, 'local.support': SUPPORTS}
