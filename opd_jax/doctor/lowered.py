"""The programs of a run without its weights: what each is called with, as shapes and shardings, and
what XLA makes of it.

What is compiled here, other than for a look (`look_options`), is what the loop calls later: jax
keeps it under the function, the shapes and the shardings, so that a start compiles nothing twice (a
test counts).
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.algorithm import sample, score
from opd_jax.algorithm.objective import wants
from opd_jax.build import Parts
from opd_jax.data.streams import OWN, Stream
from opd_jax.models import lora
from opd_jax.models import params as params_lib
from opd_jax.parallel import sharding
from opd_jax.programs import Programs
from opd_jax.run.evaluate import Seen
from opd_jax.settings import Run
from opd_jax.types import Batch, Head, Heads, Params, Prompts, Rollout, TrainState

COMPARE = 'evaluate compare'


@dataclasses.dataclass(frozen=True)
class Resident:
  """What stays on the devices while a run lasts, as shapes with shardings.

  Attributes:
    state: the train state.
    base: under the adapters; None where the whole student is trained.
    graders: the parameters of 'teacher' and 'reference', those that there are. What a model shares
      with the base is the very same object.
    heads: of those whose hidden states a loss takes: their own arrays, or copies, on
      other devices or where a module computes them.
  """

  state: TrainState
  base: lora.Frozen | None
  graders: dict[str, Params]
  heads: Heads

  @property
  def student(self) -> Params:
    """What the student computes with."""
    return lora.join(self.base, self.state.params)

  def groups(self) -> dict[str, Any]:
    """Lists what there is, by what it is for; an object in two of them belongs to the first."""
    return {'weights': self.state.params, 'optimizer': (self.state.opt_state, self.state.step),
            'base': self.base, **self.graders, 'heads': self.heads}


@dataclasses.dataclass(frozen=True)
class Call:
  """A program of a run with its arguments, as shapes with shardings.

  Attributes:
    program: the jitted function.
    args, keywords: what the loop calls it with.
    mesh: in whose context.
  """

  program: Callable[..., Any]
  args: tuple[Any, ...]
  keywords: dict[str, Any]
  mesh: jax.sharding.Mesh

  def trace(self) -> Any:
    """Traces it, for its jaxpr and the shapes of its results."""
    with jax.set_mesh(self.mesh):
      return self.program.trace(*self.args, **self.keywords)

  def text(self) -> str:
    """Writes it as XLA gets it, before anything is split or made faster."""
    with jax.set_mesh(self.mesh):
      return self.program.lower(*self.args, **self.keywords).compiler_ir('hlo').as_hlo_text()

  def begin(self, options: dict[str, Any] | None = None) -> Callable[[], Any]:
    """Traces it; what is returned compiles it, in any thread; with `options` of the compiler, for a
    look and not for the loop."""
    with jax.set_mesh(self.mesh):
      traced = self.program.lower(*self.args, **self.keywords)
    return functools.partial(traced.compile, options)

  def compile(self, options: dict[str, Any] | None = None) -> Any:
    """Compiles it, see `begin`."""
    with jax.set_mesh(self.mesh):
      return self.begin(options)()


def for_a_look(calls: dict[str, Call], short: bool) -> dict[str, Call]:
  """Picks what has to be compiled to know what the largest program takes: no sampler beside one
  that takes as much.

  Args:
    calls: of a run.
    short: whether to compile what is left of samplers with the last two lengths of their caches
      alone. No other two take as much as these, while one is copied into the other.
  """
  samplers = {name: call for name, call in calls.items()
              if getattr(_settings(call), 'func', None) is sample.sample_fn}
  out = dict(calls)
  for name, call in samplers.items():
    if any(other != name and other in out and _takes_no_less(bigger, call)
           for other, bigger in samplers.items()):
      del out[name]
    elif short:
      out[name] = dataclasses.replace(call, program=jax.jit(
          functools.partial(_settings(call), cache_lengths=2),
          out_shardings=sharding.by_rows(call.mesh)))
  return out


def _settings(call: Call) -> Any:
  """The function that is compiled, of a sampler with its settings."""
  return call.program.__wrapped__


def _takes_no_less(a: Call, b: Call) -> bool:
  """Whether sampler `a` is known to take as much as `b`: with the same weights, as many rows of as
  much room, and draws that look at the distribution as `b` does, or at more of it."""
  mine, theirs = _settings(a).keywords, _settings(b).keywords
  forms = [(how['model'], how['slots'], how['mix_model'] if how.get('mix_share') else None,
            [id(x) for x in jax.tree.leaves((call.args[0], call.keywords))])
           for call, how in ((a, mine), (b, theirs))]
  truncations = [(how['top_k'], how['top_p']) for how in (mine, theirs)]
  return (forms[0] == forms[1] and len(a.args[1].tokens) >= len(b.args[1].tokens)
          and mine['max_new_tokens'] >= theirs['max_new_tokens']
          and (mine['temperature'] > 0 or theirs['temperature'] == 0)
          and truncations[1] in (truncations[0], (0, 1.0)))


def look_options() -> dict[str, Any]:
  """Says how code of the CPU is compiled that is looked at and not run: what it allocates is the
  same, and compiling takes a third of the time."""
  options = {'xla_backend_optimization_level': 0, 'xla_cpu_parallel_codegen_split_count': 1}
  if jax.__version_info__ < (0, 12):  # gone from there
    options['xla_cpu_use_fusion_emitters'] = False
  return options


def bytes_each(x: Any) -> float:
  """Counts the bytes of an array on each of its devices."""
  if not hasattr(x, 'dtype') or jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
    return 0.0
  shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
  return float(np.prod(shape)) * x.dtype.itemsize


def resident(programs: Programs) -> Resident:
  """Describes what stays on the devices of a run, as reading its weights would lay it out."""
  parts, mesh = programs.parts, programs.parts.mesh

  def weights(specs, dtype, mesh=mesh):
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        params_lib.abstract_params(specs, dtype), sharding.param_shardings(specs, mesh))

  base = None
  if parts.adapter is not None:
    base = lora.Frozen(weights(parts.student.model.specs, parts.frozen_dtype),
                       parts.adapter.settings.scale)
  graders, heads = {}, {}
  for part in ('teacher', 'reference'):
    loaded = getattr(parts, part)
    if loaded is None or loaded.model is None:
      continue
    if loaded is parts.student:  # as `Parts.read_frozen`: the base is shared, the rest is a copy
      graders[part] = lora.join(base, weights(parts.trained_specs, jnp.float32))
    else:
      graders[part] = weights(loaded.model.specs, parts.frozen_dtype, parts.mesh_of(part))
    if any(parts.wanted(s, part).hidden for s in parts.streams):
      heads[part] = _head(loaded.model.head, graders[part], mesh)
  return Resident(programs.state, base, graders, Heads(**heads))


def _head(make: Callable[[Params], Head], params: Params, mesh: jax.sharding.Mesh) -> Head:
  """A head as an array: the parameter itself, or what another mesh has of it, split likewise."""
  head = jax.eval_shape(make, params)
  if head.matrix is None:
    return head
  own = params.get('embed' if head.tied else 'head')
  # A Flax module may have a part of this name.
  if hasattr(own, 'sharding') and getattr(own.sharding, 'mesh', None) == mesh and (
      own.shape, own.dtype) == (head.matrix.shape, head.matrix.dtype):
    return head.replace(matrix=own)
  where = sharding.fitting(head.matrix.shape, head.axes, mesh)
  return head.replace(matrix=jax.ShapeDtypeStruct(head.matrix.shape, head.matrix.dtype,
                                                  sharding=where))


def calls(run: Run, programs: Programs, there: Resident) -> dict[str, Call]:
  """Lists the programs of a run with their arguments, by what they do: 'lay out', 'sample', 'score
  teacher', 'score student', 'score reference', 'update', 'evaluate ...'; of the run's other streams
  with the stream's name in front. A program that serves two models is listed for both.

  Args:
    run: its settings.
    programs: its functions.
    there: what it keeps on its devices.
  """
  parts, mesh = programs.parts, programs.parts.mesh
  # Keys are made in the loop, where the mesh is set; that of the evaluations before it is.
  early, out, batches = jax.eval_shape(lambda: jax.random.key(0)), {}, {}
  key = jax.ShapeDtypeStruct(early.shape, early.dtype, sharding=sharding.replicated(mesh))

  def call(program, *args, mesh=mesh, **keywords):
    return Call(program, args, keywords, mesh)

  for stream in parts.streams:
    name = '' if stream.name == OWN else f'{stream.name} '
    pieces = parts.apart.parts if parts.apart and stream.on_policy else 1
    if stream.name in programs.writers:
      writes = 'teacher' if stream.writer == 'teacher' else 'student'
      writer = there.graders['teacher'] if writes == 'teacher' else there.student
      place = parts.mesh_of(writes)
      layout = programs.layouts[stream.name].program
      if layout is not None:
        out[f'{name}lay out'] = laid = call(layout, writer, mesh=place)
        writer = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            laid.trace().out_info, laid.compile().output_shardings)
      mixed = {'mix_params': there.graders['teacher']} if stream.teacher_mix else {}
      out[f'{name}sample'] = call(
          programs.writers[stream.name], writer,
          _prompts(run, stream.rows // pieces, place, part=pieces > 1),
          jax.ShapeDtypeStruct(early.shape, early.dtype, sharding=sharding.replicated(place)),
          mesh=place, **mixed)
    rows, scores = _rollout(run, stream.rows, mesh), {}
    for part in wants(stream.objective):
      if (stream.name, part) not in programs.scorers:
        continue
      place = parts.mesh_of(part)
      apart = place is not mesh
      graded = call(programs.scorers[stream.name, part],
                    there.student if part == 'student' else there.graders[part],
                    _rollout(run, stream.rows // pieces, place) if apart else rows, mesh=place)
      out[f'{name}score {part}'] = graded
      said = _by_rows(graded.trace().out_info, stream.rows, mesh)  # of all parts, joined
      scores[part] = score.only(said, parts.wanted(stream, part))
    batches[stream.name] = _batch(stream, rows, scores, mesh)
  for names, program in programs.updates.items():
    name = '' if names[0] == OWN else f'{names[0]} '
    out[f'{name}update'] = call(program, there.state, tuple(batches[n] for n in names),
                                there.heads, there.base, key)
  return out | _evaluation(run, programs, there, call, early)


def _evaluation(run: Run, programs: Programs, there: Resident, call: Callable[..., Call],
                key: Any) -> dict[str, Call]:
  """The programs of the evaluations, of the teacher where it has its own."""
  parts, mesh, out = programs.parts, programs.parts.mesh, {}
  problems = len(parts.held_out)
  rows = problems * run.eval.samples_per_problem
  evaluators = [('evaluate ', programs.evaluator, there.student)]
  if programs.teacher_evaluator not in (None, programs.evaluator):  # else by the same programs
    evaluators.append(('evaluate teacher ', programs.teacher_evaluator, there.graders['teacher']))
  for name, evaluator, params in evaluators:
    place = parts.mesh_of('teacher' if params is there.graders.get('teacher') else 'student')
    out[f'{name}sample'] = call(evaluator.sample, params, _prompts(run, rows, place), key,
                                mesh=place)
    if evaluator.graded:
      out[f'{name}greedy'] = call(evaluator.greedy, params, _prompts(run, problems, place), key,
                                  mesh=place)
    if evaluator.compare is not None:
      theirs = there.graders['teacher']
      if evaluator.see is not None:
        place = parts.mesh_of('teacher')
        out[f'{name}see'] = sees = call(evaluator.see.program, theirs,
                                        _rollout(run, rows, place, run.eval_tokens), mesh=place)
        theirs = Seen(_by_rows(sees.trace().out_info.hidden, rows, mesh), _seen_head(parts))
      out[f'{name}compare'] = call(evaluator.compare, params, theirs,
                                  _rollout(run, rows, mesh, run.eval_tokens))
  return out


def _seen_head(parts: Parts) -> Head:
  """That of a teacher on devices of its own, on the student's."""
  model = parts.teacher.model
  return _head(model.head, params_lib.abstract_params(model.specs, parts.frozen_dtype), parts.mesh)


def _array(shape: tuple[int, ...], dtype: Any, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding.by_rows(mesh))


def _by_rows(tree: Any, rows: int, mesh: jax.sharding.Mesh) -> Any:
  return jax.tree.map(lambda x: _array((rows, *x.shape[1:]), x.dtype, mesh), tree)


def _prompts(run: Run, rows: int, mesh: jax.sharding.Mesh, part: bool = False) -> Prompts:
  """Prompts of a batch, or of a part of one, which says which."""
  shape = rows, run.data.max_prompt_tokens
  places = _array((rows,), 'int32', mesh) if part else None
  return Prompts(_array(shape, 'int32', mesh), _array(shape, 'bool', mesh), places)


def _rollout(run: Run, rows: int, mesh: jax.sharding.Mesh, room: int = 0) -> Rollout:
  """Rows of a batch; `room` for answers that is another than of training."""
  length = run.data.max_prompt_tokens + (room or run.data.max_new_tokens)
  per_token = _array((rows, length - 1), 'float32', mesh)
  return Rollout(
      tokens=_array((rows, length), 'int32', mesh), valid=_array((rows, length), 'bool', mesh),
      mask=per_token, sampler_logprobs=per_token, policy_offset=per_token,
      ended=_array((rows,), 'bool', mesh), prompt_length=run.data.max_prompt_tokens)


def _batch(stream: Stream, rollout: Rollout, scores: dict[str, Any], mesh: jax.sharding.Mesh
           ) -> Batch:
  graded = stream.objective.needs_rewards
  return Batch(rollout, rewards=_array((stream.rows,), 'float32', mesh) if graded else None,
               **scores)
