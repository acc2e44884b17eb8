"""Choices: a name with its parameters in one text, such as 'two_sided(0.5, 2)'.

A choice is one public function of the module of its kind (`Kind`; `objective.py` lists the kinds),
and nothing else has to know of it:

  def clip(signal: Float[Array, 'B t'], *, limit: Positive) -> Float[Array, 'B t']:

The names of its positional parameters say what it takes of a batch, and so what must be known
before the loss (`objective.wants`). Its keyword-only parameters are what a text may set, with the
values that make sense in their annotations. Everything that a text leaves open or that the function
does not read is refused by `parse`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
import dataclasses
import functools
import inspect
import math
from types import ModuleType
import typing
from typing import Annotated, Any

NONE = 'none'
LONGEST = 200  # characters of a text


@dataclasses.dataclass(frozen=True)
class Bounds:
  """The values of a number that make sense.

  Attributes:
    low, high: from where to where; an infinite end is never a value.
    ends: whether the ends are values themselves.
    of_vocabulary: whether it counts tokens of the vocabulary, and so is at most their number.
  """

  low: float
  high: float = math.inf
  ends: bool = True
  of_vocabulary: bool = False

  def __contains__(self, value: float | int) -> bool:
    inside = self.low <= value <= self.high if self.ends else self.low < value < self.high
    return inside and math.isfinite(value)  # NaN is nowhere

  def __str__(self) -> str:
    if math.isinf(self.high):
      return f'{"at least" if self.ends else "above"} {self.low:g}'
    if self.ends:
      return f'{self.low:g} to {self.high:g}'
    return f'above {self.low:g} and below {self.high:g}'


Positive = Annotated[float, Bounds(0.0, ends=False)]
Share = Annotated[float, Bounds(0.0, 1.0, ends=False)]
AtLeast1 = Annotated[float, Bounds(1.0)]
Above1 = Annotated[float, Bounds(1.0, ends=False)]
Unsigned = Annotated[float, Bounds(0.0)]
Count = Annotated[int, Bounds(1.0)]
TopK = Annotated[int, Bounds(1.0, of_vocabulary=True)]


class ChoiceError(ValueError):
  """A text that is no choice: what is wrong with it, and what would do."""

  def __init__(self, why: str, allowed: Any):
    super().__init__(f'{why}; allowed: {allowed}')
    self.why, self.allowed = why, allowed


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a field is a choice of.

  Attributes:
    module: its public functions are the choices.
    inputs: what the positional parameters of those may be called.
    optional: whether the text may be 'none'.
  """

  module: ModuleType
  inputs: tuple[str, ...]
  optional: bool = True

  @property
  def functions(self) -> dict[str, Callable[..., Any]]:
    """The choices there are, by name."""
    return {name: f for name, f in sorted(vars(self.module).items()) if inspect.isfunction(f)
            and f.__module__ == self.module.__name__ and name[0] != '_'}

  @property
  def names(self) -> list[str]:
    """How each choice is written: ['none', 'clip(limit)', 'log']."""
    names = [name + (f'({", ".join(parameters(f))})' if parameters(f) else '')
             for name, f in self.functions.items()]
    return [NONE] * self.optional + names


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
  """A function with its parameters; false where the text was 'none'.

  Attributes:
    name: of the function, or 'none'.
    function: None for 'none'.
    arguments: its keyword-only parameters.
    inputs: the names of its positional parameters.
  """

  name: str
  function: Callable[..., Any] | None
  arguments: Mapping[str, Any]
  inputs: tuple[str, ...]

  def __bool__(self) -> bool:
    return self.function is not None

  def __call__(self, known: Mapping[str, Any]) -> Any:
    """Calls the function with what it takes of `known`."""
    return self.function(*(known[name] for name in self.inputs), **self.arguments)

  def __str__(self) -> str:
    inside = ', '.join(f'{name}={value!r}' for name, value in self.arguments.items())
    return f'{self.name}({inside})' if inside else self.name

  @property
  def top_k(self) -> int:
    """The most tokens of the vocabulary that a parameter counts, 0 where none does."""
    return max((self.arguments[name] for name in _of_vocabulary(self.function)), default=0)


@functools.cache
def parse(kind: Kind, text: str) -> Choice:
  """Reads a choice.

  Args:
    kind: of what.
    text: a name, or a name with arguments as Python writes them: 'clip(5)', 'clip(limit=5)'.

  Raises:
    ChoiceError: no such choice; arguments that are missing, unknown, of another type or out of
      bounds.
  """
  name, positional, named = _read(kind, text)
  if not (positional or named) and text != name:  # a choice has one spelling, which code compares
    raise ChoiceError(f'without arguments it is written {name!r}', kind.names)
  if name == NONE and kind.optional and not (positional or named):
    return Choice(NONE, None, {}, ())
  if name not in kind.functions:
    raise ChoiceError('', kind.names)
  function = kind.functions[name]
  signature = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD)
                                 for n in parameters(function)])
  try:
    arguments = signature.bind(*positional, **named).arguments
  except TypeError as e:
    raise ChoiceError(str(e), describe(function)) from e
  arguments = {n: _checked(function, n, value) for n, value in arguments.items()}
  return Choice(name, function, arguments, inputs(function))


def _read(kind, text):
  """(name, positional arguments, named ones) of a text."""
  try:
    if len(text) > LONGEST:  # Python's own parser can be broken by deep nesting
      raise ValueError(text)
    node = ast.parse(text.strip(), mode='eval').body
    if isinstance(node, ast.Name):
      return node.id, [], {}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
      named = {x.arg: ast.literal_eval(x.value) for x in node.keywords}
      if len(named) == len(node.keywords):
        return node.func.id, [ast.literal_eval(x) for x in node.args], named
  except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
    pass  # whatever Python makes of a text that is none of these
  raise ChoiceError('not a name, nor a name with arguments in brackets', kind.names)


def _checked(function, name, value):
  """An argument as the type that the function wants."""
  hint = parameters(function)[name]
  if bounds(hint) is None:
    fine = value in typing.get_args(hint)
  else:
    base, within = typing.get_args(hint)
    if base is float and type(value) is int and abs(value) < 2**53:
      value = float(value)
    fine = type(value) is base and value in within
  if not fine:
    raise ChoiceError(f'{name}={value!r}', describe(function))
  return value


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
  """Lists the keyword-only parameters of a choice, with their annotations."""
  hints = typing.get_type_hints(function, include_extras=True)
  return {name: hints[name] for name, p in inspect.signature(function).parameters.items()
          if p.kind is p.KEYWORD_ONLY}


def inputs(function: Callable[..., Any]) -> tuple[str, ...]:
  """Lists the positional parameters of a choice."""
  return tuple(name for name, p in inspect.signature(function).parameters.items()
               if p.kind is not p.KEYWORD_ONLY)


def describe(function: Callable[..., Any]) -> str:
  """Writes a choice with the values of its parameters: 'clip(limit: above 0)'."""
  parts = [f'{name}: {bounds(hint) or " or ".join(map(repr, typing.get_args(hint)))}'
           for name, hint in parameters(function).items()]
  return f'{function.__name__}({", ".join(parts)})' if parts else function.__name__


def bounds(hint: Any) -> Bounds | None:
  """Finds the bounds of a parameter's annotation; None where it is one of some texts."""
  return None if typing.get_origin(hint) is typing.Literal else typing.get_args(hint)[1]


def _of_vocabulary(function):
  return [name for name, hint in (parameters(function) if function else {}).items()
          if (b := bounds(hint)) and b.of_vocabulary]


def at_most(kind: Kind, text: str, top_k: int) -> str:
  """Rewrites a choice so that it counts at most so many tokens of the vocabulary."""
  choice = parse(kind, text)
  fewer = {name: min(choice.arguments[name], top_k) for name in _of_vocabulary(choice.function)}
  return str(dataclasses.replace(choice, arguments={**choice.arguments, **fewer}))
