"""What each token is worth: signal, shaping, return, baseline, and which tokens count at all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax import estimators
from opd_jax.objective import Objective
from opd_jax.types import Rollout, Scores


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
  raw = estimators.score_weight(o.term, theirs - own)
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


def token_weights(o: Objective, rollout: Rollout, teacher: Scores | None, student: Scores | None,
                  rewards: Float[Array, 'B'] | None, group_size: int) -> Float[Array, 'B t']:
  """A_t of `update.py`: detached, and zero where the mask is."""
  mask = rollout.mask
  total = o.likelihood_coef * mask
  if o.needs_teacher and o.route == 'policy_gradient':
    if o.student_logprobs == 'rescored':
      own = student.logprobs
    else:
      own = rollout.sampler_logprobs + rollout.policy_offset
    returns = discounted_return(signal(o, own, teacher.logprobs) * mask, o.discount)
    total += o.distill_coef * subtract_baseline(returns, mask, o.baseline, group_size) * mask
  if o.reward_coef:
    advantage = group_advantage(rewards, group_size, o.reward_baseline)
    total += o.reward_coef * advantage[:, None] * mask
  return jax.lax.stop_gradient(total)


def gate(o: Objective, rollout: Rollout, teacher: Scores | None, student: Scores | None,
         rewards: Float[Array, 'B'] | None) -> Float[Array, 'B t']:
  """The mask of the tokens that count: those the student chose, less what the gates leave out."""
  mask = rollout.mask
  if o.window_tokens:
    place = jnp.cumsum(mask, axis=1) - 1.0
    inside = (place >= o.window_start) & (place < o.window_start + o.window_tokens)
    mask = mask * inside
  if o.row_gate == 'correct':
    mask = mask * (rewards >= 1.0)[:, None]
  elif o.row_gate == 'wrong':
    mask = mask * (rewards < 1.0)[:, None]
  elif o.row_gate == 'teacher_likelihood':
    count = jnp.sum(mask, axis=1)
    likelihood = jnp.sum(teacher.logprobs * mask, axis=1) / jnp.maximum(count, 1.0)
    mask = mask * keep_highest(likelihood, count > 0, o.row_keep)[:, None]
  if o.token_gate != 'none':
    mask = mask * keep_highest(_gate_score(o, mask, teacher, student), mask > 0, o.token_keep)
  return jax.lax.stop_gradient(mask)


def _gate_score(o, mask, teacher, student):
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


def keep_highest(score: Float[Array, '...'], among: Array, share: float) -> Float[Array, '...']:
  """1 for the ceil(share * n) entries of highest score of the n that are `among`; ties are kept."""
  flat = jnp.where(among, score, -jnp.inf).reshape(-1)
  wanted = jnp.ceil(share * jnp.sum(among)).astype(jnp.int32)
  threshold = -jnp.sort(-flat)[jnp.maximum(wanted - 1, 0)]
  return (among & (score >= threshold)).astype(score.dtype)
