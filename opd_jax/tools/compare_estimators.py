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

import dataclasses
import functools
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

from opd_jax import build, load, teachers
from opd_jax import config as config_lib
from opd_jax.algorithm import update
from opd_jax.algorithm.objective import Objective
from opd_jax.build import Parts
from opd_jax.data.streams import OWN, Stream
from opd_jax.doctor import examine as doctor
from opd_jax.errors import refuse
from opd_jax.files import disk
from opd_jax.models import lora
from opd_jax.parallel import hosts, sharding
from opd_jax.programs import Graders, Programs, compile_programs, term_of
from opd_jax.run import evaluate
from opd_jax.settings import Data, Run
from opd_jax.tools import compare_models, gradient_statistics
from opd_jax.types import Params, Rollout

RESULT = 'diagnose.json'
THIS, PLAIN, K2, EXACT = 'this config', 'sampled', 'sampled, k2 direct', 'exact reverse KL'
# Of what `update.gradient` returns: how often something is bounded, left out or replaced.
RATES = ('clip_rate', 'shaped_rate', 'counted_rate', 'local_rate')


@dataclasses.dataclass(frozen=True)
class Probe:
  """The batches, and what looks at them.

  Attributes:
    streams: one for each objective that is compared, by its name; all of the same rows.
    programs: that write and grade them.
    rollouts: R of them, B rows each.
    indices: of the examples of each.
    trained: the parameters to be differentiated by.
    base: what they are adapters on; None where the whole student is trained.
    graders: teacher and reference.
  """

  streams: dict[str, Stream]
  programs: Programs
  rollouts: list[Rollout]
  indices: list[np.ndarray]
  trained: Params
  base: lora.Frozen | None
  graders: Graders

  @property
  def student(self) -> Params:
    """The student's parameters."""
    return lora.join(self.base, self.trained)

  @property
  def tokens(self) -> list[float]:
    """Of each batch, those that the student chose."""
    return [float(hosts.fetch(rollout.mask).sum()) for rollout in self.rollouts]


def command(c: ConfigDict, workdir: pathlib.Path | None, console: Console) -> dict[str, Any]:
  """Runs `opd diagnose`: prints the tables, and writes diagnose.json where there is a work
  directory.

  Args:
    c: of one run.
    workdir: made if it does not exist; None to write nothing.
    console: to print on.

  Returns:
    What diagnose.json holds: 'estimators' and 'support', see `estimators` and
    `compare_models.support`.

  Raises:
    ConfigError: the config cannot be built, has no teacher, or is for rows that the student does
      not write.
  """
  run = check(c)
  load.require_same_inputs(run)
  parts = build.open_parts(run)
  doctor.require(run, doctor.examine_parts(run, parts))
  shards, rows = sharding.row_shards(parts.mesh), run.diagnose.prompts * group_size(run.data)
  if rows % shards:
    refuse(run, 'diagnose.prompts', f'batches of {rows} rows, which compute.mesh splits {shards} '
           'ways', 'a multiple')
  with jax.set_mesh(parts.mesh):
    probe = take_probe(run, parts)
    seen = compare_models.support(run, parts, probe)
    console.print(*compare_models.support_tables(run.name, seen), sep='\n')
    rows, rates = estimators(run, parts, probe, console)
    console.print(estimator_table(run, probe, rows))
    if rates:
      console.print(f'{THIS}: ' + ', '.join(f'{n} {v:.3f}' for n, v in rates.items()))
  out = plain({'config': config_lib.to_dict(c), 'tokens': sum(probe.tokens), 'estimators': rows,
               'rates': rates, 'support': seen})
  if workdir is not None:
    with disk.naming(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
    disk.write_json(workdir / RESULT, out)
    console.print(f'written: {workdir / RESULT}', soft_wrap=True)
  return out


def check(c: ConfigDict) -> Run:
  """Reads a config, and refuses what has nothing to diagnose before anything is loaded.

  Raises:
    ConfigError: names the field.
  """
  run = config_lib.parse(c)
  if run.teacher.kind == teachers.NONE:
    refuse(run, 'teacher.kind', 'estimators of a divergence to a teacher cannot be compared '
           'without one', f'one of {teachers.names()[1:]}')
  if run.data.source != 'student':
    refuse(run, 'data.source', 'estimates from one token need rows that the student wrote',
           "'student'")
  if run.compute.teacher_devices:
    refuse(run, 'compute.teacher_devices', 'gradients are compared where both models are', '0')
  return run


def group_size(data: Data) -> int:
  """Counts the samples of a prompt: at least two, for the leave-one-out baseline."""
  return max(2, data.samples_per_prompt)


def objectives(run: Run, o: Objective, top_k: int) -> dict[str, Objective]:
  """Makes the objectives that are compared, by name; `o`, the config's own, is the first.

  All share its temperatures and its reduction. k2 is left out where samples are not from the
  policy itself, for which only the policy gradient can correct.
  """
  plain = Objective(temperature=o.temperature, teacher_temperature=o.teacher_temperature,
                    reduction=o.reduction)
  sampled = functools.partial(dataclasses.replace, plain)
  direct = functools.partial(dataclasses.replace, plain, route='direct', importance='none')
  out = {
      THIS: o, PLAIN: plain,
      'sampled, exact baseline': sampled(baseline='exact'),
      'sampled, batch_mean baseline': sampled(baseline='batch_mean'),
      'sampled, leave_one_out baseline': sampled(baseline='leave_one_out'),
      'sampled, discount 1': sampled(discount=1.0),
      'sampled, clip 5': sampled(shaping='clip(5)'),
      'sampled, log': sampled(shaping='log'),
      'sampled, power 1': sampled(shaping='power(1)'),
      'sampled, Jensen-Shannon weight': sampled(divergence='jensen_shannon(0.5)'),
      K2: direct(estimator='k2'),
  }
  if run.sample.top_p < 1.0 or run.sample.top_k or run.sample.teacher_mix:
    del out[K2]
  for support, tail in (('teacher_top_k', 'renormalize'), ('teacher_top_k', 'bucket'),
                        ('teacher_top_k', 'stop_gradient'), ('union_top_k', 'bucket'),
                        ('student_top_k', 'bucket')):
    name = f"{support.removesuffix('_top_k')} top {top_k}, {tail}"
    out[name] = direct(support=f'{support}({top_k}, tail="{tail}")')
  return out | {EXACT: direct(support='full'),
                'exact forward KL': direct(support='full', divergence='forward_kl')}


def take_probe(run: Run, parts: Parts) -> Probe:
  """Lets the student write the batches, as the run would."""
  group, own = group_size(run.data), parts.streams[0]
  rows = run.diagnose.prompts * group
  own = dataclasses.replace(own, prompts=run.diagnose.prompts, samples=group,
                            microbatch_rows=math.gcd(own.microbatch_rows, rows))
  top_k = evaluate.clamp_top_k(run.diagnose.top_k, parts.student.model)
  streams = {name: dataclasses.replace(own, name=name, objective=o)
             for name, o in objectives(run, own.objective, top_k).items()}
  programs = compile_programs(run, dataclasses.replace(
      parts, streams=tuple(streams.values()),
      examples={name: parts.examples[OWN] for name in streams}))
  base, trained = parts.read_base(), parts.read_trained()
  probe = Probe(streams, programs, [], [], trained, base, programs.connect(base))
  key = jax.random.key(run.seed)
  for batch in range(run.diagnose.batches):
    indices = parts.examples[OWN].indices(batch, run.diagnose.prompts).repeat(group)
    probe.indices.append(indices)
    rollout, = programs.write(streams[THIS], probe.student, probe.graders, indices,
                              load.fold_in(key, load.SAMPLE, batch))
    probe.rollouts.append(jax.block_until_ready(rollout))
  return probe


def estimators(run: Run, parts: Parts, probe: Probe, console: Console
               ) -> tuple[list[dict[str, Any]], dict[str, float]]:
  """Measures every objective's gradient on the probe.

  Returns:
    For each: 'estimator', its name; the statistics of `gradient_statistics`; 'flops', the
    operations of scoring and a gradient step relative to those of the plain sampled objective;
    'tokens_per_s' of scoring and gradient, measured. And the mean of each of RATES that the
    config's own objective has.
  """
  products = jax.jit(_products, out_shardings=sharding.replicated(parts.mesh))
  exact, _, exact_seconds = gradients(run, parts, probe, probe.streams[EXACT])
  reference = hosts.fetch(products(exact, exact)).astype(np.float64)
  plain_flops = step_flops(parts, probe, probe.streams[PLAIN])
  out, rates = [], {}
  for name, stream in probe.streams.items():
    with console.status(name):
      grads, seconds = exact, exact_seconds
      if name != EXACT:
        grads, reported, seconds = gradients(run, parts, probe, stream)
      own, cross = (hosts.fetch(products(grads, other)).astype(np.float64)
                    for other in (grads, exact))
    if name == THIS:
      rates = {n: float(np.mean([m[n] for m in reported])) for n in RATES if n in reported[0]}
    out.append({'estimator': name,
                **gradient_statistics.gradient_statistics(own, cross, reference),
                'flops': step_flops(parts, probe, stream) / plain_flops,
                'tokens_per_s': float(np.mean(probe.tokens)) / seconds})
  return out, rates


def gradients(run: Run, parts: Parts, probe: Probe, stream: Stream
              ) -> tuple[list[Params], list[dict[str, Any]], float]:
  """Computes the gradient of a stream's objective on each batch.

  Returns:
    The gradients; the metrics of each; the median of the seconds that scoring and gradient took
    together (compiled before).
  """
  programs, scalar = probe.programs, sharding.replicated(parts.mesh)
  heads, key = programs.heads(probe.graders), load.fold_in(jax.random.key(run.seed), load.GATE, 0)
  program = jax.jit(functools.partial(
      update.gradient, model=parts.student.model, term=term_of(stream),
      chunk_tokens=parts.chunk_tokens),
      out_shardings=(scalar, sharding.param_shardings(parts.trained_specs, parts.mesh), scalar))

  def measure(batch):
    began = time.perf_counter()
    graded = programs.grade(stream, probe.student, probe.graders, probe.indices[batch],
                            [probe.rollouts[batch]])
    jax.block_until_ready(graded)  # programs with collectives, one after the other
    _, grads, reported = jax.block_until_ready(program(
        probe.trained, graded, heads, jnp.int32(0), jax.random.fold_in(key, batch), probe.base))
    return grads, hosts.fetch(reported), time.perf_counter() - began

  measure(0)  # compiles
  grads, reported, seconds = zip(*map(measure, range(len(probe.rollouts))), strict=True)
  return list(grads), list(reported), float(np.median(seconds))


def _products(a: list[Params], b: list[Params]) -> jax.Array:
  """The inner products of two lists of gradients, float32 [len(a), len(b)]."""
  def product(x, y):
    return sum(jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))

  return jnp.stack([jnp.stack([product(x, y) for y in b]) for x in a])


def step_flops(parts: Parts, probe: Probe, stream: Stream) -> float:
  """Counts the operations of scoring the first batch and of a gradient step on it, without
  sampling."""
  rollout = hosts.fetch(probe.rollouts[0])
  lengths = rollout.mask.sum(axis=1) + rollout.valid[:, :rollout.prompt_length].sum(axis=1)
  given = dataclasses.replace(stream, writer='dataset', teacher_mix=0.0)
  return parts.counter(updates=1).stream(given, lengths).total


def estimator_table(run: Run, probe: Probe, rows: list[dict[str, Any]]) -> Table:
  """Makes the table of what `estimators` found."""
  out = compare_models.numbers_table(
      'estimator', 'bias', 'noise', 'cosine', 'one batch', 'variance', 'SNR', 'FLOPs', 'tokens/s',
      title=f'{run.name}: gradients g against x, that of the exact reverse KL',
      caption=f'{run.diagnose.batches} batches of {np.mean(probe.tokens):.0f} tokens. bias: '
      '|E g - E x| / |E x|, "–" where sign flips do not tell it from 0 '
      f'(p > {gradient_statistics.LEVEL}). noise: what it would be measured as '
      'without any. cosine: of E g and E x. one batch: the mean '
      'cosine of g and E x. variance: E|g - E g|² / |E x|², with what x itself has. SNR: |E g|² / '
      'E|g - E g|². FLOPs: of scoring and step, relative to sampled. tokens/s: of scoring and '
      'gradient.')
  for row in rows:
    out.add_row(row['estimator'], compare_models.number(row['bias']) if row['biased'] else '–', *(
        compare_models.number(row[n])
        for n in ('noise', 'cosine', 'cosine_of_one', 'variance', 'snr')),
                f"{row['flops']:.2f}", f"{row['tokens_per_s']:.0f}",
                style='bold' if row['estimator'] == THIS else None)
  return out


def plain(tree: Any) -> Any:
  """Makes the same for JSON, which has neither NaN nor infinity: None in their place."""
  if isinstance(tree, dict):
    return {name: plain(value) for name, value in tree.items()}
  if isinstance(tree, list):
    return [plain(value) for value in tree]
  return None if isinstance(tree, float) and not math.isfinite(tree) else tree
