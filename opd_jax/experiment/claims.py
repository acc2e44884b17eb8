"""What a paper claims, as a number that a pipeline's stages give, and whether it holds here.

A claim measures arithmetic over what stages end with, a text such as
'opd.sampled_accuracy - sft.sampled_accuracy' or 'steps(rl, 0.9) / steps(opd, 0.9)':

  STAGE.METRIC          of METRICS, or by_group.NAME, the sampled accuracy of a part of the task; of
                        the student after the last step
  STAGE.before.METRIC   of the student before the first step
  STAGE.teacher.METRIC  of its teacher
  steps(STAGE, SHARE)   gradient steps until the sampled accuracy first reached that share of the
                        teacher's; no number if it never did
  flops(STAGE, SHARE)   the operations until then
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Mapping
import dataclasses
import math
import operator
from typing import Any

from opd_jax.errors import ConfigError

METRICS = ('sampled_accuracy', 'greedy_accuracy', 'reverse_kl', 'teacher_logprob')
REACH = ('steps', 'flops')
AFTER = 'after'
GROUP = 'by_group'
LONGEST = 2000  # characters of a measure
WHO = (AFTER, 'before', 'teacher')
HOLDS, PART, NOT, OPEN = 'holds', 'in part', 'does not hold', 'no number'
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv}


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim and how it is tried.

  Attributes:
    says: the claim, a sentence.
    post: what its source measured, with its setting.
    measure: the number that speaks for it, the larger the more.
    neutral: its value without any effect, 0 of a difference and 1 of a ratio.
    at_least: its value that counts as the effect that is claimed, at least `neutral`.
  """

  says: str = ''
  post: str = ''
  measure: str = ''
  neutral: float = 0.0
  at_least: float = 0.0


def parse(name: str, values: Mapping[str, Any], stages: Collection[str]) -> Claim:
  """Reads a claim of a report.

  Args:
    name: of the claim, for errors.
    values: its fields.
    stages: those of the report.

  Raises:
    ConfigError: a field that is unknown or of another type; a measure that is none.
  """
  fields = {f.name: type(f.default) for f in dataclasses.fields(Claim)}
  where = f'report.claims.{name}'
  if not isinstance(values, Mapping):
    raise ConfigError(f'{where}={values!r}; allowed: a group with the fields {list(fields)}')
  if set(values) != set(fields):
    raise ConfigError(f'{where} has the fields {sorted(values)}; allowed: {list(fields)}')
  for field, kind in fields.items():
    if type(values[field]) is not kind or kind is float and not math.isfinite(values[field]):
      raise ConfigError(f'{where}.{field}={values[field]!r}; allowed: a {kind.__name__}')
  claim = Claim(**values)
  if claim.at_least < claim.neutral:
    raise ConfigError(f'{where}.at_least={claim.at_least}; allowed: at least neutral='
                      f'{claim.neutral}')
  seen: list[str] = []

  def metric(stage, who, what):
    if stage not in stages:
      raise ValueError(f'no stage {stage!r}')
    seen.append(stage)
    return 1.0

  try:
    if len(claim.measure) > LONGEST:
      raise ValueError(f'{len(claim.measure)} characters')
    _evaluate(claim.measure, metric, lambda *_: 1.0)
    if not seen:
      raise ValueError('it names no stage')
  except (MemoryError, RecursionError, SyntaxError, ValueError) as e:
    raise ConfigError(f'{where}.measure={claim.measure!r}: {e}; allowed: arithmetic over '
                      f'STAGE.METRIC, STAGE.before.METRIC, STAGE.teacher.METRIC, '
                      f'steps(STAGE, SHARE) and flops(STAGE, SHARE), of the stages '
                      f'{sorted(stages)} and the metrics {list(METRICS)} and {GROUP}.NAME') from e
  return claim


def value(claim: Claim, metric: Callable[[str, str, str], float | None],
          reach: Callable[[str, str, float], float | None]) -> float | None:
  """Computes the measure of a claim for one seed; None where a stage does not have the number.

  Args:
    claim: whose.
    metric: (stage, of WHO, metric or 'by_group.NAME') -> the number.
    reach: ('steps' or 'flops', stage, share of the teacher's accuracy) -> what it took.
  """
  return _evaluate(claim.measure, metric, reach)


def _evaluate(text, metric, reach):
  def visit(node):
    match node:
      case ast.Expression(body=body):
        return visit(body)
      case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
        return float(number)
      case ast.UnaryOp(op=ast.USub(), operand=inner):
        found = visit(inner)
        return found if found is None else -found
      case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
        a, b = visit(left), visit(right)
        # Steps may be 0, of a student that was there from the start: then there is no ratio.
        if a is None or b is None or isinstance(op, ast.Div) and not b:
          return None
        return _OPERATORS[type(op)](a, b)
      case ast.Attribute():
        stage, *path = ast.unparse(node).split('.')
        who = path.pop(0) if path[0] in WHO else AFTER
        if stage.isidentifier() and (len(path) == 2 and path[0] == GROUP or (
            len(path) == 1 and path[0] in METRICS)):
          return metric(stage, who, '.'.join(path))
      case ast.Call(func=ast.Name(id=what), args=[ast.Name(id=stage), ast.Constant(
          value=float() as share)], keywords=[]) if what in REACH and 0 < share <= 1:
        metric(stage, AFTER, METRICS[0])  # there has to be such a stage
        return reach(what, stage, share)
    raise ValueError(f'{ast.unparse(node)!r} is nothing that is measured')

  return visit(ast.parse(text, mode='eval'))


def rename(text: str, names: Mapping[str, str]) -> str:
  """Writes a measure with other names of stages."""
  tree = ast.parse(text, mode='eval')
  for node in ast.walk(tree):
    if isinstance(node, ast.Name) and node.id in names:
      node.id = names[node.id]
  return ast.unparse(tree)


def verdict(claim: Claim, found: Mapping[str, Any] | None) -> str:
  """Judges a claim.

  It holds where the mean over seeds is at least what is claimed and its 95 % interval lies above
  the neutral value; in part where only one of the two is so. One seed has no interval, so that a
  claim holds in part at most.

  Args:
    claim: with what it claims.
    found: mean, and 'low' with several seeds, of its measure; None if a seed has no number.
  """
  if found is None:
    return OPEN
  large = found['mean'] >= claim.at_least
  sure = found.get('low', claim.neutral) > claim.neutral
  return HOLDS if large and sure else PART if large or sure else NOT
