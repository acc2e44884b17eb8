"""Choices: what every one must be, and what their parser reads and refuses."""

from __future__ import annotations

import ast
import inspect
import re
import typing

from jaxtyping import Array, Float
import pytest
import tabular
import tiny

from opd_jax import config
from opd_jax.algorithm import choices
from opd_jax.algorithm.choices import Positive, Share, shapings
from opd_jax.algorithm.gates import tokens
from opd_jax.algorithm.objective import KINDS, LOCAL_KINDS, Objective, top_ks, wants
from opd_jax.rules import objective as objective_rules
from opd_jax.types import Wants

ALL = KINDS | {'local.gate': LOCAL_KINDS['gate']}
each_kind = pytest.mark.parametrize('field', ALL)
each_choice = pytest.mark.parametrize(
    ('field', 'name'), [(field, name) for field, kind in ALL.items() for name in kind.functions])
# A year of a paper, and something to compute.
SOURCE = re.compile(r'\b(19|20)\d\d\b|arXiv \d{4}\.\d{5}')
EQUATION = re.compile(r'[=<>+*^]|\w - \w|\|\||log |sum|min\(')


@each_kind
def test_every_public_function_of_a_file_is_a_choice(field):
  kind = ALL[field]
  written = {node.name for node in ast.parse(inspect.getsource(kind.module)).body
             if isinstance(node, ast.FunctionDef) and node.name[0] != '_'}
  assert written == {*kind.functions} and written
  assert kind.names == [choices.NONE] * kind.optional + [
      f'{name}({", ".join(choices.parameters(f))})' if choices.parameters(f) else name
      for name, f in sorted(kind.functions.items())]


@each_choice
def test_a_choice_says_its_equation_and_its_source(field, name):
  text = inspect.getdoc(ALL[field].functions[name]) or ''
  assert SOURCE.search(text), f'{name}: the docstring names no paper'
  assert EQUATION.search(text), f'{name}: the docstring has no equation'


@each_choice
def test_what_a_choice_takes_and_what_a_config_may_set(field, name):
  kind, function = ALL[field], ALL[field].functions[name]
  assert {*choices.inputs(function)} <= {*kind.inputs}
  for parameter in inspect.signature(function).parameters.values():
    assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    assert parameter.default is parameter.empty, 'a parameter that is left out would be unread'
  for parameter, hint in choices.parameters(function).items():
    values = typing.get_args(hint)
    assert choices.bounds(hint) is not None or all(isinstance(v, str) for v in values), parameter
    assert choices.bounds(hint) is None or values[0] in (int, float), parameter


@each_choice
def test_a_choice_is_read_from_its_text(field, name):
  kind = ALL[field]
  for text in tabular.examples(kind):
    if text.partition('(')[0] == name:
      choice = choices.parse(kind, text)
      assert choice and choice.function is kind.functions[name]
      again = choices.parse(kind, str(choice))
      assert (again.name, again.arguments) == (choice.name, choice.arguments)


def test_arguments_by_place_and_by_name():
  kind = KINDS['support']
  for text in ('teacher_top_k(16, "bucket")', "teacher_top_k(16, tail='bucket')",
               ' teacher_top_k( tail = "bucket", k=16 ) '):
    choice = choices.parse(kind, text)
    assert choice.arguments == {'k': 16, 'tail': 'bucket'} and choice.top_k == 16
  # A whole number where any number would do.
  limit = choices.parse(KINDS['shaping'], 'clip(5)').arguments['limit']
  assert limit == 5.0 and type(limit) is float


@each_kind
def test_a_name_has_one_spelling(field):
  # Code compares the text: 'sampled ' must not be another thing than 'sampled'.
  for name in ALL[field].names:
    if '(' not in name:
      choices.parse(ALL[field], name)
      for text in (f'{name} ', f' {name}', f'{name}()', f'({name})', f'{name}  # really'):
        with pytest.raises(choices.ChoiceError, match=f"written '{name}'"):
          choices.parse(ALL[field], text)


def test_none_is_no_choice():
  none = choices.parse(KINDS['shaping'], 'none')
  assert not none and none.inputs == () and none.arguments == {} and str(none) == 'none'
  with pytest.raises(choices.ChoiceError):
    choices.parse(KINDS['returns'], 'none')


@pytest.mark.parametrize(('text', 'why', 'allowed'), [
    ('', 'not a name', "'clip(limit)'"), ('clip(', 'not a name', "'clip(limit)'"),
    ('3', 'not a name', "'clip(limit)'"), ('clip; log', 'not a name', "'clip(limit)'"),
    ('jnp.clip(3)', 'not a name', "'clip(limit)'"), ('clip(limit)', 'not a name', "'clip(limit)'"),
    ('clip(__import__("os"))', 'not a name', "'clip(limit)'"),
    ('clip(*[5])', 'not a name', "'clip(limit)'"), ('jnp', '', "'clip(limit)'"),
    ('none(3)', '', "'none', 'clip(limit)'"), ('Positive', '', "'log'"),
    ('clip', "missing a required argument: 'limit'", 'clip(limit: above 0)'),
    ('clip(5, 6)', 'too many positional arguments', 'clip(limit: above 0)'),
    ('clip(5, limit=5)', "multiple values for argument 'limit'", 'clip(limit: above 0)'),
    ('clip(scale=5)', "limit", 'clip(limit: above 0)'),
    ('clip("5")', "limit='5'", 'clip(limit: above 0)'),
    ('clip(True)', 'limit=True', 'clip(limit: above 0)'),
    ('clip(0)', 'limit=0.0', 'clip(limit: above 0)'),
    ('clip(1e999)', 'limit=inf', 'clip(limit: above 0)'), ('log(2)', 'too many', 'log'),
    ('clip(' + '9' * 100 + ')', 'limit=999', 'clip(limit: above 0)'),
    ('clip(limit=1, limit=2)', 'not a name', "'clip(limit)'"),
    ('clip({[]: 1})', 'not a name', "'clip(limit)'"),
    ('clip(' + '-' * 100_000 + '1)', 'not a name', "'clip(limit)'")])
def test_refused(text, why, allowed):
  with pytest.raises(choices.ChoiceError) as e:
    choices.parse(KINDS['shaping'], text)
  assert why in e.value.why and allowed in str(e.value.allowed)


def test_bounds():
  assert [x in choices.Bounds(0.0, 1.0) for x in (-0.1, 0.0, 1.0, 1.1)] == [0, 1, 1, 0]
  assert [x in choices.Bounds(0.0, 1.0, ends=False) for x in (0.0, 0.5, 1.0)] == [0, 1, 0]
  assert [x in choices.Bounds(1.0) for x in (0, 1, float('inf'), float('nan'))] == [0, 1, 0, 0]
  for bounds, text in ((choices.Bounds(0.0, 1.0), '0 to 1'), (choices.Bounds(1.0), 'at least 1'),
                       (choices.Bounds(0.0, ends=False), 'above 0'),
                       (choices.Bounds(0.0, 1.0, ends=False), 'above 0 and below 1')):
    assert str(bounds) == text


def test_what_counts_tokens_of_the_vocabulary_is_known_and_capped():
  o = Objective(support='union_top_k(64, "bucket")', token_gate='teachability(0.5, top_k=32)')
  assert {field: k for field, k in top_ks(o).items() if k} == {'support': 64, 'token_gate': 32}
  for text, want in (('union_top_k(64, "bucket")', "union_top_k(k=16, tail='bucket')"),
                     ('union_top_k(4, "drop")', "union_top_k(k=4, tail='drop')"),
                     ('full', 'full')):
    assert choices.at_most(KINDS['support'], text, 16) == want
  assert choices.at_most(KINDS['token_gate'], 'none', 16) == 'none'


# --- that a new choice is one function ---


def _add(monkeypatch, module, function):
  function.__module__ = module.__name__
  monkeypatch.setattr(module, function.__name__, function, raising=False)


def test_a_new_shaping_is_found_by_the_config(monkeypatch):
  def squash(signal: Float[Array, 'B t'], *, width: Positive) -> Float[Array, 'B t']:
    return signal / (1 + abs(signal) / width)

  def parse(text):
    c = tiny.config('opd_sampled', teacher__kind='initial_student', objective__shaping=text)
    return config.parse(c).objective

  with pytest.raises(config.ConfigError, match='squash'):
    parse('squash(2)')
  _add(monkeypatch, shapings, squash)
  o = parse('squash(2)')
  assert o.choice('shaping').arguments == {'width': 2.0} and wants(o) == wants(Objective())
  for text, allowed in (('squash', 'squash(width: above 0)'), ('squash(0)', 'width: above 0'),
                        ('squash(1, 2)', 'width: above 0'), ('sqash(1)', "'squash(width)'")):
    with pytest.raises(config.ConfigError) as e:
      parse(text)
    assert f'objective.shaping={text!r}' in str(e.value) and allowed in str(e.value)
  # What it takes is what the rules look at.
  with pytest.raises(config.ConfigError, match='no effect'):
    objective_rules.check(Objective(route='direct', support='full', importance='none',
                                    shaping='squash(2)'))
  objective_rules.check(Objective(divergence='forward_kl', shaping='squash(2)'))


def test_a_new_gate_says_what_it_wants(monkeypatch):
  def surprised(mask: Float[Array, 'B t'], rewards: Float[Array, 'B'],
                student_entropy: Float[Array, 'B t'], *, keep: Share) -> Float[Array, 'B t']:
    return mask * (student_entropy > keep) * (rewards > 0)[:, None]

  _add(monkeypatch, tokens, surprised)
  o = Objective(route='direct', support='full', importance='none', token_gate='surprised(0.3)')
  objective_rules.check(o)
  assert o.needs_rewards and o.gated and wants(o) == {
      'teacher': Wants(hidden=True), 'student': Wants(logprobs=True), 'reference': Wants()}
