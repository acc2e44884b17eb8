"""Which estimator for this pair of models: `opd diagnose`.

On a few batches that the student writes (the run's own prompts, sampler, temperatures, microbatches
and mesh), two questions that decide between objectives before any of them is trained:

  Estimators. The gradient of each on the very same tokens, against the exact full-vocabulary
  reverse KL: bias, variance, and what a step costs.
  Support. How far apart the two models are where the student goes: log-ratios, overlap of the top
  k, by place, and whether the teacher's opinion of a row says that its answer is right.

Only the student's own rows are looked at: `config.given` and batches that somebody else writes are
left out. The gradients of one estimator and the exact ones are kept, 2 R times what is trained.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import json
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
from rich.console import Console
from rich.table import Table

from opd_jax import build as build_lib
from opd_jax import (
  checks,
  data,
  diagnostics,
  doctor,
  evaluate,
  flops,
  lora,
  score,
  sharding,
  teachers,
  train,
  update,
)
from opd_jax import config as config_lib
from opd_jax.build import Setup
from opd_jax.objective import Objective, wants
from opd_jax.types import Heads, Params, Rollout, Scores

RESULT = 'diagnose.json'
OWN, PLAIN, K2, EXACT = 'this config', 'sampled', 'sampled, k2 direct', 'exact reverse KL'
TOP_KS = (1, 4, 16)
# Of what `update.gradient` returns: how often something is bounded, left out or replaced.
RATES = ('clip_rate', 'shaped_rate', 'counted_rate', 'local_rate')


@dataclasses.dataclass(frozen=True)
class Probe:
  """The batches, and what looks at them.

  Attributes:
    rollouts: R of them, B rows each.
    indices: of the examples of each.
    group_size: rows of one prompt.
    microbatch_rows: of a pass.
    trained: the parameters to be differentiated by, and what they are adapters on.
    frozen: None where the whole student is trained.
    weights: of all models.
  """

  rollouts: list[Rollout]
  indices: list[np.ndarray]
  group_size: int
  microbatch_rows: int
  trained: Params
  frozen: lora.Frozen | None
  weights: train.Weights

  @property
  def tokens(self) -> list[float]:
    """Of each batch, those that the student chose."""
    return [float(np.asarray(rollout.mask).sum()) for rollout in self.rollouts]


def run(c: ConfigDict, name: str, workdir: pathlib.Path | None, console: Console
        ) -> dict[str, Any]:
  """`opd diagnose`: prints the tables, and writes diagnose.json where there is a work directory.

  Args:
    c: of one run.
    name: for the titles.
    workdir: made if it does not exist; None to write nothing.
    console: to print on.

  Returns:
    What diagnose.json holds: 'estimators' and 'support', see `estimators` and `support`.

  Raises:
    ConfigError: the config cannot be built, has no teacher, or is for rows that the student does
      not write.
  """
  check(c)
  s = build_lib.build(c)
  doctor.require(c, doctor.examine(c, s))
  shards, rows = sharding.row_shards(s.mesh), c.diagnose.prompts * group_size(c)
  if rows % shards:
    raise config_lib.ConfigError(
        f'diagnose.prompts={c.diagnose.prompts} makes batches of {rows} rows, which compute.mesh '
        f'splits {shards} ways; allowed: a multiple')
  with jax.set_mesh(s.mesh):
    probe = take_probe(c, s)
    seen = support(c, s, probe)
    console.print(*support_tables(name, seen), sep='\n')
    rows, rates = estimators(c, s, probe, console)
    console.print(estimator_table(name, c, probe, rows))
    if rates:
      console.print(f'{OWN}: ' + ', '.join(f'{n} {v:.3f}' for n, v in rates.items()))
  out = plain({'config': config_lib.to_dict(c), 'tokens': sum(probe.tokens), 'estimators': rows,
               'rates': rates, 'support': seen})
  if workdir is not None:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / RESULT).write_text(json.dumps(out, indent=2) + '\n')
    console.print(f'written: {workdir / RESULT}', soft_wrap=True)
  return out


def check(c: ConfigDict) -> None:
  """Refuses what has nothing to diagnose, before anything is loaded.

  Raises:
    ConfigError: names the field.
  """
  checks.validate(c)
  if c.teacher.kind == teachers.NONE:
    raise config_lib.ConfigError(
        f'teacher.kind={c.teacher.kind!r}: estimators of a divergence to a teacher cannot be '
        f'compared without one; allowed: one of {teachers.names()[1:]}')
  if c.data.source != 'student':
    raise config_lib.ConfigError(
        f'data.source={c.data.source!r}: estimates from one token need rows that the student '
        "wrote; allowed: 'student'")


def group_size(c: ConfigDict) -> int:
  """Samples of a prompt: at least two, for the leave-one-out baseline."""
  return max(2, c.data.samples_per_prompt)


def objectives(c: ConfigDict, o: Objective, top_k: int) -> dict[str, Objective]:
  """The objectives that are compared, by name; `o`, the config's own, is the first.

  All share its temperatures and its reduction. k2 is left out where samples are not from the
  policy itself, for which only the policy gradient can correct.
  """
  plain = Objective(temperature=o.temperature, teacher_temperature=o.teacher_temperature,
                    reduction=o.reduction)
  sampled = functools.partial(dataclasses.replace, plain)
  direct = functools.partial(dataclasses.replace, plain, route='direct', importance='none')
  out = {
      OWN: o, PLAIN: plain,
      'sampled, exact baseline': sampled(baseline='exact'),
      'sampled, batch_mean baseline': sampled(baseline='batch_mean'),
      'sampled, leave_one_out baseline': sampled(baseline='leave_one_out'),
      'sampled, discount 1': sampled(discount=1.0),
      'sampled, clip 5': sampled(shaping='clip', shaping_scale=5.0),
      'sampled, log': sampled(shaping='log'),
      'sampled, power 1': sampled(shaping='power', shaping_scale=1.0),
      'sampled, Jensen-Shannon weight': sampled(divergence='jensen_shannon', divergence_alpha=0.5),
      K2: direct(estimator='k2'),
  }
  if c.sample.top_p < 1.0 or c.sample.top_k or c.sample.teacher_mix:
    del out[K2]
  for support, tail in (('teacher_top_k', 'renormalize'), ('teacher_top_k', 'bucket'),
                        ('teacher_top_k', 'stop_gradient'), ('union_top_k', 'bucket'),
                        ('student_top_k', 'bucket')):
    name = f"{support.removesuffix('_top_k')} top {top_k}, {tail}"
    out[name] = direct(support=support, top_k=top_k, tail=tail)
  return out | {EXACT: direct(support='full'),
                'exact forward KL': direct(support='full', divergence='forward_kl')}


def take_probe(c: ConfigDict, s: Setup) -> Probe:
  """Lets the student write the batches, as the run would."""
  frozen = build_lib.read_frozen(s)
  trained = build_lib.read_trained(s)
  weights = train.Weights(lora.join(frozen, trained), build_lib.read_teacher(s, frozen),
                          build_lib.read_teacher(s, frozen, 'reference'))
  group, key = group_size(c), jax.random.key(c.seed)
  microbatch = math.gcd(c.compute.microbatch_rows, c.diagnose.prompts * group)
  author = train.compile_rows(c, s, 'student', s.objective, microbatch, None)
  rollouts, indices = [], []
  for batch in range(c.diagnose.batches):
    indices.append(s.examples.indices(batch, c.diagnose.prompts).repeat(group))
    rollouts.append(jax.block_until_ready(train.write(
        author, s, s.examples, indices[-1], weights,
        build_lib.fold_in(key, build_lib.SAMPLE, batch))))
  return Probe(rollouts, indices, group, microbatch, trained, frozen, weights)


# --- Estimators ---


def estimators(c: ConfigDict, s: Setup, probe: Probe, console: Console
               ) -> tuple[list[dict[str, Any]], dict[str, float]]:
  """Every objective's gradient on the probe.

  Returns:
    For each: 'estimator', its name; the statistics of `diagnostics.gradient_statistics`; 'flops',
    the operations of scoring and a gradient step relative to those of the plain sampled objective;
    'tokens_per_s' of scoring and gradient, measured. And the mean of each of RATES that the
    config's own objective has.
  """
  names = objectives(c, s.objective, evaluate.clamp_top_k(c.diagnose.top_k, s.student.model))
  # A program for each that differs, and not for each objective.
  scorer = functools.cache(functools.partial(train.compile_scorer, c, s, probe.microbatch_rows))
  products = jax.jit(_products, out_shardings=sharding.replicated(s.mesh))
  exact, _, exact_seconds = gradients(c, s, probe, names[EXACT], scorer)
  reference = np.asarray(products(exact, exact), np.float64)
  plain_flops = step_flops(s, probe, names[PLAIN])
  out, rates = [], {}
  for name, o in names.items():
    with console.status(name):
      grads, seconds = exact, exact_seconds
      if name != EXACT:
        grads, metrics, seconds = gradients(c, s, probe, o, scorer)
      own, cross = (np.asarray(products(grads, other), np.float64) for other in (grads, exact))
    if name == OWN:
      rates = {n: float(np.mean([m[n] for m in metrics])) for n in RATES if n in metrics[0]}
    out.append({'estimator': name,
                **diagnostics.gradient_statistics(own, cross, reference),
                'flops': step_flops(s, probe, o) / plain_flops,
                'tokens_per_s': float(np.mean(probe.tokens)) / seconds})
  return out, rates


def gradients(c: ConfigDict, s: Setup, probe: Probe, o: Objective,
              scorer: Callable[..., Callable[..., Scores]]
              ) -> tuple[list[Params], list[dict[str, Any]], float]:
  """The gradient of an objective on each batch, the metrics of each, and the median of the seconds
  that scoring and gradient took together (compiled before)."""
  rows = train.RowPrograms(
      'student', False, o, None,
      {name: scorer(*program) for name, program in train.scorer_programs(s, o).items()}, None)
  heads = Heads(teacher=s.teacher.model.head(probe.weights.teacher),
                reference=s.reference and s.reference.model.head(probe.weights.reference))
  scalar = sharding.replicated(s.mesh)
  program = jax.jit(functools.partial(
      update.gradient, model=s.student.model, objective=o, group_size=probe.group_size,
      on_policy=True, chunk_tokens=c.compute.chunk_tokens, microbatch_rows=probe.microbatch_rows),
      out_shardings=(scalar, sharding.param_shardings(s.trained_specs, s.mesh), scalar))
  key = build_lib.fold_in(jax.random.key(c.seed), build_lib.GATE, 0)

  def measure(batch):
    began = time.perf_counter()
    graded = train.grade(rows, s, s.examples, probe.indices[batch], probe.weights,
                         probe.rollouts[batch])
    jax.block_until_ready(graded)  # see train: programs with collectives, one after the other
    _, grads, metrics = jax.block_until_ready(program(
        probe.trained, graded, heads, jnp.int32(0), jax.random.fold_in(key, batch), probe.frozen))
    return grads, jax.device_get(metrics), time.perf_counter() - began

  measure(0)  # compiles
  grads, metrics, seconds = zip(*map(measure, range(len(probe.rollouts))), strict=True)
  return list(grads), list(metrics), float(np.median(seconds))


def _products(a: list[Params], b: list[Params]) -> jax.Array:
  """The inner products of two lists of gradients, float32 [len(a), len(b)]."""
  def product(x, y):
    return sum(jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))

  return jnp.stack([jnp.stack([product(x, y) for y in b]) for x in a])


def step_flops(s: Setup, probe: Probe, o: Objective) -> float:
  """The operations of scoring the first batch and of a gradient step on it, without sampling."""
  rollout = probe.rollouts[0]
  lengths = np.asarray(rollout.mask).sum(axis=1) + np.asarray(
      rollout.valid)[:, :rollout.prompt_length].sum(axis=1)
  asked = wants(o)
  spent = flops.step_flops(
      s.student.model, s.teacher.model, lengths, source='dataset',
      teacher_scores=bool(asked['teacher']), student_rescores=int(bool(asked['student'])),
      updates=1, adapter_specs=s.adapter and s.adapter.specs,
      reference=s.reference.model if asked['reference'] else None, extra_heads=o.extra_heads)
  return sum(spent.values())


# --- Support ---


def support(c: ConfigDict, s: Setup, probe: Probe) -> dict[str, Any]:
  """Student and teacher on what the student wrote.

  Returns:
    'places': for each of `diagnostics.places`, the number of tokens, the exact reverse KL,
    quantiles of log p_T - log p_S, both entropies, and overlap; 'top_k': by k, the overlap of all
    tokens; 'graded': see `informativeness`, where the task grades.
  """
  ks = sorted({evaluate.clamp_top_k(k, s.student.model) for k in TOP_KS})

  def look(student, teacher, rollout):
    return score.join_rows(jax.lax.map(
        lambda rows: evaluate.compare(
            student, teacher, rows, model=s.student.model, teacher=s.teacher.model,
            temperature=s.objective.temperature,
            teacher_temperature=s.objective.teacher_temperature,
            chunk_tokens=c.compute.chunk_tokens, overlap_top_ks=tuple(ks)),
        score.split_rows(rollout, probe.microbatch_rows)))

  program = jax.jit(look, out_shardings=sharding.by_rows(s.mesh))
  batches = [jax.device_get(program(probe.weights.student, probe.weights.teacher, rollout))
             for rollout in probe.rollouts]
  seen = {name: np.concatenate([b[name] for b in batches]).astype(np.float64)
          for name in batches[0]}
  mask = np.concatenate([np.asarray(rollout.mask) for rollout in probe.rollouts])
  ratio, k = seen['teacher_logprobs'] - seen['logprobs'], ks[-1]
  out = {'top_k': {}, 'places': {}}
  for name, chosen in diagnostics.places(mask).items():
    values = {n: float(seen[key][chosen].mean()) if chosen.any() else math.nan for n, key in (
        ('reverse_kl', 'kl'), ('entropy_student', 'entropy'),
        ('entropy_teacher', 'teacher_entropy'), *((n, f'{n}_{k}') for n in evaluate.OVERLAP))}
    levels = [math.nan] * len(diagnostics.QUANTILES)
    if chosen.any():
      levels = np.quantile(ratio[chosen], diagnostics.QUANTILES)
    out['places'][name] = {'tokens': int(chosen.sum()), **values, **{
        f'log_ratio_p{round(100 * q):02d}': float(v)
        for q, v in zip(diagnostics.QUANTILES, levels, strict=True)}}
  for k in ks:
    out['top_k'][str(k)] = {n: float(seen[f'{n}_{k}'][mask > 0].mean()) for n in evaluate.OVERLAP}
  if data.has_verifier(s.task, s.examples):
    rewards = np.concatenate([
        data.grade(s.task, [s.examples.rows[i] for i in indices], rollout, s.student.tokenizer)[0]
        for indices, rollout in zip(probe.indices, probe.rollouts, strict=True)])
    out['graded'] = informativeness(ratio, mask, rewards)
  return out


def informativeness(ratio: np.ndarray, mask: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
  """Whether the teacher likes right answers better than wrong ones.

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
          'auroc': diagnostics.auroc((total / np.maximum(count, 1))[scored], right[scored])}


# --- For the terminal ---


def estimator_table(name: str, c: ConfigDict, probe: Probe, rows: list[dict[str, Any]]) -> Table:
  """What `estimators` found."""
  out = numbers_table(
      'estimator', 'bias', 'noise', 'cosine', 'one batch', 'variance', 'SNR', 'FLOPs', 'tokens/s',
      title=f'{name}: gradients g against x, that of the exact reverse KL',
      caption=f'{c.diagnose.batches} batches of {np.mean(probe.tokens):.0f} tokens. bias: |E g - E '
      f'x| / |E x|, "–" where sign flips do not tell it from 0 (p > {diagnostics.LEVEL}). noise: '
      'what it would be measured as without any. cosine: of E g and E x. one batch: the mean '
      'cosine of g and E x. variance: E|g - E g|² / |E x|², with what x itself has. SNR: |E g|² / '
      'E|g - E g|². FLOPs: of scoring and step, relative to sampled. tokens/s: of scoring and '
      'gradient.')
  for row in rows:
    out.add_row(row['estimator'], number(row['bias']) if row['biased'] else '–', *(
        number(row[n]) for n in ('noise', 'cosine', 'cosine_of_one', 'variance', 'snr')),
                f"{row['flops']:.2f}", f"{row['tokens_per_s']:.0f}",
                style='bold' if row['estimator'] == OWN else None)
  return out


def numbers_table(*columns: str, title: str | None = None, caption: str | None = None) -> Table:
  """A table whose first column is text. Where there is too little room, numbers are never cut."""
  out = Table(title=title, caption=caption, title_justify='left', caption_justify='left')
  for i, column in enumerate(columns):
    out.add_column(column, justify='right' if i else 'left', overflow='fold')
  return out


def support_tables(name: str, seen: dict[str, Any]) -> list[Table]:
  """What `support` found."""
  k = list(seen['top_k'])[-1]
  levels = [f'log_ratio_p{round(100 * q):02d}' for q in diagnostics.QUANTILES]
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
  """Three decimals where they say something; '–' for what cannot be said."""
  if not math.isfinite(value):
    return '–'
  return f'{value:.3f}' if value == 0.0 or 1e-3 <= abs(value) < 1e3 else f'{value:.1e}'


def plain(tree: Any) -> Any:
  """The same for JSON, which has neither NaN nor infinity: None in their place."""
  if isinstance(tree, dict):
    return {name: plain(value) for name, value in tree.items()}
  if isinstance(tree, list):
    return [plain(value) for value in tree]
  return None if isinstance(tree, float) and not math.isfinite(tree) else tree
