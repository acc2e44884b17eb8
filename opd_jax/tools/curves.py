"""The picture of a report: learning curves against gradient steps and against operations."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from opd_jax.experiment import Pipeline
from opd_jax.run.ledger import Ledger

MEASURE = 'sampled_accuracy'  # what the curves show, where a task grades


def draw(p: Pipeline, results: dict[int, dict[str, dict[str, Any]]]) -> bytes:
  """Draws sampled accuracy (where no stage has one, the reverse KL) against gradient steps and
  against FLOPs, one line a seed, and the mean; stages without either are left out. A section of the
  report is a row of two."""
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  sections = dict(p.report.sections) or {p.name: p.report.methods}
  many = 's' if len(results) > 1 else ''
  figure, rows = plt.subplots(len(sections), 2, figsize=(11, 4.2 * len(sections)), sharey='row',
                              squeeze=False)
  for axes, (title, methods) in zip(rows, sections.items(), strict=True):
    _draw_section(p, results, axes, methods)
    axes[0].set_title(f'{title}, seed{many} {", ".join(map(str, results))}', fontsize=11,
                      loc='left')
  figure.tight_layout()
  png = io.BytesIO()
  figure.savefig(png, dpi=120 if len(sections) == 1 else 80)
  plt.close(figure)
  return png.getvalue()


def _draw_section(p, results, axes, methods):
  """Draws some methods against steps on the left, against FLOPs on the right."""
  seeds, labels = list(results), dict(zip(p.report.methods, p.report.labels, strict=True))
  finals = [results[s][m]['after'] for s in seeds for m in methods]
  graded = any(MEASURE in e for e in finals)
  measure = MEASURE if graded else 'reverse_kl'
  goals = [r['teacher'][MEASURE] for s in seeds for m in methods
           if MEASURE in ((r := results[s][m]).get('teacher') or ())]
  for i, method in enumerate(methods):
    if not all(measure in results[s][method]['after'] for s in seeds):
      continue
    curves = [[(e['step'], Ledger(**e['flops']).total / 1e9, e[measure])
               for e in results[s][method]['evals']] for s in seeds]
    mean = np.mean([curve[:min(map(len, curves))] for curve in curves], axis=0)
    for axis, x in zip(axes, (0, 1), strict=True):
      for curve in curves if len(seeds) > 1 else ():
        axis.plot(*np.array(curve)[:, (x, 2)].T, color=f'C{i}', alpha=0.25, linewidth=0.8)
      axis.plot(mean[:, x], mean[:, 2], color=f'C{i}', label=labels[method], linewidth=1.8)
  for axis, name in zip(axes, ('gradient steps', 'GFLOP (training, sampling and teacher)'),
                        strict=True):
    if goals and len(set(goals)) <= len(seeds):  # of one teacher a seed
      axis.axhline(np.mean(goals), color='black', linestyle='--', linewidth=1, label='teacher')
    axis.set_xlabel(name)
    axis.set_xscale('symlog', linthresh=10)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel(f"{measure.replace('_', ' ')}, held-out problems")
  axes[0].set_ylim(0, 1 if graded else None)
  if axes[1].lines:
    axes[1].legend(loc='lower right' if graded else 'best', fontsize=9)
