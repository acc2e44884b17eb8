"""The rules of an objective alone: which of its fields mean something together.

What the text of a single choice leaves open or gets wrong is refused by `choices.parse`; here is
what the choices say of each other, as far as possible by what their functions take and not by name.
"""

from __future__ import annotations

from opd_jax.algorithm import choices
from opd_jax.algorithm.choices import estimators
from opd_jax.algorithm.objective import (
  ADVANTAGES,
  REDUCTIONS,
  ROUTES,
  STUDENT_LOGPROBS,
  Objective,
  wants,
)
from opd_jax.errors import refuse
from opd_jax.rules import rule
from opd_jax.rules.rule import Rule, choice, unread, within


def check(o: Objective, group: str = 'objective.') -> None:
  """Refuses unknown names and combinations that cannot mean what they say.

  Args:
    o: the objective.
    group: what stands before its fields in errors.

  Raises:
    ConfigError: names the field, the value, what is allowed, and why.
  """
  rule.check(NO_LOCAL, o, group)  # what is not used need not make sense
  for prefix, part in (('', o), ('local.', o.local)):
    for field, kind in part.KINDS.items():
      try:
        choices.parse(kind, getattr(part, field))
      except choices.ChoiceError as e:
        refuse(o, prefix + field, e.why, e.allowed, group)
  for rules in (FIELDS, GATES, DISTILLATION, SIGNAL, DIVERGENCE, LOCAL_DIVERGENCE, LOCAL):
    rule.check(rules, o, group)


def _takes(field, *names):
  """Whether the function of a field takes any of some inputs."""
  *parts, name = field.split('.')

  def takes(o):
    part = rule.get(o, '.'.join(parts)) if parts else o
    return bool({*part.choice(name).inputs} & {*names})

  return takes


NO_LOCAL = unread('local.divergence local.support local.gate local.instead',
                  lambda o: not o.local.coef, 'objective.local.coef=0')

FIELDS = (
    choice('route', ROUTES), choice('advantages', ADVANTAGES), choice('reduction', REDUCTIONS),
    choice('student_logprobs', STUDENT_LOGPROBS),
    *within('discount', 0, 1),
    *within('temperature teacher_temperature', 0, above=True,
            note=' (at 0 the distribution is a point mass and has no KL divergence)'),
    *within('distill_coef reward_coef likelihood_coef local.coef', 0),
    *within('extrapolation', 0, above=True),
    Rule('distill_coef reward_coef likelihood_coef',
         lambda o: not (o.needs_teacher or o.reward_coef or o.likelihood_coef),
         'all 0: there is nothing to train towards', 'at least one other than 0'),
    *unread('reward_baseline', lambda o: not o.reward_coef, 'objective.reward_coef=0'),
    Rule('anneal distill_coef',
         lambda o: o.choice('anneal').arguments.get('to') == o.distill_coef,
         'it would not change', 'two coefficients that differ'),
    *unread('route divergence support estimator signal shaping discount returns baseline local '
            'extrapolation', lambda o: not o.needs_teacher, 'objective.distill_coef=0'),
    *unread('advantages', lambda o: not o.has_signal and not wants(o)['student'],
            'nothing that the student scores'),
)

GATES = tuple(
    Rule(f'{field} distill_coef', lambda o, asks=asks: asks(o) and not o.needs_teacher,
         'there is no teacher to ask', 'a gate that needs none')
    for field in ('token_gate', 'row_gate')
    for asks in [_takes(field, 'teacher_logprobs', 'teacher_entropy', 'over_vocabulary')])


def _unbiased(o):
  return [name for name, what in estimators.ESTIMATES.items() if what == o.divergence]


DISTILLATION = (
    Rule('extrapolation support divergence shaping signal local.gate',
         lambda o: o.extrapolation != 1.0 and (
             o.support == 'sampled' and o.divergence != 'reverse_kl' or o.shaping != 'none'
             or not _takes('signal', 'weight')(o) or _takes('local.gate', 'advantage')(o)),
         'at one token the extrapolated teacher is known up to a constant, which only the '
         'log-ratio forgives',
         "'reverse_kl' without shaping, with signal='teacher' and no gate by the advantage, or "
         'another support'),
    Rule('route support divergence estimator',
         lambda o: o.needs_teacher and o.route == 'direct' and o.support == 'sampled'
         and o.estimator not in _unbiased(o),
         'differentiating that at the sampled token does not estimate the gradient (log p_S - log '
         'p_T itself has expectation zero, so nothing would be learned)',
         lambda o: f"estimator in {_unbiased(o)} for this divergence, route='policy_gradient', or "
         "support='full'"),
    Rule('estimator route support',
         lambda o: o.estimator != 'none' and not (o.route == 'direct' and o.support == 'sampled'),
         'no effect with these', "'none'"),
    Rule('route support', lambda o: o.route == 'policy_gradient' and o.support != 'sampled',
         'a divergence over several tokens used as a scalar advantage names no direction to move '
         'in', "route='direct', or support='sampled'"),
    Rule('importance', lambda o: o.importance != 'none' and not o.has_policy_gradient,
         'no effect: no term of the loss is a policy gradient', "'none'"),
)

SIGNAL = (
    *unread('discount returns signal shaping baseline', lambda o: o.route == 'direct',
            "route='direct', which has no advantage"),
    Rule('shaping divergence',
         lambda o: o.choice('shaping') and not _takes('shaping', 'signal')(o)
         and o.divergence != 'reverse_kl',
         "it takes the place of the reverse KL's log-ratio", "'reverse_kl'"),
    *unread('divergence shaping', lambda o: not _takes('signal', 'weight')(o),
            'a signal that is not the weight of a divergence'),
    Rule('discount divergence',
         lambda o: o.discount and _takes('signal', 'weight')(o) and o.divergence != 'reverse_kl',
         'the score-function weight of a later token is no reward for this one (of the forward KL, '
         "u - 1, the mean is zero: noise)", "0, or 'reverse_kl'"),
    Rule('returns discount', lambda o: o.returns != 'inclusive' and not o.discount,
         'later tokens count for nothing', "a discount above 0, or 'inclusive'"),
    Rule('advantages student_logprobs',
         lambda o: o.has_signal and o.advantages == 'recomputed'
         and o.student_logprobs == 'sampler', 'the first has no effect', "'kept', or 'rescored'"),
    Rule('baseline divergence signal shaping discount extrapolation',
         lambda o: o.exact_baseline and not (
             o.divergence == 'reverse_kl' and o.signal == 'teacher' and o.shaping == 'none'
             and not o.discount and o.extrapolation == 1.0),
         'minus the reverse KL is the mean of the plain log-ratio only',
         "'reverse_kl', 'teacher', 'none', 0 and 1, or another baseline"),
)


def _may_drop(part):
  """Whether what a support of some tokens leaves out may simply be left out."""
  name, alpha = part.choice('divergence').name, part.choice('divergence').arguments.get('alpha')
  if name == 'scaled_jensen_shannon' and alpha in (0.0, 1.0):
    name = ('forward_kl', 'reverse_kl')[int(alpha)]
  if name in ('forward_kl', 'skew_kl'):  # they only ever push mass into the support
    return part.choice('support').name != 'student_top_k'
  # Of the others, each term alone is at least 0, and least where the two are equal.
  return name not in ('reverse_kl', 'skew_reverse_kl')


def _over_some_tokens(prefix, part):
  """The rules of a divergence over a support, of the objective or of its local term."""
  def with_tail(tail, broken):
    return lambda o: (part(o).choice('support').arguments.get('tail') == tail
                      and broken(part(o)))

  both = f'{prefix}support {prefix}divergence'
  return (
      Rule(both, with_tail('renormalize', lambda p: p.choice('support').arguments['k'] == 1
                           and p.choice('support').name != 'union_top_k'),
           'one token with mass 1 has no divergence to lower',
           "k of at least 2, or tail='bucket'"),
      Rule(both, with_tail('drop', lambda p: not _may_drop(p)),
           "the divergence falls as the student's mass leaves the support, which ends in collapse "
           '(Many Faces of OPD, arXiv 2605.11182)',
           "tail='renormalize', 'bucket' (for reverse_kl 'stop_gradient'), forward_kl or skew_kl "
           "on a support that has the teacher's tokens, or a divergence without negative terms "
           '(alpha_divergence(0) is the reverse KL corrected to be one)'),
      Rule(both, with_tail('stop_gradient', lambda p: p.divergence != 'reverse_kl'),
           'its gradient is that of the reverse KL', "divergence='reverse_kl', or another tail"))


DIVERGENCE = _over_some_tokens('', lambda o: o)
LOCAL_DIVERGENCE = _over_some_tokens('local.', lambda o: o.local)

LOCAL = (
    Rule('local.support', lambda o: o.local.coef and o.local.support == 'sampled',
         'it is over several tokens', 'another support'),
    Rule('local.gate local.instead route',
         lambda o: o.route == 'direct' and (
             o.local.instead or _takes('local.gate', 'own_logprobs', 'advantage')(o)),
         'there is no advantage', "'none' or 'teacher_entropy', and False, or "
         "route='policy_gradient'"),
    Rule('local.gate baseline',
         lambda o: _takes('local.gate', 'advantage')(o) and o.exact_baseline,
         'it is subtracted in the loss, after the gate has looked at the advantage',
         'another gate, or another baseline'),
    Rule('local.instead baseline', lambda o: o.local.instead and o.exact_baseline,
         'which is subtracted at every token', 'False, or another baseline'),
    Rule('local.instead local.gate', lambda o: o.local.instead and o.local.gate == 'none',
         'it leaves no policy gradient', "route='direct' without a local term, or a gate"),
)
