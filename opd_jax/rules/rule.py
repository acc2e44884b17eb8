"""A rule: some fields, a condition that must not hold, and what to say where it does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
import dataclasses
import functools
import math
from typing import Any

from opd_jax.errors import refuse


@dataclasses.dataclass(frozen=True)
class Rule:
  """What is refused.

  Attributes:
    fields: dotted names that the error shows, separated by spaces; the one to change first.
    broken: the condition, of the settings.
    why: what is wrong; '' where the values say it.
    allowed: what would do: a text, or a function of the settings that makes it.
  """

  fields: str
  broken: Callable[[Any], Any]
  why: str
  allowed: str | Callable[[Any], Any]


def check(rules: Iterable[Rule], settings: Any, group: str = '') -> None:
  """Checks settings against rules, in order.

  Args:
    rules: each tried once.
    settings: what the fields are fields of.
    group: what stands before the names of fields in errors, such as 'objective.'.

  Raises:
    ConfigError: the first rule that is broken.
  """
  for rule in rules:
    if rule.broken(settings):
      allowed = rule.allowed(settings) if callable(rule.allowed) else rule.allowed
      refuse(settings, rule.fields, rule.why, allowed, group)


def get(settings: Any, field: str) -> Any:
  """Reads a dotted field."""
  return functools.reduce(getattr, field.split('.'), settings)


def default(settings: Any, field: str) -> Any:
  """Reads the default of a dotted field."""
  *groups, name = field.split('.')
  owner = functools.reduce(getattr, groups, settings)
  return next(f.default for f in dataclasses.fields(owner) if f.name == name)


def choice(field: str, names: Collection[str] | Callable[[], Collection[str]]) -> Rule:
  """Makes the rule that a field is one of some names."""
  def listed():
    return list(names() if callable(names) else names)

  return Rule(field, lambda s: get(s, field) not in listed(), '', lambda s: listed())


def least(fields: str, low: int) -> tuple[Rule, ...]:
  """Makes the rules that integer fields are at least `low`."""
  return tuple(Rule(f, lambda s, f=f: get(s, f) < low, '', f'at least {low}')
               for f in fields.split())


def within(fields: str, low: float, high: float = math.inf, *, above: bool = False,
           below: bool = False, note: str = '') -> tuple[Rule, ...]:
  """Makes the rules that numbers lie from `low` to `high`; never NaN nor infinite.

  Args:
    fields: names, separated by spaces.
    low, high: the ends.
    above, below: whether an end itself is refused.
    note: more of what is allowed.
  """
  def outside(value):
    inside = (low < value if above else low <= value) and (
        value < high if below or math.isinf(high) else value <= high)
    return not inside  # of NaN too

  start = f'above {low:g}' if above else f'at least {low:g}'
  end = ', and finite' if math.isinf(high) else f', below {high:g}' if below else (
      f', at most {high:g}')
  text = f'{low:g} to {high:g}' if not (above or below or math.isinf(high)) else start + end
  return tuple(Rule(f, lambda s, f=f: outside(get(s, f)), '', text + note) for f in fields.split())


def unread(fields: str, when: Callable[[Any], Any], where: str) -> tuple[Rule, ...]:
  """Makes the rules that fields which nothing would read are left at their defaults.

  Args:
    fields: names, separated by spaces.
    when: the condition under which nothing reads them.
    where: that condition in words, such as "teacher.kind='none'".
  """
  return tuple(Rule(f, lambda s, f=f: when(s) and get(s, f) != default(s, f),
                    f'no effect with {where}', lambda s, f=f: repr(default(s, f)))
               for f in fields.split())
