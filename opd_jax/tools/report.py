"""The end of an experiment: tables on the terminal, report.md, report.json and curves.png."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

from ml_collections import ConfigDict
import numpy as np
import scipy.stats

from opd_jax import config as config_lib
from opd_jax.errors import ConfigError
from opd_jax.experiment import Pipeline, claims, makers, scaling, stage_config, stage_dir, stage_run
from opd_jax.experiment.claims import Claim
from opd_jax.files import disk
from opd_jax.files import workdir as workdir_lib
from opd_jax.run import ledger, metrics
from opd_jax.run.ledger import Ledger
from opd_jax.tools import curves

BASE, TEACHER = 'base', 'teacher'
# One accuracy name a column; the interval stands beside each.
ACCURACIES = ('sampled_accuracy', 'greedy_accuracy')
MEASURE = curves.MEASURE  # what the teacher's level is


def reach(evals: list[dict[str, Any]], level: float) -> tuple[float, Ledger] | None:
  """Finds the (steps, operations) at which the sampled accuracy first reaches `level`, interpolated
  linearly from the evaluation before; None if it never does."""
  before = None
  for e in evals:
    point = e['step'], Ledger(**e['flops']), e[MEASURE]
    if point[2] >= level:
      if before is None or point[2] == before[2]:
        return point[:2]
      share = (level - before[2]) / (point[2] - before[2])
      return (before[0] + share * (point[0] - before[0]),
              before[1] * (1 - share) + point[1] * share)
    before = point
  return None


def spread(values: list[float | None]) -> dict[str, Any] | None:
  """Computes mean and 95 % t-interval over seeds; None unless every seed has a value."""
  if not values or any(v is None for v in values):
    return None
  mean = float(np.mean(values))
  out = {'mean': mean, 'values': list(map(float, values))}
  if len(values) > 1:
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values))
    out |= {'low': mean - half, 'high': mean + half}
  return out


def summarize(p: Pipeline, results: dict[int, dict[str, dict[str, Any]]]) -> dict[str, Any]:
  """Computes the numbers of the report from the stages' result.json, {seed: {stage: result}}."""
  seeds = list(results)
  taught = [m for m in p.report.methods if all(results[s][m].get('teacher') for s in seeds)]
  # Without accuracies (a task that does not grade) there is no share of the teacher's to reach.
  runs = [results[s][m] for s in seeds for m in p.report.methods]
  shown = [e for r in runs for e in (r['after'], r['teacher']) if e]
  graded = taught if all(MEASURE in e for e in shown) else []
  goals = {s: results[s][graded[0]]['teacher'][MEASURE] for s in seeds if graded}

  def row(label: str, evals: list[dict[str, Any]], flops: list[float | None],
          steps: list[int | None]) -> dict[str, Any]:
    out: dict[str, Any] = {'label': label}
    for name in (*ACCURACIES, 'reverse_kl'):
      out[name] = spread([e.get(name) for e in evals])
      if len(evals) == 1 and f'{name}_low' in evals[0]:
        # One seed: the interval is over problems.
        out[name] |= {end: evals[0][f'{name}_{end}'] for end in ('low', 'high')}
    out['steps'], out['flops'] = spread(steps), spread(flops)
    return out

  hits: dict[str, dict[str, list[tuple[float, Ledger] | None]]] = {}
  made: dict[str, dict[str, Any]] = {}
  for method, label in zip(p.report.methods, p.report.labels, strict=True):
    runs = [results[s][method] for s in seeds]
    spent = [Ledger(**r['flops']) for r in runs]
    made[method] = row(label, [r['after'] for r in runs], [x.total for x in spent],
                       [r['steps'] for r in runs])
    made[method]['flops_by_part'] = {
        part: spread([x.parts()[part] for x in spent]) for part in ledger.PARTS}
    hits[method] = {str(level): [reach(r['evals'], level * goals[s]) for r, s in zip(
        runs, seeds, strict=True)] for level in (p.report.levels if graded else ())}
    made[method]['reach'] = {
        level: {'seeds_reached': sum(h is not None for h in found),
                'steps': spread([h and h[0] for h in found]),
                'flops': spread([h and h[1].total for h in found])}
        for level, found in hits[method].items()}
  sections, none = outline(p, results), [None] * len(seeds)
  rows = {name: made[name] if evals is None else row(name.rpartition(' ')[-1], evals, none, none)
          for section in sections.values() for name, evals in section.items()} | made
  judged = {name: judge(claim, results, goals) for name, claim in p.report.claims.items()}
  return {'name': p.name, 'seeds': seeds, 'claims': judged,
          'sections': {title: list(names) for title, names in sections.items()},
          'laws': scaling.laws(p, results), 'levels': list(p.report.levels),
          'rows': rows, 'baseline': baseline(p) if graded else None,
          'ratios': ratios(hits, baseline(p)) if graded else {}}


def outline(p: Pipeline, results: dict[int, dict[str, dict[str, Any]]]
            ) -> dict[str, dict[str, list[dict[str, Any]] | None]]:
  """Lists the rows of each section, the base and the teacher around the methods where those share
  it: {title: {name of the row: its evaluations by seed, or None for a method}}."""
  out = {}
  made_here = p.report.teacher in [f'stage:{m}' for m in p.report.methods]
  for title, methods in (dict(p.report.sections) or {p.name: p.report.methods}).items():
    mark, seen = f'{title}: ', list(methods)
    if not p.report.sections:  # the whole of it is about one base and one teacher
      mark = ''
      seen = sorted(methods, key=lambda m: not all(r[m].get('teacher') for r in results.values()))
    found = [shared([[runs[m][who] for m in (seen if mark else seen[:1])]
                     for runs in results.values()]) for who in ('before', 'teacher')]
    rows = {mark + BASE: found[0], **dict.fromkeys(methods),
            mark + TEACHER: None if made_here else found[1]}
    out[title] = {name: evals for name, evals in rows.items() if evals or name in methods}
  return out


def shared(found: list[list[dict[str, Any] | None]]) -> list[dict[str, Any]] | None:
  """Picks the evaluation of every seed, of a list each, that is the same in all methods which have
  one; None where a seed has none, or several."""
  out = [[e for e in evals if e] for evals in found]
  if not all(out) or any(len({e[name] for e in evals if name in e}) > 1
                         for evals in out for name in (*ACCURACIES, 'reverse_kl')):
    return None
  return [max(evals, key=len) for evals in out]  # without a teacher there is no reverse KL


def judge(claim: Claim, results: dict[int, dict[str, dict[str, Any]]], goals: dict[int, float]
          ) -> dict[str, Any]:
  """Tries a claim on the results of all seeds, {seed: {stage: result}}; `goals` are the sampled
  accuracies that a stage without a teacher is to reach, where there are any."""
  def measured(seed):
    runs = results[seed]

    def metric(stage, who, name):
      values, (group, _, part) = runs[stage][who] or {}, name.partition('.')
      return values.get(group, {}).get(part) if part else values.get(name)

    def reached(what, stage, share):
      goal = (runs[stage]['teacher'] or {}).get(MEASURE, goals.get(seed))
      hit = goal and reach(runs[stage]['evals'], share * goal)
      return hit and (hit[0] if what == 'steps' else hit[1].total)

    return claims.value(claim, metric, reached)

  found = spread([measured(seed) for seed in results])
  return {**dataclasses.asdict(claim), 'found': found, 'verdict': claims.verdict(claim, found)}


def baseline(p: Pipeline) -> str | None:
  """Names the method that the others are compared with: `report.baseline`, or the one that made the
  teacher, if one of several did."""
  named = p.report.baseline or p.report.teacher.removeprefix('stage:')
  return named if named in p.report.methods and len(p.report.methods) > 1 else None


def ratios(hits: dict[str, dict[str, list[tuple[float, Ledger] | None]]], base: str | None
           ) -> dict[str, Any]:
  """Computes how many times more the baseline needed than each other method, seed by seed, where
  all seeds of both reached the level.

  Args:
    hits: {method: {level: what `reach` found of each seed}}.
    base: the baseline; None for no ratios.

  Returns:
    {method: {level: {'steps', 'flops' (all that was spent), 'flops_text_given' (without what the
    teacher spent on writing the baseline's text): `spread`}}}.
  """
  out: dict[str, Any] = {}
  for method in hits if base else ():
    for level, mine in hits[method].items():
      pairs = list(zip(hits[base][level], mine, strict=True))
      if method == base or None in (x for pair in pairs for x in pair):
        continue
      found = [ledger.efficiency(b, m) for (_, b), (_, m) in pairs]
      out.setdefault(method, {})[level] = {
          'steps': spread([b / m if m else None for (b, _), (m, _) in pairs]),
          'flops': spread([e and e.charged for e in found]),
          'flops_text_given': spread([e and e.text_given for e in found])}
  return out


def number(value: dict[str, Any] | None, form: str, upper: float = math.inf) -> str:
  """Writes a `spread`; its interval where it has one, '–' where there is none."""
  if value is None:
    return '–'
  text = form.format(value['mean'])
  if 'low' in value:  # a t-interval knows no bounds; what it stands for lies in 0..upper
    text += f" [{form.format(max(value['low'], 0))}, {form.format(min(value['high'], upper))}]"
  return text


def signed(value: dict[str, Any] | None) -> str:
  """Writes a `spread` that may be negative."""
  if value is None:
    return '–'
  interval = f" [{value['low']:.3g}, {value['high']:.3g}]" if 'low' in value else ''
  return f"{value['mean']:.3g}{interval}"


def giga(flops: dict[str, Any] | None) -> dict[str, Any] | None:
  """Converts a `spread` of FLOPs to GFLOP."""
  return flops and {name: np.asarray(value) / 1e9 for name, value in flops.items()}


def tables(summary: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
  """Makes the tables of the report as (title, columns, rows of text)."""
  many = len(summary['seeds']) > 1
  what = (f'mean and 95 % t-interval over seeds {summary["seeds"]}' if many else
          f'seed {summary["seeds"][0]}, 95 % bootstrap interval over problems')
  lines = {m: [r['label'], number(r['sampled_accuracy'], '{:.3f}', 1.0),
           number(r['greedy_accuracy'], '{:.3f}', 1.0), number(r['reverse_kl'], '{:.4f}'),
           number(r['steps'] and {'mean': r['steps']['mean']}, '{:.0f}'),
           number(giga(r['flops'] and {'mean': r['flops']['mean']}), '{:.0f}')]
           for m, r in summary['rows'].items()}
  out = [(f'{title} ({what})',
          ['', 'sampled accuracy', 'greedy accuracy', 'reverse KL (nats/token)', 'steps', 'GFLOP'],
          [lines[m] for m in methods])
         for title, methods in summary['sections'].items()]
  out.append(_parts_table(summary))
  if summary['laws']:
    out.append(('L = E + A N^-a + B D^-b: reverse KL by parameters and tokens; median relative '
                'errors', ['', 'E', 'A', 'a', 'B', 'b', 'cells', 'error', 'held out', 'error'],
                [[title, *(f'{law[name]:.3g}' for name in (
                    'floor', 'size_scale', 'size_exponent', 'token_scale', 'token_exponent')),
                  str(law['cells']), f"{law['error']:.0%}", str(law['held_out']),
                  '–' if law['held_out_error'] is None else f"{law['held_out_error']:.0%}"]
                 for title, law in summary['laws'].items()]))
  if summary['claims']:
    out.append(('Claims; an effect is at least as large as is claimed, and its interval leaves out '
                'that there is none, or it holds in part or not',
                ['claim', 'its source', 'here', 'claimed', ''],
                [[c['says'], c['post'], signed(c['found']), f"{c['at_least']:g}", c['verdict']]
                 for c in summary['claims'].values()]))
  return out + _level_tables(summary, many) if summary['baseline'] else out


def _parts_table(summary: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
  """Where the compute went, without the columns in which nobody spent anything."""
  spent = {r['label']: r['flops_by_part'] for r in summary['rows'].values() if 'flops_by_part' in r}
  parts = [n for n in ledger.PARTS if any(by[n]['mean'] for by in spent.values())]
  return ('GFLOP by part, mean', ['', *(n.replace('_', ' ') for n in parts)],
          [[label, *(f"{by[n]['mean'] / 1e9:.0f}" for n in parts)] for label, by in spent.items()])


def _level_tables(summary: dict[str, Any], many: bool
                  ) -> list[tuple[str, list[str], list[list[str]]]]:
  out, base = [], summary['rows'][summary['baseline']]
  # Only where the teacher wrote for the baseline does it matter who pays for that.
  written = base['flops_by_part']['teacher_sampling']['mean'] > 0
  for level in map(str, summary['levels']):
    body = []
    for method, row in summary['rows'].items():
      if 'reach' not in row:
        continue
      hit, ratio = row['reach'][level], summary['ratios'].get(method, {}).get(level, {})
      steps = number(hit['steps'], '{:.0f}')
      if hit['steps'] is None and many:
        steps = f"reached by {hit['seeds_reached']} of {len(summary['seeds'])} seeds"
      body.append([row['label'], steps, number(giga(hit['flops']), '{:.0f}'),
                   *(number(ratio.get(unit), '{:.1f}x') for unit in (
                       'steps', 'flops', *(['flops_text_given'] if written else [])))])
    out.append((f"To {float(level):.0%} of the teacher's sampled accuracy; ratios to "
                f"{base['label']}",
                ['', 'gradient steps', 'GFLOP', 'fewer steps', 'less compute',
                 *(['less compute, its text given'] if written else [])], body))
  return out


def markdown(title: str, columns: list[str], rows: list[list[str]]) -> str:
  """Writes one table as Markdown."""
  lines = [f'**{title}**', '', '| ' + ' | '.join(columns) + ' |',
           '|' + '---|' * len(columns)]
  return '\n'.join(lines + ['| ' + ' | '.join(row) + ' |' for row in rows]) + '\n'


def read_results(p: Pipeline, workdir: pathlib.Path) -> dict[int, dict[str, dict[str, Any]]]:
  """Reads the result.json of every stage of the report: {seed: {stage: result}}.

  Raises:
    ConfigError: a stage has not finished, is another config's, or has numbers that are none; names
      it.
  """
  results: dict[int, dict[str, dict[str, Any]]] = {}
  for seed in p.seeds:
    results[seed] = {}
    for method in p.report.methods:
      folder, config = stage_dir(workdir, method, seed), stage_config(p, method, seed, workdir)
      try:
        found = workdir_lib.result(folder, stage_run(p, method, seed))
        if found is not None:
          workdir_lib.check_config(folder, _as_made(p, method, seed, folder, config))
          check_numbers(found)
      except ConfigError as e:
        raise ConfigError(f'stage {method} of seed {seed}: {e}') from e
      if found is None:
        raise ConfigError(f'stage {method} of seed {seed} has not finished '
                          f'({folder / workdir_lib.RESULT} is missing); allowed: run `opd train` '
                          'with this config and work directory')
      results[seed][method] = found
  return results


def _as_made(p: Pipeline, method: str, seed: int, folder: pathlib.Path, config: ConfigDict
             ) -> dict[str, Any]:
  """A stage's settings, with the paths of earlier stages as config.json has them: a directory that
  was moved or copied as a whole can still be reported."""
  settings, theirs = config_lib.to_dict(config), workdir_lib.read_config(folder)
  for part, maker in makers(p.runs[method]).items():
    group = theirs.get(part)
    path = str(group.get('path')) if isinstance(group, dict) else ''
    if path.endswith(f'/{stage_dir(pathlib.Path(), maker, seed) / workdir_lib.EXPORT}'):
      settings[part]['path'] = path
  return settings


def check_numbers(result: dict[str, Any]) -> None:
  """Checks that what a report reads of a result.json are numbers, that accuracies lie in 0..1, and
  that all evaluations of the student have the same.

  Raises:
    ConfigError: names the evaluation and the field.
  """
  evals = [*result['evals'], result['before'], result['after'], *filter(None, [result['teacher']])]
  names = [f'{name}{end}' for name in (*ACCURACIES, 'reverse_kl') for end in ('', '_low', '_high')]
  if not result['evals']:
    raise ConfigError(f'{workdir_lib.RESULT}: evals=[]; allowed: at least one evaluation')
  ledger.read(result['flops'], workdir_lib.RESULT)
  for i, e in enumerate(evals):
    # A teacher has no KL to itself; elsewhere, what one has all have.
    of_teacher = i == len(result['evals']) + 2
    lacks = [n for n in names if n in result['after'] and n not in e
             and not (of_teacher and n.startswith('reverse_kl'))]
    if lacks:
      raise ConfigError(f"{workdir_lib.RESULT}: the evaluation at step {e.get('step')} has no "
                        f'{lacks[0]}; allowed: one that has, as the last one')
    read = [(name, e[name]) for name in names if name in e]
    lonely = [n for n in names if n in e and n.removesuffix('_low').removesuffix('_high') not in e]
    if not of_teacher:
      ledger.read(e['flops'], f"{workdir_lib.RESULT} at step {e['step']}")
    read += [(f'{n} without its mean', e[n]) for n in lonely]
    for name, value in read:
      share = name.startswith(ACCURACIES)
      if type(value) not in (int, float) or not math.isfinite(value) or (
          share and not 0 <= value <= 1):
        raise ConfigError(f"{workdir_lib.RESULT}: {name}={value!r} at step {e.get('step')}; "
                          f'allowed: a finite number{" of 0 to 1" if share else ""}')


def write(p: Pipeline, results: dict[int, dict[str, dict[str, Any]]], workdir: pathlib.Path
          ) -> dict[str, Any]:
  """Prints the tables and writes report.md, report.json and curves.png into the work directory.

  Raises:
    StorageError: they cannot be written.
  """
  summary = summarize(p, results)
  parts = tables(summary)
  for part in parts:
    metrics.print_table(*part)
  disk.write_text(workdir / 'report.md', '\n'.join(markdown(*part) for part in parts))
  disk.write_json(workdir / 'report.json', summary)
  disk.write_bytes(workdir / 'curves.png', curves.draw(p, results))
  print(f'picture: {workdir / "curves.png"}')
  return summary
