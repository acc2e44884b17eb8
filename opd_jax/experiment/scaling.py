"""How the reverse KL to a teacher falls with the size of the student and the tokens it learns from.

  L(N, D) = E + A N^-alpha + B D^-beta

N parameters and D tokens of training; the form of Chinchilla (Hoffmann et al. 2022, arXiv
2203.15556, section 3.3), which surveys of on-policy distillation conjecture and nobody has fitted
(Song & Zheng 2026, arXiv 2604.00626). Fitted by the squared error of log L, from many starts.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats

from opd_jax.errors import ConfigError
from opd_jax.experiment import Pipeline

LEAST_CELLS = 8  # of five constants


@dataclasses.dataclass(frozen=True)
class Cell:
  """One measurement.

  Attributes:
    parameters: of the student, N.
    tokens: that it was trained on, D.
    loss: L in nats a token, above 0.
  """

  parameters: float
  tokens: float
  loss: float


@dataclasses.dataclass(frozen=True)
class Law:
  """The constants of L = floor + size_scale N^-size_exponent + token_scale D^-token_exponent."""

  floor: float
  size_scale: float
  size_exponent: float
  token_scale: float
  token_exponent: float

  def __call__(self, parameters: float, tokens: float) -> float:
    """Predicts the loss."""
    return (self.floor + self.size_scale * parameters ** -self.size_exponent
            + self.token_scale * tokens ** -self.token_exponent)


def fit(cells: Sequence[Cell]) -> Law:
  """Fits the law.

  Raises:
    ValueError: too few cells, of one size or one number of tokens, or a loss that is not above 0.
  """
  n, d, loss = (np.array([getattr(c, f.name) for c in cells], float)
                for f in dataclasses.fields(Cell))
  if len(cells) < LEAST_CELLS or len(set(n)) < 2 or len(set(d)) < 2:
    raise ValueError(f'{len(cells)} cells of {len(set(n))} sizes and {len(set(d))} numbers of '
                     f'tokens; allowed: at least {LEAST_CELLS}, of two of each')
  if not (loss > 0).all():
    raise ValueError(f'a loss of {loss.min()}; allowed: above 0')
  # In units of the smallest student and the shortest run, both terms are of the size of the loss.
  size, tokens = n / n.min(), d / d.min()

  def residuals(x):
    floor, a, b = np.exp(x[:3])
    return np.log(floor + a * size ** -x[3] + b * tokens ** -x[4]) - np.log(loss)

  best = None
  for share, alpha, beta in itertools.product((0.01, 0.3), (0.2, 1.0), (0.2, 1.0)):
    half = np.log(loss.max() / 2)
    start = [np.log(share * loss.min()), half, half, alpha, beta]
    found = scipy.optimize.least_squares(
        residuals, start, bounds=([-30, -30, -30, 0, 0], [5, 5, 5, 5, 5]))
    best = found if best is None or found.cost < best.cost else best
  floor, a, b = np.exp(best.x[:3])
  alpha, beta = best.x[3:]
  return Law(float(floor), float(a * n.min() ** alpha), float(alpha),
             float(b * d.min() ** beta), float(beta))


def error(law: Law, cells: Sequence[Cell]) -> float:
  """Computes the median of |log L_predicted - log L| over cells: 0.1 is about 10 per cent."""
  return float(np.median([abs(np.log(law(c.parameters, c.tokens) / c.loss)) for c in cells]))


def laws(p: Pipeline, results: dict[int, dict[str, dict[str, Any]]]) -> dict[str, Any]:
  """Fits a scaling law to each group of `report.scaling`: {title: constants, how many cells, and
  the median relative errors of those that were fitted and of those held out}. A cell is an
  evaluation of a method, its loss the geometric mean over seeds; its tokens are those that the
  operations of training stand for.

  Raises:
    ConfigError: too few evaluations, or without a reverse KL above 0.
  """
  out = {}
  for title, methods in p.report.scaling.items():
    cells: dict[bool, list[Cell]] = {False: [], True: []}
    for method in methods:
      runs = [results[s][method] for s in results]
      for found in zip(*([e for e in r['evals'] if e['step']] for r in runs), strict=True):
        n = float(runs[0]['parameters'])
        tokens = np.mean([e['flops']['student_training'] for e in found]) / (6 * n)
        loss = [e.get('reverse_kl', 0.0) for e in found]
        if min(loss) <= 0:
          raise ConfigError(f'report.scaling: {method} has a reverse KL of {min(loss)} at step '
                            f"{found[0]['step']}; allowed: above 0, with a teacher")
        cells[method in p.report.held_out].append(
            Cell(n, float(tokens), float(scipy.stats.gmean(loss))))
    try:
      law = fit(cells[False])
    except ValueError as e:
      raise ConfigError(f'report.scaling, {title}: {e}') from e
    out[title] = {**dataclasses.asdict(law), 'cells': len(cells[False]),
                  'error': error(law, cells[False]), 'held_out': len(cells[True]),
                  'held_out_error': error(law, cells[True]) if cells[True] else None}
  return out
