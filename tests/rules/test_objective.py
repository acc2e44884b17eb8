"""What makes no sense as an objective is refused: the field, its value, and what is allowed."""

from __future__ import annotations

import itertools
import math

import pytest

from opd_jax.algorithm.objective import KINDS, ROUTES, Local, Objective
from opd_jax.errors import ConfigError
from opd_jax.rules import objective as objective_rules

EXACT = Objective(route='direct', support='full', importance='none')
GRPO = Objective(distill_coef=0.0, reward_coef=1.0, reward_baseline='group_mean_std',
                 importance='ppo_clip(0.2)')
DIRECT = dict(route='direct', importance='none')
TAILS = ('drop', 'renormalize', 'bucket', 'stop_gradient')


def _local(**fields):
  return dict(local=Local(**fields))


def _over(tail, k=4, support='teacher_top_k', **fields):
  return dict(DIRECT, support=f'{support}({k}, {tail!r})', **fields)


def _sft(**fields):
  return dict(distill_coef=0.0, likelihood_coef=1.0, importance='none') | fields


@pytest.mark.parametrize(('changes', 'field', 'allowed'), [
    # Names.
    (dict(route='sideways'), "objective.route='sideways'", "['policy_gradient', 'direct']"),
    (dict(reduction='sum'), "objective.reduction='sum'", "['token_mean', 'sequence_mean']"),
    (dict(student_logprobs='x'), "objective.student_logprobs='x'", "['rescored', 'sampler']"),
    (dict(advantages='x'), "objective.advantages='x'", "['kept', 'recomputed']"),
    *[({field: 'euclid'}, f"objective.{field}='euclid'", str(kind.names))
      for field, kind in KINDS.items()],
    (dict(divergence='jnp'), "objective.divergence='jnp'", "'reverse_kl'"),
    (dict(reward_baseline='group_mean('), "objective.reward_baseline='group_mean('", 'brackets'),
    (_local(coef=1.0, gate='x'), "objective.local.gate='x'", "'untrusted'"),
    (_local(coef=1.0, divergence='x'), "objective.local.divergence='x'", "'forward_kl'"),
    (_local(coef=1.0, support='x'), "objective.local.support='x'", "'full'"),
    # Numbers.
    (dict(discount=1.5), 'objective.discount=1.5', '0 to 1'),
    (dict(discount=-0.1), 'objective.discount=-0.1', '0 to 1'),
    (dict(temperature=0.0), 'objective.temperature=0.0', 'above 0'),
    (dict(temperature=math.nan), 'objective.temperature=nan', 'above 0'),
    (dict(teacher_temperature=-1.0), 'objective.teacher_temperature=-1.0', 'above 0'),
    *[({name: value}, f'objective.{name}={value}', 'at least 0')
      for name in ('distill_coef', 'reward_coef', 'likelihood_coef')
      for value in (-1.0, math.inf, math.nan)],
    (_local(coef=-1.0), 'objective.local.coef=-1.0', 'at least 0'),
    (_local(coef=math.nan), 'objective.local.coef=nan', 'at least 0'),
    (dict(extrapolation=0.0), 'objective.extrapolation=0.0', 'above 0'),
    # Parameters that are missing, that nothing reads, or out of bounds.
    *[({field: text}, f'objective.{field}={text!r}', allowed) for field, text, allowed in (
        ('importance', 'ppo_clip', 'epsilon: above 0'),
        ('importance', 'ppo_clip(-0.2)', 'epsilon: above 0'),
        ('importance', 'ppo_clip(nan)', 'brackets'),
        ('importance', 'ratio(0.2)', 'ratio'),
        ('importance', 'truncated', 'high: at least 1'),
        ('importance', 'truncated(0.5)', 'high: at least 1'),
        ('importance', 'truncated(1e999)', 'high: at least 1'),
        ('importance', 'two_sided(2.0)', 'low: above 0 and below 1'),
        ('importance', 'two_sided(2.0, 0.5)', 'low: above 0 and below 1'),
        ('divergence', 'reverse_kl(0.5)', 'reverse_kl'),
        ('divergence', 'jensen_shannon', 'alpha: above 0 and below 1'),
        ('divergence', 'skew_kl(1.0)', 'alpha: above 0 and below 1'),
        ('divergence', 'alpha_divergence(3)', 'alpha: -1 to 2'),
        ('shaping', 'clip', 'limit: above 0'), ('shaping', 'clip(0)', 'limit: above 0'),
        ('shaping', 'clip(nan)', 'brackets'), ('shaping', 'log(1.0)', 'log'),
        ('shaping', 'power(exponent=0)', 'exponent: above 0'),
        ('token_gate', 'divergence', 'keep: above 0 and below 1'),
        ('token_gate', 'divergence(1.0)', 'keep: above 0 and below 1'),
        ('token_gate', 'teachability(keep=0.5)', 'top_k: at least 1'),
        ('token_gate', 'teachability(0.5, 1.5)', 'top_k: at least 1'),
        ('token_gate', 'soft_or(0.5, top_k=3)', 'keep: above 0 and below 1'),
        ('row_gate', 'correct(keep=0.5)', 'correct'),
        ('row_gate', 'teacher_likelihood', 'keep: above 0 and below 1'),
        ('window', 'tokens(start=3)', 'count: at least 1'),
        ('window', 'tokens(0, 0)', 'count: at least 1'),
        ('window', 'tokens(-1, 2)', 'start: at least 0'),
        ('reference_kl', 'full', 'coef: above 0'), ('reference_kl', 'k2(0)', 'coef: above 0'),
        ('anneal', 'linear(steps=5)', 'to: at least 0'),
        ('anneal', 'linear(steps=-5, to=0.1)', 'steps: at least 1'),
        ('support', 'full(4)', 'full'), ('support', 'full(tail="bucket")', 'full'))],
    *[(dict(DIRECT, support=f'teacher_top_k({inside})'), 'objective.support', 'k: at least 1')
      for inside in ('0, "bucket"', '4', 'tail="bucket"', '4, "cut"', '4, "none"', 'True, "drop"')],
    (_local(coef=1.0, gate='teacher_entropy'), "objective.local.gate='teacher_entropy'",
     'above: above 0'),
    (_local(coef=1.0, gate='untrusted(0.8)'), "objective.local.gate='untrusted(0.8)'", 'untrusted'),
    # What is there together.
    (dict(reward_baseline='group_mean'), "objective.reward_baseline='group_mean'", "'none'"),
    (dict(distill_coef=0.0), 'objective.distill_coef=0.0', 'at least one other than 0'),
    (dict(route='direct'), "objective.route='direct', support='sampled'", "support='full'"),
    (dict(support='full'), "objective.route='policy_gradient', support='full'", "route='direct'"),
    (_over('bucket', importance='none') | dict(route='policy_gradient'),
     "objective.route='policy_gradient'", "route='direct'"),
    (dict(shaping='power(1)', divergence='forward_kl'), "objective.shaping='power(1)'",
     "'reverse_kl'"),
    (dict(signal='fixed_negative', shaping='log'), "objective.shaping='log'", "'none'"),
    (dict(signal='fixed_negative', divergence='forward_kl'), "objective.divergence='forward_kl'",
     "'reverse_kl'"),
    *[(dict(baseline='exact', **changes), "objective.baseline='exact'", 'another baseline')
      for changes in (dict(discount=0.5), dict(shaping='log'), dict(divergence='forward_kl'),
                      dict(signal='fixed_negative'), dict(extrapolation=1.2))],
    (dict(divergence='forward_kl', discount=0.5), 'objective.discount=0.5', "'reverse_kl'"),
    (dict(returns='later'), "objective.returns='later', discount=0.0", "'inclusive'"),
    (dict(advantages='recomputed', student_logprobs='sampler'), "objective.advantages='recomputed'",
     "'rescored'"),
    (_sft(token_gate='divergence(0.5)'), "objective.token_gate='divergence(0.5)'", 'needs none'),
    (_sft(token_gate='teachability(0.5, 4)'), 'objective.token_gate', 'needs none'),
    (_sft(row_gate='reward_agrees'), "objective.row_gate='reward_agrees'", 'needs none'),
    (_sft(advantages='recomputed'), "objective.advantages='recomputed'", "'kept'"),
    *[(_sft(**{name: value}), f'objective.{name}={value!r}', 'allowed') for name, value in dict(
        route='direct', support='full', divergence='forward_kl', discount=0.5, shaping='log',
        baseline='batch_mean', returns='later', signal='fixed_negative', extrapolation=1.2,
        local=Local(coef=1.0), estimator='k2').items()],
    # Estimators and schedules.
    (dict(estimator='k2'), "objective.estimator='k2'", "'none'"),
    (dict(DIRECT, estimator='k3'), "estimator='k3'", "['k2']"),
    (dict(DIRECT, estimator='k2', divergence='forward_kl'), "estimator='k2'", "['k3']"),
    (dict(DIRECT, divergence='total_variation'), "estimator='none'", "route='policy_gradient'"),
    (dict(DIRECT, support='full', estimator='k2'), "objective.estimator='k2'", "'none'"),
    (dict(anneal='linear(5, 1.0)'), "objective.anneal='linear(5, 1.0)', distill_coef=1.0",
     'differ'),
    # A direct term has no advantage.
    *[(dict(DIRECT, support='full', **{name: value}), f'objective.{name}={value!r}', 'allowed')
      for name, value in dict(discount=0.5, returns='later', shaping='log', baseline='batch_mean',
                              signal='fixed_negative', advantages='recomputed').items()],
    (dict(route='direct', support='full'), "objective.importance='ratio'", "'none'"),
    # Supports of some tokens.
    (_over('renormalize', k=1), "objective.support=\"teacher_top_k(1, 'renormalize')\"",
     'at least 2'),
    (_over('drop'), 'objective.support', 'without negative terms'),
    (_over('drop', divergence='forward_kl', support='student_top_k'), 'objective.support',
     "on a support that has the teacher's tokens"),
    (_over('drop', divergence='scaled_jensen_shannon(1)'), 'objective.support', 'negative terms'),
    (_over('stop_gradient', divergence='forward_kl'), 'objective.support',
     "divergence='reverse_kl'"),
    (_local(coef=1.0, support='student_top_k(4, "drop")'),
     "objective.local.support='student_top_k(4, \"drop\")', divergence='forward_kl'",
     'negative terms'),
    # Extrapolation.
    *[(dict(extrapolation=1.2, **changes), 'objective.extrapolation=1.2', 'another support')
      for changes in (dict(divergence='forward_kl'), dict(shaping='log'),
                      dict(signal='fixed_negative'), _local(coef=1.0, gate='negative'))],
    # The local term.
    *[(_local(**fields), 'objective.local.', 'allowed') for fields in (
        dict(divergence='reverse_kl'), dict(support='teacher_top_k(4, "drop")'),
        dict(gate='untrusted'), dict(instead=True), dict(support='nonsense'))],
    (_local(coef=1.0, support='sampled'), "objective.local.support='sampled'", 'another support'),
    (_local(coef=1.0, instead=True), "objective.local.instead=True, gate='none'", 'a gate'),
    *[(dict(baseline='exact', **_local(coef=1.0, **fields)), 'objective.local.', 'another baseline')
      for fields in (dict(gate='negative'), dict(gate='untrusted', instead=True))],
    *[(dict(DIRECT, support='full', **_local(coef=1.0, **fields)), 'objective.local.gate',
       "route='policy_gradient'") for fields in (
           dict(gate='untrusted'), dict(gate='negative'),
           dict(gate='teacher_entropy(0.8)', instead=True))],
], ids=lambda x: ','.join(f'{k}={v}' for k, v in x.items()) if isinstance(x, dict) else None)
def test_refused(changes, field, allowed):
  with pytest.raises(ConfigError) as error:
    objective_rules.check(Objective(**changes))
  message = str(error.value)
  assert field in message and 'allowed' in message and allowed in message, message


def test_errors_name_the_group():
  with pytest.raises(ConfigError, match='^given.support='):
    objective_rules.check(Objective(**DIRECT, support='teacher_top_k(4)'), 'given.')


@pytest.mark.parametrize('objective', [
    EXACT, Objective(), Objective(**_sft()), GRPO,
    Objective(**_over('drop', divergence='alpha_divergence(0)')),
    Objective(**_over('drop', divergence='skew_kl(0.5)', support='union_top_k')),
    Objective(**_over('renormalize', k=1, support='union_top_k')),
    Objective(distill_coef=0.0, anneal='linear(5, 1)'),
    Objective(**DIRECT, support='full', **_local(coef=1.0, gate='teacher_entropy(0.8)'))], ids=str)
def test_accepted(objective):
  objective_rules.check(objective)


def test_every_pair_of_route_and_support_is_either_meaningful_or_refused():
  accepted, top_k = set(), [name for name in KINDS['support'].functions if name.endswith('top_k')]
  supports = [('sampled', ''), ('full', ''), *itertools.product(top_k, TAILS)]
  for route, (support, tail), estimator in itertools.product(
      ROUTES, supports, ('none', *KINDS['estimator'].functions)):
    try:
      objective_rules.check(Objective(
          route=route, support=f'{support}(4, {tail!r})' if tail else support, estimator=estimator,
          importance='ratio' if route == 'policy_gradient' else 'none'))
      accepted.add((route, support, tail, estimator))
    except ConfigError as e:
      assert 'allowed' in str(e)
  assert accepted == {
      ('policy_gradient', 'sampled', '', 'none'), ('direct', 'sampled', '', 'k2'),
      ('direct', 'full', '', 'none'),
      *itertools.product(['direct'], top_k, ['renormalize', 'bucket', 'stop_gradient'], ['none'])}
