"""The one kind of error that is the user's to mend, and the one place that words it."""

from __future__ import annotations

import functools
from typing import Any

LONGEST = 2000  # characters of a line on the console


class ConfigError(ValueError):
  """A config that cannot run: names the field, the value and what is allowed."""


def one_line(text: str) -> str:
  """Makes one line of what a library says in several. Of a long one, which quotes a long value, the
  middle is left out: the end says what is allowed."""
  line = ' '.join(text.splitlines())
  if len(line) <= LONGEST:
    return line
  return f'{line[:LONGEST - 600]} ... {line[-600:]}'


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
