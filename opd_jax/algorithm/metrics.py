"""What a step reports, beside the loss; and how far two models are apart."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.algorithm.objective import Objective
from opd_jax.algorithm.support import top_k
from opd_jax.types import Batch

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def batch_metrics(o: Objective, on_policy: bool, batch: Batch, aux: dict[str, Float[Array, 'B t']]
                  ) -> dict[str, Array]:
  """Takes token means over the mask (nats a token where it is a KL or an entropy).

  `divergence` is the one of the loss, over its support (with the exact baseline: over the full
  vocabulary). Tokens that a gate leaves out are in. On the student's own samples only:
  `reverse_kl`, the mean of log p_S - log p_T over the tokens drawn (an estimate of the reverse KL
  where they come from the student itself: not with top-p, top-k or a mixed-in teacher);
  `log_ratio_*`, quantiles of log p_T - log p_S and its means over correct and over wrong rows (NaN
  where there are none); `gap_*`, how far sampler and scorer are apart; `ratio_*`, the importance
  ratio; `clip_rate`, how often it was outside its bounds. `lengths` and `prompt_lengths` are int32
  [B].
  """
  rollout, mask = batch.rollout, batch.rollout.mask
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
  out |= {name: mean(aux[name]) for name in ('divergence', 'local', 'reference_kl') if name in aux}
  if batch.rewards is not None:
    out['reward'] = jnp.mean(batch.rewards)
  if o.needs_teacher:
    hidden = 'teacher_logprobs' in aux
    out['entropy_teacher'] = mean(aux['teacher_entropy'] if hidden else batch.teacher.entropy)
    if on_policy:
      theirs = aux['teacher_logprobs'] if hidden else batch.teacher.logprobs
      out['reverse_kl'] = mean(aux['logprobs'] - theirs)
      out |= _log_ratio_metrics(theirs - aux['logprobs'], mask, batch.rewards)
  if on_policy:
    out |= _ratio_metrics(o, rollout, aux, mean)
  return out


def _log_ratio_metrics(logratio, mask, rewards):
  values = jnp.nanquantile(jnp.where(mask > 0, logratio, jnp.nan),
                           jnp.array(QUANTILES, logratio.dtype))
  out = {f'log_ratio_p{round(100 * q):02d}': v
         for q, v in zip(QUANTILES, values, strict=True)}
  if rewards is not None:
    for name, rows in (('correct', rewards >= 1.0), ('wrong', rewards < 1.0)):
      among = mask * rows[:, None]
      out[f'log_ratio_{name}'] = jnp.sum(logratio * among) / jnp.sum(among)  # 0 / 0 is NaN
  return out


def _ratio_metrics(o, rollout, aux, mean):
  mask = rollout.mask
  gap = jnp.abs(aux['logprobs'] - (rollout.sampler_logprobs + rollout.policy_offset)) * mask
  ratio, chosen = jnp.exp(aux['logratio'] * mask), mask > 0
  # The smallest of no ratios at all would be infinite, which JSON cannot say: then it is 1.
  lowest = jnp.where(jnp.any(chosen), jnp.min(jnp.where(chosen, ratio, jnp.inf)), 1.0)
  out = {'gap_mean': mean(gap), 'gap_max': jnp.max(gap), 'ratio_mean': mean(ratio),
         'ratio_max': jnp.max(jnp.where(chosen, ratio, 0.0)), 'ratio_min': lowest}
  low, high = _bounds(o)
  if high is not None:
    out['clip_rate'] = mean(((ratio < low) | (ratio > high)).astype(jnp.float32))
  return out


def _bounds(o):
  """Between what the ratio of an importance weight is held; None, None where it is not."""
  arguments = o.choice('importance').arguments
  if 'epsilon' in arguments:
    return 1.0 - arguments['epsilon'], 1.0 + arguments['epsilon']
  return (arguments.get('low', 0.0), arguments['high']) if 'high' in arguments else (None, None)


def overlap(student: Float[Array, 'n V'], teacher: Float[Array, 'n V'], k: int
            ) -> dict[str, Float[Array, 'n']]:
  """Measures how far the k most likely tokens of two models are the same (log-probs in; see
  "Rethinking OPD", 2026, arXiv 2604.13016).

  overlap_count: the share of the student's k that are among the teacher's; overlap_mass: the
  student's mass on those; mass_outside: the student's mass on all that are not among the teacher's
  k. A token that ties with the last of the teacher's k is among them in the first two.
  """
  mine, tokens = top_k(student, k)
  theirs, best = top_k(teacher, k)
  shared = (jnp.take_along_axis(teacher, tokens, axis=1) >= theirs[:, -1:]).astype(student.dtype)
  inside = jnp.sum(jnp.exp(jnp.take_along_axis(student, best, axis=1)), axis=1)
  return {'overlap_count': jnp.mean(shared, axis=1),
          'overlap_mass': jnp.sum(jnp.exp(mine) * shared, axis=1),
          'mass_outside': jnp.maximum(1.0 - inside, 0.0)}
