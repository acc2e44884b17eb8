"""The clock's table beside a report, from rows that are written down here."""

import json

import pytest

from opd_jax import experiment
from opd_jax.tools import times


def write_rows(folder, *rows):
  """A metrics.jsonl of steps of so many seconds, with so many programs compiled by then."""
  folder.mkdir(parents=True)
  (folder / 'metrics.jsonl').write_text(''.join(
      json.dumps({'kind': 'train', 'step': i, 'perf': {'steps_per_s': 1 / s, 'compiles': n}}) + '\n'
      for i, (s, n) in enumerate(rows, 1)))


def test_steps_that_compiled_are_left_out(tmp_path):
  write_rows(tmp_path / 'a', (60.0, 3), (2.0, 3), (30.0, 5), (4.0, 5))
  assert times.step_seconds(tmp_path / 'a') == pytest.approx(3.0)
  write_rows(tmp_path / 'b', (60.0, 3))
  assert times.step_seconds(tmp_path / 'b') is None
  assert times.step_seconds(tmp_path / 'nowhere') is None


def test_ratios_are_those_of_time(tmp_path, capsys):
  report = experiment.Report(methods=('opd', 'sft'), labels=('OPD', 'SFT'), baseline='sft')
  p = experiment.Pipeline(report=report)
  reach = {'opd': [10.0, 20.0], 'sft': [40.0, 40.0]}
  summary = {'seeds': [0, 1], 'baseline': 'sft', 'rows': {
      m: {'label': m.upper(), 'reach': {'0.9': {'steps': {'values': steps}},
                                        '0.95': {'steps': None}}} for m, steps in reach.items()}}
  for seed in (0, 1):
    write_rows(experiment.stage_dir(tmp_path, 'opd', seed), (9.0, 1), (2.0, 1), (2.0, 1))
    write_rows(experiment.stage_dir(tmp_path, 'sft', seed), (9.0, 1), (1.0, 1))
  got = times.write(p, summary, tmp_path)
  assert got['opd']['step_s']['values'] == pytest.approx([2.0, 2.0])
  assert got['opd']['reach']['0.9']['s']['values'] == pytest.approx([20.0, 40.0])
  assert got['opd']['reach']['0.9']['ratio']['values'] == pytest.approx([2.0, 1.0])
  assert got['opd']['reach']['0.95'] == {'s': None, 'ratio': None}
  assert got['sft']['reach']['0.9']['ratio'] is None
  assert json.loads((tmp_path / 'times.json').read_text()) == json.loads(json.dumps(got))
  assert '1.5x' in capsys.readouterr().out
