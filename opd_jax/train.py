"""The training loop. Read from top to bottom, it is the algorithm:

    prompts -> sample_fn (the student writes) -> teacher_logprob_fn (the teacher grades every token)
            -> update_fn (the student moves towards the teacher) -> metrics

Supervised learning takes its rows from a data set or from the teacher, reinforcement learning takes
its weights from a verifier; they are the same loop. Some batches, or some rows of each, may come
from elsewhere than the student. What is not here: a replay buffer, a value
network, a rollout server. The student that samples is the student that is updated, one step later.

With low-rank adapters, the train state holds the adapters and `frozen` the base beneath them; the
student is the two joined, which copies nothing.

Every jax.jit of the loop is in `compile_step`. The random key of a step is fold_in(seed, step).
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import json
import math
import operator
import pathlib
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from opd_jax import build as build_lib
from opd_jax import (
  checkpoint,
  checks,
  data,
  doctor,
  flops,
  hf,
  lora,
  metrics,
  params,
  peft,
  sample,
  score,
  sharding,
  update,
)
from opd_jax import config as config_lib
from opd_jax.build import Setup
from opd_jax.objective import Objective, wants
from opd_jax.types import Batch, Heads, Model, Params, Rollout, Scores, TrainState, Wants

RESULT, EXPORT, ADAPTER = 'result.json', 'export', 'adapter'


class NonFiniteError(FloatingPointError):
  """The loss or the gradient is not finite; the message has the step."""


class PreemptedError(Exception):
  """SIGTERM or SIGINT arrived; a checkpoint of the step it interrupted is on disk."""


@dataclasses.dataclass(frozen=True)
class RowPrograms:
  """The compiled functions of one kind of rows: who writes them, who grades them."""

  source: str  # 'student', 'teacher' or 'dataset'
  teacher_mixed: bool  # the student's samples come from a mixture with the teacher
  objective: Objective
  sample: Callable[..., Any] | None
  scorers: dict[str, Callable[..., Scores]]  # of the models that the objective asks, by name
  update: Callable[..., Any] | None  # None for rows beside others


@dataclasses.dataclass(frozen=True)
class Programs:
  """The compiled functions of the loop.

  Attributes:
    own: for the batches of data.source.
    off: for those that the student does not write; None without.
    given: for the rows beside; None without.
    init: makes the train state.
  """

  own: RowPrograms
  off: RowPrograms | None
  given: RowPrograms | None
  init: Callable[..., Any]

  def compile_count(self) -> int:
    """How many programs are compiled; one a function that is in use, or something retraces."""
    loop = {f for rows in (self.own, self.off, self.given) if rows is not None
            for f in (rows.sample, *rows.scorers.values(), rows.update) if f is not None}
    return sum(f._cache_size() for f in loop)


@dataclasses.dataclass
class Weights:
  """The parameters that a step looks at; the student's are those of the step."""

  student: Params
  teacher: Params | None
  reference: Params | None


def train(c: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Runs one config to its end, from the start or from where it was interrupted.

  Args:
    c: a config with the fields of `config.default_config`.
    workdir: for checkpoints, metrics, the final model (`export/`) and result.json.

  Returns:
    The content of result.json: evaluations before and after, FLOPs, steps.

  Raises:
    ConfigError: before anything expensive starts.
    NonFiniteError: with the step; the last good checkpoint is kept.
    PreemptedError: after saving.
  """
  workdir = pathlib.Path(workdir)
  # --- Check, and return at once if there is nothing to do ---
  checks.validate(c)
  build_lib.check_workdir(c, workdir)
  if (workdir / RESULT).exists():
    return json.loads((workdir / RESULT).read_text())

  # --- Build: models, data, programs; then the newest checkpoint, or a fresh state ---
  s = build_lib.build(c)
  findings = doctor.examine(c, s)
  doctor.require(c, findings)
  programs, state_shape = compile_step(c, s)
  store = checkpoint.Checkpoints(
      workdir / 'checkpoints', keep_latest=c.checkpoint.keep_latest,
      keep_best=c.checkpoint.keep_best, best_metric=c.checkpoint.best_metric,
      checksums=jax.jit(checkpoint.checksums))
  frozen = build_lib.read_frozen(s)
  teacher_params = build_lib.read_teacher(s, frozen)
  reference_params = build_lib.read_teacher(s, frozen, 'reference')
  heads = loss_heads(s, teacher_params, reference_params)
  restored = store.restore_latest(state_shape)
  if restored is None:
    state = programs.init(build_lib.read_trained(s))
    host = {'step': 0, 'flops': {'student': 0.0, 'sampling': 0.0, 'teacher': 0.0},
            'evals': [], 'config': config_lib.to_dict(c)}
  else:
    state, host = restored
  start = host['step']
  writer = metrics.Writer(workdir, start if restored else None)
  display = metrics.Display(c.name, c.steps, c.log.plain_every_steps)
  if restored:
    display.say(f'{c.name}: resumed from the checkpoint of step {start}')
  key = jax.random.key(c.seed)
  # On several fake CPU devices, programs with collectives must not be in flight together.
  crowded = jax.default_backend() == 'cpu' and s.mesh.size > 1
  blocking = c.compute.block == 'always' or (c.compute.block == 'auto' and crowded)
  wait = jax.block_until_ready if blocking else lambda x: x
  clock = metrics.Clock()

  def rows_of(step: int) -> RowPrograms:
    """Of the batch whose update produced `step`: whether the student writes it."""
    mine = data.is_on_policy(c.seed, step - 1, c.data.on_policy_fraction)
    return programs.own if mine else programs.off

  def evaluation(step: int, title: str | None) -> dict[str, Any]:
    began = time.perf_counter()
    values, shown = s.evaluator(lora.join(frozen, state.params), teacher_params,
                                c.log.transcripts if title else 0)
    row = {**values, 'flops': dict(host['flops'])}
    writer.write('eval', step, row)
    display.evaluation(step, values)
    display.transcripts(title or '', shown)
    host['evals'].append({'step': step, **row})
    clock.pause(time.perf_counter() - began)
    return values

  def process(step: int, values: dict[str, Any]) -> None:
    """The metrics of the update that produced `step`: checked, counted, written, shown."""
    values = jax.device_get(values)
    lengths, row = values.pop('lengths'), {}
    for rows, lengths_of in ((rows_of(step), lengths + values.pop('prompt_lengths')),
                             (programs.given, values.pop('given_lengths', 0)
                              + values.pop('given_prompt_lengths', 0))):
      if rows is not None:
        for name, amount in count_flops(c, s, rows, lengths_of).items():
          host['flops'][name] += amount
    row = {name: float(v) for name, v in values.items()}
    # Of no tokens there is no quantile.
    row = {n: v for n, v in row.items() if not (n.startswith('log_ratio') and math.isnan(v))}
    check_finite(row, step, c.log.max_sampler_gap)
    row |= {'length': float(lengths.mean()), 'flops': dict(host['flops']),
            'compiles': programs.compile_count(), 'perf': clock.read(1, int(lengths.sum()))}
    if step % c.log.every_steps == 0:
      writer.write('train', step, row)
    display.progress(step, row)

  def save(step: int, values: dict[str, Any] | None) -> None:
    host['step'] = step
    best = None
    if values is not None and c.checkpoint.keep_best:
      best = {c.checkpoint.best_metric: values[c.checkpoint.best_metric]}
    store.save(state, step, host, best)

  # --- The loop ---
  with Interrupts() as interrupted, jax.set_mesh(s.mesh):
    try:
      findings += doctor.examine_rollouts(c, s, lora.join(frozen, state.params), teacher_params)
      doctor.settle(c, findings, workdir, display.say)
      # Only now: a start that was refused must not keep the directory from the corrected config.
      build_lib.claim_workdir(c, workdir)
      if restored is None:
        writer.write('data', 0, s.data_report)
        display.data(s.data_report)
        if s.teacher_evaluator is not None:
          host['teacher'], _ = s.teacher_evaluator(teacher_params, None, 0)
          if 'sampled_accuracy' in host['teacher']:  # the task grades
            display.say(f"{c.name}: the teacher's sampled accuracy is "
                        f"{host['teacher']['sampled_accuracy']:.3f}, greedy "
                        f"{host['teacher']['greedy_accuracy']:.3f}")
        evaluation(0, 'before training:')
      step, pending, reached = start, None, host.get('stopped_at') is not None
      while step < c.steps and not reached:
        weights = Weights(lora.join(frozen, state.params), teacher_params, reference_params)
        rows = rows_of(step + 1)
        # The rows: written by the student, by the teacher, or given.
        indices = s.examples.indices(step, c.data.prompts_per_step).repeat(
            c.data.samples_per_prompt)
        step_key = build_lib.fold_in(key, build_lib.SAMPLE, step)
        rollout = wait(write(rows, s, s.examples, indices, weights, step_key))
        # The grades: of every token by the teacher, or of the whole answer by the verifier.
        batch = wait(grade(rows, s, s.examples, indices, weights, rollout))
        beside = None
        if programs.given is not None:
          indices = s.given.indices(step, c.given.prompts_per_step)
          step_key = build_lib.fold_in(key, build_lib.GIVEN, step)
          beside = wait(write(programs.given, s, s.given, indices, weights, step_key))
          beside = wait(grade(programs.given, s, s.given, indices, weights, beside))
        # The step.
        first = {}
        for update_number in range(c.optimizer.updates_per_batch):
          if update_number and rows.objective.advantages == 'recomputed':
            student = lora.join(frozen, state.params)
            batch = batch.replace(student=wait(ask(rows, 'student', student, rollout)))
          gate_key = build_lib.fold_in(
              key, build_lib.GATE, step * c.optimizer.updates_per_batch + update_number)
          state, values = wait(rows.update(state, batch, heads, frozen, beside, gate_key))
          first = first or {name: v for name, v in values.items() if name.startswith('gap')}
        values |= first  # later updates move away from the sampler on purpose
        step += 1
        # Read the metrics of the previous step while the device works on this one, unless the host
        # must look at this one anyway.
        if pending is not None:
          process(*pending)
        pending = (step, values)
        due = bool(c.eval.every_steps) and step % c.eval.every_steps == 0
        stop = interrupted()
        if due or step % c.checkpoint.every_steps == 0 or step == c.steps or stop:
          process(*pending)
          pending, latest = None, None
          if due or step == c.steps:
            middle = c.steps // 2 <= step < c.steps // 2 + max(c.eval.every_steps, 1)
            title = 'after training:' if step == c.steps else 'halfway:' if middle else None
            latest = evaluation(step, title)
            if 0 < c.eval.stop_at_sampled_accuracy <= latest.get('sampled_accuracy', 0.0):
              reached, host['stopped_at'] = True, step
              display.say(f'{c.name}: sampled accuracy {latest["sampled_accuracy"]:.3f} reached '
                          f'{c.eval.stop_at_sampled_accuracy} at step {step}; stopping')
          began = time.perf_counter()
          save(step, latest)
          clock.pause(time.perf_counter() - began)
        if stop:
          store.wait()
          raise PreemptedError(f'{c.name}: interrupted at step {step}; its checkpoint is in '
                          f'{workdir / "checkpoints"}; the same command resumes')
      result = finish(c, s, state, frozen, host, workdir)
      if interrupted():  # during the last evaluation: do not go on to another stage
        raise PreemptedError(f'{c.name}: interrupted after its last step, and finished; the same '
                             'command goes on')
    finally:
      store.close()
      writer.close()
      display.close()
  return result


def write(rows: RowPrograms, s: Setup, examples: data.Examples, indices: np.ndarray,
          weights: Weights, key: jax.Array) -> Rollout:
  """The rollouts of some examples, by whoever writes this kind of rows."""
  rows_sharding = sharding.by_rows(s.mesh)
  if rows.source == 'dataset':
    return sharding.put(examples.given(indices), rows_sharding)
  prompts = sharding.put(examples.prompts(indices), rows_sharding)
  if rows.source == 'teacher':
    return rows.sample(weights.teacher, prompts, key)
  if rows.teacher_mixed:
    return rows.sample(weights.student, prompts, key, mix_params=weights.teacher)
  return rows.sample(weights.student, prompts, key)


def grade(rows: RowPrograms, s: Setup, examples: data.Examples, indices: np.ndarray,
          weights: Weights, rollout: Rollout) -> Batch:
  """What the objective of this kind of rows asks for: grades of every token by the teacher, the
  student itself and the reference, or of the whole answer by the verifier."""
  scores = {name: ask(rows, name, getattr(weights, name), rollout) for name in rows.scorers}
  rewards = None
  if rows.objective.needs_rewards:
    graded, _ = data.grade(s.task, [examples.rows[i] for i in indices], rollout,
                           s.student.tokenizer)
    rewards = sharding.put(graded, sharding.by_rows(s.mesh))
  return Batch(rollout, rewards=rewards, **scores)


def ask(rows: RowPrograms, name: str, params: Params, rollout: Rollout) -> Scores:
  """Asks one model what the objective wants to know, and drops what its program gives for others
  that share it: that would stay in memory until the step is done."""
  return score.only(rows.scorers[name](params, rollout), wants(rows.objective)[name])


def loss_heads(s: Setup, teacher: Params | None, reference: Params | None) -> Heads:
  """Returns the heads of the models whose hidden states a loss or a gate takes."""
  asked = [wants(o) for o in (s.objective, s.off_objective, s.given_objective) if o is not None]

  def head(name, params):
    hidden = any(of[name].hidden for of in asked)
    return getattr(s, name).model.head(params) if hidden else None

  return Heads(teacher=head('teacher', teacher), reference=head('reference', reference))


def compile_step(c: ConfigDict, s: Setup) -> tuple[Programs, TrainState]:
  """The jitted functions of the loop, and the abstract train state with its shardings.

  Output shardings are pinned: left to the compiler they may differ from the inputs', and the second
  step would compile everything again.
  """
  scalar = sharding.replicated(s.mesh)
  abstract = abstract_state(s.trained_specs, s.optimizer, s.mesh)
  state = jax.tree.map(lambda x: x.sharding, abstract)
  batching = dict(chunk_tokens=c.compute.chunk_tokens, microbatch_rows=c.compute.microbatch_rows)

  def update_of(objective: Objective, source: str):
    return jax.jit(
        functools.partial(update.update_fn, model=s.student.model, optimizer=s.optimizer,
                          objective=objective, group_size=c.data.samples_per_prompt,
                          on_policy=source == 'student', given_objective=s.given_objective,
                          **batching),
        donate_argnums=0, out_shardings=(state, scalar))

  def rows_of(source: str, objective: Objective | None, microbatch_rows: int, beside: bool = False):
    if objective is None:
      return None
    return compile_rows(c, s, source, objective, microbatch_rows,
                        None if beside else update_of(objective, source))

  init_fn = jax.jit(functools.partial(init_state, s.optimizer), donate_argnums=0,
                    out_shardings=state)
  microbatch = c.compute.microbatch_rows
  return Programs(own=rows_of(c.data.source, s.objective, microbatch),
                  off=rows_of(c.data.off_policy_source, s.off_objective, microbatch),
                  given=rows_of(c.given.source, s.given_objective,
                                math.gcd(microbatch, c.given.prompts_per_step), beside=True),
                  init=init_fn), abstract


def compile_rows(c: ConfigDict, s: Setup, source: str, o: Objective, microbatch_rows: int,
                 update_fn: Callable[..., Any] | None) -> RowPrograms:
  """Sampler and scorers of one kind of rows."""
  rows, student = sharding.by_rows(s.mesh), s.student.model
  mixed = c.sample.teacher_mix if source == 'student' else 0.0

  sampler = None
  if source != 'dataset':
    sampler = jax.jit(functools.partial(
        sample.sample_fn, model=s.teacher.model if source == 'teacher' else student,
        max_new_tokens=c.data.max_new_tokens, temperature=c.sample.temperature,
        top_p=c.sample.top_p, top_k=c.sample.top_k, stop_tokens=s.stop_tokens,
        pad_token=s.pad_token, mix_share=mixed, mix_model=s.teacher.model if mixed else None,
        mix_temperature=o.teacher_temperature), out_shardings=rows)
  scorer = functools.cache(functools.partial(compile_scorer, c, s, microbatch_rows))
  scorers = {name: scorer(*program) for name, program in scorer_programs(s, o).items()}
  return RowPrograms(source, mixed > 0.0, o, sampler, scorers, update_fn)


def scorer_programs(s: Setup, o: Objective) -> dict[str, tuple[Model, float, Wants]]:
  """Names the program that scores each model `o` asks, by its form, temperature and wants.

  A teacher or a reference of the student's own form, at its temperature, is scored by the student's
  own program: then log p_T - log p_S is exactly zero for a teacher equal to the student, and so is
  the policy gradient. That program gives all that any of them is asked for.
  """
  asked = {name: known for name, known in wants(o).items() if known}

  def form(name):
    loaded = getattr(s, name)
    temperature = o.teacher_temperature if name == 'teacher' else o.temperature
    own = (name == 'student'
           or temperature == o.temperature and s.runs_students_programs(loaded))
    return (s.student if own else loaded).model, temperature

  return {name: (*form(name), functools.reduce(operator.or_, (
      known for other, known in asked.items() if form(other) == form(name)))) for name in asked}


def compile_scorer(c: ConfigDict, s: Setup, microbatch_rows: int, model: Model, temperature: float,
                   known: Wants) -> Callable[..., Scores]:
  """Returns the jitted scorer of one of `scorer_programs`."""
  return jax.jit(functools.partial(
      score.teacher_logprob_fn, model=model, temperature=temperature, wants=known,
      chunk_tokens=c.compute.chunk_tokens, microbatch_rows=microbatch_rows),
      out_shardings=sharding.by_rows(s.mesh))


def count_flops(c: ConfigDict, s: Setup, rows: RowPrograms, lengths: np.ndarray
                ) -> dict[str, float]:
  """The operations of a step on rows of these lengths, by who spends them."""
  o, updates = rows.objective, c.optimizer.updates_per_batch
  asked = wants(o)
  rescores = bool(asked['student']) * (updates if o.advantages == 'recomputed' else 1)
  return flops.step_flops(
      s.student.model, s.teacher.model if s.teacher else None, lengths, source=rows.source,
      teacher_scores=bool(asked['teacher']), student_rescores=rescores, updates=updates,
      adapter_specs=s.adapter and s.adapter.specs,
      reference=s.reference.model if asked['reference'] else None,
      teacher_mixed=rows.teacher_mixed, extra_heads=o.extra_heads)


def init_state(optimizer: optax.GradientTransformation, trained: Any) -> TrainState:
  """The train state before the first step."""
  return TrainState(step=jnp.int32(0), params=trained, opt_state=optimizer.init(trained))


def abstract_state(specs: dict[str, Any], optimizer: optax.GradientTransformation,
                   mesh: jax.sharding.Mesh) -> TrainState:
  """Shapes, dtypes and shardings of a train state; moments are sharded as their parameters."""
  abstract = jax.eval_shape(functools.partial(init_state, optimizer),
                            params.abstract_params(specs))
  weights, scalar = sharding.param_shardings(specs, mesh), sharding.replicated(mesh)
  shardings = TrainState(
      step=scalar, params=weights, opt_state=optax.tree_utils.tree_map_params(
          optimizer, lambda _, sharding: sharding, abstract.opt_state, weights,
          transform_non_params=lambda _: scalar))
  return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                      abstract, shardings)


def check_finite(row: dict[str, float], step: int, max_gap: float) -> None:
  """Stops the run rather than train on nonsense.

  Raises:
    NonFiniteError: the loss or the gradient norm is not finite.
    FloatingPointError: sampler and scorer disagree by more than `log.max_sampler_gap`.
  """
  bad = {n: row[n] for n in ('loss', 'grad_norm', 'update_norm') if not math.isfinite(row[n])}
  if bad:
    raise NonFiniteError(f'step {step}: {bad} is not finite; training stopped, the last good '
                         'checkpoint is kept')
  # A NaN gap stops too; rows that the student did not write have none.
  if max_gap and 'gap_max' in row and not row['gap_max'] <= max_gap:
    raise FloatingPointError(
        f"step {step}: sampler and scorer differ by {row['gap_max']:.3g} nats; log.max_sampler_gap"
        f'={max_gap}')


class Interrupts:
  """Turns SIGTERM and the first SIGINT into a flag that the loop reads between steps."""

  def __enter__(self) -> Callable[[], bool]:
    seen: list[int] = []
    self._old = {}

    def handle(number, frame):
      seen.append(number)
      signal.signal(number, self._old[number])  # a second one ends the process

    try:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the caller's business
      pass
    return lambda: bool(seen)

  def __exit__(self, *exc: Any) -> None:
    for number, old in self._old.items():
      signal.signal(number, old)


def finish(c: ConfigDict, s: Setup, state: TrainState, frozen: lora.Frozen | None,
           host: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
  """Writes the final model as a Hugging Face directory, then result.json, which ends the run."""
  tokenizer = build_lib.final_tokenizer(c, s.student, s.teacher)
  if s.adapter is not None and not (workdir / ADAPTER).exists():
    peft.write_adapter(workdir / ADAPTER, s.student.model, state.params, s.adapter.settings,
                       tokenizer, c.student.path)
  if c.checkpoint.export == 'full' and not (workdir / EXPORT).exists():
    hf.write_checkpoint(workdir / EXPORT, s.student.model, lora.join(frozen, state.params),
                        tokenizer, stop_tokens=s.stop_tokens)
  result = {'name': c.name, 'seed': c.seed, 'steps': host['step'], 'flops': host['flops'],
            'before': host['evals'][0], 'after': host['evals'][-1], 'evals': host['evals'],
            'teacher': host.get('teacher')}
  partial = workdir / f'.{RESULT}.partial'
  partial.write_text(json.dumps(result, indent=2) + '\n')
  partial.rename(workdir / RESULT)
  return result
