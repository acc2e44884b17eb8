"""What a claim measures, and when it is said to hold."""

import pytest

from opd_jax.errors import ConfigError
from opd_jax.experiment import claims
from opd_jax.experiment.claims import Claim

STAGES = ('opd', 'sft')
NUMBERS = {('opd', 'after', 'sampled_accuracy'): 0.75, ('sft', 'after', 'sampled_accuracy'): 0.5,
           ('opd', 'before', 'sampled_accuracy'): 0.25, ('opd', 'teacher', 'sampled_accuracy'): 1.0,
           ('opd', 'after', 'reverse_kl'): 0.125, ('opd', 'before', 'greedy_accuracy'): None}


def measured(text, reach=None):
  return claims.value(Claim(measure=text), lambda *key: NUMBERS[key],
                      lambda *key: (reach or {}).get(key))


@pytest.mark.parametrize(('text', 'expected'), [
    ('opd.sampled_accuracy - sft.sampled_accuracy', 0.25),
    ('(opd.sampled_accuracy - opd.before.sampled_accuracy) / opd.teacher.sampled_accuracy', 0.5),
    ('-1 * opd.reverse_kl + 2', 1.875), ('-opd.reverse_kl', -0.125),
    ('steps(sft, 0.9) / steps(opd, 0.9)', 4.0), ('flops(opd, 0.9)', 7.0),
    ('steps(sft, 0.5) / steps(opd, 0.9)', None),  # SFT never got there
    ('steps(sft, 0.9) / steps(opd, 0.1)', None),  # OPD began there: 0 steps
    ('opd.before.greedy_accuracy - 1', None)])  # nobody grades
def test_value(text, expected):
  reach = {('steps', 'sft', 0.9): 40, ('steps', 'opd', 0.9): 10, ('flops', 'opd', 0.9): 7.0,
           ('steps', 'opd', 0.1): 0}
  assert measured(text, reach) == expected


@pytest.mark.parametrize('text', [
    'opd', 'opd.loss', 'rl.sampled_accuracy', 'opd.later.sampled_accuracy', 'steps(rl, 0.9)',
    'steps(opd, 1)', 'steps(opd, 90.0)', 'steps(opd, 0.0)', 'steps(opd)', '1.0', 999 * '- ' + '1',
    1500 * '-' + 'opd.reverse_kl', 'max(opd, 0.9)', '__import__("os")', 'opd.sampled_accuracy ** 2',
    'opd.sampled_accuracy if True else 0', 'True', '', 'opd.sampled_accuracy -',
    'opd.reverse_kl.real', 'opd.by_group', 'opd.by_group.a.b', '(opd).before', "'opd'"])
def test_other_measures_are_refused(text):
  values = dict(says='', post='', measure=text, neutral=0.0, at_least=0.0)
  with pytest.raises(ConfigError, match=r'report\.claims\.gain\.measure=.*allowed: arithmetic'):
    claims.parse('gain', values, STAGES)


@pytest.mark.parametrize(('change', 'match'), [
    ({'neutral': 1.0}, r'at_least=0\.5; allowed: at least neutral=1\.0'),
    ({'neutral': 0}, r'neutral=0; allowed: a float'),
    ({'at_least': float('nan')}, 'at_least=nan; allowed'),
    ({'says': None}, 'says=None; allowed: a str'), ({'sayz': ''}, r'fields .*sayz.*allowed')])
def test_other_fields_are_refused(change, match):
  values = dict(says='', post='', measure='opd.reverse_kl', neutral=0.0, at_least=0.5)
  assert claims.parse('gain', values, STAGES) == Claim(**values)
  with pytest.raises(ConfigError, match=match):
    claims.parse('gain', values | change, STAGES)


@pytest.mark.parametrize(('found', 'expected'), [
    (dict(mean=0.2, low=0.1), claims.HOLDS), (dict(mean=0.1, low=0.01), claims.HOLDS),
    (dict(mean=0.2, low=-0.1), claims.PART),  # large, and not sure
    (dict(mean=0.05, low=0.01), claims.PART),  # sure, and not large
    (dict(mean=0.05, low=-0.1), claims.NOT), (dict(mean=-0.2, low=-0.3), claims.NOT),
    (dict(mean=0.1), claims.PART), (dict(mean=0.05), claims.NOT),  # one seed is never sure
    (None, claims.OPEN)])
def test_verdict(found, expected):
  assert claims.verdict(Claim(neutral=0.0, at_least=0.1), found) == expected


def test_no_group_at_all():
  with pytest.raises(ConfigError, match=r'report\.claims\.gain=5; allowed: a group'):
    claims.parse('gain', 5, STAGES)


def test_renamed():
  text = claims.rename('steps(opd, 0.9) - opd.before.reverse_kl * sft.reverse_kl', {'opd': 'a_opd'})
  assert text == 'steps(a_opd, 0.9) - a_opd.before.reverse_kl * sft.reverse_kl'


def test_a_part_of_the_task():
  numbers = {('opd', 'after', 'by_group.fact'): 0.5, ('opd', 'before', 'by_group.fact'): 0.25}
  claim = Claim(measure='opd.by_group.fact - opd.before.by_group.fact')
  assert claims.value(claim, lambda *key: numbers[key], None) == 0.25
