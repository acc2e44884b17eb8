"""What each token is worth, and which tokens count at all: an objective's choices, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.algorithm import score as score_lib
from opd_jax.algorithm import support as support_lib
from opd_jax.algorithm import vocabulary
from opd_jax.algorithm.objective import Objective
from opd_jax.models import layout
from opd_jax.types import Batch, Head


def reduction_weights(mask: Float[Array, 'B t'], reduction: str) -> Float[Array, 'B t']:
  """Computes w_t: the mask, scaled to sum to 1 over the global batch; 0 for an empty mask."""
  if reduction == 'token_mean':
    return mask / jnp.maximum(jnp.sum(mask), 1.0)
  per_row = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
  return per_row / jnp.maximum(jnp.sum(jnp.any(mask > 0, axis=1)), 1.0)


def discounted_return(rewards: Float[Array, 'B t'], discount: float) -> Float[Array, 'B t']:
  """Computes G_t = sum_{k >= t} discount^(k - t) r_k along a row; discount 0: `rewards`."""
  if discount == 0.0:
    return rewards

  def backwards(later, reward):
    total = reward + discount * later
    return total, total

  _, returns = jax.lax.scan(backwards, jnp.zeros_like(rewards[:, 0]), rewards.T, reverse=True)
  return returns.T


def group_advantage(o: Objective, rewards: Float[Array, 'B'], group_size: int
                    ) -> Float[Array, 'B']:
  """Compares rewards with the other samples of the same prompt (rows b // group_size)."""
  groups, baseline = rewards.reshape(-1, group_size), o.choice('reward_baseline')
  return (baseline(dict(rewards=groups)) if baseline else groups).reshape(-1)


def signal(o: Objective, own: Float[Array, 'B t'], theirs: Float[Array, 'B t']
           ) -> Float[Array, 'B t']:
  """Computes what the teacher says of each sampled token, from the two log-probs of it: the
  score-function weight of the divergence, shaped (see `Objective`)."""
  said, shaping, known = o.choice('signal'), o.choice('shaping'), dict(own=own, theirs=theirs)
  if 'weight' in said.inputs:
    if not shaping or 'signal' in shaping.inputs:
      known['signal'] = support_lib.score_weight(o.term, theirs - own)
    known['weight'] = shaping(known) if shaping else known['signal']
  return said(known)


def distill_coef(o: Objective, step: Array) -> Array | float:
  """Computes the weight of distillation at a gradient step, annealed if `o` says so."""
  anneal = o.choice('anneal')
  return anneal(dict(coef=o.distill_coef, step=step)) if anneal else o.distill_coef


def teacher_logprobs(o: Objective, batch: Batch) -> Float[Array, 'B t']:
  """Takes the teacher's log-probs of the sampled tokens; extrapolated, up to a constant of the
  prefix."""
  theirs = batch.teacher.logprobs
  if o.extrapolation != 1.0:
    # Where teacher and reference agree it is the teacher's own, bit for bit.
    theirs = theirs + (o.extrapolation - 1.0) * (theirs - batch.reference.logprobs)
  return theirs


def student_logprobs(o: Objective, batch: Batch) -> Float[Array, 'B t']:
  """Takes the student's log-probs of the sampled tokens, from where `o` says."""
  if o.student_logprobs == 'rescored':
    return batch.student.logprobs
  return batch.rollout.sampler_logprobs + batch.rollout.policy_offset


def raw_signal(o: Objective, batch: Batch) -> Float[Array, 'B t']:
  """Computes `signal` of a batch, zero where the mask is."""
  return signal(o, student_logprobs(o, batch), teacher_logprobs(o, batch)) * batch.rollout.mask


def distillation_advantage(o: Objective, batch: Batch, group_size: int) -> Float[Array, 'B t']:
  """Computes what the teacher's signals are worth to each token: detached, and zero where the mask
  is.

  The exact baseline is subtracted in the loss.
  """
  mask, said = batch.rollout.mask, raw_signal(o, batch)
  values = o.choice('returns')(dict(total=discounted_return(said, o.discount), signal=said,
                                    mask=mask))
  if o.baseline != 'none' and not o.exact_baseline:
    values = o.choice('baseline')(dict(values=values, mask=mask, group_size=group_size))
  return jax.lax.stop_gradient(values * mask)


def outcome_advantage(o: Objective, batch: Batch, group_size: int) -> Float[Array, 'B t']:
  """Computes the part of A_t that is the same for every token of a row: verifier and likelihood."""
  mask = batch.rollout.mask
  total = o.likelihood_coef * mask
  if o.reward_coef:
    advantage = group_advantage(o, batch.rewards, group_size)
    total += o.reward_coef * advantage[:, None] * mask
  return jax.lax.stop_gradient(total)


def gate(o: Objective, batch: Batch, over_vocabulary: Callable[..., Array] | None = None
         ) -> Float[Array, 'B t']:
  """Marks the tokens that count: those the student chose, less what the gates leave out."""
  mask, known = batch.rollout.mask, _known(batch) | {'over_vocabulary': over_vocabulary}
  for field in ('window', 'row_gate', 'token_gate'):
    if choice := o.choice(field):
      mask = choice(known | {'mask': mask})
  return jax.lax.stop_gradient(mask)


def local_gate(o: Objective, batch: Batch, known: Mapping[str, Any]) -> Float[Array, 'B t']:
  """Marks the tokens where `objective.local` is, among those of the mask.

  Args:
    o: the objective.
    batch: what it asks for.
    known: of the inputs of the gate, those that are not of a batch: 'advantage', 'noise',
      'over_vocabulary'.
  """
  mask, choice = batch.rollout.mask, o.local.choice('gate')
  if choice:
    own = student_logprobs(o, batch) if 'own_logprobs' in choice.inputs else None
    mask = choice(_known(batch) | {'mask': mask, 'own_logprobs': own} | known)
  return jax.lax.stop_gradient(mask)


def _known(batch):
  """What gates take of a batch, by name; None where an objective asks for less."""
  return {'rewards': batch.rewards} | {
      f'{model}_{what}': getattr(getattr(batch, model), what, None)
      for model in ('student', 'teacher') for what in ('logprobs', 'entropy')}


def over_vocabulary(o: Objective, batch: Batch, student_head: Head | None,
                    teacher_head: Head | None, chunk_tokens: int) -> Callable[..., Array]:
  """Makes what a gate sees the vocabulary through: from a function of log-probs over it, those of
  the student and of the teacher [n, V], to its value [n] at every token [B, T-1].

  From the hidden states, in chunks.
  """
  def over(f):
    heads = layout.whole_head((student_head, teacher_head), batch.student.hidden.dtype)

    def chunk(mine, theirs):
      return {'value': f(*score_lib.same_width(
          score_lib.log_softmax(mine, heads[0], o.temperature),
          score_lib.log_softmax(theirs, heads[1], o.teacher_temperature)))}

    out = vocabulary.map_over_chunks(
        chunk, chunk_tokens, batch.student.hidden, batch.teacher.hidden)
    return score_lib.to_rows(out['value'], batch.rollout)

  return over
