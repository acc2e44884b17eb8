"""What each token is worth: signal, shaping, return, baseline, and which tokens count at all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from opd_jax.algorithm import score as score_lib
from opd_jax.algorithm import support as support_lib
from opd_jax.algorithm import vocabulary
from opd_jax.algorithm.objective import Objective
from opd_jax.types import Batch, Head


def reduction_weights(mask: Float[Array, 'B t'], reduction: str) -> Float[Array, 'B t']:
  """w_t: the mask, scaled so that it sums to 1 over the global batch; 0 for an empty mask."""
  if reduction == 'token_mean':
    return mask / jnp.maximum(jnp.sum(mask), 1.0)
  per_row = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
  return per_row / jnp.maximum(jnp.sum(jnp.any(mask > 0, axis=1)), 1.0)


def discounted_return(rewards: Float[Array, 'B t'], discount: float) -> Float[Array, 'B t']:
  """G_t = sum_{k >= t} discount^(k - t) r_k along a row. Discount 0 returns `rewards` itself."""
  if discount == 0.0:
    return rewards

  def backwards(later, reward):
    total = reward + discount * later
    return total, total

  _, returns = jax.lax.scan(backwards, jnp.zeros_like(rewards[:, 0]), rewards.T, reverse=True)
  return returns.T


def credited(rewards: Float[Array, 'B t'], mask: Float[Array, 'B t'], discount: float, returns: str
             ) -> Float[Array, 'B t']:
  """The return of each token by `objective.returns`, of rewards that are zero where the mask is."""
  total = discounted_return(rewards, discount)
  if returns == 'inclusive':
    return total
  total = total - rewards
  if returns == 'later_mean':
    later = jnp.sum(mask, axis=1, keepdims=True) - jnp.cumsum(mask, axis=1)
    total = total / jnp.maximum(later, 1.0)
  return total


def group_advantage(rewards: Float[Array, 'B'], group_size: int, baseline: str
                    ) -> Float[Array, 'B']:
  """Rewards relative to the other samples of the same prompt (rows b // group_size).

  'group_mean_std' is GRPO's (r - mean) / (std + 1e-4) (Shao et al. 2024, arXiv 2402.03300, eq. 3,
  outcome supervision); 'group_mean' leaves out the division (Liu et al. 2025, Dr. GRPO).
  """
  groups = rewards.reshape(-1, group_size)
  if baseline != 'none':
    groups = groups - jnp.mean(groups, axis=1, keepdims=True)
  if baseline == 'group_mean_std':
    groups = groups / (jnp.std(groups, axis=1, keepdims=True) + 1e-4)
  return groups.reshape(-1)


def signal(o: Objective, own: Float[Array, 'B t'], theirs: Float[Array, 'B t']
           ) -> Float[Array, 'B t']:
  """What the teacher says of each sampled token, from the two log-probs of it: the score-function
  weight of the divergence, shaped (see `Objective`)."""
  if o.signal == 'fixed_negative':
    return -(theirs < own).astype(own.dtype)
  if o.shaping == 'power':
    return jnp.exp(o.shaping_scale * theirs) - jnp.exp(o.shaping_scale * own)
  raw = support_lib.score_weight(o.term, theirs - own)
  if o.shaping == 'clip':
    return jnp.clip(raw, -o.shaping_scale, o.shaping_scale)
  if o.shaping == 'log':
    return jnp.sign(raw) * jnp.log1p(jnp.abs(raw))
  return raw


def subtract_baseline(values: Float[Array, 'B t'], mask: Float[Array, 'B t'], baseline: str,
                      group_size: int) -> Float[Array, 'B t']:
  """Values less a mean that does not depend on the token itself.

  'batch_mean': over the batch's tokens (its own share in it biases by one part in the number of
  tokens). 'leave_one_out': over the tokens of the other samples of the same prompt, without bias
  (Kool et al. 2019, for rows). 'exact' is subtracted in the loss, which alone has the vocabulary.
  """
  if baseline == 'batch_mean':
    return values - jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)
  if baseline == 'leave_one_out':
    totals, counts = (jnp.sum(x, axis=1).reshape(-1, group_size) for x in (values * mask, mask))
    others, number = (jnp.sum(x, axis=1, keepdims=True) - x for x in (totals, counts))
    return values - (others / jnp.maximum(number, 1.0)).reshape(-1, 1)
  return values


def distill_coef(o: Objective, step: Array) -> Array | float:
  """The weight of distillation at a gradient step, annealed if `o` says so."""
  if not o.anneal_steps:
    return o.distill_coef
  return optax.linear_schedule(o.distill_coef, o.final_distill_coef, o.anneal_steps)(step)


def teacher_logprobs(o: Objective, batch: Batch) -> Float[Array, 'B t']:
  """The teacher's log-probs of the sampled tokens; extrapolated, up to a constant of the prefix."""
  theirs = batch.teacher.logprobs
  if o.extrapolation != 1.0:
    # Where teacher and reference agree it is the teacher's own, bit for bit.
    theirs = theirs + (o.extrapolation - 1.0) * (theirs - batch.reference.logprobs)
  return theirs


def student_logprobs(o: Objective, batch: Batch) -> Float[Array, 'B t']:
  """The student's log-probs of the sampled tokens, from where `o` says."""
  if o.student_logprobs == 'rescored':
    return batch.student.logprobs
  return batch.rollout.sampler_logprobs + batch.rollout.policy_offset


def raw_signal(o: Objective, batch: Batch) -> Float[Array, 'B t']:
  """`signal` of a batch, zero where the mask is."""
  return signal(o, student_logprobs(o, batch), teacher_logprobs(o, batch)) * batch.rollout.mask


def distillation_advantage(o: Objective, batch: Batch, group_size: int) -> Float[Array, 'B t']:
  """What the teacher's signals are worth to each token: detached, and zero where the mask is."""
  mask = batch.rollout.mask
  returns = credited(raw_signal(o, batch), mask, o.discount, o.returns)
  return jax.lax.stop_gradient(subtract_baseline(returns, mask, o.baseline, group_size) * mask)


def outcome_advantage(o: Objective, batch: Batch, group_size: int) -> Float[Array, 'B t']:
  """The part of A_t that is the same for every token of a row: verifier and likelihood."""
  mask = batch.rollout.mask
  total = o.likelihood_coef * mask
  if o.reward_coef:
    advantage = group_advantage(batch.rewards, group_size, o.reward_baseline)
    total += o.reward_coef * advantage[:, None] * mask
  return jax.lax.stop_gradient(total)


def gate(o: Objective, batch: Batch, teachability: Float[Array, 'B t'] | None = None
         ) -> Float[Array, 'B t']:
  """The mask of the tokens that count: those the student chose, less what the gates leave out."""
  mask, rewards = batch.rollout.mask, batch.rewards
  if o.window_tokens:
    place = jnp.cumsum(mask, axis=1) - 1.0
    inside = (place >= o.window_start) & (place < o.window_start + o.window_tokens)
    mask = mask * inside
  if o.row_gate == 'correct':
    mask = mask * (rewards >= 1.0)[:, None]
  elif o.row_gate == 'wrong':
    mask = mask * (rewards < 1.0)[:, None]
  elif o.row_gate == 'reward_agrees':
    lead = jnp.sum((batch.teacher.logprobs - batch.student.logprobs) * mask, axis=1)
    mask = mask * jnp.where(rewards >= 1.0, lead > 0.0, lead < 0.0)[:, None]
  elif o.row_gate == 'teacher_likelihood':
    count = jnp.sum(mask, axis=1)
    likelihood = jnp.sum(batch.teacher.logprobs * mask, axis=1) / jnp.maximum(count, 1.0)
    mask = mask * keep_highest(likelihood, count > 0, o.row_keep)[:, None]
  if o.token_gate != 'none':
    score = _gate_score(o, mask, batch) if teachability is None else teachability
    mask = mask * keep_highest(score, mask > 0, o.token_keep)
  return jax.lax.stop_gradient(mask)


def _gate_score(o, mask, batch):
  teacher, student = batch.teacher, batch.student

  def unit(x):  # to 0..1 over the tokens that count
    return x / jnp.maximum(jnp.max(x * mask), jnp.finfo(x.dtype).tiny)

  if o.token_gate == 'student_entropy':
    return student.entropy
  if o.token_gate == 'teacher_entropy':
    return teacher.entropy
  difference = jnp.abs(teacher.logprobs - student.logprobs)
  if o.token_gate == 'divergence':
    return difference
  return 1.0 - (1.0 - unit(student.entropy)) * (1.0 - unit(difference))


def teachability(o: Objective, batch: Batch, student_head: Head, teacher_head: Head,
                 chunk_tokens: int) -> Float[Array, 'B t']:
  """KL(p_S || p_T) times p_T's mass on the top k of p_S: where the two disagree and the student
  could follow. From the hidden states, in chunks."""
  def chunk(mine, theirs):
    own, other = score_lib.same_width(
        score_lib.log_softmax(mine, student_head, o.temperature),
        score_lib.log_softmax(theirs, teacher_head, o.teacher_temperature))
    top = support_lib.top_k(own, o.token_top_k)[1]
    reachable = jnp.sum(jnp.exp(jnp.take_along_axis(other, top, axis=1)), axis=1)
    return {'score': jnp.sum(jnp.exp(own) * (own - other), axis=1) * reachable}

  out = vocabulary.map_over_chunks(chunk, chunk_tokens, batch.student.hidden, batch.teacher.hidden)
  return score_lib.to_rows(out['score'], batch.rollout)


def local_gate(o: Objective, batch: Batch, advantage: Float[Array, 'B t'] | None,
               noise: Float[Array, 'B t'] | None) -> Float[Array, 'B t']:
  """1 where `objective.local` is, among the tokens of the mask; `noise` is uniform in 0..1."""
  mask, which = batch.rollout.mask, o.local.gate
  if which == 'teacher_entropy':
    mask = mask * (batch.teacher.entropy > o.local.entropy)
  elif which == 'untrusted':  # the signal as it is, whatever is done to it afterwards
    own = student_logprobs(o, batch)
    mask = mask * (noise >= jnp.exp(jnp.minimum(batch.teacher.logprobs - own, 0.0)))
  elif which == 'negative':
    mask = mask * (advantage <= 0.0)
  return jax.lax.stop_gradient(mask)


def keep_highest(score: Float[Array, '...'], among: Array, share: float) -> Float[Array, '...']:
  """1 for the ceil(share * n) entries of highest score of the n that are `among`; ties are kept."""
  flat = jnp.where(among, score, -jnp.inf).reshape(-1)
  # In float32, 0.6 * 25 is above 15: without the small factor one more would be kept.
  wanted = jnp.ceil(share * jnp.sum(among) * (1.0 - 1e-6)).astype(jnp.int32)
  threshold = -jnp.sort(-flat)[jnp.maximum(wanted - 1, 0)]
  return (among & (score >= threshold)).astype(score.dtype)
