"""The training loop. Read from top to bottom, it is the algorithm:

    prompts -> write (the student writes) -> grade (the teacher grades every token)
            -> update (the student moves towards the teacher) -> the book

Supervised learning takes its rows from a data set or from the teacher, reinforcement learning takes
its weights from a verifier; they are the same loop. Who writes which rows for what is a `Stream`
(data/streams.py); who grades them is a `Grader` (teachers/); the compiled functions are in
programs.py, and what they compute in algorithm/. What is not here: a replay buffer, a value
network, a rollout server. The student that samples is the student that is updated, one step later.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from opd_jax import build, load
from opd_jax import config as config_lib
from opd_jax.data import streams as streams_lib
from opd_jax.data.streams import OWN
from opd_jax.doctor import examine as doctor
from opd_jax.doctor import rollouts
from opd_jax.files import checkpoint, disk, huggingface, peft
from opd_jax.files import workdir as workdir_lib
from opd_jax.files.digest import Digests
from opd_jax.models import lora
from opd_jax.models import params as params_lib
from opd_jax.parallel import hosts
from opd_jax.programs import Graders, Programs, compile_programs
from opd_jax.run.book import Book, new_history
from opd_jax.run.interrupts import Interrupts, PreemptedError
from opd_jax.settings import Checkpoint, Run
from opd_jax.types import Params, TrainState


def train(c: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Runs one config to its end, from the start or from where it was interrupted.

  Args:
    c: a config with the fields of `config.default_config`.
    workdir: for checkpoints, metrics, the final model (`export/`) and result.json.

  Returns:
    The content of result.json: evaluations before and after, FLOPs, steps, `export_kl`.

  Raises:
    ConfigError: before anything expensive starts.
    NonFiniteError: with the step; the last good checkpoint is kept.
    PreemptedError: after saving.
  """
  pinned, workdir = config_lib.pin(c, workdir), pathlib.Path(workdir)
  run, settings = config_lib.parse(pinned), config_lib.to_dict(pinned)
  inputs = load.check_directory(run, settings, workdir)
  if (done := workdir_lib.result(workdir, run)) is not None:
    return done
  with workdir_lib.lock(workdir):
    # Models, tokenizers and data, held against each other: no weight is read yet.
    parts = build.open_parts(run)
    programs = compile_programs(run, parts)
    findings = doctor.require(run, doctor.examine(run, programs))

    # Weights. `base` is what adapters are trained on (None without). Only the train state changes.
    base, store = parts.read_base(), checkpoint.of_run(run.checkpoint, workdir, programs.checksums)
    graders = programs.connect(base)
    state, book = restore(run, programs, store, workdir, new_history(settings))
    step, key = book.history['step'], jax.random.key(run.seed)
    with Interrupts() as interrupted, book, store, jax.set_mesh(parts.mesh):
      student = lora.join(base, state.params)
      findings += doctor.examine_rollouts(run, parts, student, teacher_params(graders))
      doctor.settle(run, findings, workdir, book.say)
      # Only now: a start that was refused must not keep the directory from the corrected config.
      workdir_lib.claim(workdir, settings, inputs)
      programs = prepare_answers(programs, graders, book, workdir, key, interrupted)
      if not book.begun:
        book.begin(parts.report, evaluate_teacher(programs, graders))
        evaluate_student(book, programs, student, graders, 0)
      while step < run.steps and not book.reached_goal:
        state, metrics = take_step(run, programs, state, base, graders, step, key)
        step += 1
        book.train(step, metrics)
        # The host looks at the student only where it has to; elsewhere it waits for no device.
        stop, due = interrupted(), run.is_evaluated(step)
        if due or stop or step % run.checkpoint.every_steps == 0:
          book.flush()
          student = lora.join(base, state.params)
          values = evaluate_student(book, programs, student, graders, step) if due else None
          save(run.checkpoint, store, book, state, step, values)
        if stop:
          store.wait()
          raise PreemptedError(f'{run.name}: interrupted at step {step}, which is saved')
      store.wait()  # once result.json is there, no start looks for checkpoints half deleted
      result = finish(run, programs, state, base, book, workdir, inputs)
      if interrupted.now():  # during the last evaluation: do not go on to another stage
        raise PreemptedError(f'{run.name}: interrupted after its last step, and finished')
  return result


def prepare_answers(programs: Programs, graders: Graders, book: Book, workdir: pathlib.Path,
                    key: jax.Array, interrupted: Interrupts) -> Programs:
  """Has the teacher write, before the first step, what rows are taken from for the whole run."""
  key = load.fold_in(key, load.ANSWERS, 0)
  programs = programs.with_answers(workdir, graders, key, book.say, interrupted.end)
  if programs.answers:  # counted by what is there, whichever start wrote it
    lengths = np.concatenate([answers.lengths for answers in programs.answers.values()])
    book.answers(lengths, programs.parts.counter(updates=1).answers(lengths))
  return programs


def take_step(run: Run, programs: Programs, state: TrainState, base: lora.Frozen | None,
              graders: Graders, step: int, key: jax.Array) -> tuple[TrainState, dict[str, Any]]:
  """Takes a step of the algorithm: rows are written and graded, and the student moves.

  Everything random is a function of (seed, step): a run that was killed draws the same again.
  """
  student = lora.join(base, state.params)
  streams = streams_lib.of_step(programs.parts.streams, run.seed, step)
  batches = []
  for stream in streams:
    examples = programs.parts.examples[stream.name]
    indices = examples.indices(step, stream.prompts).repeat(stream.samples)
    purpose = load.BESIDE if stream.name == streams_lib.GIVEN else load.SAMPLE
    rollouts = programs.write(stream, student, graders, indices, load.fold_in(key, purpose, step))
    batches.append(programs.grade(stream, student, graders, indices, rollouts))

  # Usually one update. Several reuse the rows: then the policy has moved from the one that wrote
  # them, for which the importance ratio corrects, and advantages may be recomputed.
  gaps: dict[str, Any] = {}
  updates = run.optimizer.updates_per_batch
  for n in range(updates):
    if n and streams[0].objective.advantages == 'recomputed':
      student = lora.join(base, state.params)
      batches[0] = batches[0].replace(
          student=programs.rescore(streams[0], student, batches[0].rollout))
    gate_key = load.fold_in(key, load.GATE, step * updates + n)
    state, metrics = programs.update(state, streams, batches, graders, base, gate_key)
    # Later updates move away from the sampler on purpose: only the first gap means something.
    gaps = gaps or {name: v for name, v in metrics.items() if name.startswith('gap')}
  if streams[0].on_policy:  # what the student wrote, for the book to look at
    rollout = batches[0].rollout
    metrics['written'] = (rollout.tokens[:, 1:], rollout.mask)
  return state, metrics | gaps


def teacher_params(graders: Graders) -> Params | None:
  """Picks the parameters of a teacher in this process; None without one."""
  return graders['teacher'].params if 'teacher' in graders else None


def evaluate_teacher(programs: Programs, graders: Graders) -> dict[str, Any] | None:
  """Evaluates the teacher on the held-out problems, if there is one that can write."""
  if programs.teacher_evaluator is None:
    return None
  with jax.set_mesh(programs.parts.mesh_of('teacher')):
    return programs.teacher_evaluator(graders['teacher'].params, None, 0)[0]


def evaluate_student(book: Book, programs: Programs, student: Params, graders: Graders, step: int
                     ) -> dict[str, Any]:
  """Evaluates the student on the held-out problems, and writes it into the book."""
  return book.evaluation(step, lambda transcripts: programs.evaluator(
      student, teacher_params(graders), transcripts))


def restore(run: Run, programs: Programs, store: checkpoint.Checkpoints, workdir: pathlib.Path,
            fresh: dict[str, Any]) -> tuple[TrainState, Book]:
  """Restores the newest checkpoint and the book that goes with it; without one, the state before
  training and a book with the history `fresh`."""
  parts, restored = programs.parts, store.restore_latest(programs.state)
  state, history = restored or (programs.init(parts.read_trained()), fresh)
  book = Book(
      run, workdir, history, restored=restored is not None,
      operations=lambda step, lengths: parts.counter(run.optimizer.updates_per_batch).step(
          streams_lib.of_step(parts.streams, run.seed, step - 1), lengths),
      counts=lambda step, lengths: programs.counts(
          streams_lib.of_step(parts.streams, run.seed, step - 1)[0], lengths, run.sample.slots))
  if parts.apart:
    book.say(parts.describe_apart(run.name))
  return state, book


def save(settings: Checkpoint, store: checkpoint.Checkpoints, book: Book, state: TrainState,
         step: int, values: dict[str, Any] | None) -> None:
  """Saves a checkpoint; `values` are of an evaluation at this step, None without."""
  book.history['step'], metric = step, settings.best_metric
  with book.pause():
    graded = settings.keep_best and metric in (values or {})
    best = {metric: values[metric]} if graded else None
    store.save(state, step, book.history, best)


def finish(run: Run, programs: Programs, state: TrainState, base: lora.Frozen | None, book: Book,
           workdir: pathlib.Path, inputs: dict[str, Digests]) -> dict[str, Any]:
  """Writes the final model as a Hugging Face directory, then result.json, which ends the run.

  A directory with the origin of this very state was written before the run was killed.
  """
  parts, history = programs.parts, book.history
  origin = workdir_lib.origin(history['config'], inputs, history['step'],
                              hosts.fetch(programs.checksums(state)).tolist())
  tokenizer = build.final_tokenizer(run.prompt.template, parts.student, parts.teacher)
  export, adapter = workdir / workdir_lib.EXPORT, workdir / workdir_lib.ADAPTER
  result, student = book.result(), lora.join(base, state.params)
  result['parameters'] = params_lib.count_params(parts.student.model.specs, matmul_only=True)
  if parts.adapter is not None and run.checkpoint.export == 'full':  # merged, and so not the same
    result['export_kl'] = rollouts.measure_export(
        run, parts.student, parts.stop_tokens, parts.examples[OWN], parts.mesh, student)
    book.say(rollouts.describe_export(run.name, 'float32', result['export_kl']))
  if parts.adapter is not None and not workdir_lib.delivered(adapter, origin):
    peft.write_adapter(adapter, parts.student.model, state.params, parts.adapter.settings,
                       tokenizer, run.student.path, origin, run.student.revision)
  if run.checkpoint.export == 'full' and not workdir_lib.delivered(export, origin):
    huggingface.write_checkpoint(export, parts.student.model, student, tokenizer,
                                 stop_tokens=parts.stop_tokens, dtype='float32',
                                 sampling=parts.student.sampling, origin=origin)
  hosts.decide(lambda: disk.write_json(workdir / workdir_lib.RESULT, result))
  return result
