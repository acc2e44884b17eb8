"""How far apart student and teacher are where the student goes: half of `opd diagnose`."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from rich.table import Table

from opd_jax.algorithm import buckets, metrics
from opd_jax.build import Parts
from opd_jax.data import examples as examples_lib
from opd_jax.data.streams import OWN
from opd_jax.parallel import hosts, sharding
from opd_jax.run import evaluate
from opd_jax.settings import Run
from opd_jax.tools import gradient_statistics

TOP_KS = (1, 4, 16)


def support(run: Run, parts: Parts, probe: Any) -> dict[str, Any]:
  """Looks at student and teacher on what the student wrote.

  Returns:
    'places': for each of `gradient_statistics.places`, the number of tokens, the exact reverse KL,
    quantiles of log p_T - log p_S, both entropies, and overlap; 'top_k': by k, the overlap of all
    tokens; 'graded': see `informativeness`, where the task grades.
  """
  own = next(iter(probe.streams.values()))  # that of the config itself
  o, ks = own.objective, sorted({evaluate.clamp_top_k(k, parts.student.model) for k in TOP_KS})

  def look(student, teacher, rollout):
    return buckets.join_rows(jax.lax.map(
        lambda rows: evaluate.compare(
            student, teacher, rows, model=parts.student.model, teacher=parts.teacher.model,
            temperature=o.temperature, teacher_temperature=o.teacher_temperature,
            chunk_tokens=parts.chunk_tokens, overlap_top_ks=tuple(ks)),
        buckets.split_rows(rollout, own.microbatch_rows)))

  program = jax.jit(look, out_shardings=sharding.by_rows(parts.mesh))
  batches = [hosts.fetch(program(probe.student, probe.graders['teacher'].params, rollout))
             for rollout in probe.rollouts]
  seen = {name: np.concatenate([b[name] for b in batches]).astype(np.float64)
          for name in batches[0]}
  mask = np.concatenate([hosts.fetch(rollout.mask) for rollout in probe.rollouts])
  ratio, k = seen['teacher_logprobs'] - seen['logprobs'], ks[-1]
  out = {'top_k': {}, 'places': {}}
  for name, chosen in gradient_statistics.places(mask).items():
    values = {n: float(seen[key][chosen].mean()) if chosen.any() else math.nan for n, key in (
        ('reverse_kl', 'kl'), ('entropy_student', 'entropy'),
        ('entropy_teacher', 'teacher_entropy'), *((n, f'{n}_{k}') for n in evaluate.OVERLAP))}
    levels = [math.nan] * len(metrics.QUANTILES)
    if chosen.any():
      levels = np.quantile(ratio[chosen], metrics.QUANTILES)
    out['places'][name] = {'tokens': int(chosen.sum()), **values, **{
        f'log_ratio_p{round(100 * q):02d}': float(v)
        for q, v in zip(metrics.QUANTILES, levels, strict=True)}}
  for k in ks:
    out['top_k'][str(k)] = {n: float(seen[f'{n}_{k}'][mask > 0].mean()) for n in evaluate.OVERLAP}
  rows = parts.examples[OWN].rows
  if examples_lib.has_verifier(parts.task, parts.examples[OWN]):
    rewards = np.concatenate([
        examples_lib.grade(parts.task, [rows[i] for i in indices], rollout,
                           parts.student.tokenizer)[0]
        for indices, rollout in zip(probe.indices, probe.rollouts, strict=True)])
    out['graded'] = informativeness(ratio, mask, rewards)
  return out


def informativeness(ratio: np.ndarray, mask: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
  """Measures whether the teacher likes right answers better than wrong ones.

  Args:
    ratio: log p_T - log p_S, [B, T-1].
    mask: [B, T-1].
    rewards: [B]; right from 1 on.

  Returns:
    The share of right rows; the token mean of the log-ratio on right and on wrong rows (NaN where
    there are none); the AUROC of a row's mean log-ratio for its being right.
  """
  right, count = rewards >= 1.0, mask.sum(axis=1)
  total = (ratio * mask).sum(axis=1)

  def mean(rows):
    return float(total[rows].sum() / count[rows].sum()) if count[rows].sum() else math.nan

  # A row without a token has no mean.
  scored = count > 0
  return {'accuracy': float(right.mean()), 'log_ratio_correct': mean(right),
          'log_ratio_wrong': mean(~right),
          'auroc': gradient_statistics.auroc((total / np.maximum(count, 1))[scored], right[scored])}


def numbers_table(*columns: str, title: str | None = None, caption: str | None = None) -> Table:
  """Makes a table whose first column is text. Where there is too little room, numbers are never
  cut."""
  out = Table(title=title, caption=caption, title_justify='left', caption_justify='left')
  for i, column in enumerate(columns):
    out.add_column(column, justify='right' if i else 'left', overflow='fold')
  return out


def support_tables(name: str, seen: dict[str, Any]) -> list[Table]:
  """Makes the tables of what `support` found."""
  k = list(seen['top_k'])[-1]
  levels = [f'log_ratio_p{round(100 * q):02d}' for q in metrics.QUANTILES]
  by_place = numbers_table(
      'where', 'tokens', 'reverse KL', *(n.removeprefix('log_ratio_') for n in levels), 'H(S)',
      'H(T)', f'top {k}', 'outside',
      title=f'{name}: student S and teacher T on what the student writes',
      caption='p05 to p95: quantiles of log p_T - log p_S of the tokens drawn, nats. H: entropy. '
      f"top {k}: the share of S's most likely tokens that are T's too. outside: S's mass on what "
      "is not among T's.")
  names = ('reverse_kl', *levels, 'entropy_student', 'entropy_teacher', 'overlap_count',
           'mass_outside')
  for place, values in seen['places'].items():
    by_place.add_row(place, str(values['tokens']), *(number(values[n]) for n in names))
  by_k = numbers_table('top k', 'shared by S and T', "S's mass on shared", "S's mass outside T's")
  for k, values in seen['top_k'].items():
    by_k.add_row(k, *(number(values[n]) for n in evaluate.OVERLAP))
  out = [by_place, by_k]
  if 'graded' in seen:
    g = seen['graded']
    graded = numbers_table('log p_T - log p_S', 'correct rows', 'wrong rows', 'AUROC', 'accuracy')
    graded.add_row('token mean', *(number(g[n]) for n in (
        'log_ratio_correct', 'log_ratio_wrong', 'auroc', 'accuracy')))
    out.append(graded)
  return out


def number(value: float) -> str:
  """Writes three decimals where they say something; '–' for what cannot be said."""
  if not math.isfinite(value):
    return '–'
  return f'{value:.3f}' if value == 0.0 or 1e-3 <= abs(value) < 1e3 else f'{value:.1e}'
