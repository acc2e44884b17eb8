"""Experiment configs: the one template with every field, its checks, and typed config arguments.

ConfigDict stops here: the rest of the package takes frozen dataclasses and keyword arguments.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

from opd_jax import data, hf, models, optim, tasks, teachers, tokenizer
from opd_jax import objective as objective_lib
from opd_jax.params import flatten

SOURCES = ('student', 'teacher', 'dataset')
STAGE = 'stage:'  # prefix of a path that names an earlier stage of the same pipeline


class ConfigError(ValueError):
  """A config that cannot run: names the field, the value and what is allowed."""


def default_config() -> ConfigDict:
  """Every field of a run, locked: assigning a field that is not here raises."""
  c = ConfigDict()
  c.name = 'run'
  c.seed = 0
  c.steps = 100  # batches; gradient steps are steps * optimizer.updates_per_batch

  # Who learns. `path` is a Hugging Face directory, 'stage:NAME', or 'organization/name' of the hub
  # with its commit as `revision`; with path '' a fresh model is made from `fresh` (the fields of a
  # config.json) with a character tokenizer.
  # `factory` is the 'package.module:function' of a Flax module (see `foreign.load`), '' for none.
  c.student = ConfigDict(dict(path='', revision='', factory=''))
  c.student.fresh = ConfigDict(dict(
      model_type='qwen3', hidden_size=64, intermediate_size=192, num_hidden_layers=2,
      num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
      rope_theta=100.0, tie_word_embeddings=False, max_position_embeddings=512))

  # Low-rank adapters instead of the whole model: rank 0 trains the whole model. `targets` is 'all',
  # 'attention', 'mlp' or a regular expression (lora.Settings). `path` is a PEFT directory to start
  # from, which then says all of it.
  c.student.lora = ConfigDict(dict(rank=0, alpha=32.0, targets='all', path=''))

  # Who grades: kind is a file in opd_jax/teachers/, or 'none'.
  c.teacher = ConfigDict(dict(kind='none', path='', revision='', factory=''))

  # How both compute.
  c.compute = ConfigDict()
  c.compute.dtype = 'float32'  # of activations; trained parameters and reductions are float32
  # How teachers and the base under an adapter are kept: 'auto' is compute.dtype.
  c.compute.frozen_dtype = 'auto'
  c.compute.remat = False  # recompute each layer in the backward pass
  c.compute.layer_unroll = 1  # layers per iteration of the scan over layers
  c.compute.microbatch_rows = 0  # rows per forward/backward pass, 0 for the whole batch
  c.compute.chunk_tokens = 4096  # tokens whose vocabulary rows exist at a time
  c.compute.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, expert=1))  # -1: what is left
  # Wait for each program before the next: 'auto' does on several fake CPU devices, where programs
  # with collectives in flight together can deadlock.
  c.compute.block = 'auto'

  # What it learns on: name is a file in opd_jax/tasks/, options are its Options.
  c.task = task_config('arithmetic')

  _add_data(c)

  # How completions are sampled, in training and evaluation. The student is trained at this
  # temperature too.
  # `stop`: whose stop tokens end a completion: 'student', 'teacher' or the 'union' of both.
  c.sample = ConfigDict(dict(temperature=1.0, top_p=1.0, top_k=0, stop='student'))

  # See objective.Objective for every field.
  c.objective = ConfigDict({
      f.name: f.default for f in dataclasses.fields(objective_lib.Objective)
      if f.name != 'temperature'})

  c.optimizer = ConfigDict(dict(
      name='adamw', learning_rate=1e-3, schedule='constant', final_learning_rate=0.0,
      warmup_steps=0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0,
      updates_per_batch=1))

  _add_bookkeeping(c)
  c.lock()
  return c


def _add_data(c: ConfigDict) -> None:
  # How prompts become tokens. template is 'none' (the text as it is) or whose chat template is
  # used, 'student' or 'teacher'; system, thinking ('default', 'on', 'off') and date (what one
  # that writes today's date writes in its place) are for a template; special_tokens, only without
  # one, lets the tokenizer put its own tokens (BOS) first.
  c.prompt = ConfigDict(dict(template='none', system='', thinking='default', date='',
                             special_tokens=False))

  c.data = ConfigDict()
  c.data.source = 'student'  # who writes the completions: student, teacher or dataset
  c.data.split = 'train'
  c.data.limit = 0  # use only the first so many examples, 0 for all
  c.data.prompts_per_step = 256
  c.data.samples_per_prompt = 1
  c.data.max_prompt_tokens = 12
  c.data.max_new_tokens = 36
  # Examples that do not fit: 'raise'; 'drop'; 'cut' (the beginning of a prompt, the end of a given
  # completion).
  c.data.overlong = 'raise'


def _add_bookkeeping(c: ConfigDict) -> None:
  c.eval = ConfigDict()
  c.eval.every_steps = 0  # 0: only before the first and after the last step
  c.eval.problems = 256
  c.eval.samples_per_problem = 2
  c.eval.pass_k = 2
  c.eval.stop_at_sampled_accuracy = 0.0  # end the stage once reached, 0 for never

  # `export` is what a finished run leaves for others: 'full', the whole model with adapters merged
  # into it (and the adapter beside it), or only the 'adapter'.
  c.checkpoint = ConfigDict(dict(every_steps=100, keep_latest=2, keep_best=1,
                                 best_metric='sampled_accuracy', export='full'))
  # What is checked at every start, on this many rollouts of at most so many tokens. A check is 'on'
  # or 'off: REASON'; see opd_jax/doctor.py.
  c.doctor = ConfigDict(dict(
      rollouts=8, max_new_tokens=256, max_reverse_kl=6.0,
      templates='on', token_ids='on', stop_tokens='on', vocabulary='on', memory='on',
      unused_options='on', self_kl='on', uniform_teacher='on', support='on', special_tokens='on',
      truncation='on'))
  c.log = ConfigDict()
  c.log.every_steps = 1
  c.log.plain_every_steps = 10  # lines on a console that is no terminal
  c.log.transcripts = 3
  c.log.max_sampler_gap = 0.0  # stop if sampler and scorer differ by more nats, 0 for never


def task_config(name: str, **options: Any) -> ConfigDict:
  """The `task` group for a task, with all of its knobs spelled out.

  Raises:
    ValueError: an unknown task or knob.
  """
  values = dataclasses.asdict(tasks.options(tasks.get(name), options))
  return ConfigDict(dict(name=name, options=ConfigDict(values)))


def default_pipeline() -> ConfigDict:
  """Named stages, each a config of `default_config`, run in `order` for every seed."""
  c = ConfigDict()
  c.name = 'pipeline'
  c.seeds = (0,)
  c.order = ()
  c.stages = ConfigDict()
  # What the report shows; every field names stages.
  c.report = ConfigDict(dict(
      teacher='',  # 'stage:NAME' of the method that made the teacher, '' if none of them did
      methods=(),  # the rows of the table and the curves of the picture
      labels=(),  # their names, in the same order
      levels=(0.9, 0.95)))  # shares of the teacher's accuracy to reach
  return c


def is_pipeline(c: ConfigDict) -> bool:
  """Whether `c` is a pipeline rather than one run."""
  return 'stages' in c


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Parses the string after the colon of `--config file.py:arg`, strictly.

  'tiny,seeds=3' sets `size='tiny'` (a bare word, where the experiment has a `size`) and seeds=3.
  Values take the type of their default.

  Raises:
    ConfigError: an unknown name or a value of another type.
  """
  out = ConfigDict(defaults)
  for part in filter(None, (arg or '').split(',')):
    name, has_value, text = part.partition('=')
    if not has_value and 'size' in defaults:
      name, text = 'size', part
    if name not in defaults:
      raise ConfigError(f'config argument {part!r}: unknown name {name!r}; allowed: '
                        f'{sorted(defaults)}')
    default, value = defaults[name], text
    if not isinstance(default, str):
      try:
        value = ast.literal_eval(text)
      except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if type(value) is not type(default):
      raise ConfigError(f'config argument {part!r}: {name} takes a {type(default).__name__}')
    out[name] = value
  return out


def to_dict(c: ConfigDict) -> dict[str, Any]:
  """Plain JSON content (tuples become lists)."""
  return json.loads(c.to_json())


def from_dict(values: dict[str, Any]) -> ConfigDict:
  """The inverse of `to_dict`, for a single run.

  Raises:
    ConfigError: fields that are missing or unknown.
  """
  def fill(template, given, prefix):
    if sorted(template) != sorted(given):
      odd = sorted({f'{prefix}{k}' for k in set(template) ^ set(given)})
      raise ConfigError(f'fields {odd} are missing or unknown; allowed: those of a config of this '
                        'version')
    for name, value in given.items():
      if isinstance(template[name], ConfigDict):
        fill(template[name], value, f'{prefix}{name}.')
      else:
        template[name] = tuple(value) if isinstance(template[name], tuple) else value

  c = default_config()
  c.student.fresh = ConfigDict(values.get('student', {}).get('fresh', {}))
  if 'task' in values:
    name = values['task']['name']
    defaults = {f.name: f.default for f in dataclasses.fields(tasks.get(name).Options)}
    c.task = task_config(name, **{
        k: tuple(v) if isinstance(defaults.get(k), tuple) else v
        for k, v in values['task']['options'].items()})
  fill(c, values, '')
  return c


def make_objective(c: ConfigDict) -> objective_lib.Objective:
  """The pure code's Objective. The student's temperature is the sampler's, by construction; text
  that the student did not write is scored at temperature 1."""
  own = c.data.source == 'student'
  return objective_lib.Objective(**c.objective.to_dict(),
                              temperature=c.sample.temperature if own else 1.0)


def validate(c: ConfigDict, prefix: str = '') -> None:
  """Checks everything that can be checked without loading anything.

  Raises:
    ConfigError: the first problem found.
  """
  _check_fields(c, default_config(), prefix)
  try:
    if c.steps < 1:
      raise ConfigError(f'steps={c.steps}; allowed: at least 1')
    if not 0 <= c.seed < 2**32:  # of a larger one, a random key has only the lower 32 bits
      raise ConfigError(f'seed={c.seed}; allowed: 0 to {2**32 - 1}')
    objective_lib.check_objective(make_objective(c))
    tasks.options(tasks.get(c.task.name), c.task.options.to_dict())
    _check_roles(c)
    _check_prompt(c)
    _check_factories(c)
    _check_sizes(c)
    _check_adapter(c)
    _check_doctor(c)
    _check_optimizer(c.optimizer)
    if c.optimizer.warmup_steps >= c.steps * c.optimizer.updates_per_batch:
      raise ConfigError(f'optimizer.warmup_steps={c.optimizer.warmup_steps}; allowed: below the '
                        f'{c.steps * c.optimizer.updates_per_batch} gradient steps of the run')
    _check_source('student', c.student)
    _check_source('teacher', c.teacher)
  except (ValueError, TypeError) as e:
    raise ConfigError(f'{prefix}{e}') from e


def _check_fields(c, template, prefix):
  free = ('student.fresh', 'task.options')  # checked by the family and by the task
  for name, value in template.items():
    field = f'{prefix}{name}'
    if name not in c:
      raise ConfigError(f'{field} is missing')
    if isinstance(value, ConfigDict):
      if not isinstance(c[name], ConfigDict):
        raise ConfigError(f'{field}={c[name]!r}; allowed: a group with fields {sorted(value)}')
      if not field.endswith(free):
        _check_fields(c[name], value, f'{field}.')
    elif type(c[name]) is not type(value):
      raise ConfigError(f'{field}={c[name]!r} has type {type(c[name]).__name__}; allowed: '
                        f'{type(value).__name__}')
  unknown = sorted(set(c) - set(template))
  if unknown:
    raise ConfigError(f'unknown config keys {[prefix + k for k in unknown]}; allowed: '
                      f'{[prefix + k for k in sorted(template)]}')


def _check_source(part, group):
  if group.path and not group.path.startswith(STAGE):
    try:
      hf.check_source(group.path, group.revision)
    except ValueError as e:
      raise ConfigError(f"{part}.{e}, or 'stage:NAME' in a pipeline") from e
  elif group.revision:
    raise ConfigError(f'{part}.revision={group.revision!r} has no effect with {part}.path='
                      f"{group.path!r}; allowed: ''")


def _check_optimizer(c):
  if c.name not in optim.OPTIMIZERS:
    raise ConfigError(f'optimizer.name={c.name!r}; allowed: {list(optim.OPTIMIZERS)}')
  if c.schedule not in optim.SCHEDULES:
    raise ConfigError(f'optimizer.schedule={c.schedule!r}; allowed: {list(optim.SCHEDULES)}')
  for field in ('learning_rate', 'final_learning_rate', 'weight_decay', 'clip_norm', 'eps'):
    if not 0 <= c[field] < math.inf:  # NaN is neither
      raise ConfigError(f'optimizer.{field}={c[field]}; allowed: at least 0, and finite')
  for field in ('b1', 'b2'):
    if not 0 <= c[field] < 1:
      raise ConfigError(f'optimizer.{field}={c[field]}; allowed: at least 0, below 1')
  if c.schedule == 'constant' and c.final_learning_rate:
    raise ConfigError(f'optimizer.final_learning_rate={c.final_learning_rate} has no effect with '
                      "optimizer.schedule='constant'; allowed: 0")
  if c.name == 'sgd' and c.weight_decay:
    raise ConfigError(f'optimizer.weight_decay={c.weight_decay} has no effect with '
                      "optimizer.name='sgd'; allowed: 0")


def _check_samples(c, o):
  truncated = c.sample.top_p < 1 or c.sample.top_k > 0
  # The ratio is in the policy-gradient terms only, so that it does not help the estimators.
  uncorrected = o.estimator != 'none' or o.has_policy_gradient and o.importance == 'none'
  if c.data.source == 'student' and uncorrected and (
      truncated or c.optimizer.updates_per_batch > 1):
    raise ConfigError(
        f'objective.importance={o.importance!r}, estimator={o.estimator!r} with sample.top_p='
        f'{c.sample.top_p}, top_k={c.sample.top_k}, optimizer.updates_per_batch='
        f'{c.optimizer.updates_per_batch}: the samples are not from the policy that is updated; '
        f"allowed: importance in {[i for i in objective_lib.IMPORTANCE if i != 'none']} with "
        "estimator='none'")
  longest, window = c.data.max_new_tokens, o.window_start + o.window_tokens
  if o.window_tokens and not (o.window_start < longest and (o.window_start or window < longest)):
    raise ConfigError(f'objective.window_start={o.window_start}, window_tokens={o.window_tokens} '
                      f'with data.max_new_tokens={longest}: no token is inside, or none outside; '
                      f'allowed: a start below {longest}, and from 0 fewer tokens than that')


def _check_roles(c):
  o = make_objective(c)
  if c.teacher.kind not in teachers.names():
    raise ConfigError(f'teacher.kind={c.teacher.kind!r}; allowed: {teachers.names()}')
  if c.data.source not in SOURCES:
    raise ConfigError(f'data.source={c.data.source!r}; allowed: {list(SOURCES)}')
  has_teacher = c.teacher.kind != teachers.NONE
  if c.teacher.path and not has_teacher:
    raise ConfigError(f"teacher.path={c.teacher.path!r} has no effect with teacher.kind='none'; "
                      "allowed: ''")
  if (o.needs_teacher or c.data.source == 'teacher') and not has_teacher:
    raise ConfigError("teacher.kind='none' with objective.distill_coef="
                      f'{o.distill_coef} and data.source={c.data.source!r}; allowed: one of '
                      f'{teachers.names()[1:]}, or no use of a teacher')
  if c.data.source != 'student' and o.importance != 'none':
    raise ConfigError(f'objective.importance={o.importance!r} with data.source={c.data.source!r}: '
                      "there is no ratio to the sampler's policy; allowed: 'none'")
  if c.data.split == 'eval':
    raise ConfigError("data.split='eval': nobody trains on the held-out examples; allowed: another "
                      'split of the task')
  if c.data.source == 'dataset' and c.data.samples_per_prompt > 1:
    raise ConfigError(f'data.samples_per_prompt={c.data.samples_per_prompt} with data.source='
                      "'dataset': there is one completion a prompt; allowed: 1")
  _check_samples(c, o)
  if not 0 <= c.log.max_sampler_gap < math.inf:
    raise ConfigError(f'log.max_sampler_gap={c.log.max_sampler_gap}; allowed: at least 0, and '
                      'finite')
  if c.data.source != 'student' and c.log.max_sampler_gap:
    raise ConfigError(f'log.max_sampler_gap={c.log.max_sampler_gap} has no effect with data.source='
                      f"{c.data.source!r}; allowed: 0, or data.source='student'")
  if c.data.source != 'student' and o.needs_teacher and o.support == 'sampled':
    raise ConfigError(f"objective.route={o.route!r}, support='sampled' with data.source="
                      f"{c.data.source!r}: an estimate from one token needs the student's own "
                      "samples; allowed: data.source='student', or route='direct' with another "
                      'support')
  if o.student_logprobs == 'sampler' and not (o.needs_teacher and o.route == 'policy_gradient'):
    raise ConfigError("objective.student_logprobs='sampler' has no effect without a "
                      "policy-gradient distillation term; allowed: 'rescored'")
  if o.reward_coef and o.reward_baseline != 'none' and c.data.samples_per_prompt < 2:
    raise ConfigError(f'data.samples_per_prompt={c.data.samples_per_prompt} with '
                      f'objective.reward_baseline={o.reward_baseline!r}: a group of one has no '
                      'baseline; allowed: at least 2')
  if o.baseline == 'leave_one_out' and c.data.samples_per_prompt < 2:
    raise ConfigError(f'data.samples_per_prompt={c.data.samples_per_prompt} with objective.'
                      "baseline='leave_one_out': there is no other sample; allowed: at least 2")
  if not 0 < c.sample.temperature < math.inf:
    raise ConfigError(f'sample.temperature={c.sample.temperature}; allowed: above 0, and finite '
                      '(greedy accuracy is always evaluated too)')
  if c.sample.stop not in ('student', 'teacher', 'union'):
    raise ConfigError(f"sample.stop={c.sample.stop!r}; allowed: ['student', 'teacher', 'union']")
  if c.sample.stop != 'student' and not has_teacher:
    raise ConfigError(f"sample.stop={c.sample.stop!r} with teacher.kind='none'; allowed: 'student'")
  if not 0 < c.sample.top_p <= 1 or c.sample.top_k < 0:
    raise ConfigError(f'sample.top_p={c.sample.top_p}, top_k={c.sample.top_k}; allowed: top_p '
                      'above 0 and at most 1, top_k at least 0 (0 for none)')


def _check_prompt(c):
  p = c.prompt
  for field, value, names in (
      ('prompt.template', p.template, tokenizer.TEMPLATES),
      ('prompt.thinking', p.thinking, tokenizer.THINKING),
      ('data.overlong', c.data.overlong, data.OVERLONG)):
    if value not in names:
      raise ConfigError(f'{field}={value!r}; allowed: {list(names)}')
  if p.template == 'none':
    for field, default in (('system', ''), ('thinking', 'default'), ('date', '')):
      if p[field] != default:
        raise ConfigError(f"prompt.{field}={p[field]!r} has no effect with prompt.template='none'; "
                          f'allowed: {default!r}')
  elif p.special_tokens:
    raise ConfigError(f'prompt.special_tokens=True with prompt.template={p.template!r}: a template '
                      'writes its special tokens itself; allowed: False')
  if p.template == 'teacher' and c.teacher.kind == teachers.NONE:
    raise ConfigError("prompt.template='teacher' with teacher.kind='none'; allowed: 'none', "
                      "'student', or a teacher")
  if c.data.overlong == 'cut' and (p.template != 'none' or p.special_tokens):
    raise ConfigError(
        f"data.overlong='cut' with prompt.template={p.template!r}, special_tokens="
        f'{p.special_tokens}: what a template or the tokenizer puts first would be cut off; '
        "allowed: 'raise' or 'drop'")


def _check_factories(c):
  for part in ('student', 'teacher'):
    name = c[part].factory
    if name and not re.fullmatch(r'[\w.]+:\w+', name):
      raise ConfigError(f"{part}.factory={name!r}; allowed: 'package.module:function', or ''")
  if c.teacher.factory and (c.teacher.kind != 'checkpoint' or not c.teacher.path):
    raise ConfigError(f'teacher.factory={c.teacher.factory!r} with teacher.kind={c.teacher.kind!r},'
                      f" path={c.teacher.path!r}; allowed: teacher.kind='checkpoint' and a path")
  if c.student.factory:
    if has_adapter(c):
      raise ConfigError(f'student.lora.rank={c.student.lora.rank}, path={c.student.lora.path!r} '
                        f'with student.factory={c.student.factory!r}: adapters are for families in '
                        "opd_jax/models; allowed: 0 and ''")
    for field, neutral in (('remat', False), ('layer_unroll', 1)):
      if c.compute[field] != neutral:
        raise ConfigError(f'compute.{field}={c.compute[field]} has no effect with student.factory='
                          f"{c.student.factory!r}, a module that knows its own layers; allowed: "
                          f'{neutral}')


def _check_adapter(c):
  group, template = c.student.lora, default_config().student.lora
  if group.rank < 0:
    raise ConfigError(f'student.lora.rank={group.rank}; allowed: at least 1, or 0 to train the '
                      'whole model')
  if group.path and not pathlib.Path(group.path).is_dir():
    raise ConfigError(f'student.lora.path={group.path!r} is not a directory; allowed: a PEFT '
                      "checkpoint directory, or ''")
  fixed = ('rank', 'alpha', 'targets') if group.path else () if group.rank else ('alpha', 'targets')
  for name in fixed:
    if group[name] != template[name]:
      why = f'path={group.path!r}, which says it' if group.path else 'rank=0'
      raise ConfigError(f'student.lora.{name}={group[name]!r} has no effect with student.lora.'
                        f'{why}; allowed: {template[name]!r}')
  if not 0 < group.alpha < math.inf:
    raise ConfigError(f'student.lora.alpha={group.alpha}; allowed: above 0, and finite')
  if c.checkpoint.export not in ('full', 'adapter'):
    raise ConfigError(f"checkpoint.export={c.checkpoint.export!r}; allowed: ['full', 'adapter']")
  if c.checkpoint.export == 'adapter' and not has_adapter(c):
    raise ConfigError("checkpoint.export='adapter' with student.lora.rank=0: there is no adapter; "
                      "allowed: 'full'")


def _check_doctor(c):
  for name, value in c.doctor.items():
    if isinstance(value, str) and value != 'on' and not (
        value.startswith('off:') and value.removeprefix('off:').strip()):
      raise ConfigError(f"doctor.{name}={value!r}; allowed: 'on', or 'off: REASON'")
  if not c.doctor.max_reverse_kl > 0:
    raise ConfigError(f'doctor.max_reverse_kl={c.doctor.max_reverse_kl}; allowed: above 0')


def unused_options(c: ConfigDict) -> list[str]:
  """'field=value (why)' for options that were changed and that nothing will read."""
  template = flatten(default_config().to_dict())
  changed = {name for name, value in flatten(c.to_dict()).items()
             if name in template and template[name] != value}
  out = []

  def unread(names, condition, why):
    if condition:
      out.extend(f'{n.replace("/", ".")}={flatten(c.to_dict())[n]!r} ({why})'
                 for n in sorted(changed) if n.startswith(names))

  unread('student/fresh/', bool(c.student.path), 'student.path is set')
  unread('student/fresh/', bool(c.student.factory), 'student.factory is set')
  unread(('optimizer/b2', 'optimizer/eps'), c.optimizer.name == 'sgd', "optimizer.name='sgd'")
  unread('checkpoint/best_metric', not c.checkpoint.keep_best, 'checkpoint.keep_best=0')
  unread('compute/frozen_dtype', c.teacher.kind == teachers.NONE and not has_adapter(c),
         'there is no teacher and no adapter')
  unread('doctor/max_reverse_kl', c.doctor.support != 'on' or c.data.source != 'student',
         'the check support does not run')
  return out


def has_adapter(c: ConfigDict) -> bool:
  """Whether adapters are trained instead of the whole model."""
  return bool(c.student.lora.rank or c.student.lora.path)


def _check_sizes(c):
  for field, low in (('data.prompts_per_step', 1), ('data.samples_per_prompt', 1),
                     ('data.max_prompt_tokens', 1), ('data.max_new_tokens', 1), ('data.limit', 0),
                     ('compute.microbatch_rows', 0), ('compute.chunk_tokens', 1),
                     ('compute.layer_unroll', 1), ('optimizer.updates_per_batch', 1),
                     ('optimizer.warmup_steps', 0), ('eval.problems', 1),
                     ('eval.every_steps', 0), ('eval.samples_per_problem', 1),
                     ('checkpoint.every_steps', 1), ('checkpoint.keep_latest', 1),
                     ('checkpoint.keep_best', 0), ('log.every_steps', 1),
                     ('log.plain_every_steps', 1), ('log.transcripts', 0),
                     ('doctor.rollouts', 1), ('doctor.max_new_tokens', 1)):
    group, name = field.split('.')
    if c[group][name] < low:
      raise ConfigError(f'{field}={c[group][name]}; allowed: at least {low}')
  rows = c.data.prompts_per_step * c.data.samples_per_prompt
  if c.compute.microbatch_rows and rows % c.compute.microbatch_rows:
    raise ConfigError(
        f'compute.microbatch_rows={c.compute.microbatch_rows} does not divide the batch of {rows} '
        f'rows (data.prompts_per_step={c.data.prompts_per_step} x data.samples_per_prompt='
        f'{c.data.samples_per_prompt}); allowed: a divisor of {rows}, or 0 for the whole batch')
  if not 1 <= c.eval.pass_k <= c.eval.samples_per_problem:
    raise ConfigError(f'eval.pass_k={c.eval.pass_k}; allowed: 1 to eval.samples_per_problem='
                      f'{c.eval.samples_per_problem}')
  if c.compute.dtype not in ('float32', 'bfloat16'):
    raise ConfigError(f"compute.dtype={c.compute.dtype!r}; allowed: ['float32', 'bfloat16']")
  if c.compute.frozen_dtype not in ('auto', 'float32', 'bfloat16'):
    raise ConfigError(f'compute.frozen_dtype={c.compute.frozen_dtype!r}; allowed: '
                      "['auto', 'float32', 'bfloat16']")
  if c.compute.block not in ('auto', 'always', 'never'):
    raise ConfigError(f"compute.block={c.compute.block!r}; allowed: ['auto', 'always', 'never']")
  if not 0 <= c.eval.stop_at_sampled_accuracy <= 1:
    raise ConfigError(f'eval.stop_at_sampled_accuracy={c.eval.stop_at_sampled_accuracy}; allowed: '
                      '0 to 1')
  if c.eval.stop_at_sampled_accuracy and not c.eval.every_steps:
    raise ConfigError(f'eval.stop_at_sampled_accuracy={c.eval.stop_at_sampled_accuracy} has no '
                      'effect with eval.every_steps=0; allowed: 0, or eval.every_steps above 0')
  accuracies = ['sampled_accuracy', 'greedy_accuracy', f'pass_at_{c.eval.pass_k}']
  if c.checkpoint.best_metric not in accuracies:
    raise ConfigError(f'checkpoint.best_metric={c.checkpoint.best_metric!r}; allowed: '
                      f'{accuracies}')
  if not (c.student.path or c.student.factory):
    models.build({**c.student.fresh.to_dict(), 'vocab_size': 64})


def validate_pipeline(c: ConfigDict) -> None:
  """`validate` for every stage, and the references between them.

  Raises:
    ConfigError: the first problem found.
  """
  _check_fields(c, _pipeline_template(c), '')
  if sorted(c.order) != sorted(c.stages):
    raise ConfigError(f'order={c.order}; allowed: each of {sorted(c.stages)} once')
  if len(set(c.seeds)) != len(c.seeds) or not c.seeds or not all(
      type(seed) is int and 0 <= seed < 2**32 for seed in c.seeds):
    raise ConfigError(f'seeds={c.seeds}; allowed: at least one seed of 0 to {2**32 - 1}, each once')
  done: list[str] = []
  for name in c.order:
    stage = c.stages[name]
    for part in ('student', 'teacher'):
      path = stage[part].path
      if path.startswith(STAGE) and path[len(STAGE):] not in done:
        raise ConfigError(f'stages.{name}.{part}.path={path!r}; allowed: an earlier stage, one of '
                          f'{done}')
      if path.startswith(STAGE):
        made_by = c.stages[path[len(STAGE):]].student.factory
        if stage[part].factory != made_by:
          raise ConfigError(f'stages.{name}.{part}.factory={stage[part].factory!r} with the path '
                            f'{path!r}; allowed: {made_by!r}, as in that stage')
      if path.startswith(STAGE) and c.stages[path[len(STAGE):]].checkpoint.export != 'full':
        raise ConfigError(f'stages.{name}.{part}.path={path!r}: that stage leaves no whole model '
                          "behind; allowed: a stage with checkpoint.export='full'")
    validate(stage, f'stages.{name}.')
    if stage.seed:
      raise ConfigError(f'stages.{name}.seed={stage.seed} has no effect; allowed: 0, and the field '
                        'seeds of the pipeline')
    done.append(name)
  made = c.report.teacher
  if made and not (made.startswith(STAGE) and made[len(STAGE):] in done):
    raise ConfigError(f"report.teacher={made!r}; allowed: '', or 'stage:NAME' of {done}")
  unknown = sorted(set(c.report.methods) - set(done))
  if unknown or not c.report.methods or len(c.report.methods) != len(c.report.labels):
    raise ConfigError(f'report.methods={c.report.methods}, labels={c.report.labels}; allowed: '
                      f'at least one stage of {done}, with one label each')


def _pipeline_template(c):
  template = default_pipeline()
  template.stages = c.stages
  return template


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
  """'field: old -> new' for every field in which two configs differ."""
  a, b = flatten(a), flatten(b)
  return [f'{k}: {a.get(k, "(absent)")!r} -> {b.get(k, "(absent)")!r}'
          for k in sorted(set(a) | set(b)) if a.get(k, '(absent)') != b.get(k, '(absent)')]
