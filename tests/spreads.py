"""Means and t-intervals over seeds, computed without the package."""

import math
import statistics

import pytest

T_975 = {1: 12.706204736, 2: 4.30265273}  # Student's t by degrees of freedom, from a table


def t_interval(values):
  half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
  return statistics.mean(values) - half, statistics.mean(values) + half


def assert_spread(got, values):
  """`got` is the mean of `values` and their t-interval."""
  assert got['values'] == pytest.approx(values)
  assert got['mean'] == pytest.approx(statistics.mean(values))
  assert (got['low'], got['high']) == pytest.approx(t_interval(values), rel=1e-6)
