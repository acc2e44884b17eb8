"""The objective and the gradient step.

One per-token loss covers on-policy distillation, reinforcement learning and supervised learning.
With w_t the reduction weights (they sum to 1), rho_t the importance ratio, A_t a detached weight:

  loss = sum_t w_t ( distill_coef * D(p_S, p_T)_t        direct route, full vocabulary
                     - rho_t A_t )                       policy-gradient route

  A_t = distill_coef * (log p_T - log p_S)(y_t)          on-policy distillation, discounted
      + reward_coef * (group-normalized verifier reward) GRPO
      + likelihood_coef                                  SFT: every given token is worth 1

So the four methods of the paper are one function with another source of tokens and another weight
per token.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from opd_jax import divergences, lora
from opd_jax import score as score_lib
from opd_jax.types import Head, Model, Params, Rollout, Scores, TrainState

ROUTES = ('policy_gradient', 'direct')
SUPPORTS = ('sampled', 'full')
BASELINES = ('none', 'group_mean', 'group_mean_std')
IMPORTANCE = ('none', 'ratio', 'ppo_clip')
REDUCTIONS = ('token_mean', 'sequence_mean')
STUDENT_LOGPROBS = ('rescored', 'sampler')


@dataclasses.dataclass(frozen=True)
class Objective:
  """What the student is trained towards. `check_objective` refuses what makes no sense.

  Attributes:
    route: 'policy_gradient' (score function, detached advantage) or 'direct' (differentiate the
      divergence through the student's log-probs); of the distillation term.
    divergence: name of a function in `divergences.py`.
    support: 'sampled' (the token the student drew) or 'full' (exact, the whole vocabulary).
    distill_coef, reward_coef, likelihood_coef: the three weights in the module docstring.
    discount: gamma of the return of per-token distillation rewards. 0 is the paper's choice: each
      token answers for itself only; 1 is the gradient of the sequence-level KL.
    reward_baseline: subtracted from a row's reward: nothing, the mean of its group, or the mean
      and then a division by the group's standard deviation (GRPO, Shao et al. 2024); 'none' without
      a reward.
    importance: rho = 1 with log p in its place ('none'), p_S / p_sampler ('ratio'), or PPO's
      pessimistic clip ('ppo_clip', against the sampler's policy before top-p and top-k).
    clip_epsilon: of 'ppo_clip'; 0 without it.
    reduction: 'token_mean' over the global batch, or 'sequence_mean' (rows weigh the same).
    student_logprobs: where log p_S in the advantage comes from: 'rescored' by the program that
      scored the teacher (self-distillation is then an exact fixed point; one more forward pass),
      or the 'sampler' (free; off by its rounding).
    temperature: of the student's distribution; the loop sets it to the sampler's.
    teacher_temperature: of the teacher's distribution (for a teacher equal to the student to be a
      fixed point, the two must be equal).
  """

  route: str = 'policy_gradient'
  divergence: str = 'reverse_kl'
  support: str = 'sampled'
  distill_coef: float = 1.0
  reward_coef: float = 0.0
  likelihood_coef: float = 0.0
  discount: float = 0.0
  reward_baseline: str = 'none'
  importance: str = 'ratio'
  clip_epsilon: float = 0.0
  reduction: str = 'token_mean'
  student_logprobs: str = 'rescored'
  temperature: float = 1.0
  teacher_temperature: float = 1.0

  @property
  def needs_teacher(self) -> bool:
    return self.distill_coef != 0.0

  @property
  def needs_hidden(self) -> bool:
    return self.needs_teacher and self.support == 'full'

  @property
  def has_policy_gradient(self) -> bool:
    """Whether any term of the loss goes through A_t."""
    distil = self.needs_teacher and self.route == 'policy_gradient'
    return distil or self.reward_coef != 0.0 or self.likelihood_coef != 0.0

  @property
  def needs_student_scores(self) -> bool:
    return (self.needs_teacher and self.route == 'policy_gradient'
            and self.student_logprobs == 'rescored')


def names_of_divergences() -> list[str]:
  """What `objective.divergence` may be."""
  return sorted(name for name, f in vars(divergences).items()
                if getattr(f, '__module__', '') == divergences.__name__ and name[0] != '_')


def check_objective(o: Objective) -> None:
  """Refuses unknown names and combinations that cannot mean what they say.

  Raises:
    ValueError: names the field, the value, what is allowed, and why.
  """
  for name, allowed in (('route', ROUTES), ('support', SUPPORTS), ('importance', IMPORTANCE),
                        ('reward_baseline', BASELINES), ('reduction', REDUCTIONS),
                        ('student_logprobs', STUDENT_LOGPROBS),
                        ('divergence', names_of_divergences())):
    if getattr(o, name) not in allowed:
      raise ValueError(f'objective.{name}={getattr(o, name)!r}; allowed: {list(allowed)}')
  if not 0.0 <= o.discount <= 1.0:
    raise ValueError(f'objective.discount={o.discount}; allowed: 0 to 1')
  for name in ('temperature', 'teacher_temperature'):
    if not 0.0 < getattr(o, name) < math.inf:  # NaN is neither
      raise ValueError(f'objective.{name}={getattr(o, name)}; allowed: above 0 (at 0 the '
                       'distribution is a point mass and has no KL divergence), and finite')
  if not 0.0 <= o.clip_epsilon < math.inf or (o.clip_epsilon > 0.0) != (o.importance == 'ppo_clip'):
    raise ValueError(f'objective.clip_epsilon={o.clip_epsilon} with objective.importance='
                     f"{o.importance!r}; allowed: above 0 with 'ppo_clip', 0 without")
  for name in ('distill_coef', 'reward_coef', 'likelihood_coef'):
    if not 0.0 <= getattr(o, name) < math.inf:
      raise ValueError(f'objective.{name}={getattr(o, name)}; allowed: at least 0, and finite')
  if not (o.distill_coef or o.reward_coef or o.likelihood_coef):
    raise ValueError('objective.distill_coef, reward_coef and likelihood_coef are all 0: there is '
                     'nothing to train towards; allowed: at least one other than 0')
  if o.reward_baseline != 'none' and not o.reward_coef:
    raise ValueError(f'objective.reward_baseline={o.reward_baseline!r} has no effect with '
                     "objective.reward_coef=0; allowed: 'none'")
  if o.needs_teacher:
    _check_distillation(o)
    return
  for name in ('route', 'divergence', 'support', 'discount', 'teacher_temperature'):
    value, default = getattr(o, name), getattr(Objective, name)
    if value != default:
      raise ValueError(f'objective.{name}={value!r} has no effect with objective.distill_coef=0; '
                       f'allowed: {default!r}')


def _check_distillation(o: Objective) -> None:
  if o.route == 'direct' and o.support == 'sampled':
    raise ValueError(
        "objective.route='direct' with objective.support='sampled': differentiating "
        'log p_S - log p_T at the sampled token has expectation zero, so nothing would be learned; '
        "allowed: route='policy_gradient', or support='full'")
  if o.route == 'policy_gradient' and o.support == 'full':
    raise ValueError(
        "objective.route='policy_gradient' with objective.support='full': a full-vocabulary "
        'divergence used as a scalar advantage names no direction to move in; '
        "allowed: route='direct', or support='sampled'")
  if o.route == 'policy_gradient' and o.divergence != 'reverse_kl':
    raise ValueError(
        f'objective.divergence={o.divergence!r} with route=\'policy_gradient\': only reverse_kl '
        "has log p_T - log p_S as its score-function weight; allowed: 'reverse_kl', or "
        "route='direct' with support='full'")
  if o.route == 'direct' and o.discount:
    raise ValueError(
        f"objective.discount={o.discount} has no effect with route='direct', which has no "
        "return; allowed: 0, or route='policy_gradient'")
  if o.importance != 'none' and not o.has_policy_gradient:
    raise ValueError(f'objective.importance={o.importance!r} has no effect: no term of the loss is '
                     "a policy gradient; allowed: 'none'")


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


def token_weights(o: Objective, rollout: Rollout, teacher: Scores | None, student: Scores | None,
                  rewards: Float[Array, 'B'] | None, group_size: int) -> Float[Array, 'B t']:
  """A_t of the module docstring: detached, and zero where the mask is."""
  mask = rollout.mask
  total = o.likelihood_coef * mask
  if o.needs_teacher and o.route == 'policy_gradient':
    if student is not None:
      own = student.logprobs
    else:
      own = rollout.sampler_logprobs + rollout.kept_logmass
    reward = (teacher.logprobs - own) * mask
    total = total + o.distill_coef * discounted_return(reward, o.discount) * mask
  if o.reward_coef:
    advantage = group_advantage(rewards, group_size, o.reward_baseline)
    total = total + o.reward_coef * advantage[:, None] * mask
  return jax.lax.stop_gradient(total)


def loss_fn(params: Params, rollout: Rollout, weights: Float[Array, 'B t'],
            advantage: Float[Array, 'B t'], teacher_hidden: Float[Array, 'B C E'] | None,
            teacher_head: Head | None, *, model: Model, objective: Objective,
            chunk_tokens: int) -> tuple[Array, dict[str, Float[Array, 'B t']]]:
  """The loss of some rows (its sum over microbatches is the loss of the batch), and per-token
  arrays [B, T-1] for the metrics."""
  o = objective
  hidden = score_lib.completion_hidden(model, params, rollout)
  head = model.head(params)
  divergence = getattr(divergences, o.divergence)

  def chunk(hidden, targets, teacher_hidden=None):
    logprobs = score_lib.log_softmax(hidden, head, o.temperature)
    out = {'logprobs': score_lib.pick(logprobs, targets),
           'entropy': jax.lax.stop_gradient(score_lib.entropy_of(logprobs))}
    if teacher_hidden is not None:
      teacher = jax.lax.stop_gradient(
          score_lib.log_softmax(teacher_hidden, teacher_head, o.teacher_temperature))
      out['divergence'] = divergence(*score_lib.same_width(logprobs, teacher))
      out['teacher_logprobs'] = score_lib.pick(teacher, targets)
      out['teacher_entropy'] = score_lib.entropy_of(teacher)
    return out

  arrays = [hidden, rollout.completion_targets]
  if o.needs_hidden:
    arrays.append(teacher_hidden)
  out = score_lib.map_token_chunks(chunk, chunk_tokens, *arrays)
  out = {name: score_lib.to_rows(a, rollout) for name, a in out.items()}

  # `weights` is zero exactly where the mask is, so masked positions cannot reach the loss.
  loss = jnp.zeros((), weights.dtype)
  if o.needs_hidden:
    loss = loss + o.distill_coef * jnp.sum(weights * out['divergence'])
  behaviour = rollout.sampler_logprobs
  if o.importance == 'ppo_clip':  # how far the policy has moved, not what top-p cut away
    behaviour = behaviour + rollout.kept_logmass
  logratio = (out['logprobs'] - behaviour) * rollout.mask
  if o.importance == 'none':
    surrogate = out['logprobs'] * advantage
  else:
    ratio = jnp.exp(logratio)
    surrogate = ratio * advantage
    if o.importance == 'ppo_clip':
      clipped = jnp.clip(ratio, 1.0 - o.clip_epsilon, 1.0 + o.clip_epsilon) * advantage
      surrogate = jnp.minimum(surrogate, clipped)
  if o.has_policy_gradient:
    loss = loss - jnp.sum(weights * surrogate)
  return loss, {**jax.lax.stop_gradient(out), 'logratio': jax.lax.stop_gradient(logratio)}


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
    teacher: logprobs for support 'sampled', hidden states for 'full'; None without a teacher.
    student: log p_S by the teacher's own scoring program; None unless
      `objective.needs_student_scores`.
    rewards: verifier rewards; None unless `objective.reward_coef`.
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
  weights = reduction_weights(rollout.mask, objective.reduction)
  advantage = token_weights(objective, rollout, teacher, student, rewards, group_size)
  hidden = teacher.hidden if objective.needs_hidden else None

  def loss(trained, *rows):
    return loss_fn(lora.join(frozen, trained), *rows, model=model, objective=objective,
                   chunk_tokens=chunk_tokens)

  grad_fn = jax.value_and_grad(loss, has_aux=True)

  def accumulate(carry, rows):
    (value, aux), grads = grad_fn(state.params, *rows, teacher_head)
    return jax.tree.map(jnp.add, carry, (value, grads)), aux

  split = score_lib.split_rows((rollout, weights, advantage, hidden), microbatch_rows)
  zeros = (jnp.zeros((), weights.dtype), jax.tree.map(jnp.zeros_like, state.params))
  (total, grads), aux = jax.lax.scan(accumulate, zeros, split)
  aux = score_lib.join_rows(aux)

  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = batch_metrics(objective, on_policy, rollout, teacher, aux)
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

  `divergence` is exact, over the full vocabulary. On the student's own samples only: `reverse_kl`,
  the sample estimate log p_S - log p_T; `gap_*`, how far sampler and scorer are apart; `ratio_*`,
  the importance ratio. `lengths` and `prompt_lengths` are int32 [B].
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
