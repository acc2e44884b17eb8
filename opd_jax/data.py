"""Prompts in a deterministic order, as left-padded batches.

What step s trains on is a function of (seed, s) alone: epoch e visits the examples in the order of
permutation (seed, e). The data position in a checkpoint is therefore the step, and every host
derives the same batch.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from opd_jax import tokenizer as tokenizer_lib
from opd_jax.types import Prompts, Rollout


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(size)


class Examples:
  """The examples of a split, encoded: prompts, and completions where the split has them."""

  def __init__(self, task: Any, dataset: Any, tokenizer: Any, *, max_prompt_tokens: int,
               max_new_tokens: int, seed: int):
    """Encodes everything, so that bad examples are found before training starts.

    Raises:
      ValueError: an empty split, or a prompt or completion longer than the room for it.
    """
    if not len(dataset):
      raise ValueError('the split has no examples; allowed: at least one')
    self.rows = dataset.to_list()
    self._seed, self._tokenizer = seed, tokenizer
    self._prompt_room, self._completion_room = max_prompt_tokens, max_new_tokens
    self._prompts = tokenizer_lib.encode(tokenizer, [task.prompt(r) for r in self.rows])
    self._check('data.max_prompt_tokens', self._prompts, max_prompt_tokens,
                lambda i: task.prompt(self.rows[i]))
    self._completions = None
    if 'completion' in dataset.column_names:
      texts = [r['completion'] for r in self.rows]
      eos = [tokenizer.eos_token_id]
      self._completions = [ids + eos for ids in tokenizer_lib.encode(tokenizer, texts)]
      self._check('data.max_new_tokens', self._completions, max_new_tokens, texts.__getitem__)

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def has_completions(self) -> bool:
    """Whether the split comes with completions, so that `given` works."""
    return self._completions is not None

  @staticmethod
  def _check(field, encoded, room, text):
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]))
    if len(encoded[longest]) > room:
      count = sum(len(ids) > room for ids in encoded)
      raise ValueError(
          f'{field}={room}: {count} of {len(encoded)} examples do not fit, the longest with '
          f'{len(encoded[longest])} tokens: {text(longest)!r}; allowed: at least '
          f'{len(encoded[longest])}')

  def indices(self, step: int, count: int) -> np.ndarray:
    """The examples of a step that takes `count` of them, int [count]."""
    places = np.arange(step * count, (step + 1) * count)
    return np.array([_order(self._seed, int(p // len(self)), len(self))[p % len(self)]
                     for p in places])

  def prompts(self, indices: np.ndarray) -> Prompts:
    """Left-padded prompts, NumPy arrays [B, P]."""
    tokens = np.full((len(indices), self._prompt_room), tokenizer_lib.pad_id(self._tokenizer),
                     np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, i in enumerate(indices):
      ids = self._prompts[i]
      tokens[row, self._prompt_room - len(ids):] = ids
      valid[row, self._prompt_room - len(ids):] = True
    return Prompts(tokens=tokens, valid=valid)

  def given(self, indices: np.ndarray) -> Rollout:
    """The split's own completions in the form of a rollout, NumPy arrays.

    Nobody sampled them, so the sampler's log-probs are zero: only an objective with
    importance='none' may be used.
    """
    if self._completions is None:
      raise ValueError("data.source='dataset' needs a split with completions; this one has columns "
                       f'{sorted(self.rows[0])}')
    prompts = self.prompts(indices)
    room = (len(indices), self._completion_room)
    tokens = np.full(room, tokenizer_lib.pad_id(self._tokenizer), np.int32)
    alive = np.zeros(room, bool)
    for row, i in enumerate(indices):
      ids = self._completions[i]
      tokens[row, :len(ids)] = ids
      alive[row, :len(ids)] = True
    mask = np.pad(alive.astype(np.float32), ((0, 0), (self._prompt_room - 1, 0)))
    return Rollout(tokens=np.concatenate([prompts.tokens, tokens], 1),
                   valid=np.concatenate([prompts.valid, alive], 1), mask=mask,
                   sampler_logprobs=np.zeros_like(mask), kept_logmass=np.zeros_like(mask),
                   ended=np.ones(len(indices), bool), prompt_length=self._prompt_room)


def completions(rollout: Rollout, tokenizer: Any) -> list[str]:
  """The text of each row's completion, without special tokens."""
  tokens = np.asarray(rollout.tokens)[:, rollout.prompt_length:]
  alive = np.asarray(rollout.valid)[:, rollout.prompt_length:]
  return tokenizer.batch_decode([t[a] for t, a in zip(tokens, alive, strict=True)],
                                skip_special_tokens=True)


def grade(task: Any, rows: list[dict[str, Any]], rollout: Rollout, tokenizer: Any
          ) -> tuple[np.ndarray, list[str]]:
  """The verifier's rewards, float32 [B], and the texts. A completion that ran out of room before
  its stop token has not answered and gets 0."""
  texts, ended = completions(rollout, tokenizer), np.asarray(rollout.ended)
  rewards = [task.grade(row, text) if end else 0.0
             for row, text, end in zip(rows, texts, ended, strict=True)]
  return np.array(rewards, np.float32), texts
