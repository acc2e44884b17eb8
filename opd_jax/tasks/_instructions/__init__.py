"""Instructions that a program can check: those of IFEval (Zhou et al. 2023, arXiv 2311.07911).

An instruction is called 'FILE:FUNCTION', after the file of this folder and its function (text,
*, settings) -> whether the text follows it; keyword-only parameters are its settings. What the
functions ask is what the published checks ask, but for three things: names of words and marks are
texts, not patterns (C++ is a keyword); sentences and words in capitals are found by rules of our
own, where the published ones take the models of a library; and a setting that is missing is
refused, where the published ones draw one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pathlib
from typing import Any, Literal, get_args, get_type_hints

from opd_jax.tasks._instructions import _detect

KINDS = tuple(sorted(p.stem for p in pathlib.Path(__file__).parent.glob('*.py')
                     if p.stem[0] != '_'))


@functools.cache
def names() -> list[str]:
  """Lists the instructions there are."""
  return [f'{kind}:{name}' for kind in KINDS for name, value in sorted(vars(_module(kind)).items())
          if inspect.isfunction(value) and value.__module__ == _module(kind).__name__
          and name[0] != '_']


def _module(kind):
  return importlib.import_module(f'opd_jax.tasks._instructions.{kind}')


@functools.cache
def _settings(name):
  """(the function, the type of each of its settings)."""
  kind, _, function = name.partition(':')
  check = getattr(_module(kind), function)
  hints = get_type_hints(check)
  return check, {p.name: hints[p.name] for p in inspect.signature(check).parameters.values()
                 if p.kind == p.KEYWORD_ONLY}


def parse(ids: Any, settings: Any) -> str:
  """Checks the instructions of a prompt, and writes them as one text for `follow`.

  Args:
    ids: their names.
    settings: of each, its settings; what is None is not there, as in a table that has a column for
      every setting of any instruction.

  Raises:
    ValueError: an unknown name, settings that do not fit, or a library that is not installed.
  """
  if not isinstance(ids, list) or not ids:
    raise ValueError(f'instruction_id_list={ids!r}; allowed: a list of {names()}')
  if not isinstance(settings, list) or len(settings) != len(ids):
    raise ValueError(f'kwargs={settings!r}; allowed: a list of {len(ids)} objects, one for each of '
                     f'{ids}')
  return json.dumps([[name, _fit(name, given)] for name, given in zip(ids, settings, strict=True)])


def _fit(name, values):
  """The settings of an instruction, without those that are None."""
  if name not in names():
    raise ValueError(f'the instruction {name!r}; allowed: {names()}')
  if values is not None and not isinstance(values, dict):
    raise ValueError(f'{name} with {values!r}; allowed: an object of its settings')
  _, wanted = _settings(name)
  given = {key: value for key, value in (values or {}).items() if value is not None}
  if set(given) != set(wanted):
    raise ValueError(f'{name} with the settings {sorted(given)}; allowed: exactly {sorted(wanted)}')
  for key, value in given.items():
    given[key] = _typed(name, key, value, wanted[key])
  _detect.require(name)
  return given


def _typed(name, key, value, kind):
  allowed = get_args(kind) if getattr(kind, '__origin__', None) is Literal else ()
  if isinstance(value, float) and value.is_integer():
    value = int(value)  # as tables with empty cells have integers
  words = kind == list[str]
  right = (value in allowed if allowed else
           isinstance(value, list) and value and all(isinstance(v, str) and v for v in value)
           if words else type(value) is kind and value != '')
  if not right or kind is int and value < 0:
    what = list(allowed) if allowed else 'a list of words' if words else kind.__name__
    raise ValueError(f'{name} with {key}={value!r}; allowed: {what}')
  return value


def follow(instructions: str, text: str) -> list[bool]:
  """Tells of each instruction whether a text follows it, strictly: as it stands."""
  return [_follows(text, name, settings) for name, settings in json.loads(instructions)]


def _follows(text, name, settings):
  return bool(text.strip()) and bool(_settings(name)[0](text, **settings))


def variants(text: str) -> list[str]:
  """Lists what the loose accuracy looks at: the text, and that without its first line, its last, or
  both (what a model says around its answer), each with and without stars (Markdown)."""
  lines = text.split('\n')
  cut = [text, *('\n'.join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
  return [*cut, *(part.replace('*', '') for part in cut)]


def measures(instructions: str, text: str) -> dict[str, list[float]]:
  """Computes the accuracies of IFEval besides the prompt's strict one, which is the reward.

  Returns:
    prompt_loose, one value; instruction_strict and instruction_loose, and strict by kind as
    KIND_strict, a value for each instruction.
  """
  given = json.loads(instructions)
  strict, tried = follow(instructions, text), variants(text)
  loose = [any(_follows(t, name, settings) for t in tried) for name, settings in given]
  out = {'prompt_loose': [float(all(loose))], 'instruction_strict': list(map(float, strict)),
         'instruction_loose': list(map(float, loose))}
  for (name, _), right in zip(given, strict, strict=True):
    out.setdefault(f'{name.partition(":")[0]}_strict', []).append(float(right))
  return out
