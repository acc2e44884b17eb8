"""The scaling law: constants that are found again, and what a report says of it."""

import dataclasses

import numpy as np
import pytest

from opd_jax import experiment
from opd_jax.errors import ConfigError
from opd_jax.experiment import scaling
from opd_jax.experiment.scaling import Cell, Law
from opd_jax.run.ledger import Ledger
from opd_jax.tools import report

LAW = Law(floor=0.01, size_scale=40.0, size_exponent=0.6, token_scale=900.0, token_exponent=0.7)
SIZES, TOKENS = (2e4, 4e4, 8e4, 16e4), (1e5, 2e5, 4e5, 8e5, 16e5)


def cells(law=LAW, noise=0.0, sizes=SIZES):
  rng = np.random.default_rng(0)
  return [Cell(n, d, law(n, d) * float(np.exp(noise * rng.normal())))
          for n in sizes for d in TOKENS]


def test_the_formula():
  law = Law(0.5, 8.0, 1.0, 27.0, 1 / 3)
  assert law(4.0, 27.0) == pytest.approx(0.5 + 8 / 4 + 27 / 3)


def test_constants_are_found_again():
  found = scaling.fit(cells())
  for name, value in dataclasses.asdict(LAW).items():
    assert getattr(found, name) == pytest.approx(value, rel=0.02), name
  assert scaling.error(found, cells()) < 1e-4


def test_it_predicts_what_it_has_not_seen():
  found = scaling.fit(cells(noise=0.02))
  larger = [Cell(n, 4 * d, LAW(n, 4 * d)) for n in (32e4, 64e4) for d in TOKENS]
  assert scaling.error(found, larger) < 0.1
  flat = Law(0.5, 0.0, 0.0, 0.0, 0.0)
  assert scaling.error(flat, larger) > 1.0  # the test could fail


@pytest.mark.parametrize(('some', 'match'), [
    (cells()[:7], '7 cells'), (cells(sizes=(2e4, 2e4)), 'of 1 sizes'),
    ([Cell(n, 1e5, 1.0) for n in range(1, 10)], '1 numbers of tokens'),
    ([*cells(), Cell(1e4, 1e5, 0.0)], r'a loss of 0\.0; allowed: above 0')])
def test_what_cannot_be_fitted(some, match):
  with pytest.raises(ValueError, match=match):
    scaling.fit(some)


class TestReport:

  def evaluation(self, n, step, tokens):
    flops = Ledger(student_training=6 * n * tokens).parts()
    return {'step': step, 'reverse_kl': LAW(n, tokens) if step else 9.0, 'flops': flops}

  def results(self, seeds=(0, 1)):
    out = {}
    for n in SIZES:
      evals = [self.evaluation(n, i, d) for i, d in enumerate((0.0, *TOKENS))]
      out[f's{n:.0f}'] = {'steps': len(TOKENS), 'flops': evals[-1]['flops'], 'parameters': n,
                          'before': evals[0], 'after': evals[-1], 'evals': evals, 'teacher': None}
    return {seed: out for seed in seeds}

  def pipeline(self, held_out=('s80000',)):
    methods = tuple(f's{n:.0f}' for n in SIZES)
    return experiment.Pipeline(report=experiment.Report(
        methods=methods, labels=methods, scaling={'rl': methods}, held_out=held_out))

  def test_cells_are_evaluations(self):
    law = report.summarize(self.pipeline(), self.results())['laws']['rl']
    assert (law['cells'], law['held_out']) == (15, 5)
    assert law['size_exponent'] == pytest.approx(LAW.size_exponent, rel=0.02)
    assert law['token_exponent'] == pytest.approx(LAW.token_exponent, rel=0.02)
    assert max(law['error'], law['held_out_error']) < 1e-3

  def test_the_table(self):
    title, columns, rows = next(t for t in report.tables(report.summarize(
        self.pipeline(held_out=()), self.results())) if t[0].startswith('L = '))
    assert len(columns) == len(rows[0]) and rows[0][-2:] == ['0', '–']

  def test_without_a_reverse_kl(self):
    results = self.results()
    del results[0]['s20000']['evals'][2]['reverse_kl']
    with pytest.raises(ConfigError, match=r's20000 has a reverse KL of 0\.0 at step 2; allowed'):
      report.summarize(self.pipeline(), results)

  @pytest.mark.parametrize(('field', 'value'), [
      ('scaling', {'rl': ('nobody',)}), ('held_out', ('nobody',))])
  def test_strangers_are_refused(self, field, value):
    from ml_collections import ConfigDict
    import tiny
    c = experiment.default_pipeline()
    c.stages = ConfigDict(dict(a=tiny.config('sft')))
    c.order = c.report.methods = c.report.labels = ('a',)
    c.report[field] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=rf"report\.{field} has \['nobody'\]; allowed"):
      experiment.parse_pipeline(c)
