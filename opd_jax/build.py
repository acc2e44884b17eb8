"""From a config to everything that stays the same during a run: models, data, mesh, optimizer.

This is where a ConfigDict ends: what `train.py` and the pure code get are models, arrays and frozen
dataclasses. Whatever does not fit together is refused here, before the first program is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
import copy
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from opd_jax import (
  checks,
  data,
  evaluate,
  foreign,
  hf,
  lora,
  metrics,
  models,
  optim,
  params,
  peft,
  sharding,
  tasks,
  teachers,
  tokenizer,
)
from opd_jax import config as config_lib
from opd_jax.objective import Objective
from opd_jax.types import Model, Params

INIT, SAMPLE, EVAL, GIVEN, GATE = range(5)  # what a random key is for
CONFIG = 'config.json'


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The low-rank adapters that are trained, before training.

  Attributes:
    settings: rank, alpha and targets.
    specs: the table of what is trained (`lora.adapter_specs`).
    read: (dtype, shardings) -> fresh adapters, or those of a PEFT directory.
  """

  settings: lora.Settings
  specs: dict[str, Any]
  read: Callable[..., Params]


@dataclasses.dataclass(frozen=True)
class Setup:
  """What `build` makes of a config: everything that stays the same during a run."""

  student: hf.LoadedModel  # before training
  adapter: Adapter | None  # what is trained; None for the whole student
  teacher: hf.LoadedModel | None  # `student` itself, if it teaches itself
  reference: hf.LoadedModel | None  # as with the teacher
  frozen_dtype: jnp.dtype  # of the teacher, and of the base under adapters
  task: Any
  objective: Objective
  off_objective: Objective | None  # of the batches that the student does not write
  given_objective: Objective | None  # of the rows beside
  mesh: jax.sharding.Mesh
  examples: data.Examples
  given: data.Examples | None  # of the rows beside
  evaluator: evaluate.Evaluator
  teacher_evaluator: evaluate.Evaluator | None
  optimizer: optax.GradientTransformation
  style: tokenizer.Style
  stop_tokens: tuple[int, ...]
  pad_token: int
  data_report: dict[str, dict[str, Any]]  # of the 'train' and the 'eval' examples

  @property
  def trained_specs(self) -> dict[str, Any]:
    """The table of the parameters in the train state."""
    return self.adapter.specs if self.adapter else self.student.model.specs

  @property
  def same_programs(self) -> bool:
    """Whether the teacher's parameters have the very form of the student's, so that the same
    compiled programs serve both: only then is log p_T - log p_S exactly zero for equal models."""
    return self.runs_students_programs(self.teacher)

  def runs_students_programs(self, other: hf.LoadedModel | None) -> bool:
    """`same_programs` of any other model."""
    if other is None or other is self.student:
      return other is not None
    return (self.adapter is None and self.frozen_dtype == jnp.float32
            and same_shape(other.model, self.student.model))


def same_shape(a: Model, b: Model) -> bool:
  """Whether two models are the same functions of their parameters."""
  return (a.family, a.config, a.vocab_in_use) == (b.family, b.config, b.vocab_in_use)


def read_frozen(s: Setup) -> lora.Frozen | None:
  """The base under the adapters on its devices; None where the whole student is trained."""
  if s.adapter is None:
    return None
  weights = sharding.param_shardings(s.student.model.specs, s.mesh)
  return lora.Frozen(read('student.path', s.student, s.frozen_dtype, weights),
                     s.adapter.settings.scale)


def read_trained(s: Setup) -> Params:
  """What the train state starts from, on its devices."""
  source, field = (s.adapter, 'student.lora.path') if s.adapter else (s.student, 'student.path')
  return read(field, source, jnp.float32, sharding.param_shardings(s.trained_specs, s.mesh))


def read(field: str, source: hf.LoadedModel | Adapter, dtype: Any, shardings: Any) -> Params:
  """`source.read`, whose errors name the config field.

  Raises:
    ConfigError: the weights have NaN or infinity, or a copy of a tied head that differs.
  """
  try:
    return source.read(dtype, shardings)
  except ValueError as e:
    raise config_lib.ConfigError(f'{field}: {e}') from e


def read_teacher(s: Setup, frozen: lora.Frozen | None, part: str = 'teacher') -> Params | None:
  """The parameters of the 'teacher' or the 'reference' on their devices. A student with adapters
  that teaches itself shares its base with its teacher: there is no second copy."""
  model = getattr(s, part)
  if model is None:
    return None
  if model is s.student:
    return lora.join(frozen, read_trained(s))
  weights = sharding.param_shardings(model.model.specs, s.mesh)
  return read(f'{part}.path', model, s.frozen_dtype, weights)


def fold_in(key: jax.Array, purpose: int, step: int) -> jax.Array:
  """The key for one purpose at one step; no key is ever stored."""
  return jax.random.fold_in(jax.random.fold_in(key, purpose), step)


def check_workdir(c: ConfigDict, workdir: pathlib.Path) -> None:
  """Checks that a work directory is new, or holds a run of this very config (but for `doctor`).

  Raises:
    ConfigError: the directory holds another config's run, or cannot be written.
  """
  mine = config_lib.to_dict(c)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / CONFIG).exists():
      partial = workdir / f'.{CONFIG}.partial'
      partial.write_text('')  # whether it can be written shows only by writing
      partial.unlink()
      return
    # The doctor changes no step of a run: one that it will not let resume needs its switches.
    theirs = {**json.loads((workdir / CONFIG).read_text()), 'doctor': mine['doctor']}
  except (OSError, TypeError, json.JSONDecodeError) as e:
    raise config_lib.ConfigError(
        f'workdir={str(workdir)!r} cannot be used ({CONFIG}: {e}); allowed: a directory that can '
        'be created and written, and holds nothing or a run of this config') from e
  if theirs != mine:
    changes = '; '.join(config_lib.differences(theirs, mine)[:8])
    raise config_lib.ConfigError(
        f'workdir={str(workdir)!r} holds a run of another config ({changes}); allowed: a new '
        'directory, or the config that the run was started with')


def claim_workdir(c: ConfigDict, workdir: pathlib.Path) -> None:
  """`check_workdir`, and then the directory belongs to this config.

  Raises:
    ConfigError: see `check_workdir`.
  """
  check_workdir(c, workdir)
  partial = workdir / f'.{CONFIG}.partial'
  try:
    if not (workdir / CONFIG).exists():
      partial.write_text(json.dumps(config_lib.to_dict(c), indent=2, sort_keys=True) + '\n')
      partial.rename(workdir / CONFIG)
  except OSError as e:
    raise config_lib.ConfigError(f'workdir={str(workdir)!r} cannot be used: {e}; allowed: a '
                                 'directory that can be written') from e


def build(c: ConfigDict) -> Setup:
  """Loads the models and the data, and checks that they fit together.

  Raises:
    ConfigError: with the field, the value and what is allowed.
  """
  try:
    mesh = sharding.make_mesh(c.compute.mesh.to_dict())
    rows = c.data.prompts_per_step * c.data.samples_per_prompt
    per_pass = c.compute.microbatch_rows or rows
    if per_pass % sharding.row_shards(mesh):
      raise ValueError(f'compute.mesh splits rows {sharding.row_shards(mesh)} ways, which does not '
                       f'divide the {per_pass} rows of a pass (compute.microbatch_rows, or data.'
                       'prompts_per_step x samples_per_prompt)')
    student = load_student(c)
    adapter = make_adapter(c, student)
    teacher, reference = get_teacher(c, student), get_reference(c, student)
    check_top_k(c, student)
    if adapter is not None:
      sharding.param_shardings(adapter.specs, mesh)
    for loaded in filter(None, (student, teacher, reference)):
      sharding.param_shardings(loaded.model.specs, mesh)  # raises where the mesh does not fit
      longest = loaded.model.config.max_position_embeddings
      if c.data.max_prompt_tokens + c.data.max_new_tokens > longest:
        raise ValueError(
            f'data.max_prompt_tokens={c.data.max_prompt_tokens} + data.max_new_tokens='
            f'{c.data.max_new_tokens}; allowed: together at most {longest}, the '
            'max_position_embeddings of student, teacher and reference')
    task = tasks.get(c.task.name)
    stop_tokens = choose_stop_tokens(c, student, teacher)
    style = prompt_style(c, student.tokenizer, teacher and teacher.tokenizer, stop_tokens)
    examples = load_examples(c, c.data.split, c.data.limit, student.tokenizer, style,
                             'dataset' in (c.data.source, c.data.off_policy_source))
    held_out = load_examples(c, 'eval', c.eval.problems, student.tokenizer, style)
    given = None
    if c.given.source != 'none':
      given = load_examples(c, c.given.split, 0, student.tokenizer, style,
                            c.given.source == 'dataset')
    check_verifier(c, examples, held_out)
    check_completions(c, examples, given)
    for field, rows in (('given.prompts_per_step', c.given.prompts_per_step),
                        ('eval.problems', len(held_out))):
      if rows % sharding.row_shards(mesh):
        raise ValueError(f'compute.mesh splits rows {sharding.row_shards(mesh)} ways, which does '
                         f'not divide {field}={rows}')
  except config_lib.ConfigError:
    raise
  except (ValueError, FileNotFoundError, FileExistsError) as e:
    raise config_lib.ConfigError(str(e)) from e
  evaluator = make_evaluator(c, student, teacher and teacher.model, held_out, mesh, stop_tokens)
  off = c.data.off_policy_source
  report = {'train': examples.report, 'eval': held_out.report}
  s = Setup(student=student, adapter=adapter, teacher=teacher, reference=reference,
            frozen_dtype=frozen_dtype(c), task=task, objective=config_lib.make_objective(c),
            off_objective=None if off == 'none' else config_lib.make_objective(c, off),
            given_objective=config_lib.make_given_objective(c), mesh=mesh, examples=examples,
            given=given, evaluator=evaluator, teacher_evaluator=None, optimizer=make_optimizer(c),
            style=style, stop_tokens=stop_tokens, pad_token=tokenizer.pad_id(student.tokenizer),
            data_report=report | ({'given': given.report} if given else {}))
  if teacher is None:
    return s
  # A teacher of the student's form is evaluated by the same programs.
  return dataclasses.replace(s, teacher_evaluator=evaluator if s.same_programs else make_evaluator(
      c, teacher, None, held_out, mesh, stop_tokens))


def check_top_k(c: ConfigDict, student: hf.LoadedModel) -> None:
  """Checks every k against the vocabulary.

  Raises:
    ValueError: with the field.
  """
  for field, k in (('sample.top_k', c.sample.top_k), ('eval.top_k', c.eval.top_k),
                   ('objective.top_k', c.objective.top_k),
                   ('objective.local.top_k', c.objective.local.top_k),
                   ('objective.token_top_k', c.objective.token_top_k),
                   ('given.top_k', c.given.top_k)):
    if k > student.model.vocab_in_use:
      raise ValueError(f'{field}={k}; allowed: at most the vocabulary of '
                       f'{student.model.vocab_in_use}')


def check_completions(c: ConfigDict, examples: data.Examples, given: data.Examples | None) -> None:
  """Checks that there are completions where the dataset is to give them.

  Raises:
    ValueError: with the field.
  """
  for group, field, rows in (('data', 'source', examples), ('given', 'source', given),
                             ('data', 'off_policy_source', examples)):
    if c[group][field] == 'dataset' and not rows.has_completions:
      raise ValueError(
          f"{group}.split={c[group].split!r}: {group}.{field}='dataset' needs a split with "
          f"completions; allowed: one with a column 'completion', and not only "
          f'{sorted(rows.rows[0])}')


def choose_stop_tokens(c: ConfigDict, student: hf.LoadedModel, teacher: hf.LoadedModel | None
                       ) -> tuple[int, ...]:
  """What ends a completion in this run, whoever writes it."""
  mine = set(student.stop_tokens)
  if teacher is None:  # a model that such a run exported ends with its own stop tokens
    return tuple(sorted(mine))
  theirs = set(teacher.stop_tokens)
  return tuple(sorted({'student': mine, 'teacher': theirs, 'union': mine | theirs}[c.sample.stop]))


def final_tokenizer(c: ConfigDict, student: hf.LoadedModel, teacher: hf.LoadedModel | None) -> Any:
  """The tokenizer of the trained model: the student's, with the chat template it was trained in."""
  if c.prompt.template != 'teacher':
    return student.tokenizer
  out = copy.deepcopy(student.tokenizer)
  out.chat_template = teacher.tokenizer.chat_template
  return out


def make_optimizer(c: ConfigDict) -> optax.GradientTransformation:
  """The optimizer and its schedule."""
  o = c.optimizer
  schedule = optim.make_schedule(o.schedule, o.learning_rate, o.final_learning_rate,
                                 o.warmup_steps, c.steps * o.updates_per_batch)
  return optim.make_optimizer(o.name, schedule, b1=o.b1, b2=o.b2, eps=o.eps,
                              weight_decay=o.weight_decay, clip_norm=o.clip_norm)


def prompt_style(c: ConfigDict, student: Any, teacher: Any, stop_tokens: tuple[int, ...]
                 ) -> tokenizer.Style:
  """How prompts become tokens, from the tokenizers of student and teacher (None if there is none).

  Raises:
    ValueError: no chat template where one is needed, or a setting without effect.
  """
  chat = {'none': None, 'student': student, 'teacher': teacher}[c.prompt.template]
  if chat is None and c.prompt.template != 'none':
    raise ValueError(f'prompt.template={c.prompt.template!r} without a teacher; allowed: the path '
                     'of a teacher')
  style = tokenizer.Style(chat=chat, stop_tokens=stop_tokens, **c.prompt.to_dict())
  tokenizer.check_style(style)
  return style


def load_examples(c: ConfigDict, split: str, limit: int, tokens: Any, style: tokenizer.Style,
                  with_completions: bool = False) -> data.Examples:
  """The first `limit` examples of a split (0 for all) of those that fit, encoded."""
  task = tasks.get(c.task.name)
  rows = task.load(split, tasks.options(task, c.task.options.to_dict()))
  if c.data.overlong != 'drop' and 0 < limit < len(rows):
    rows = rows.select(range(limit))  # none of the others can be needed
  examples = data.Examples(
      task, rows, tokens, max_prompt_tokens=c.data.max_prompt_tokens,
      max_new_tokens=c.data.max_new_tokens, seed=c.seed, style=style, overlong=c.data.overlong,
      with_completions=with_completions)
  if limit > len(examples):
    field = 'eval.problems' if split == 'eval' else 'data.limit'
    raise ValueError(f'{field}={limit}; allowed: at most {len(examples)}, the examples of the '
                     f'split {split!r} ({examples.report})')
  return examples.first(limit) if limit else examples


def check_verifier(c: ConfigDict, examples: data.Examples, held_out: data.Examples) -> None:
  """Checks that nothing asks for rewards or accuracies that a task cannot give.

  Raises:
    ValueError: with the field.
  """
  task = tasks.get(c.task.name)
  if config_lib.make_objective(c).needs_rewards and not data.has_verifier(task, examples):
    raise ValueError(f'objective.reward_coef={c.objective.reward_coef}, row_gate='
                     f'{c.objective.row_gate!r} with task.name={c.task.name!r}, which does not '
                     "grade these examples; allowed: 0, and 'none' or 'teacher_likelihood'")
  for group, name in (('checkpoint', 'keep_best'), ('eval', 'stop_at_sampled_accuracy')):
    if c[group][name] and not data.has_verifier(task, held_out):
      raise ValueError(f'{group}.{name}={c[group][name]} with task.name={c.task.name!r}, which '
                       'does not grade its evaluation examples, so that there is no accuracy; '
                       'allowed: 0')


def make_evaluator(c: ConfigDict, student: hf.LoadedModel, teacher: Model | None,
                   examples: data.Examples, mesh: jax.sharding.Mesh,
                   stop_tokens: tuple[int, ...]) -> evaluate.Evaluator:
  """Evaluation of models shaped like `student` on the held-out examples."""
  settings = evaluate.Settings(
      samples_per_problem=c.eval.samples_per_problem, pass_k=c.eval.pass_k,
      max_new_tokens=c.data.max_new_tokens, temperature=c.sample.temperature,
      teacher_temperature=c.objective.teacher_temperature, top_p=c.eval.top_p,
      top_k=c.eval.top_k, chunk_tokens=c.compute.chunk_tokens,
      microbatch_rows=c.compute.microbatch_rows, overlap_top_k=c.eval.overlap_top_k)
  return evaluate.Evaluator(
      settings, model=student.model, teacher=teacher, task=tasks.get(c.task.name),
      examples=examples, tokenizer=student.tokenizer,
      stop_tokens=stop_tokens, pad_token=tokenizer.pad_id(student.tokenizer), mesh=mesh,
      key=fold_in(jax.random.key(c.seed), EVAL, 0))


def compute_options(c: ConfigDict) -> dict[str, Any]:
  """The `models.build` options of a config."""
  return dict(dtype=jnp.dtype(c.compute.dtype), remat=c.compute.remat,
              layer_unroll=c.compute.layer_unroll)


def load_student(c: ConfigDict) -> hf.LoadedModel:
  """The student before training: a checkpoint, or fresh parameters from the seed."""
  if c.student.factory:
    return load_flax(c, 'student')
  if c.student.path:
    try:
      return hf.load(c.student.path, compute_options(c), c.student.revision)
    except (ValueError, FileNotFoundError) as e:
      raise ValueError(f'student.path={c.student.path!r}: {e}; allowed: a Hugging Face checkpoint '
                       'directory') from e
  characters = tokenizer.character_tokenizer()
  model = models.build({**c.student.fresh.to_dict(), 'vocab_size': len(characters)},
                       **compute_options(c))
  return hf.LoadedModel(model, characters, (characters.eos_token_id,),
                        fresh_reader(c, model.specs))


def make_adapter(c: ConfigDict, student: hf.LoadedModel) -> Adapter | None:
  """The adapters to train, fresh from the seed or from a PEFT directory; None without any.

  Raises:
    ValueError: settings or a directory that do not fit the student.
  """
  group = c.student.lora
  if not config_lib.has_adapter(c):
    return None
  if group.path:
    try:
      settings, read = peft.read_adapter(group.path, student.model, c.student.path)
    except (ValueError, FileNotFoundError) as e:
      raise ValueError(f'student.lora.path={group.path!r}: {e}') from e
    return Adapter(settings, lora.adapter_specs(student.model.specs, settings), read)
  settings = lora.Settings(rank=group.rank, alpha=group.alpha, targets=group.targets)
  try:
    specs = lora.adapter_specs(student.model.specs, settings)
  except ValueError as e:
    raise ValueError(f'student.{e}') from e
  return Adapter(settings, specs, fresh_reader(c, specs))


def fresh_reader(c: ConfigDict, specs: dict[str, Any]) -> Callable[..., Params]:
  """(dtype, shardings) -> fresh parameters from the run's seed, in the form of a `read`."""
  def read(dtype: Any = jnp.float32, shardings: Any = None) -> Params:
    fresh = params.init_params(specs, fold_in(jax.random.key(c.seed), INIT, 0), dtype)
    return jax.device_get(fresh) if shardings is None else sharding.put(fresh, shardings)

  return read


def frozen_dtype(c: ConfigDict) -> jnp.dtype:
  """How parameters that nothing changes are kept."""
  auto = c.compute.frozen_dtype == 'auto'
  return jnp.dtype(c.compute.dtype if auto else c.compute.frozen_dtype)


def load_flax(c: ConfigDict, part: str) -> hf.LoadedModel:
  """The 'student' or 'teacher' that the code named by its `factory` makes.

  Raises:
    ValueError: names the fields. `read` raises a ConfigError for parameters that do not do.
  """
  factory, path = c[part].factory, c[part].path
  where = f'{part}.factory={factory!r}, {part}.path={path!r}'
  try:
    directory = str(hf.fetch(path, c[part].revision)) if path else ''
    loaded = foreign.load(factory, directory, jnp.dtype(c.compute.dtype),
                          fold_in(jax.random.key(c.seed), INIT, 0))
  except (ValueError, FileNotFoundError) as e:
    raise ValueError(f'{where}: {e}') from e

  def read(dtype=jnp.float32, shardings=None):
    try:
      return loaded.read(dtype, shardings)
    except (ValueError, FileNotFoundError) as e:
      raise config_lib.ConfigError(f'{where}: {e}') from e

  return dataclasses.replace(loaded, read=read)


def get_teacher(c: ConfigDict, student: hf.LoadedModel) -> hf.LoadedModel | None:
  """The teacher, if there is one. Whether it fits the student is for `doctor` to say.

  Raises:
    ValueError: it cannot be opened.
  """
  if c.teacher.kind == teachers.NONE:
    return None
  try:
    if c.teacher.factory:
      return load_flax(c, 'teacher')
    return teachers.load(c.teacher.kind, c.teacher.path, student, compute_options(c),
                         c.teacher.revision)
  except (ValueError, FileNotFoundError) as e:
    if str(e).startswith('teacher.'):
      raise
    raise ValueError(f'teacher.path={c.teacher.path!r}: {e}; allowed: a Hugging Face checkpoint '
                     'directory') from e


def get_reference(c: ConfigDict, student: hf.LoadedModel) -> hf.LoadedModel | None:
  """The reference model, if there is one: any kind of teacher, of the student's vocabulary.

  Raises:
    ValueError: it cannot be opened, or has other tokens.
  """
  if c.reference.kind == teachers.NONE:
    return None
  where = f'reference.path={c.reference.path!r}'
  try:
    loaded = teachers.load(c.reference.kind, c.reference.path, student, compute_options(c),
                           c.reference.revision)
  except (ValueError, FileNotFoundError) as e:
    raise ValueError(f'{where}: {e}; allowed: a Hugging Face checkpoint directory') from e
  if not tokenizer.same_vocabulary(student.tokenizer, loaded.tokenizer):
    raise ValueError(f'{where} has {len(loaded.tokenizer)} tokens, not those of the student '
                     f'({len(student.tokenizer)}); allowed: a model that maps the same strings to '
                     'the same token ids')
  return loaded


def open_directory(c: ConfigDict, part: str, path: str) -> hf.LoadedModel:
  """A directory in place of a run's student or teacher; `c` says how to make it if it is Flax."""
  if c[part].factory and hf.read_config(path).get('model_type') == foreign.FAMILY:
    c = copy.deepcopy(c)
    c[part].path = path
    return load_flax(c, part)
  return hf.load(path, compute_options(c))


def evaluate_model(c: ConfigDict, path: str, teacher_path: str) -> dict[str, Any]:
  """Evaluates a Hugging Face directory on a run's held-out problems, as the run would.

  Args:
    c: a run's config; its task, room, sampling and evaluation settings and its seed are used. (In a
      pipeline, stages run with the pipeline's seeds, and this evaluates with seed 0.)
    path: the model.
    teacher_path: another directory to measure the reverse KL to, or ''.

  Raises:
    ConfigError: a path that is no checkpoint directory, or a teacher with other tokens.
  """
  for name, value in (('model', path), ('teacher', teacher_path)):
    if (value or name == 'model') and not (value and pathlib.Path(value).is_dir()):
      raise config_lib.ConfigError(f'{name}={value!r}; allowed: a Hugging Face directory')
  checks.validate(c)
  mesh = sharding.make_mesh(c.compute.mesh.to_dict())
  try:
    student = open_directory(c, 'student', path)
    teacher = open_directory(c, 'teacher', teacher_path) if teacher_path else None
    if teacher and not tokenizer.same_vocabulary(student.tokenizer, teacher.tokenizer):
      raise ValueError(
          f'teacher={teacher_path!r} has {len(teacher.tokenizer)} tokens, not those of model='
          f'{path!r} ({len(student.tokenizer)}); allowed: a teacher that maps the same strings to '
          'the same token ids')
    stop_tokens = choose_stop_tokens(c, student, teacher)
    # What such a run exported has the template it was trained in.
    style = prompt_style(c, student.tokenizer, (teacher or student).tokenizer, stop_tokens)
    examples = load_examples(c, 'eval', c.eval.problems, student.tokenizer, style)
  except (ValueError, FileNotFoundError) as e:
    raise config_lib.ConfigError(str(e)) from e
  evaluator = make_evaluator(c, student, teacher and teacher.model, examples, mesh,
                             stop_tokens)
  weights = [m and read(field, m, jnp.float32, sharding.param_shardings(m.model.specs, mesh))
             for field, m in (('model', student), ('teacher', teacher))]
  display = metrics.Display(path, 0, 1)
  with jax.set_mesh(mesh):
    values, shown = evaluator(*weights, c.log.transcripts)
  display.transcripts('transcripts:', shown)
  display.close()
  print(json.dumps(values, indent=2))
  return values
