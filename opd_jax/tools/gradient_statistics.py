"""What tells estimators and pairs of models apart: the statistics behind `opd diagnose`.

Of gradients only inner products are looked at. With R independent batches, a product of the
gradients of two different batches has no noise in its mean, so that averages over pairs r != s
estimate |E g|^2 and its like without bias, whatever the variance (a U-statistic); the diagonal has
the noise.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

LEVEL = 0.01  # of the test for a bias; with 8 batches, the least p that there is stands below it
_ROUNDING = 1e-3  # a smaller bias is no bias, however regular
_MOST_SIGNS = 2**13


def across(products: np.ndarray) -> float:
  """Averages [R, R] products over pairs of different batches."""
  count = len(products)
  return float((products.sum() - np.trace(products)) / (count * (count - 1)))


def gradient_statistics(own: np.ndarray, cross: np.ndarray, exact: np.ndarray
                        ) -> dict[str, float]:
  """Holds an estimator of a gradient against the exact one, from R batches of each.

  With g_r the estimator's gradient of batch r, x_r the exact one of the same tokens, and averages
  over pairs of different batches in place of squares of means (see the top of this file):

    bias      |E g - E x| / |E x|, from the differences d_r = g_r - x_r
    noise     what |mean_r d_r| / |E x| would be without any bias, sqrt(tr Cov(d) / R) / |E x|
    bias_p    by `sign_flip_p` of the products of d; `biased` if that is at most LEVEL
    cosine    of E g and E x
    variance  E |g - E g|^2 / |E x|^2
    snr       |E g|^2 / E |g - E g|^2
    cosine_of_one  E cos(g_r, E x), each against the exact gradient of the other batches

  Where the exact gradient is not above its own noise, all are NaN (and `biased` False).

  Args:
    own: [R, R], g_r . g_s.
    cross: [R, R], g_r . x_s.
    exact: [R, R], x_r . x_s.
  """
  own, cross, exact = (np.asarray(a, np.float64) for a in (own, cross, exact))
  count, size = len(own), across(exact)
  names = ('bias', 'noise', 'bias_p', 'cosine', 'variance', 'snr', 'cosine_of_one')
  if size <= 0.0:
    return {**dict.fromkeys(names, math.nan), 'biased': False}
  difference = own - cross - cross.T + exact
  of_mean, apart = across(own), across(difference)
  variance = float(np.mean(np.diag(own))) - of_mean
  bias = math.sqrt(max(apart, 0.0) / size)
  noise = math.sqrt(max(float(np.mean(np.diag(difference))) - apart, 0.0) / count / size)
  p = sign_flip_p(difference)
  others = (cross.sum(axis=1) - np.diag(cross)) / (count - 1)  # g_r . mean of the other x
  length = np.sqrt(np.diag(own))
  single = np.divide(others, length, out=np.zeros(count), where=length > 0)
  return {
      'bias': bias, 'noise': noise, 'bias_p': p, 'biased': p <= LEVEL and bias > _ROUNDING,
      'cosine': (float(np.clip(across(cross) / math.sqrt(of_mean * size), -1.0, 1.0))
                 if of_mean > 0.0 else math.nan),
      'variance': variance / size,
      'snr': of_mean / variance if variance > 0.0 else math.inf,
      'cosine_of_one': float(single.mean()) / math.sqrt(size)}


def sign_flip_p(products: np.ndarray) -> float:
  """Estimates the probability of a sum of vectors as long as this one, if their mean were zero.

  Then each vector might as well have had the other sign: the share of all choices of signs whose
  sum is at least as long. Exact for vectors with a symmetric distribution, in any dimension; at
  least 2^(1-R).

  Args:
    products: [R, R], the inner products of the vectors.
  """
  count = len(products)
  if 2**(count - 1) <= _MOST_SIGNS:
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=count - 1)))
  else:  # a fixed draw, and the signs as they are
    signs = np.random.default_rng(0).choice((1.0, -1.0), (_MOST_SIGNS, count - 1))
    signs[0] = 1.0
  signs = np.concatenate([np.ones((len(signs), 1)), signs], axis=1)  # a common sign is no choice
  lengths = ((signs @ products) * signs).sum(axis=1)
  # Sums that are equal but for rounding count as equal.
  return float(np.mean(lengths >= lengths[0] - 1e-9 * np.abs(products).sum()))


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
  """Computes the probability that a positive has a higher score than a negative, ties counted half.

  NaN where one of the two kinds is missing.
  """
  positive = np.asarray(positive, bool)
  high, low = np.asarray(scores)[positive], np.sort(np.asarray(scores)[~positive])
  if not len(high) or not len(low):
    return math.nan
  below, up_to = (np.searchsorted(low, high, side) for side in ('left', 'right'))
  return float((below + up_to).mean() / 2 / len(low))


def places(mask: np.ndarray) -> dict[str, np.ndarray]:
  """Marks parts of completions, by masks [B, T-1] of their own: all, the first token, and four
  quarters of each row (token i of n is in quarter floor(4 i / n))."""
  chosen = np.asarray(mask) > 0
  index = np.cumsum(chosen, axis=1) - 1
  length = np.maximum(chosen.sum(axis=1, keepdims=True), 1)
  out = {'all': chosen, 'first token': chosen & (index == 0)}
  for quarter in range(4):
    out[f'quarter {quarter + 1}'] = chosen & (4 * index // length == quarter)
  return out
