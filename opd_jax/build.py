"""From the settings of a run to what stays the same while it runs: models without weights, data,
mesh, optimizer.

Whatever does not fit together is refused here, before a weight is read or a program compiled.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from opd_jax import load, tasks
from opd_jax.algorithm.objective import top_ks, wants
from opd_jax.data import examples as examples_lib
from opd_jax.data import prompts as prompts_lib
from opd_jax.data import streams as streams_lib
from opd_jax.data.examples import Examples
from opd_jax.data.streams import GIVEN, OWN, Stream
from opd_jax.errors import ConfigError, refuse
from opd_jax.files.huggingface import LoadedModel
from opd_jax.load import Adapter
from opd_jax.models import flax_module, kernels, lora
from opd_jax.models import params as params_lib
from opd_jax.parallel import apart as apart_lib
from opd_jax.parallel import sharding
from opd_jax.parallel.apart import Apart
from opd_jax.run import meshes, optim
from opd_jax.run.ledger import Counter
from opd_jax.settings import Run
from opd_jax.types import Params, Wants


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a run is made of."""

  student: LoadedModel  # before training
  adapter: Adapter | None  # what is trained; None for the whole student
  teacher: LoadedModel | None  # `student` itself, if it teaches itself
  reference: LoadedModel | None  # as with the teacher
  frozen_dtype: jnp.dtype  # of the teacher, and of the base under adapters
  task: Any
  streams: tuple[Stream, ...]
  examples: dict[str, Examples]  # by the name of the stream
  held_out: Examples
  mesh: jax.sharding.Mesh
  apart: Apart | None  # the way to a teacher that has devices of its own
  itemsize: int  # of an activation, in bytes
  chunk_tokens: int  # of all devices together
  optimizer: optax.GradientTransformation
  style: prompts_lib.Style
  stop_tokens: tuple[int, ...]
  pad_token: int

  @property
  def trained_specs(self) -> dict[str, Any]:
    """The table of the parameters in the train state."""
    return self.adapter.specs if self.adapter else self.student.model.specs

  @property
  def report(self) -> dict[str, dict[str, Any]]:
    """What became of the examples, for the log."""
    out = {'train': self.examples[OWN].report, 'eval': self.held_out.report}
    return out | ({GIVEN: self.examples[GIVEN].report} if GIVEN in self.examples else {})

  def read_base(self) -> lora.Frozen | None:
    """Reads the base under the adapters to its devices; None where the whole student is trained."""
    return load.read_base(self.student, self.adapter, self.frozen_dtype, self.mesh)

  def read_trained(self) -> Params:
    """Reads what the train state starts from to its devices."""
    source, field = ((self.adapter, 'student.lora.path') if self.adapter
                     else (self.student, 'student.path'))
    return load.read(field, source, self.trained_specs, jnp.float32, self.mesh)

  def read_frozen(self, part: str, base: lora.Frozen | None) -> Params | None:
    """Reads the parameters of the 'teacher' or the 'reference' to their devices. A student with
    adapters that teaches itself shares its base with its teacher: there is no second copy."""
    loaded = getattr(self, part)
    if loaded is None:
      return None
    if loaded is self.student:
      return lora.join(base, self.read_trained())
    return load.read(f'{part}.path', loaded, loaded.model.specs, self.frozen_dtype,
                     self.mesh_of(part))

  def wanted(self, stream: Stream, part: str) -> Wants:
    """Says what is asked of the 'teacher', the 'student' or the 'reference' for a stream; of a
    teacher on devices of its own, in the form of the least bytes."""
    asked = wants(stream.objective)[part]
    if part != 'teacher' or not self.apart:
      return asked
    return apart_lib.least(asked, stream.objective.teachers_top_k, self._teacher_width,
                           self.itemsize)

  @property
  def _teacher_width(self):
    """Numbers in a hidden state of the teacher, which are the logits where it has no head."""
    model = self.teacher.model
    head = jax.eval_shape(model.head, params_lib.abstract_params(model.specs))
    if head.matrix is None:
      return model.config.vocab_size
    return head.matrix.shape[head.axes.index('embed')]

  def counter(self, updates: int) -> Counter:
    """Makes what counts the operations of steps that take so many updates."""
    return Counter(self.student.model, self.teacher and self.teacher.model,
                   self.reference and self.reference.model, self.adapter and self.adapter.specs,
                   updates)

  def describe_apart(self, name: str) -> str:
    """Says, for the log of a run, where a teacher on devices of its own is, and what comes back."""
    wanted = {s.name: self.wanted(s, 'teacher') for s in self.streams}
    return apart_lib.describe(name, self.apart, wanted, self._teacher_width, self.itemsize)

  def mesh_of(self, part: str) -> jax.sharding.Mesh:
    """Returns the mesh of the 'student', the 'teacher' or the 'reference'."""
    return self.apart.mesh if part == 'teacher' and self.apart else self.mesh

  def place_of(self, stream: Stream) -> jax.sharding.Mesh:
    """Returns the mesh on which a stream is written."""
    return self.mesh_of('teacher' if stream.writer == 'teacher' else 'student')

  def pieces_of(self, stream: Stream) -> int:
    """Says in how many parts the rows of a stream are written, one after another."""
    return self.apart.parts if self.apart and stream.on_policy else 1

  def runs_students_programs(self, other: LoadedModel | None) -> bool:
    """Tells whether another model's parameters have the very form of the student's, so that the
    same compiled programs serve both: only then is log p_T - log p_S exactly zero for equal
    models."""
    if other is None or other is self.teacher and self.apart:
      return False
    if other is self.student:
      return True
    a, b = other.model, self.student.model
    return (self.adapter is None and self.frozen_dtype == jnp.float32
            and (a.family, a.config, a.vocab_in_use) == (b.family, b.config, b.vocab_in_use))


def open_parts(run: Run) -> Parts:
  """Opens models and data, and checks that they fit together.

  Raises:
    ConfigError: with the field, the value and what is allowed.
  """
  try:
    return _open_parts(run)
  except ConfigError:
    raise
  except (ValueError, FileNotFoundError, FileExistsError) as e:
    raise ConfigError(str(e)) from e


def _open_parts(run):
  student = load.open_student(run)
  adapter = load.make_adapter(run, student)
  teacher, reference = load.open_teacher(run, student), load.open_reference(run, student)
  mesh, apart = meshes.make_meshes(run.compute, student, teacher)
  shards = sharding.row_shards(mesh)
  at_once = math.lcm(shards, sharding.row_shards(apart.mesh)) if apart else shards
  streams = streams_lib.make(run, shards)
  check_models(run, streams, mesh, adapter, [m for m in (student, teacher, reference) if m],
               teacher if apart else None)
  if apart:
    meshes.check_apart(run, streams, apart, teacher)
  _check_wants(streams, teacher, reference)
  stop_tokens = choose_stop_tokens(run.sample.stop, student, teacher)
  style = prompt_style(run, student.tokenizer, teacher and teacher.tokenizer, stop_tokens)
  examples = _open_examples(run, streams, student.tokenizer, style)
  held_out = load_examples(run, 'eval', run.eval.problems, student.tokenizer, style)
  check_verifier(run, streams, examples[OWN], held_out)
  for field, rows in [('eval.problems', len(held_out))] + [
      ('given.prompts_per_step', s.rows) for s in streams if s.name == GIVEN]:
    if rows % at_once:
      raise ConfigError(f'{field}={rows}: compute.mesh splits rows {at_once} ways; allowed: a '
                        f'multiple of {at_once}')
  return Parts(
      student=student, adapter=adapter, teacher=teacher, reference=reference,
      frozen_dtype=jnp.dtype(run.frozen_dtype), task=tasks.get(run.task.name), streams=streams,
      examples=examples, held_out=held_out, mesh=mesh, apart=apart,
      itemsize=jnp.dtype(run.compute.dtype).itemsize,
      chunk_tokens=run.compute.chunk_tokens * shards, optimizer=make_optimizer(run), style=style,
      stop_tokens=stop_tokens, pad_token=prompts_lib.pad_id(student.tokenizer))


def check_models(run: Run, streams: tuple[Stream, ...], mesh: jax.sharding.Mesh,
                 adapter: Adapter | None, loaded: list[LoadedModel],
                 elsewhere: LoadedModel | None = None) -> None:
  """Refuses sizes that do not fit the mesh, the models or the vocabulary; of a model that is
  `elsewhere`, on devices of its own, the parameters are none of the mesh's.

  Raises:
    ConfigError: the first of them, or ValueError for parameters that the mesh does not divide.
  """
  rows, shards = streams[0].rows, sharding.row_shards(mesh)
  if rows % shards:
    refuse(run, 'data.prompts_per_step data.samples_per_prompt',
           f'compute.mesh splits rows {shards} ways', f'a multiple of {shards} rows')
  if rows % (streams[0].microbatch_rows or rows):
    refuse(run, 'compute.microbatch_rows', f'compute.mesh leaves {rows // shards} rows to a shard, '
           'which it does not divide', f'a divisor of {rows // shards}, or 0')
  if run.sample.slots % shards:
    refuse(run, 'sample.slots', f'compute.mesh splits rows {shards} ways',
           f'a multiple of {shards}')
  if run.sample.slots and (fixed := [m.model.family for m in loaded if not m.model.refill]):
    refuse(run, 'sample.slots', f'the cache of {fixed[0]} takes no fresh prompts', '0')
  here = [m.model.specs for m in loaded if m is not elsewhere]
  for specs in here + ([adapter.specs] if adapter else []):
    sharding.param_shardings(specs, mesh)  # raises where the mesh does not fit
  _check_layers(run, mesh, loaded)
  longest = min(m.model.config.max_position_embeddings for m in loaded)
  room = max(run.data.max_new_tokens, run.eval_tokens)
  if run.data.max_prompt_tokens + room > longest:
    refuse(run, 'data.max_prompt_tokens data.max_new_tokens eval.max_new_tokens', '',
           f'together at most {longest}, the max_position_embeddings of student, teacher and '
           'reference')
  in_use = loaded[0].model.vocab_in_use
  counts = {'sample.top_k': run.sample.top_k, 'eval.top_k': run.eval.top_k}
  for stream in streams:
    group = 'given' if stream.name == GIVEN else 'objective'
    counts |= {f'{group}.{field}': k for field, k in top_ks(stream.objective).items()}
  for field, k in counts.items():
    if k > in_use:
      refuse(run, field, '', f'at most the vocabulary of {in_use} tokens')


def _check_layers(run, mesh, loaded):
  """Refuses ways to compute layers that these devices do not have, or not for these models."""
  if run.compute.remat == 'offload' and mesh.devices.flat[0].platform == 'cpu':
    refuse(run, 'compute.remat', 'a CPU has no memory but its own',
           "'none', 'attention' or 'layer'")
  for config in (m.model.config for m in loaded if m.model.family != flax_module.FAMILY):
    softcap = getattr(config, 'attn_logit_softcapping', None) or 0.0
    found = kernels.refusal(run.compute.attention, mesh.devices.flat[0].platform,
                            run.compute.dtype, config.head_dim, softcap)
    if found:
      refuse(run, 'compute.attention', *found)


def _check_wants(streams, teacher, reference):
  """Refuses an objective that asks for more than a grader gives."""
  for part, grader in (('teacher', teacher), ('reference', reference)):
    for stream in streams:
      wanted = wants(stream.objective)[part]
      if grader is not None and (wanted | grader.gives) != grader.gives:
        raise ValueError(f'{part}.kind gives {grader.gives}, and the objective of the stream '
                         f'{stream.name!r} asks for {wanted}; allowed: another kind, or another '
                         'objective')


def _open_examples(run, streams, tokens, style):
  own = load_examples(run, run.data.split, run.data.limit, tokens, style,
                      'dataset' in (run.data.source, run.data.off_policy_source), 'data')
  out = {s.name: own for s in streams}
  if GIVEN in out:
    out[GIVEN] = load_examples(run, run.given.split, 0, tokens, style,
                               run.given.source == 'dataset', 'given')
  for group, field, rows in (('data', 'source', own), ('data', 'off_policy_source', own),
                             ('given', 'source', out.get(GIVEN))):
    part = getattr(run, group)
    if getattr(part, field) == 'dataset' and not rows.has_completions:
      raise ValueError(
          f"{group}.split={part.split!r}: {group}.{field}='dataset' needs a split with "
          f"completions; allowed: one with a column 'completion', and not only "
          f'{sorted(rows.rows[0])}')
  return out


def load_examples(run: Run, split: str, limit: int, tokens: Any, style: prompts_lib.Style,
                  with_completions: bool = False, group: str = '') -> Examples:
  """Encodes the first `limit` examples of a split (0 for all) of those that fit.

  `group` is that of the field which says the split, '' where none does.

  Raises:
    ValueError: there are fewer, some do not fit, or the task refuses the split.
  """
  task = tasks.get(run.task.name)
  try:
    rows = task.load(split, run.task.options)
  except ValueError as e:  # of the split: a task does not know for what it is asked
    raise ConfigError(f'{group}.{e}' if group and str(e).startswith('split=') else str(e)) from e
  if run.data.overlong != 'drop' and 0 < limit < len(rows):
    rows = rows.select(range(limit))  # none of the others can be needed
  out = Examples(
      task, rows, tokens, max_prompt_tokens=run.data.max_prompt_tokens,
      max_new_tokens=run.data.max_new_tokens, seed=run.seed, style=style,
      overlong=run.data.overlong, with_completions=with_completions)
  if limit > len(out):
    field = 'eval.problems' if split == 'eval' else 'data.limit'
    raise ValueError(f'{field}={limit}; allowed: at most {len(out)}, the examples of the split '
                     f'{split!r} ({out.report})')
  return out.first(limit) if limit else out


def check_verifier(run: Run, streams: tuple[Stream, ...], own: Examples, held_out: Examples
                   ) -> None:
  """Checks that nothing asks for rewards or accuracies that a task cannot give.

  Raises:
    ConfigError: with the field.
  """
  task = tasks.get(run.task.name)
  if streams[0].objective.needs_rewards and not examples_lib.has_verifier(task, own):
    refuse(run, 'objective.reward_coef objective.row_gate task.name',
           'the task does not grade these examples', "0, and 'none' or 'teacher_likelihood'")
  for asked, field, allowed in (
      (run.checkpoint.keep_best, 'checkpoint.keep_best', '0, or -1 for 1 where the task grades'),
      (run.eval.stop_at_sampled_accuracy, 'eval.stop_at_sampled_accuracy', '0')):
    if asked > 0 and not examples_lib.has_verifier(task, held_out):
      refuse(run, f'{field} task.name', 'the task does not grade its evaluation examples, so that '
             'there is no accuracy', allowed)


def choose_stop_tokens(stop: str, student: LoadedModel, teacher: LoadedModel | None
                       ) -> tuple[int, ...]:
  """Chooses what ends a completion (`stop`: sample.stop), whoever writes it."""
  mine = set(student.stop_tokens)
  if teacher is None:  # a model that such a run exported ends with its own stop tokens
    return tuple(sorted(mine))
  theirs = set(teacher.stop_tokens)
  return tuple(sorted(
      {'student': mine, 'teacher': theirs, 'union': mine | theirs}[stop]))


def final_tokenizer(template: str, student: LoadedModel, teacher: LoadedModel | None) -> Any:
  """Makes the tokenizer of the trained model: the student's, with the chat template it was trained
  in (`template`: prompt.template)."""
  if template != 'teacher':
    return student.tokenizer
  out = copy.deepcopy(student.tokenizer)
  out.chat_template = teacher.tokenizer.chat_template
  return out


def make_optimizer(run: Run) -> optax.GradientTransformation:
  """Makes the optimizer and its schedule."""
  o = run.optimizer
  schedule = optim.make_schedule(o.schedule, o.learning_rate, o.final_learning_rate,
                                 o.warmup_steps, run.steps * o.updates_per_batch)
  return optim.make_optimizer(o.name, schedule, b1=o.b1, b2=o.b2, eps=o.eps,
                              weight_decay=o.weight_decay, clip_norm=o.clip_norm)


def prompt_style(run: Run, student: Any, teacher: Any, stop_tokens: tuple[int, ...]
                 ) -> prompts_lib.Style:
  """Makes the style in which prompts become tokens, from the tokenizers of student and teacher
  (None if there is none).

  Raises:
    ValueError: no chat template where one is needed, or a setting without effect.
  """
  chat = {'none': None, 'student': student, 'teacher': teacher}[run.prompt.template]
  if chat is None and run.prompt.template != 'none':
    refuse(run, 'prompt.template', 'there is no teacher', 'the path of a teacher')
  style = prompts_lib.Style(chat=chat, stop_tokens=stop_tokens, **dataclasses.asdict(run.prompt))
  prompts_lib.check_style(style)
  return style
