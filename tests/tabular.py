"""A language model that is a table, and small batches for it: what tests of the loss need of a
model, at a hundredth of a transformer's time to compile.

The hidden state at a position is the table's entry for (position, token read), and the head is a
matrix, so that the gradient reaches both as it does in a real model.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import itertools
import math
import typing

import jax.numpy as jnp
import numpy as np

from opd_jax.algorithm import choices
from opd_jax.algorithm.objective import Objective
from opd_jax.types import Batch, Head, Heads, Model, Params, Rollout, Scores


def model(vocab: int, max_len: int, width: int) -> Model:
  """Of `vocab` tokens, rows of at most `max_len`, and hidden states of a width."""
  def forward(params, tokens, positions, valid, cache):
    del valid
    return params['table'][positions, tokens], cache

  return Model(family='table', config=(vocab, max_len, width), vocab_in_use=vocab, specs={},
               forward=forward, head=lambda params: Head(params['head'], vocab), init_cache=None,
               unstack=None, to_hf=dict)


def random_params(of: Model, seed: int, dtype: jnp.dtype = jnp.float64) -> Params:
  """Next-token distributions that are neither flat nor one-hot."""
  vocab, max_len, width = of.config
  rng = np.random.RandomState(seed)
  return {'table': jnp.asarray(rng.standard_normal((max_len, vocab, width)), dtype),
          'head': jnp.asarray(1.5 * rng.standard_normal((width, vocab)) * width**-0.5, dtype)}


def moved(params: Params, seed: int, size: float) -> Params:
  """Other tables near those of `params`, with the same head."""
  rng = np.random.RandomState(seed)
  table = params['table']
  noise = jnp.asarray(size * rng.standard_normal(table.shape), table.dtype)
  return dict(params, table=table + noise)


def hidden(params: Params, rollout: Rollout) -> np.ndarray:
  """Of every prediction, [B, T-1, D]; in NumPy."""
  valid = np.asarray(rollout.valid)[:, :-1]
  positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
  return np.asarray(params['table'])[positions, np.asarray(rollout.tokens)[:, :-1]]


def logits(params: Params, rollout: Rollout) -> np.ndarray:
  """Of every prediction, [B, T-1, V]; in NumPy."""
  return hidden(params, rollout) @ np.asarray(params['head'])


def by_params(d_logits: np.ndarray, params: Params, rollout: Rollout) -> dict[str, np.ndarray]:
  """The gradient by the parameters from that by the logits, by the chain rule in NumPy."""
  valid = np.asarray(rollout.valid)[:, :-1]
  positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
  table = np.zeros(params['table'].shape)
  np.add.at(table, (positions, np.asarray(rollout.tokens)[:, :-1]),
            d_logits @ np.asarray(params['head']).T)
  return {'table': table,
          'head': np.einsum('btd,btv->dv', hidden(params, rollout), d_logits)}


@dataclasses.dataclass(frozen=True)
class Cast:
  """The models of a test. `before` is the student when it was scored; `params` are those it has."""

  model: Model
  params: Params
  before: Params
  teacher_params: Params
  reference_params: Params


def batch(o: Objective, cast: Cast, rollout: Rollout, rewards: np.ndarray,
          scorer: Callable[[float], Callable[[Params, Rollout], Scores]]) -> tuple[Batch, Heads]:
  """All that any objective asks of a batch. `scorer` gives the compiled scoring of a temperature,
  one program for all models, which have the same shape."""
  own, theirs = scorer(o.temperature), scorer(o.teacher_temperature)
  return Batch(
      rollout, teacher=theirs(cast.teacher_params, rollout), student=own(cast.before, rollout),
      reference=own(cast.reference_params, rollout),
      rewards=jnp.asarray(rewards, rollout.mask.dtype)), Heads(
          cast.model.head(cast.teacher_params), cast.model.head(cast.reference_params))


def examples(kind: choices.Kind) -> list[str]:
  """Every choice of a kind, its parameters somewhere within their bounds."""
  def values(hint):
    bounds = choices.bounds(hint)
    if bounds is None:
      return typing.get_args(hint)
    if typing.get_args(hint)[0] is int:
      return (round(bounds.low) + 2,)
    far = 0.3 if math.isinf(bounds.high) else 0.4 * (bounds.high - bounds.low)
    return (bounds.low + far,)

  out = []
  for name, function in kind.functions.items():
    hints = choices.parameters(function)
    for arguments in itertools.product(*map(values, hints.values())):
      inside = ', '.join(f'{k}={v!r}' for k, v in zip(hints, arguments, strict=True))
      out.append(f'{name}({inside})' if inside else name)
  return out
