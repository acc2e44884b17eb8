"""The time that the stages of a pipeline took by the clock, beside what they computed: a table on
the terminal and times.json. No two runs have the same, so it stands apart from the report."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from opd_jax.experiment import Pipeline, stage_dir
from opd_jax.files import disk
from opd_jax.run import metrics
from opd_jax.tools import report

FILE = 'times.json'


def step_seconds(workdir: pathlib.Path) -> float | None:
  """Computes how long a step of a run took on average: the steps in metrics.jsonl, evaluations and
  saving left out, without those in which something was compiled or the process had just started.

  None where no such step was logged.
  """
  rows = [r for r in metrics.read(workdir / metrics.JSONL) if r['kind'] == 'train' and 'perf' in r]
  warm = [1 / b['perf']['steps_per_s'] for a, b in zip(rows, rows[1:], strict=False)
          if a['perf']['compiles'] == b['perf']['compiles']]
  return float(np.mean(warm)) if warm else None


def summarize(summary: dict[str, Any], seconds: dict[str, list[float | None]]) -> dict[str, Any]:
  """Computes how long each method took to each level, and how many times longer the baseline.

  Args:
    summary: of `report.summarize`.
    seconds: {method: of a step, by seed}.

  Returns:
    {method: {'step_s', 'reach': {level: {'s', 'ratio'}}}}, each a `report.spread`; None where a
    seed has no time, or did not reach the level.
  """
  def taken(method, level):
    steps = summary['rows'][method]['reach'][level]['steps']
    return [None] * len(summary['seeds']) if steps is None else [
        s and n * s for n, s in zip(steps['values'], seconds[method], strict=True)]

  out: dict[str, Any] = {}
  for method, own in seconds.items():
    out[method] = {'step_s': report.spread(own), 'reach': {}}
    for level in summary['rows'][method]['reach']:
      mine, ratio = taken(method, level), None
      if summary['baseline'] not in (None, method):
        pairs = zip(taken(summary['baseline'], level), mine, strict=True)
        ratio = report.spread([b / m if b is not None and m else None for b, m in pairs])
      out[method]['reach'][level] = {'s': report.spread(mine), 'ratio': ratio}
  return out


def write(p: Pipeline, summary: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
  """Prints the times and writes times.json.

  Raises:
    StorageError: it cannot be written.
  """
  found = summarize(summary, {
      m: [step_seconds(stage_dir(workdir, m, s)) for s in summary['seeds']]
      for m in p.report.methods})
  levels = next(iter(found.values()))['reach'] if found else {}
  columns = ['', 's a step']
  for level in levels:
    columns += [f's to {float(level):.0%}', *(['less time'] if summary['baseline'] else [])]
  rows = []
  for method, times in found.items():
    row = [summary['rows'][method]['label'], report.number(times['step_s'], '{:.3g}')]
    for hit in times['reach'].values():
      row += [report.number(hit['s'], '{:.3g}'),
              *([report.number(hit['ratio'], '{:.1f}x')] if summary['baseline'] else [])]
    rows.append(row)
  metrics.print_table('Time by the clock, of all devices of the run together, without compiling',
                      columns, rows)
  disk.write_json(workdir / FILE, found)
  return found
