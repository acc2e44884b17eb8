"""The objective and the gradient step.

One per-token loss covers on-policy distillation, reinforcement learning and supervised learning.
With w_t the reduction weights (they sum to 1), rho_t the importance ratio, A_t a detached weight:

  loss = sum_t w_t ( distill_coef * D(p_S, p_T)_t               direct route, over a support
                     + distill_coef * local.coef * g_t D'_t     the local term, where its gate is 1
                     + kappa * KL(p_S || p_ref)_t               reference_kl, which has kappa
                     - rho_t A_t )                              policy-gradient route

  A_t = distill_coef * w(p_T / p_S)(y_t)                 on-policy distillation, discounted; for the
                                                         reverse KL, w is log p_T - log p_S
      + reward_coef * (group-normalized verifier reward) GRPO
      + likelihood_coef                                  SFT: every given token is worth 1

So the four methods of the paper are one function with another source of tokens and another weight
per token. Rows that somebody else wrote may come beside the student's, with an objective of their
own: the two losses are added.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
import optax

from opd_jax.algorithm import buckets, metrics, signals, vocabulary
from opd_jax.algorithm import score as score_lib
from opd_jax.algorithm import support as support_lib
from opd_jax.algorithm.objective import Objective, wants
from opd_jax.models import layout, lora
from opd_jax.types import (
  Batch,
  Head,
  Heads,
  Model,
  Params,
  Rollout,
  Scores,
  TrainState,
  Weighted,
)


def loss_fn(params: Params, rows: Weighted, coef: Array | float, heads: Heads, *, model: Model,
            objective: Objective, chunk_tokens: int
            ) -> tuple[Array, dict[str, Float[Array, 'B t']]]:
  """Computes the loss of some rows (its sum over microbatches is that of the batch), and per-token
  arrays [B, T-1] for the metrics. `coef` is the present distill_coef."""
  rollout = rows.rollout
  behaviour = rollout.sampler_logprobs
  if 'policy_logratio' in objective.choice('importance').inputs:
    # How far the policy has moved, not what top-p cut away.
    behaviour = behaviour + rollout.policy_offset
  per_token = {'mask': rollout.mask, 'behaviour': behaviour, 'weights': rows.weights,
               'advantage': rows.advantage, 'local_weights': rows.local_weights,
               'teacher_logprobs': rows.teacher_logprobs,
               'reference_logprobs': rows.reference_logprobs}
  arrays = {name: score_lib.to_completion(x, rollout) for name, x in per_token.items()
            if x is not None}
  arrays |= {name: x for name in (
      'teacher_hidden', 'teacher_top', 'student_hidden', 'reference_hidden')
             if (x := getattr(rows, name)) is not None}
  arrays['targets'] = rollout.completion_targets
  hidden = score_lib.completion_hidden(model, params, rollout)
  loss, out = vocabulary.sum_over_chunks(
      functools.partial(_chunk_loss, objective), chunk_tokens, model.head(params),
      (coef, layout.whole_head(heads, hidden.dtype)), hidden, arrays)
  out = {name: score_lib.to_rows(x, rollout) for name, x in out.items()}
  return loss.astype(rows.weights.dtype), out


def _chunk_loss(o, head, constants, hidden, a):
  """The losses [n] of n tokens, and what the metrics want of each.

  `hidden` [n, D] is the student's, with a gradient; `a` has the arrays of `loss_fn` for these
  tokens, [n], and hidden states [n, D] of the others. Distributions are [n, V].
  """
  coef, heads = constants
  chosen, terms = a['mask'] > 0, []

  def at_chosen(x):
    # What stands elsewhere, NaN too, is replaced before it is computed with: replaced afterwards,
    # it would not be in the loss and yet be in the gradient, as zero times NaN.
    return jnp.where(chosen if x.ndim == 1 else chosen[:, None], x, 0.0)

  def logprobs_of(hidden, head, temperature):
    return score_lib.log_softmax(at_chosen(hidden), head, temperature)

  own = logprobs_of(hidden, head, o.temperature)
  logprobs = at_chosen(score_lib.pick(own, a['targets']))
  out = {'logprobs': logprobs, 'entropy': score_lib.entropy_of(own),
         'logratio': logprobs - at_chosen(a['behaviour'])}
  reference = None
  if 'reference_hidden' in a:
    reference = logprobs_of(a['reference_hidden'], heads.reference, o.temperature)
  if o.needs_hidden_in_loss:  # the teacher's whole distribution, not one token of it
    if 'teacher_top' in a:
      top = a['teacher_top']
      theirs = support_lib.spread_top(top.tokens, top.logprobs, top.rest, own.shape[1],
                                      head.vocab_in_use)
    else:
      theirs = logprobs_of(a['teacher_hidden'], heads.teacher, o.teacher_temperature)
      out['teacher_logprobs'] = score_lib.pick(theirs, a['targets'])
      out['teacher_entropy'] = score_lib.entropy_of(theirs)
    teacher = support_lib.extrapolate(theirs, reference, o.extrapolation)
    mine = own
    if 'student_hidden' in a:  # the baseline of an earlier policy, which wrote the rows
      mine = jax.lax.stop_gradient(logprobs_of(a['student_hidden'], head, o.temperature))
    if o.support != 'sampled' or o.exact_baseline:
      out['divergence'] = o.over_support(*score_lib.same_width(mine, teacher))
    if o.local.coef:
      out['local'] = o.local.over_support(*score_lib.same_width(own, teacher))
      terms.append(a['local_weights'] * coef * o.local.coef * out['local'])
  if o.estimator != 'none':  # or of one token: k2, k3
    log_u = at_chosen(a['teacher_logprobs']) - logprobs
    out['divergence'] = o.choice('estimator')(dict(log_u=log_u))
  if o.needs_teacher and o.route == 'direct':
    terms.append(a['weights'] * coef * out['divergence'])
  if o.reference_kl != 'none':
    known = {}
    if 'reference_logprobs' in a:
      known['log_u'] = at_chosen(a['reference_logprobs']) - logprobs
    if reference is not None:
      known['student'], known['reference'] = score_lib.same_width(own, reference)
    weight, out['reference_kl'] = o.choice('reference_kl')(known)
    terms.append(a['weights'] * weight * out['reference_kl'])
  if o.has_policy_gradient:
    advantage = a['advantage']
    if o.exact_baseline:
      advantage = o.choice('baseline')(dict(
          values=advantage, divergence=coef * jax.lax.stop_gradient(out['divergence'])))
    terms.append(-a['weights'] * surrogate(o, logprobs, out['logratio'], advantage))
  return at_chosen(sum(terms)), out


def surrogate(o: Objective, logprobs: Float[Array, '...'], logratio: Float[Array, '...'],
              advantage: Float[Array, '...']) -> Float[Array, '...']:
  """Computes what is differentiated for the policy gradient: its gradient is rho A grad log p_S."""
  if o.importance == 'none':
    return logprobs * advantage
  return o.choice('importance')(dict(logprobs=logprobs, advantage=advantage, logratio=logratio,
                                     policy_logratio=logratio))


def weigh(o: Objective, batch: Batch, coef: Array | float, student_head: Head | None,
          heads: Heads, key: PRNGKeyArray | None, *, group_size: int, chunk_tokens: int
          ) -> tuple[Weighted, dict[str, Array]]:
  """Computes what each token of a batch is worth, and the metrics of that, normalized over the
  global batch, so that microbatches of the result add up to the whole.

  Args:
    o: the objective.
    batch: with what `wants(o)` names.
    coef: the present distill_coef.
    student_head: for gates that look at the vocabulary.
    heads: of teacher and reference.
    key: for the draws of a local gate.
    group_size: samples per prompt.
    chunk_tokens: tokens whose vocabulary rows exist at a time.
  """
  mask = batch.rollout.mask
  rows = signals.over_vocabulary(o, batch, student_head, heads.teacher, chunk_tokens)
  counted = signals.gate(o, batch, rows)
  weights = signals.reduction_weights(counted, o.reduction)
  reported, distil, local = {}, None, None
  advantage = signals.outcome_advantage(o, batch, group_size)
  if o.needs_teacher and o.route == 'policy_gradient':
    distil = signals.distillation_advantage(o, batch, group_size)
    limit = o.choice('shaping').arguments.get('limit')
    if limit is not None:
      hit = jnp.abs(signals.raw_signal(o, batch)) >= limit
      reported['shaped_rate'] = jnp.sum(hit * mask) / jnp.maximum(jnp.sum(mask), 1.0)
  if o.local.coef:
    known = {'advantage': distil, 'over_vocabulary': rows}
    if 'noise' in o.local.choice('gate').inputs:
      known['noise'] = jax.random.uniform(key, mask.shape, mask.dtype)
    local = signals.local_gate(o, batch, known)
    if o.local.gate != 'none':
      reported['local_rate'] = jnp.sum(local * counted) / jnp.maximum(jnp.sum(counted), 1.0)
    if o.local.instead:
      distil = distil * (1.0 - local)
  if distil is not None:
    advantage = advantage + coef * distil
  if o.gated:
    reported['counted_rate'] = jnp.sum(counted) / jnp.maximum(jnp.sum(mask), 1.0)

  def take(scores, name, wanted):
    return getattr(scores, name) if wanted else None

  return Weighted(
      rollout=batch.rollout, weights=weights,
      advantage=advantage if o.has_policy_gradient else None,
      local_weights=None if local is None else local * weights,
      teacher_logprobs=signals.teacher_logprobs(o, batch) if o.estimator != 'none' else None,
      reference_logprobs=take(batch.reference, 'logprobs',
                              'log_u' in o.choice('reference_kl').inputs),
      teacher_hidden=take(batch.teacher, 'hidden', o.needs_hidden_in_loss),
      teacher_top=take(batch.teacher, 'top', o.needs_hidden_in_loss),
      student_hidden=take(batch.student, 'hidden', o.rescored_baseline),
      reference_hidden=take(batch.reference, 'hidden', wants(o)['reference'].hidden)), reported


@dataclasses.dataclass(frozen=True)
class Term:
  """A batch's part in the loss.

  Attributes:
    name: stands before the metrics of batches other than the first.
    objective: what its rows are for.
    group_size: samples per prompt; those of one prompt are neighbours.
    on_policy: the student itself wrote the rows, so that comparing it with the sampler means
      something.
    microbatch_rows: rows per forward and backward pass, 0 for all. The gradient is the full batch's
      whatever it is: weights are normalized over the global batch before the split.
    length_buckets: to how many lengths they are cut (`buckets.lengths_of`).
  """

  name: str
  objective: Objective
  group_size: int = 1
  on_policy: bool = True
  microbatch_rows: int = 0
  length_buckets: int = 1


def gradient(params: Params, batch: Batch, heads: Heads, step: Array, key: PRNGKeyArray | None,
             frozen: lora.Frozen | None = None, *, model: Model, term: Term, chunk_tokens: int
             ) -> tuple[Array, Params, dict[str, Array]]:
  """Computes loss, gradient and metrics of a batch, accumulated over microbatches; the arguments
  are those of `update_fn`."""
  o, batch = term.objective, score_lib.chosen_only(batch)
  coef = signals.distill_coef(o, step)
  rows, reported = weigh(o, batch, coef, model.head(lora.join(frozen, params)), heads, key,
                         group_size=term.group_size, chunk_tokens=chunk_tokens)

  def loss(trained, rows):
    return loss_fn(lora.join(frozen, trained), rows, coef, heads, model=model, objective=o,
                   chunk_tokens=chunk_tokens)

  grad_fn = jax.value_and_grad(loss, has_aux=True)

  def accumulate(carry, rows):
    (value, aux), grads = grad_fn(params, rows)
    return jax.tree.map(jnp.add, carry, (value, grads)), aux

  zeros = (jnp.zeros((), rows.weights.dtype), jax.tree.map(jnp.zeros_like, params))
  (total, grads), aux, reported['scored_useful'] = buckets.scan_rows(
      accumulate, zeros, rows, batch.rollout, microbatch_rows=term.microbatch_rows,
      buckets=term.length_buckets)
  reported |= metrics.batch_metrics(o, term.on_policy, batch, aux)
  if o.anneal != 'none':
    reported['distill_coef'] = coef
  return total, grads, reported


def update_fn(state: TrainState, batches: tuple[Batch, ...], heads: Heads,
              frozen: lora.Frozen | None = None, key: PRNGKeyArray | None = None, *, model: Model,
              optimizer: optax.GradientTransformation, terms: tuple[Term, ...], chunk_tokens: int
              ) -> tuple[TrainState, dict[str, Array]]:
  """Takes one gradient step on a tuple of batches, whose losses are added.

  Args:
    state: donated by the caller's jit.
    batches: each with what `objective.wants` names of each model for its objective, and the rewards
      if `objective.needs_rewards`: what is not needed may be None.
    heads: of the models whose hidden states are there.
    frozen: what `state.params` are adapters on; None where the state holds the whole model. Not
      donated.
    key: for the draws of objective.local.gate in the first batch.
    model, optimizer: static.
    terms: static, one for each batch.
    chunk_tokens: tokens whose vocabulary rows exist at a time.

  Returns:
    The next state and scalar metrics (see `metrics.batch_metrics`) with 'lengths' and
    'prompt_lengths', int32 [B], beside them. Of batches other than the first there are lengths,
    'logprob' and 'loss', with the name of their term in front: 'given_loss'.
  """
  total, grads, reported = gradient(state.params, batches[0], heads, state.step, key, frozen,
                                    model=model, term=terms[0], chunk_tokens=chunk_tokens)
  for batch, term in zip(batches[1:], terms[1:], strict=True):
    extra, more, theirs = gradient(state.params, batch, heads, state.step, None, frozen,
                                   model=model, term=term, chunk_tokens=chunk_tokens)
    total, grads = total + extra, jax.tree.map(jnp.add, grads, more)
    reported |= {f'{term.name}_loss': extra} | {f'{term.name}_{name}': theirs[name] for name in (
        'lengths', 'prompt_lengths', 'logprob')}
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  reported |= {'loss': total, 'grad_norm': optax.tree.norm(grads),
               'update_norm': optax.tree.norm(updates)}
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state), reported


def reverse_kl_update(state: TrainState, rollout: Rollout, teacher: Scores, student: Scores | None,
                      teacher_head: Head | None = None, *, exact: bool, model: Model,
                      optimizer: optax.GradientTransformation, chunk_tokens: int,
                      microbatch_rows: int) -> tuple[TrainState, dict[str, Array]]:
  """Takes the paper's step: per-token reverse KL on the student's own samples.

  exact=False: importance-sampled policy gradient with advantage log p_T - log p_S, discount 0
  (Thinking Machines Lab 2025, "On-Policy Distillation"). exact=True: the gradient of
  sum_v p_S (log p_S - log p_T), which the former estimates from one sample. The other arguments are
  those of `update_fn` and `Term`.
  """
  objective = (Objective(route='direct', support='full', importance='none') if exact
               else Objective())
  return update_fn(
      state, (Batch(rollout, teacher, student),), Heads(teacher_head), model=model,
      optimizer=optimizer, terms=(Term('own', objective, microbatch_rows=microbatch_rows),),
      chunk_tokens=chunk_tokens)
