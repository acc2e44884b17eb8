"""The rules of an objective alone: which of its fields mean something together."""

from __future__ import annotations

import dataclasses
import math

from opd_jax.algorithm import divergences
from opd_jax.algorithm import support as support_lib
from opd_jax.algorithm.objective import (
  ADVANTAGES,
  BASELINES,
  ESTIMATORS,
  IMPORTANCE,
  LOCAL_GATES,
  REDUCTIONS,
  REFERENCE_ESTIMATORS,
  RETURNS,
  REWARD_BASELINES,
  ROUTES,
  ROW_GATES,
  SHAPINGS,
  SIGNALS,
  STUDENT_LOGPROBS,
  TOKEN_GATES,
  Local,
  Objective,
  wants,
)
from opd_jax.errors import ConfigError


def check(o: Objective, group: str = 'objective.') -> None:
  """Refuses unknown names and combinations that cannot mean what they say.

  Raises:
    ConfigError: names the field, the value, what is allowed, and why.
  """
  try:
    check_objective(o)
  except ValueError as e:
    raise ConfigError(str(e).replace('objective.', group)) from e


def check_objective(o: Objective) -> None:
  """Refuses unknown names and combinations that cannot mean what they say.

  Raises:
    ValueError: names the field, the value, what is allowed, and why.
  """
  for name, allowed in (
      ('route', ROUTES), ('support', support_lib.SUPPORTS), ('importance', IMPORTANCE),
      ('reward_baseline', REWARD_BASELINES), ('reduction', REDUCTIONS),
      ('student_logprobs', STUDENT_LOGPROBS), ('divergence', support_lib.names()),
      ('tail', support_lib.TAILS), ('estimator', ESTIMATORS), ('signal', SIGNALS),
      ('shaping', SHAPINGS), ('baseline', BASELINES), ('token_gate', TOKEN_GATES),
      ('row_gate', ROW_GATES), ('returns', RETURNS), ('advantages', ADVANTAGES),
      ('reference_estimator', REFERENCE_ESTIMATORS)):
    if getattr(o, name) not in allowed:
      raise ValueError(f'objective.{name}={getattr(o, name)!r}; allowed: {list(allowed)}')
  if not 0.0 <= o.discount <= 1.0:
    raise ValueError(f'objective.discount={o.discount}; allowed: 0 to 1')
  for name in ('temperature', 'teacher_temperature'):
    if not 0.0 < getattr(o, name) < math.inf:  # NaN is neither
      raise ValueError(f'objective.{name}={getattr(o, name)}; allowed: above 0 (at 0 the '
                       'distribution is a point mass and has no KL divergence), and finite')
  for name in ('distill_coef', 'reward_coef', 'likelihood_coef', 'final_distill_coef',
               'reference_coef'):
    if not 0.0 <= getattr(o, name) < math.inf:
      raise ValueError(f'objective.{name}={getattr(o, name)}; allowed: at least 0, and finite')
  if not (o.needs_teacher or o.reward_coef or o.likelihood_coef):
    raise ValueError('objective.distill_coef, reward_coef and likelihood_coef are all 0: there is '
                     'nothing to train towards; allowed: at least one other than 0')
  if o.reward_baseline != 'none' and not o.reward_coef:
    raise ValueError(f'objective.reward_baseline={o.reward_baseline!r} has no effect with '
                     "objective.reward_coef=0; allowed: 'none'")
  _check_importance(o)
  _check_gates(o)
  _check_reference(o)
  if o.anneal_steps < 0 or o.anneal_steps and o.distill_coef == o.final_distill_coef:
    raise ValueError(f'objective.anneal_steps={o.anneal_steps} with distill_coef={o.distill_coef}, '
                     f'final_distill_coef={o.final_distill_coef}; allowed: at least 1 with two '
                     'coefficients that differ, or 0')
  if not o.anneal_steps:
    _refuse_unread(o, 'objective.anneal_steps=0', 'final_distill_coef')
  if o.needs_teacher:
    _check_distillation(o)
    _check_local(o)
    return
  _refuse_unread(o, 'objective.distill_coef=0', 'route', 'divergence', 'divergence_alpha',
                 'support', 'top_k', 'tail', 'estimator', 'signal', 'shaping', 'shaping_scale',
                 'discount', 'returns', 'baseline', 'local', 'extrapolation')
  if not wants(o)['student']:
    _refuse_unread(o, 'nothing that the student scores', 'advantages')


def _refuse_unread(o: Objective, why: str, *names: str) -> None:
  for name in names:
    value, default = getattr(o, name), getattr(Objective, name)
    if value != default:
      raise ValueError(f'objective.{name}={value!r} has no effect with {why}; allowed: {default!r}')


def _check_importance(o):
  if not 0.0 <= o.clip_epsilon < math.inf or (o.clip_epsilon > 0.0) != (o.importance == 'ppo_clip'):
    raise ValueError(f'objective.clip_epsilon={o.clip_epsilon} with objective.importance='
                     f"{o.importance!r}; allowed: above 0 with 'ppo_clip', 0 without")
  low, high = o.ratio_low, o.ratio_high
  if o.importance == 'two_sided':
    fine = 0.0 < low < 1.0 < high < math.inf
  elif o.importance == 'truncated':
    fine = low == 0.0 and 1.0 <= high < math.inf
  else:
    fine = low == high == 0.0
  if not fine:
    raise ValueError(
        f'objective.ratio_low={low}, ratio_high={high} with objective.importance={o.importance!r}; '
        "allowed: low below 1 below high with 'two_sided', 0 and at least 1 with 'truncated', 0 "
        'and 0 without')


def _check_gates(o):
  for gate, keep in (('token_gate', 'token_keep'), ('row_gate', 'row_keep')):
    share, wanted = getattr(o, keep), getattr(o, gate) not in (
        'none', 'correct', 'wrong', 'reward_agrees')
    if not (0.0 < share < 1.0 if wanted else share == 1.0):
      raise ValueError(f'objective.{keep}={share} with objective.{gate}={getattr(o, gate)!r}; '
                       f'allowed: {"above 0 and below 1" if wanted else "1"}')
  if o.window_start < 0 or o.window_tokens < 0 or (o.window_start and not o.window_tokens):
    raise ValueError(f'objective.window_start={o.window_start}, window_tokens={o.window_tokens}; '
                     'allowed: a start of at least 0 and at least one token, or 0 and 0 for all')
  if (o.token_top_k > 0) != (o.token_gate == 'teachability') or o.token_top_k < 0:
    raise ValueError(f'objective.token_top_k={o.token_top_k} with objective.token_gate='
                     f"{o.token_gate!r}; allowed: at least 1 with 'teachability', 0 without")
  asks_teacher = (o.token_gate not in ('none', 'student_entropy')
                  or o.row_gate in ('teacher_likelihood', 'reward_agrees'))
  if asks_teacher and not o.needs_teacher:
    raise ValueError(f'objective.token_gate={o.token_gate!r}, row_gate={o.row_gate!r} with '
                     'objective.distill_coef=0: there is no teacher to ask; allowed: a gate that '
                     'needs none')


def _check_reference(o):
  if (o.reference_coef > 0.0) != (o.reference_estimator != 'none'):
    raise ValueError(f'objective.reference_coef={o.reference_coef} with reference_estimator='
                     f"{o.reference_estimator!r}; allowed: above 0 with 'k2', 'k3' or 'full', 0 "
                     "with 'none'")
  if not 0.0 < o.extrapolation < math.inf:
    raise ValueError(f'objective.extrapolation={o.extrapolation}; allowed: above 0, and finite')
  if o.extrapolation != 1.0 and (o.support == 'sampled' and o.divergence != 'reverse_kl'
                                 or o.shaping != 'none' or o.signal == 'fixed_negative'
                                 or o.local.gate == 'negative'):
    raise ValueError(
        f'objective.extrapolation={o.extrapolation} with support={o.support!r}, divergence='
        f'{o.divergence!r}, shaping={o.shaping!r}, signal={o.signal!r}, local.gate='
        f'{o.local.gate!r}: at one token the extrapolated teacher is known up to a constant, which '
        "only the log-ratio forgives; allowed: 'reverse_kl' without shaping, 'fixed_negative' and "
        "'negative', or another support")


def _check_local(o):
  local = o.local
  if not 0.0 <= local.coef < math.inf:
    raise ValueError(f'objective.local.coef={local.coef}; allowed: at least 0, and finite')
  if not local.coef:
    for field in dataclasses.fields(Local):
      if getattr(local, field.name) != field.default:
        raise ValueError(f'objective.local.{field.name}={getattr(local, field.name)!r} has no '
                         f'effect with objective.local.coef=0; allowed: {field.default!r}')
    return
  for name, allowed in (('divergence', support_lib.names()), ('tail', support_lib.TAILS),
                        ('support', support_lib.SUPPORTS[1:]), ('gate', LOCAL_GATES)):
    if getattr(local, name) not in allowed:
      raise ValueError(f'objective.local.{name}={getattr(local, name)!r}; allowed: '
                       f'{list(allowed)}')
  _check_divergence(local, 'objective.local.')
  if not (0.0 < local.entropy < math.inf if local.gate == 'teacher_entropy'
          else local.entropy == 0.0):
    raise ValueError(f'objective.local.entropy={local.entropy} with objective.local.gate='
                     f"{local.gate!r}; allowed: above 0 with 'teacher_entropy', 0 without")
  if o.route == 'direct' and (local.instead or local.gate in ('untrusted', 'negative')):
    raise ValueError(f'objective.local.gate={local.gate!r}, instead={local.instead} with objective.'
                     "route='direct', which has no advantage; allowed: 'none' or 'teacher_entropy',"
                     " and False, or route='policy_gradient'")
  if local.gate == 'negative' and o.baseline == 'exact':
    raise ValueError("objective.local.gate='negative' with objective.baseline='exact': it is "
                     'subtracted in the loss, after the gate has looked at the advantage; allowed: '
                     'another gate, or another baseline')
  if local.instead and o.baseline == 'exact':
    raise ValueError("objective.local.instead=True with objective.baseline='exact', which is "
                     'subtracted at every token; allowed: False, or another baseline')
  if local.instead and local.gate == 'none':
    raise ValueError("objective.local.instead=True with objective.local.gate='none' leaves no "
                     "policy gradient; allowed: route='direct' without a local term, or a gate")


def _check_distillation(o):
  _check_divergence(o, 'objective.')
  _check_signal(o)
  if o.route == 'direct' and o.support == 'sampled':
    unbiased = [k for k, name in support_lib.DIRECT_SAMPLED.items() if name == o.divergence]
    if o.estimator not in unbiased:
      raise ValueError(
          "objective.route='direct' with objective.support='sampled', divergence="
          f'{o.divergence!r}, estimator={o.estimator!r}: differentiating that at the sampled token '
          'does not estimate the gradient (log p_S - log p_T itself has expectation zero, so '
          f'nothing would be learned); allowed: estimator in {unbiased} for this divergence, '
          "route='policy_gradient', or support='full'")
  elif o.estimator != 'none':
    raise ValueError(f'objective.estimator={o.estimator!r} has no effect with objective.route='
                     f"{o.route!r}, support={o.support!r}; allowed: 'none'")
  if o.route == 'policy_gradient' and o.support != 'sampled':
    raise ValueError(
        f"objective.route='policy_gradient' with objective.support={o.support!r}: a divergence "
        'over several tokens used as a scalar advantage names no direction to move in; '
        "allowed: route='direct', or support='sampled'")
  if o.importance != 'none' and not o.has_policy_gradient:
    raise ValueError(f'objective.importance={o.importance!r} has no effect: no term of the loss is '
                     "a policy gradient; allowed: 'none'")


def _check_signal(o):
  if o.route == 'direct':
    _refuse_unread(o, "route='direct', which has no advantage", 'discount', 'returns', 'signal',
                   'shaping', 'shaping_scale', 'baseline')
    if not wants(o)['student']:
      _refuse_unread(o, 'nothing that the student scores', 'advantages')
    return
  if not (0.0 < o.shaping_scale < math.inf if o.shaping in ('clip', 'power')
          else o.shaping_scale == 0.0):
    raise ValueError(f'objective.shaping_scale={o.shaping_scale} with objective.shaping='
                     f"{o.shaping!r}; allowed: above 0 with 'clip' and 'power', 0 without")
  if o.shaping == 'power' and o.divergence != 'reverse_kl':
    raise ValueError(f"objective.shaping='power' with objective.divergence={o.divergence!r}: it "
                     "takes the place of the reverse KL's log-ratio; allowed: 'reverse_kl'")
  if o.signal == 'fixed_negative':
    _refuse_unread(o, "objective.signal='fixed_negative'", 'divergence', 'divergence_alpha',
                   'shaping', 'shaping_scale')
  if o.discount and o.signal == 'teacher' and o.divergence != 'reverse_kl':
    raise ValueError(f'objective.discount={o.discount} with objective.divergence={o.divergence!r}: '
                     'the score-function weight of a later token is no reward for this one (of the '
                     "forward KL, u - 1, the mean is zero: noise); allowed: 0, or 'reverse_kl'")
  if o.returns != 'inclusive' and not o.discount:
    raise ValueError(f'objective.returns={o.returns!r} with objective.discount=0: later tokens '
                     "count for nothing; allowed: a discount above 0, or 'inclusive'")
  if o.advantages == 'recomputed' and o.student_logprobs == 'sampler':
    raise ValueError("objective.advantages='recomputed' has no effect with objective."
                     "student_logprobs='sampler'; allowed: 'kept', or 'rescored'")
  exact_mean = (o.divergence == 'reverse_kl' and o.signal == 'teacher' and o.shaping == 'none'
                and not o.discount and o.extrapolation == 1.0)
  if o.baseline == 'exact' and not exact_mean:
    raise ValueError(
        f"objective.baseline='exact' with divergence={o.divergence!r}, signal={o.signal!r}, "
        f'shaping={o.shaping!r}, discount={o.discount}, extrapolation={o.extrapolation}: minus the '
        "reverse KL is the mean of the plain log-ratio only; allowed: 'reverse_kl', 'teacher', "
        "'none', 0 and 1, or another baseline")


def _check_divergence(o, group):
  low, high, ends = divergences.ALPHAS.get(o.divergence, (0.0, 0.0, True))
  inside = low <= o.divergence_alpha <= high if ends else low < o.divergence_alpha < high
  if not inside:
    allowed = ('0, since it has no parameter' if low == high else f'{low} to {high}' + (
        '' if ends else ", the ends excluded, where it vanishes ('scaled_jensen_shannon' has the "
        'two KL divergences there)' if o.divergence == 'jensen_shannon' else ', the ends excluded'))
    raise ValueError(f'{group}divergence_alpha={o.divergence_alpha} with divergence='
                     f'{o.divergence!r}; allowed: {allowed}')
  if not o.support.endswith('top_k'):
    for name, neutral in (('top_k', 0), ('tail', 'none')):
      if getattr(o, name) != neutral:
        raise ValueError(f'{group}{name}={getattr(o, name)!r} has no effect with support='
                         f'{o.support!r}; allowed: {neutral!r}')
    return
  if o.top_k < 1:
    raise ValueError(f'{group}top_k={o.top_k} with support={o.support!r}; allowed: at least 1')
  if o.tail == 'none':
    raise ValueError(f"{group}tail='none' with support={o.support!r}; allowed: "
                     f'{[t for t in support_lib.TAILS if t != "none"]}')
  if o.tail == 'renormalize' and o.top_k == 1 and o.support != 'union_top_k':
    raise ValueError(f"{group}tail='renormalize' with {group}top_k=1: one token with mass 1 "
                     "has no divergence to lower; allowed: top_k of at least 2, or tail='bucket'")
  if o.tail == 'drop' and not _may_drop(o):
    raise ValueError(
        f"{group}tail='drop' with divergence={o.divergence!r}, support={o.support!r}: the "
        "divergence falls as the student's mass leaves the support, which ends in collapse (Many "
        "Faces of OPD, arXiv 2605.11182); allowed: 'renormalize', 'bucket' (for reverse_kl "
        "'stop_gradient'), forward_kl or skew_kl on a support that has the teacher's tokens, or a "
        'divergence without negative terms (alpha_divergence with alpha 0 is the reverse KL '
        'corrected to be one)')
  if o.tail == 'stop_gradient' and o.divergence != 'reverse_kl':
    raise ValueError(f"{group}tail='stop_gradient' with divergence={o.divergence!r}; allowed: "
                     "divergence='reverse_kl', or another tail")


def _may_drop(o):
  """Whether what a top-k support leaves out may simply be left out."""
  ends = o.divergence == 'scaled_jensen_shannon' and o.divergence_alpha in (0.0, 1.0)
  name = ('forward_kl', 'reverse_kl')[int(o.divergence_alpha)] if ends else o.divergence
  if name in ('forward_kl', 'skew_kl'):  # they only ever push mass into the support
    return o.support != 'student_top_k'
  # Of the others, each term alone is at least 0, and least where the two are equal.
  return name not in ('reverse_kl', 'skew_reverse_kl')
