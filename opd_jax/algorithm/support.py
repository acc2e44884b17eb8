"""From one term of a divergence to its sum over some tokens, and to its estimates from one token.

With D = sum_v p_S f(u), u = p_T / p_S, the gradient has three forms, which the oracle tests tie to
each other in float64 on an enumerable vocabulary:

  direct         differentiate the sum over the support;
  score function E_S[-w(u) grad log p_S], w(u) = -f(u) + u f'(u), the weight detached;
  k2, k3         differentiate a function of u at the sampled token (`choices/estimators.py`).
"""

from __future__ import annotations

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LARGEST = 30.0  # of an exponent; the square of its exp, summed over parameters, fits float32
_GONE = -1e30  # the log-prob of what is not in a support; finite, so that 0 * log 0 is 0

Term = Callable[[Array, Array], Array]  # (log p_S, log p_T) -> p_S f(u), elementwise


def from_generator(f: Callable[[Array], Array]) -> Term:
  """Makes the term p_S f(u) of any convex f with f(1) = 0, as a function of u = p_T / p_S.

  For trying one out: everything here takes a term. A divergence that stays gets a function in
  `divergences.py`, in a form that does not overflow where the student is sure and the teacher is
  not; here u is held within e^-80 and e^80.
  """
  return lambda student, teacher: jnp.exp(student) * f(
      jnp.exp(jnp.clip(teacher - student, -80.0, 80.0)))


def split_exponent(x: Float[Array, '...']) -> tuple[Float[Array, '...'], Float[Array, '...']]:
  """Splits an exponent x into a, which is at most 30, and b, so that exp(a) + b is exp(x) up to
  there and its tangent beyond, e^30 (1 + x - 30).

  exp(88) is infinite in float32, and so is the square of exp(44), which Adam keeps. A tangent,
  unlike a bound, still says in which direction to move. The ratio of a token that the student draws
  passes e^30 once in 1e13 draws (verl holds the log-ratio of its k3 within 20, and k3 within 10).
  """
  return jnp.minimum(x, LARGEST), math.exp(LARGEST) * jnp.maximum(x - LARGEST, 0.0)


def score_weight(f: Term, log_u: Float[Array, '...']) -> Float[Array, '...']:
  """Computes w(u) - w(1) for the score-function estimate -E_S[w grad log p_S] of the gradient of D.

  w(u) = -f(u) + u f'(u) (OPD+, 2026, arXiv 2606.01039), from the term itself: minus its derivative
  by p_S, which is of degree 0 and so may be taken at p_S = 1. (Taking f and u f' apart instead
  cancels: in float32 nothing is left of it at log u = 15.) The constant w(1) has no expectation;
  without it a student equal to its teacher gets a weight of zero. Reverse KL: log u. Forward KL:
  u - 1. The ratio is bounded as in `split_exponent`.
  """
  log_u = jnp.minimum(log_u, LARGEST)

  def weight(x):
    zeros, ones = jnp.zeros_like(x), jnp.ones_like(x)
    return -jax.jvp(lambda student: f(student, x), (zeros,), (ones,))[1]

  # A compiler may round the two differently, and Adam makes a full step of any difference.
  return jnp.where(log_u == 0.0, 0.0, weight(log_u) - weight(jnp.zeros_like(log_u)))


def extrapolate(teacher: Float[Array, 'n V'], reference: Float[Array, 'n W'] | None, scale: float
                ) -> Float[Array, 'n V']:
  """Computes log p_T^scale p_ref^(1 - scale), normalized: what ExOPD (2026, arXiv 2602.12125)
  distils.

  At scale 1 it is the teacher, at 0 the reference; above 1 it goes on in the same direction.
  """
  if scale == 1.0:
    return teacher
  width = min(teacher.shape[1], reference.shape[1])  # see score.same_width
  teacher, reference = teacher[:, :width], reference[:, :width]
  # Padding of the vocabulary is -1e30 on both sides: the difference is 0, not the sum of both.
  return jax.nn.log_softmax(teacher + (scale - 1.0) * (teacher - reference), axis=-1)


def top_k(x: Float[Array, 'n V'], k: int) -> tuple[Float[Array, 'n k'], Int[Array, 'n k']]:
  """Computes `jax.lax.top_k` in two steps, exactly: the k largest are within the k blocks of
  largest maxima.

  On CPUs top_k sorts the whole row, 25 ms of it at 151936 tokens; this sorts two rows of sqrt(k V).
  """
  width = x.shape[1]
  block = math.isqrt(width // k)
  if block < 4:
    return tuple(jax.lax.top_k(x, k))
  blocks = jnp.pad(x, ((0, 0), (0, -width % block)), constant_values=-jnp.inf)
  blocks = blocks.reshape(len(x), -1, block)
  chosen = jnp.sort(jax.lax.top_k(jnp.max(blocks, axis=2), k)[1], axis=1)  # in the order of tokens
  among = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(len(x), k * block)
  values, place = jax.lax.top_k(among, k)
  return values, jnp.take_along_axis(chosen, place // block, axis=1) * block + place % block


def spread_top(tokens: Int[Array, 'n k'], logprobs: Float[Array, 'n k'], rest: Float[Array, 'n'],
               width: int, vocab_in_use: int) -> Float[Array, 'n V']:
  """Makes log-probs over the vocabulary of the most likely tokens and the mass of the rest, which
  is spread evenly over the others: for what looks at those tokens and at that mass only."""
  each = rest - math.log(max(vocab_in_use - tokens.shape[1], 1))
  out = jnp.where(jnp.arange(width)[None] < vocab_in_use, each[:, None], _GONE)
  rows = jnp.broadcast_to(jnp.arange(len(tokens))[:, None], tokens.shape)
  return out.at[rows, tokens].set(logprobs)


def rest_of(logprobs: Float[Array, 'n V'], tokens: Int[Array, 'n K']) -> Float[Array, 'n']:
  """Computes the log of the mass of all other tokens; summed, since 1 - the rest would cancel."""
  rows = jnp.broadcast_to(jnp.arange(len(tokens))[:, None], tokens.shape)
  return jax.nn.logsumexp(logprobs.at[rows, tokens].set(_GONE), axis=-1)


def over_tokens(f: Term, student: Float[Array, 'n V'], teacher: Float[Array, 'n V'],
                tokens: Int[Array, 'n K'], tail: str, counts: Int[Array, 'n K'] | None = None
                ) -> Float[Array, 'n']:
  """Sums the divergence over some tokens, and does to the rest what `tail` says.

  'drop' leaves the rest out; 'renormalize' gives both models mass 1 on the support (LSM, 2026,
  arXiv 2603.25562); 'bucket' adds the rest of both as one more token (tail-aware top-k, 2026, arXiv
  2608.14728); 'stop_gradient' is sum_K p_S (sg(log p_S) - log p_T), whose gradient has no term that
  pushes mass out of the support (Many Faces of OPD, 2026, arXiv 2605.11182; reverse KL only). With
  k = V (bucket: k = V - 1) all of them are the divergence itself. `counts` is 0 for a token that is
  there twice.
  """
  counts = jnp.ones(tokens.shape, student.dtype) if counts is None else counts.astype(student.dtype)
  here = counts > 0
  mine, theirs = (jnp.where(here, jnp.take_along_axis(x, tokens, axis=1), _GONE)
                  for x in (student, teacher))
  if tail == 'stop_gradient':
    return jnp.sum(jnp.exp(mine) * (jax.lax.stop_gradient(mine) - theirs) * counts, axis=-1)
  if tail == 'renormalize':
    mine, theirs = (jax.nn.log_softmax(x, axis=-1) for x in (mine, theirs))
  elif tail == 'bucket':
    mine, theirs = (jnp.concatenate([x, rest_of(whole, tokens)[:, None]], axis=1)
                    for x, whole in ((mine, student), (theirs, teacher)))
  counted = mine > 0.5 * _GONE
  # Both log-probs of what does not count are replaced, or its gradient would be NaN times zero.
  mine, theirs = (jnp.where(counted, x, 0.0) for x in (mine, theirs))
  return jnp.sum(jnp.where(counted, f(mine, theirs), 0.0), axis=-1)
