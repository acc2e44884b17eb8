"""The one kind of error that is the user's to mend, and the one place that words it."""

from __future__ import annotations

import functools
from typing import Any


class ConfigError(ValueError):
  """A config that cannot run: names the field, the value and what is allowed."""


def refusal(settings: Any, fields: str, why: str, allowed: Any, group: str = '') -> str:
  """Words why settings are refused: 'field=value, field=value: why; allowed: what'.

  Args:
    settings: what the fields are fields of.
    fields: dotted names, separated by spaces; the first is the one to change. Of neighbours in one
      group, only the first is written with its group.
    why: what is wrong with them; '' where the value says it.
    allowed: what would do: a text, or a list of values.
    group: what stands before every name, such as 'objective.'.
  """
  parts, last = [], None
  for field in fields.split():
    value = functools.reduce(getattr, field.split('.'), settings)
    parent, _, name = f'{group}{field}'.rpartition('.')
    shown = name if parent == last and parts else f'{parent}.{name}'.lstrip('.')
    text = repr(value)
    parts.append(f'{shown}={text if len(text) <= 400 else text[:400] + "..."}')
    last = parent
  reason = f': {why}' if why else ''
  return f'{", ".join(parts)}{reason}; allowed: {allowed}'


def refuse(settings: Any, fields: str, why: str, allowed: Any, group: str = '') -> None:
  """Raises the error that `refusal` words.

  Raises:
    ConfigError: always.
  """
  raise ConfigError(refusal(settings, fields, why, allowed, group))
