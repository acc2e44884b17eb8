"""Every compiled function of the loop, with its shardings, and which models share one.

Two models of one form are graded by one program exactly where their difference has to be zero for
equal models: log p_T - log p_S of two programs would differ by rounding, which Adam turns into full
steps. Such a program gives all that any of its models is asked for; what a model was not asked for
is dropped at once, so that nothing is kept alive that the loss does not read.

Output shardings are pinned: left to the compiler they may differ from the inputs', and the second
step would compile everything again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import load
from opd_jax.algorithm import score, update
from opd_jax.algorithm import slots as slots_lib
from opd_jax.algorithm.objective import wants
from opd_jax.build import Parts
from opd_jax.data import examples as examples_lib
from opd_jax.data.examples import Examples
from opd_jax.data.streams import GIVEN, Stream
from opd_jax.files import answers as answers_lib
from opd_jax.files import checkpoint
from opd_jax.files.huggingface import LoadedModel
from opd_jax.models import layout, lora
from opd_jax.models.placement import LaidOut
from opd_jax.parallel import apart as apart_lib
from opd_jax.parallel import sharding
from opd_jax.parallel import state as state_lib
from opd_jax.parallel.apart import Apart
from opd_jax.parallel.decoding import DecodeLayout
from opd_jax.run import evaluate
from opd_jax.run import evaluator as evaluator_lib
from opd_jax.settings import Run
from opd_jax.teachers import Grader
from opd_jax.types import Batch, Heads, Model, Params, Rollout, Scores, TrainState, Wants

Graders = dict[str, Grader]  # 'teacher', 'reference': those that there are


@dataclasses.dataclass(frozen=True)
class Programs:
  """The compiled functions of the loop.

  Attributes:
    parts: what the run is made of.
    state: shapes, dtypes and shardings of the train state.
    init: (parameters) -> the train state before the first step.
    layouts, writers: by the name of the stream; none for rows that a dataset gives. The first lays
      the weights of who writes out for decoding.
    scorers: by (stream, 'student' | 'teacher' | 'reference').
    updates: by the names of the streams that take part in a step.
    evaluator, teacher_evaluator: of the student; of the teacher, if there is one.
    checksums: of a train state, for its checkpoints.
    join: parts of the rows of a step -> all of them, each where it is.
    wait: blocks until its argument is computed, where programs must not be in flight together.
    answers: by the name of the stream, what was written for it before the first step.
  """

  parts: Parts
  state: TrainState
  init: Callable[[Params], TrainState]
  layouts: dict[str, DecodeLayout]
  writers: dict[str, Callable[..., Rollout]]
  scorers: dict[tuple[str, str], Callable[..., Scores]]
  updates: dict[tuple[str, ...], Callable[..., Any]]
  evaluator: evaluate.Evaluator
  teacher_evaluator: evaluate.Evaluator | None
  checksums: Callable[[Any], jax.Array]
  join: Callable[[Any], Any]
  wait: Callable[[Any], Any]
  answers: dict[str, Examples] = dataclasses.field(default_factory=dict)

  def connect(self, base: lora.Frozen | None) -> Graders:
    """Reads the weights of the models that grade, and makes graders of them."""
    out = {}
    for part in ('teacher', 'reference'):
      loaded = getattr(self.parts, part)
      if loaded is not None:
        out[part] = self._local_grader(part, loaded, self.parts.read_frozen(part, base))
    return out

  def _local_grader(self, part: str, loaded: LoadedModel, params: Params) -> Grader:
    apart = self.parts.apart if part == 'teacher' else None

    def grade(rollout: Rollout, stream: Stream) -> Scores:
      scorer = self.scorers[stream.name, part]
      scores = apart.call(scorer, params, rollout) if apart else scorer(params, rollout)
      return score.only(scores, self.parts.wanted(stream, part))

    # A head may be a copy (of other devices, of a module's): only where somebody reads it.
    head = None
    if any(self.parts.wanted(s, part).hidden for s in self.parts.streams):
      head = loaded.model.head(params)
      head = apart.bring(head) if apart else head
    return Grader(grade, head, params)

  def write(self, stream: Stream, student: Params, graders: Graders, indices: np.ndarray,
            key: jax.Array) -> Iterator[Rollout]:
    """Writes the rows of a stream on some of its examples: all together, or one part after another,
    so that a teacher on devices of its own grades one while the student writes the next.

    Args:
      stream: says who writes.
      student: the student's parameters as they are now.
      graders: the teacher, where it writes or is mixed in.
      indices: of the examples, one a row.
      key: of the draws.
    """
    examples, home = self.parts.examples[stream.name], self.parts.mesh
    if stream.name in self.answers:
      examples = self.answers[stream.name]
      indices = indices * stream.samples + np.arange(len(indices)) % stream.samples
    if stream.writer == 'dataset' or stream.name in self.answers:
      yield self.wait(sharding.put(examples.given(indices), sharding.by_rows(home)))
      return
    author = graders['teacher'].params if stream.writer == 'teacher' else student
    mixed = {'mix_params': graders['teacher'].params} if stream.teacher_mix else {}
    place, parts = self.parts.place_of(stream), self.parts.pieces_of(stream)
    key = key if place is home else apart_lib.move_key(key, place)
    with jax.set_mesh(place):
      weights = self.layouts[stream.name](author)
    for i, prompts in enumerate(apart_lib.split_prompts(examples.prompts(indices), parts, home), 1):
      with jax.set_mesh(place):
        rollout = self.writers[stream.name](
            weights, sharding.put(prompts, sharding.by_rows(place)), key, **mixed)
      if i == parts:
        del weights  # not to be kept while the rows are graded
      yield self.wait(rollout if place is home else apart_lib.move_rows(rollout, home))

  def with_answers(self, workdir: pathlib.Path, graders: Graders, key: jax.Array,
                   say: Callable[[str], None], end: Callable[[str], None]) -> Programs:
    """Has what streams with `fixed` text learn from in the work directory (files/answers.py), where
    the teacher writes what is not there; `end` may raise where a stop loses nothing."""
    def write(stream, indices, block):  # of (seed, stream, block) alone
      place = jax.random.fold_in(key, self.parts.streams.index(stream))
      return next(self.write(stream, {}, graders, indices, jax.random.fold_in(place, block)))

    return dataclasses.replace(self, answers={
        s.name: answers_lib.prepare(workdir, s, self.parts.examples[s.name], write, say, end)
        for s in self.parts.streams if s.fixed})

  def grade(self, stream: Stream, student: Params, graders: Graders, indices: np.ndarray,
            rollouts: Iterable[Rollout]) -> Batch:
    """Grades what the objective of a stream asks for: every token by the teacher, the student
    itself and the reference, the whole answer by the verifier."""
    o, asked = stream.objective, wants(stream.objective)
    scores, seen = {}, []
    for rollout in rollouts:
      theirs = graders['teacher'].score(rollout, stream) if asked['teacher'] else None
      seen.append((rollout, theirs))
    rollout, scores['teacher'] = self.join(seen) if len(seen) > 1 else seen[0]
    if asked['reference']:
      scores['reference'] = graders['reference'].score(rollout, stream)
    if asked['student']:
      scores['student'] = self.rescore(stream, student, rollout)
    rewards = None
    if o.needs_rewards:
      rows = [self.parts.examples[stream.name].rows[i] for i in indices]
      graded, _ = examples_lib.grade(self.parts.task, rows, rollout, self.parts.student.tokenizer)
      rewards = sharding.put(graded, sharding.by_rows(self.parts.mesh))
    return self.wait(Batch(rollout, rewards=rewards, **scores))

  def rescore(self, stream: Stream, student: Params, rollout: Rollout) -> Scores:
    """Scores a rollout by the student, with the program that scored it by the teacher."""
    scores = self.scorers[stream.name, 'student'](student, rollout)
    return self.wait(score.only(scores, wants(stream.objective)['student']))

  def update(self, state: TrainState, streams: tuple[Stream, ...], batches: list[Batch],
             graders: Graders, base: lora.Frozen | None, key: jax.Array
             ) -> tuple[TrainState, dict[str, Any]]:
    """Takes one gradient step on the batches of some streams; `state` is donated."""
    program = self.updates[tuple(s.name for s in streams)]
    return self.wait(program(state, tuple(batches), self.heads(graders), base, key))

  def heads(self, graders: Graders) -> Heads:
    """Picks the heads of the models whose hidden states the loss takes."""
    return Heads(**{part: grader.head for part, grader in graders.items()})

  def counts(self, stream: Stream, lengths: np.ndarray, slots: int) -> dict[str, float]:
    """Counts compiled programs (one a function that is in use, or something retraces), and of a
    stream that a model wrote in rows of these lengths, what laying that out for decoding moved, and
    which part of decoding wrote them."""
    functions = {*self.writers.values(), *self.scorers.values(), *self.updates.values()}
    decoded = {}
    if stream.name in self.layouts and not stream.fixed:
      place = self.parts.place_of(stream)
      parts = apart_lib.part_places(len(lengths), self.parts.pieces_of(stream), self.parts.mesh)
      decoded = {**self.layouts[stream.name].report(), 'decode_useful': slots_lib.useful_share(
          list(lengths[parts]), slots, layout.row_parts(parts.shape[1], layout.DECODE, place))}
    compiled = sum(f._cache_size() for f in functions)
    compiled += sum(layout.compile_count() for layout in self.layouts.values())
    return {'compiles': compiled, **decoded}


def compile_programs(run: Run, parts: Parts) -> Programs:
  """Makes the jitted functions of a run; each is compiled when it is first called."""
  scalar = sharding.replicated(parts.mesh)
  abstract = state_lib.abstract(parts.trained_specs, parts.optimizer, parts.mesh)
  state = jax.tree.map(lambda x: x.sharding, abstract)
  beside = tuple(s for s in parts.streams if s.name == GIVEN)

  def update_of(streams):
    return jax.jit(
        functools.partial(
            update.update_fn, model=parts.student.model, optimizer=parts.optimizer,
            terms=tuple(map(term_of, streams)), chunk_tokens=parts.chunk_tokens),
        donate_argnums=0, out_shardings=(state, scalar))

  def evaluator_of(student, teacher, mesh, see=None):
    return evaluator_lib.make_evaluator(
        run, student, teacher, task=parts.task, examples=parts.held_out,
        stop_tokens=parts.stop_tokens, mesh=mesh, see=see,
        key=load.fold_in(jax.random.key(run.seed), load.EVAL, 0))

  evaluator = evaluator_of(parts.student, parts.teacher and parts.teacher.model, parts.mesh,
                           parts.apart and evaluator_lib.make_see(
                               parts.apart, parts.teacher.model,
                               len(parts.held_out) * run.eval.samples_per_problem))
  of_teacher = None
  if parts.teacher is not None and parts.teacher.model is not None:
    # A teacher of the student's form is evaluated by the same programs.
    same = parts.runs_students_programs(parts.teacher)
    of_teacher = evaluator if same else evaluator_of(
        parts.teacher, None, parts.mesh_of('teacher'))
  # On several fake CPU devices, programs with collectives must not be in flight together.
  crowded = jax.default_backend() == 'cpu' and parts.mesh.size > 1
  blocking = run.compute.block == 'always' or (run.compute.block == 'auto' and crowded)
  updates = {tuple(s.name for s in streams): update_of(streams)
             for streams in ((s, *beside) for s in parts.streams if s not in beside)}
  written = [s for s in parts.streams if s.writer != 'dataset']
  return Programs(
      parts, abstract, jax.jit(functools.partial(state_lib.init, parts.optimizer), donate_argnums=0,
                               out_shardings=state),
      {s.name: make_layout(run, parts, s, blocking) for s in written},
      {s.name: make_writer(run, parts, s) for s in written},
      make_scorers(parts, parts.streams), updates, evaluator, of_teacher,
      jax.jit(checkpoint.checksums, out_shardings=scalar),
      jax.jit(functools.partial(apart_lib.join_parts, mesh=parts.mesh),
              out_shardings=sharding.by_rows(parts.mesh)),
      jax.block_until_ready if blocking else lambda x: x)


def term_of(stream: Stream) -> update.Term:
  """Makes a stream's part in the loss."""
  return update.Term(stream.name, stream.objective, stream.samples, stream.on_policy,
                     stream.microbatch_rows, stream.length_buckets)


def make_layout(run: Run, parts: Parts, stream: Stream, wait: bool) -> DecodeLayout:
  """Makes what lays out the weights of who writes a stream; on one device the sampler does it."""
  model = (parts.teacher if stream.writer == 'teacher' else parts.student).model
  mesh = parts.mesh_of('teacher' if stream.writer == 'teacher' else 'student')
  if mesh.size == 1:
    return DecodeLayout(None, 0, wait)
  received = sharding.decode_bytes(model.specs, mesh, jnp.dtype(run.compute.dtype).itemsize)
  return DecodeLayout(jax.jit(lambda params: LaidOut(model.for_decoding(params))), received, wait)


def make_writer(run: Run, parts: Parts, stream: Stream) -> Callable[..., Rollout]:
  """Makes the sampler of a stream that a model writes."""
  teacher = parts.teacher and parts.teacher.model
  writer = teacher if stream.writer == 'teacher' else parts.student.model
  return jax.jit(evaluator_lib.make_sampler(
      run, writer, parts.stop_tokens, parts.pad_token, mix_share=stream.teacher_mix,
      mix_model=teacher if stream.teacher_mix else None,
      mix_temperature=stream.objective.teacher_temperature),
      out_shardings=sharding.by_rows(
          parts.mesh_of('teacher' if stream.writer == 'teacher' else 'student')))


def make_scorers(parts: Parts, streams: tuple[Stream, ...]
                 ) -> dict[tuple[str, str], Callable[..., Scores]]:
  """Makes the scorers of streams, by (stream, model); equal keys are one program."""
  @functools.cache
  def scorer(model: Model, temperature: float, apart: Apart | None, wanted: Wants,
             microbatch_rows: int, length_buckets: int):
    return jax.jit(functools.partial(
        score.teacher_logprob_fn, model=model, temperature=temperature, wants=wanted,
        chunk_tokens=(apart or parts).chunk_tokens, microbatch_rows=microbatch_rows,
        length_buckets=length_buckets), out_shardings=sharding.by_rows((apart or parts).mesh))

  out = {}
  for stream in streams:
    o, forms, needed = stream.objective, {}, {}
    for part in wants(o):
      loaded, asked = getattr(parts, part), parts.wanted(stream, part)
      if not asked or loaded.model is None:  # not asked, or not a model of this process
        continue
      same = parts.runs_students_programs(loaded)
      forms[part] = (parts.student.model if same else loaded.model,
                     o.teacher_temperature if part == 'teacher' else o.temperature,
                     parts.apart if part == 'teacher' else None)
      needed[forms[part]] = needed.get(forms[part], Wants()) | asked
    for part, form in forms.items():
      rows = stream.microbatch_rows
      if form[-1]:
        rows = form[-1].rows_of_pass(stream.rows // (form[-1].parts if stream.on_policy else 1))
      out[stream.name, part] = scorer(*form, needed[form], rows, stream.length_buckets)
  return out
