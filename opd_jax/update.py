"""The objective and the gradient step.

One per-token loss covers on-policy distillation, reinforcement learning and supervised learning.
With w_t the reduction weights (they sum to 1), rho_t the importance ratio, A_t a detached weight:

  loss = sum_t w_t ( distill_coef * D(p_S, p_T)_t        direct route, over a support
                     - rho_t A_t )                       policy-gradient route

  A_t = distill_coef * w(p_T / p_S)(y_t)                 on-policy distillation, discounted; for the
                                                         reverse KL, w is log p_T - log p_S
      + reward_coef * (group-normalized verifier reward) GRPO
      + likelihood_coef                                  SFT: every given token is worth 1

So the four methods of the paper are one function with another source of tokens and another weight
per token.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from opd_jax import chunks, credit, estimators, lora
from opd_jax import score as score_lib
from opd_jax.objective import Objective
from opd_jax.types import Head, Model, Params, Rollout, Scores, TrainState


def loss_fn(params: Params, rollout: Rollout, weights: Float[Array, 'B t'],
            advantage: Float[Array, 'B t'], teacher_logprobs: Float[Array, 'B t'] | None,
            teacher_hidden: Float[Array, 'B C E'] | None,
            student_hidden: Float[Array, 'B C D'] | None, teacher_head: Head | None, *,
            model: Model, objective: Objective, chunk_tokens: int
            ) -> tuple[Array, dict[str, Float[Array, 'B t']]]:
  """The loss of some rows (its sum over microbatches is the loss of the batch), and per-token
  arrays [B, T-1] for the metrics.

  `student_hidden`, from the program that scored the teacher, is for the exact baseline, which is
  then exactly zero for a teacher equal to the student.
  """
  o = objective
  hidden = score_lib.completion_hidden(model, params, rollout)
  behaviour = rollout.sampler_logprobs
  if o.importance in ('two_sided', 'ppo_clip'):
    # How far the policy has moved, not what top-p cut away.
    behaviour = behaviour + rollout.kept_logmass
  per_token = (rollout.mask, weights, advantage, behaviour, teacher_logprobs)
  per_token = jax.tree.map(lambda a: a[:, rollout.prompt_length - 1:], per_token)
  total, out = chunks.sum_over_chunks(
      functools.partial(_chunk_loss, o), chunk_tokens, model.head(params), teacher_head, hidden,
      rollout.completion_targets, teacher_hidden if o.needs_hidden else None,
      student_hidden if o.needs_hidden else None, *per_token)
  return (total.astype(weights.dtype),
          {name: score_lib.to_rows(a, rollout) for name, a in out.items()})


def _chunk_loss(o, head, teacher_head, hidden, targets, teacher_hidden, student_hidden, mask,
                weights, advantage, behaviour, teacher_logprobs):
  """The part of the loss of each of n tokens, and what is reported of them."""
  stop = jax.lax.stop_gradient
  logprobs = score_lib.log_softmax(hidden, head, o.temperature)
  chosen = score_lib.pick(logprobs, targets)
  out = {'logprobs': chosen, 'entropy': score_lib.entropy_of(stop(logprobs))}
  if teacher_hidden is not None:
    teacher = score_lib.log_softmax(teacher_hidden, teacher_head, o.teacher_temperature)
    own = logprobs if student_hidden is None else stop(
        score_lib.log_softmax(student_hidden, head, o.temperature))
    out['divergence'] = _divergence(o, *score_lib.same_width(own, teacher))
    out['teacher_logprobs'] = score_lib.pick(teacher, targets)
    out['teacher_entropy'] = score_lib.entropy_of(teacher)

  # `weights` is zero wherever the mask is, so masked positions cannot reach the loss.
  loss = jnp.zeros_like(weights)
  if o.estimator != 'none':
    out['divergence'] = estimators.sampled_loss(o.estimator, (teacher_logprobs - chosen) * mask)
  if o.needs_teacher and o.route == 'direct':
    loss = loss + o.distill_coef * weights * out['divergence']
  if o.baseline == 'exact':
    # The mean of log p_T - log p_S over the student's next token is minus this.
    advantage = advantage + o.distill_coef * stop(out['divergence'])
  logratio = (chosen - behaviour) * mask
  if o.has_policy_gradient:
    loss = loss - weights * surrogate(o, chosen, logratio, advantage)
  return loss, {**out, 'logratio': logratio}


def surrogate(o: Objective, logprobs: Float[Array, '...'], logratio: Float[Array, '...'],
              advantage: Float[Array, '...']) -> Float[Array, '...']:
  """What is differentiated for the policy gradient: its gradient is rho A grad log p_S."""
  if o.importance == 'none':
    return logprobs * advantage
  ratio = jnp.exp(logratio)
  if o.importance == 'truncated':
    return jax.lax.stop_gradient(jnp.minimum(ratio, o.ratio_high)) * logprobs * advantage
  if o.importance == 'two_sided':
    inside = (ratio >= o.ratio_low) & (ratio <= o.ratio_high)
    # The ratio is replaced, not the product: the gradient of an infinite one would be NaN.
    return jax.lax.stop_gradient(jnp.where(inside, ratio, 0.0)) * logprobs * advantage
  if o.importance == 'ppo_clip':
    clipped = jnp.clip(ratio, 1.0 - o.clip_epsilon, 1.0 + o.clip_epsilon) * advantage
    return jnp.minimum(ratio * advantage, clipped)
  return ratio * advantage


def _divergence(o: Objective, student: Float[Array, 'n V'], teacher: Float[Array, 'n V']
                ) -> Float[Array, 'n']:
  if not o.support.endswith('top_k'):  # full, or the mean of the sampled signal
    return estimators.full(o.term, student, teacher)
  return estimators.on_support(o.term, student, teacher, support=o.support, top_k=o.top_k,
                               tail=o.tail)


def update_fn(state: TrainState, rollout: Rollout, teacher: Scores | None, student: Scores | None,
              rewards: Float[Array, 'B'] | None, teacher_head: Head | None,
              frozen: lora.Frozen | None = None, *, model: Model,
              optimizer: optax.GradientTransformation, objective: Objective, group_size: int,
              on_policy: bool, chunk_tokens: int, microbatch_rows: int
              ) -> tuple[TrainState, dict[str, Array]]:
  """One gradient step on `objective`, accumulated over microbatches.

  Args:
    state: donated by the caller's jit.
    rollout: B rows; rows of one prompt are neighbours (`group_size` of them).
    teacher: log-probs if `objective.needs_teacher_logprobs`, hidden states if
      `objective.needs_hidden`; None without a teacher.
    student: log p_S by the teacher's own scoring program, and the hidden states with
      `objective.baseline='exact'`; None unless `objective.needs_student_scores`.
    rewards: verifier rewards; None unless `objective.needs_rewards`.
    teacher_head: with the hidden states.
    frozen: what `state.params` are adapters on; None where the state holds the whole model. Not
      donated.
    model, optimizer, objective: static.
    group_size: samples per prompt.
    on_policy: the student itself wrote the rows, so that comparing it with the sampler means
      something.
    chunk_tokens: tokens whose vocabulary rows exist at a time.
    microbatch_rows: rows per forward and backward pass, 0 for all. The gradient is the full
      batch's whatever it is: weights are normalized over the global batch before the split.

  Returns:
    The next state and scalar metrics (see `batch_metrics`) with 'lengths', int32 [B], beside them.
  """
  counted = credit.gate(objective, rollout, teacher, student, rewards)
  weights = credit.reduction_weights(counted, objective.reduction)
  advantage = credit.token_weights(objective, rollout, teacher, student, rewards, group_size)
  hidden = teacher.hidden if objective.needs_hidden else None
  exact = objective.baseline == 'exact' and objective.student_logprobs == 'rescored'
  own_hidden = student.hidden if exact else None
  theirs = teacher.logprobs if objective.estimator != 'none' else None

  def loss(trained, *rows):
    return loss_fn(lora.join(frozen, trained), *rows, model=model, objective=objective,
                   chunk_tokens=chunk_tokens)

  grad_fn = jax.value_and_grad(loss, has_aux=True)

  def accumulate(carry, rows):
    (value, aux), grads = grad_fn(state.params, *rows, teacher_head)
    return jax.tree.map(jnp.add, carry, (value, grads)), aux

  split = score_lib.split_rows((rollout, weights, advantage, theirs, hidden, own_hidden),
                               microbatch_rows)
  zeros = (jnp.zeros((), weights.dtype), jax.tree.map(jnp.zeros_like, state.params))
  (total, grads), aux = jax.lax.scan(accumulate, zeros, split)
  aux = score_lib.join_rows(aux)

  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = batch_metrics(objective, on_policy, rollout, teacher, aux)
  if objective.gated:
    metrics['counted_rate'] = jnp.sum(counted) / jnp.maximum(jnp.sum(rollout.mask), 1.0)
  metrics |= {'loss': total, 'grad_norm': optax.tree.norm(grads),
              'update_norm': optax.tree.norm(updates)}
  if rewards is not None:
    metrics['reward'] = jnp.mean(rewards)
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


def reverse_kl_update(state: TrainState, rollout: Rollout, teacher: Scores, student: Scores | None,
                      teacher_head: Head | None = None, *, exact: bool,
                      **settings: Any) -> tuple[TrainState, dict[str, Array]]:
  """The paper's step: per-token reverse KL on the student's own samples.

  exact=False: importance-sampled policy gradient with advantage log p_T - log p_S, discount 0
  (Thinking Machines Lab 2025, "On-Policy Distillation"). exact=True: the gradient of
  sum_v p_S (log p_S - log p_T), which the former estimates from one sample.
  `settings` are those of `update_fn` other than the objective.
  """
  objective = (Objective(route='direct', support='full', importance='none') if exact
               else Objective())
  return update_fn(state, rollout, teacher, student, None, teacher_head, objective=objective,
                   group_size=1, on_policy=True, **settings)


def batch_metrics(o: Objective, on_policy: bool, rollout: Rollout, teacher: Scores | None,
                  aux: dict[str, Float[Array, 'B t']]) -> dict[str, Array]:
  """Token means over the mask (nats a token where it is a KL or an entropy).

  `divergence` is the one of the loss, over its support (with the exact baseline: over the full
  vocabulary). Tokens that a gate leaves out are in. On the student's own samples only:
  `reverse_kl`, the sample estimate log p_S - log p_T; `gap_*`, how far sampler and scorer are
  apart; `ratio_*`, the importance ratio. `lengths` and `prompt_lengths` are int32 [B].
  """
  mask = rollout.mask
  count = jnp.maximum(jnp.sum(mask), 1.0)

  def mean(x):
    return jnp.sum(x * mask) / count

  out = {
      'entropy_student': mean(aux['entropy']),
      'logprob': mean(aux['logprobs']),
      'truncation_rate': 1.0 - jnp.mean(rollout.ended.astype(jnp.float32)),
      'lengths': jnp.sum(mask, axis=1).astype(jnp.int32),
      'prompt_lengths': jnp.sum(rollout.valid[:, :rollout.prompt_length], axis=1),
  }
  if o.needs_teacher:
    exact = o.needs_hidden
    out['entropy_teacher'] = mean(aux['teacher_entropy'] if exact else teacher.entropy)
    if exact:
      out['divergence'] = mean(aux['divergence'])
    if on_policy:
      theirs = aux['teacher_logprobs'] if exact else teacher.logprobs
      out['reverse_kl'] = mean(aux['logprobs'] - theirs)
  if not on_policy:
    return out
  gap = jnp.abs(aux['logprobs'] - (rollout.sampler_logprobs + rollout.kept_logmass)) * mask
  ratio, chosen = jnp.exp(aux['logratio']), mask > 0
  # The smallest of no ratios at all would be infinite, which JSON cannot say: then it is 1.
  lowest = jnp.where(jnp.any(chosen), jnp.min(jnp.where(chosen, ratio, jnp.inf)), 1.0)
  out |= {'gap_mean': mean(gap), 'gap_max': jnp.max(gap), 'ratio_mean': mean(ratio),
          'ratio_max': jnp.max(jnp.where(chosen, ratio, 0.0)), 'ratio_min': lowest}
  if o.importance == 'ppo_clip':
    out['clip_rate'] = mean((jnp.abs(ratio - 1.0) > o.clip_epsilon).astype(jnp.float32))
  return out
