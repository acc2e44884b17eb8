"""What a config must satisfy before anything is loaded: each field alone, and all together.

Refused is what cannot run, what cannot mean what it says, and what nothing would read. The rules of
the objective alone are in `objective.py`; what needs the models is checked by `build.py` and
`doctor.py`.
"""

from __future__ import annotations

import math
import pathlib
import re

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import data, estimators, hf, models, optim, tasks, teachers, tokenizer
from opd_jax import objective as objective_lib
from opd_jax.config import SOURCES, STAGE, ConfigError, default_config, has_adapter, make_objective
from opd_jax.params import flatten


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
    _check_given(c)
    tasks.options(tasks.get(c.task.name), c.task.options.to_dict())
    _check_roles(c)
    _check_mixture(c)
    _check_reference(c)
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
    _check_source('reference', c.reference)
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
  sampled = o.estimator != 'none' or o.reference_estimator in ('k2', 'k3')
  uncorrected = sampled or o.has_policy_gradient and o.importance == 'none'
  if c.data.source == 'student' and uncorrected and (
      truncated or c.sample.teacher_mix or c.optimizer.updates_per_batch > 1):
    raise ConfigError(
        f'objective.importance={o.importance!r}, estimator={o.estimator!r}, reference_estimator='
        f'{o.reference_estimator!r} with sample.top_p={c.sample.top_p}, top_k={c.sample.top_k}, '
        f'teacher_mix={c.sample.teacher_mix}, optimizer.updates_per_batch='
        f'{c.optimizer.updates_per_batch}: the samples are not from the policy that is updated; '
        "allowed: importance='ratio' or 'truncated' (for later updates on full samples 'two_sided' "
        "and 'ppo_clip' too) with estimator='none' and a reference_estimator other than 'k2' and "
        "'k3'")
  moved = o.importance in ('two_sided', 'ppo_clip')
  if truncated and moved and o.needs_teacher and o.route == 'policy_gradient':
    raise ConfigError(
        f'objective.importance={o.importance!r} with sample.top_p={c.sample.top_p}, top_k='
        f'{c.sample.top_k}: it compares with the policy before truncation, so that the samples '
        "would count as the policy's own; allowed: 'ratio' or 'truncated'")
  later = c.optimizer.updates_per_batch > 1 and o.advantages == 'kept'
  if later and objective_lib.wants(o)['student'].hidden:
    raise ConfigError(
        f'objective.advantages={o.advantages!r} with optimizer.updates_per_batch='
        f'{c.optimizer.updates_per_batch}, objective.baseline={o.baseline!r}, token_gate='
        f"{o.token_gate!r}: what those read are hidden states, which need the head of their own "
        "time; allowed: 'recomputed', another baseline and another gate")
  if o.advantages == 'recomputed' and c.optimizer.updates_per_batch == 1:
    raise ConfigError("objective.advantages='recomputed' has no effect with optimizer."
                      "updates_per_batch=1; allowed: 'kept'")
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
  if not has_teacher and c.objective.teacher_temperature != 1.0:
    raise ConfigError(f'objective.teacher_temperature={c.objective.teacher_temperature} has no '
                      "effect with teacher.kind='none'; allowed: 1.0")
  if c.teacher.path and not has_teacher:
    raise ConfigError(f"teacher.path={c.teacher.path!r} has no effect with teacher.kind='none'; "
                      "allowed: ''")
  uses = {'data.source': c.data.source, 'data.off_policy_source': c.data.off_policy_source,
          'given.source': c.given.source}
  if not has_teacher and (o.needs_teacher or c.given.distill_coef or c.sample.teacher_mix
                          or 'teacher' in uses.values()):
    raise ConfigError("teacher.kind='none' with objective.distill_coef="
                      f'{o.distill_coef}, given.distill_coef={c.given.distill_coef}, sample.'
                      f'teacher_mix={c.sample.teacher_mix}, '
                      + ', '.join(f'{field}={value!r}' for field, value in uses.items())
                      + '; allowed: one of '
                      f'{teachers.names()[1:]}, or no use of a teacher')
  for field in ('source', 'off_policy_source'):
    if c.data[field] in ('teacher', 'dataset'):
      _check_foreign_rows(c, o, field)
  if c.data.split == 'eval':
    raise ConfigError("data.split='eval': nobody trains on the held-out examples; allowed: another "
                      'split of the task')
  _check_samples(c, o)
  if not 0 <= c.log.max_sampler_gap < math.inf:
    raise ConfigError(f'log.max_sampler_gap={c.log.max_sampler_gap}; allowed: at least 0, and '
                      'finite')
  if (c.data.source != 'student' or not c.data.on_policy_fraction) and c.log.max_sampler_gap:
    raise ConfigError(f'log.max_sampler_gap={c.log.max_sampler_gap} has no effect with data.source='
                      f"{c.data.source!r}; allowed: 0, or data.source='student'")
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
  for group in ('sample', 'eval'):
    if not 0 < c[group].top_p <= 1 or c[group].top_k < 0:
      raise ConfigError(f'{group}.top_p={c[group].top_p}, top_k={c[group].top_k}; allowed: top_p '
                        'above 0 and at most 1, top_k at least 0 (0 for none)')


def _check_foreign_rows(c, o, field):
  """Rows that the student did not write."""
  where = f'data.{field}={c.data[field]!r}'
  if o.importance != 'none':
    raise ConfigError(f'objective.importance={o.importance!r} with {where}: there is no ratio to '
                      "the sampler's policy; allowed: 'none'")
  if c.data[field] == 'dataset' and c.data.samples_per_prompt > 1:
    raise ConfigError(f'data.samples_per_prompt={c.data.samples_per_prompt} with {where}: there is '
                      'one completion a prompt; allowed: 1')
  if o.needs_teacher and o.support == 'sampled' or o.reference_estimator in ('k2', 'k3'):
    raise ConfigError(
        f"objective.route={o.route!r}, support={o.support!r}, reference_estimator="
        f"{o.reference_estimator!r} with {where}: an estimate from one token needs the student's "
        "own samples; allowed: data.source='student', or route='direct' with another support, and "
        "no reference_estimator but 'full'")


def _check_mixture(c):
  share, other = c.data.on_policy_fraction, c.data.off_policy_source
  if not 0.0 <= share <= 1.0:
    raise ConfigError(f'data.on_policy_fraction={share}; allowed: 0 to 1')
  if (other in ('teacher', 'dataset')) != (share < 1.0) or other not in (
      'none', 'teacher', 'dataset'):
    raise ConfigError(f'data.off_policy_source={other!r} with data.on_policy_fraction={share}; '
                      "allowed: 'teacher' or 'dataset' below 1, 'none' at 1")
  o = make_objective(c)
  if share < 1.0 and (c.data.source != 'student' or o.needs_rewards):
    raise ConfigError(
        f'data.on_policy_fraction={share} with data.source={c.data.source!r}, objective.reward_coef'
        f"={o.reward_coef}, row_gate={o.row_gate!r}; allowed: 1, or data.source='student' and no "
        'use of rewards, which are for what the student wrote')
  mix = c.sample.teacher_mix
  if not 0.0 <= mix < 1.0:
    raise ConfigError(f"sample.teacher_mix={mix}; allowed: 0 to below 1 (data.source='teacher' is "
                      'all of it)')
  if mix and (c.data.source != 'student' or c.sample.top_p < 1.0 or c.sample.top_k or not share):
    raise ConfigError(f'sample.teacher_mix={mix} with data.source={c.data.source!r}, '
                      f'on_policy_fraction={share}, sample.top_p={c.sample.top_p}, top_k='
                      f"{c.sample.top_k}; allowed: 0, or data.source='student', above 0, 1 and 0")
  if mix and o.has_policy_gradient and o.importance not in ('ratio', 'truncated'):
    raise ConfigError(
        f'sample.teacher_mix={mix} with objective.importance={o.importance!r}, which does not '
        "correct for the mixture; allowed: 'ratio' or 'truncated'")


def _check_given(c):
  g = c.given
  if g.source == 'none':
    for name, neutral in default_config().given.items():
      if g[name] != neutral:
        raise ConfigError(f"given.{name}={g[name]!r} has no effect with given.source='none'; "
                          f'allowed: {neutral!r}')
    return
  if g.source not in ('teacher', 'dataset'):
    raise ConfigError(f"given.source={g.source!r}; allowed: ['none', 'teacher', 'dataset']")
  if g.prompts_per_step < 1:
    raise ConfigError(f'given.prompts_per_step={g.prompts_per_step}; allowed: at least 1')
  if g.split == 'eval':
    raise ConfigError("given.split='eval': nobody trains on the held-out examples; allowed: "
                      'another split of the task')
  if c.data.source != 'student':
    raise ConfigError(f'given.source={g.source!r} with data.source={c.data.source!r}; allowed: '
                      "'none', or data.source='student'")
  if not (g.distill_coef or g.likelihood_coef):
    raise ConfigError('given.distill_coef and given.likelihood_coef are both 0: the rows would '
                      'teach nothing; allowed: at least one other than 0')
  if not g.distill_coef:
    for name in ('divergence', 'divergence_alpha', 'support', 'top_k', 'tail'):
      if g[name] != default_config().given[name]:
        raise ConfigError(f'given.{name}={g[name]!r} has no effect with given.distill_coef=0; '
                          f'allowed: {default_config().given[name]!r}')
  elif g.support == 'sampled':
    raise ConfigError("given.support='sampled': an estimate from one token needs the student's own "
                      f'samples; allowed: {list(estimators.SUPPORTS[1:])}')
  try:
    objective_lib.check_objective(config_lib.make_given_objective(c))
  except ValueError as e:
    raise ConfigError(str(e).replace('objective.', 'given.')) from e


def _check_reference(c):
  o, kind = make_objective(c), c.reference.kind
  if kind not in teachers.names():
    raise ConfigError(f'reference.kind={kind!r}; allowed: {teachers.names()}')
  if bool(objective_lib.wants(o)['reference']) != (kind != teachers.NONE):
    raise ConfigError(
        f'reference.kind={kind!r} with objective.reference_coef={o.reference_coef}, extrapolation='
        f"{o.extrapolation}; allowed: one of {teachers.names()[1:]} with a coefficient above 0 or "
        "an extrapolation other than 1, 'none' without")
  if bool(c.reference.path) != (kind == 'checkpoint'):
    raise ConfigError(f'reference.path={c.reference.path!r} with reference.kind={kind!r}; allowed: '
                      "a checkpoint with 'checkpoint', '' without")


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
  unread('compute/frozen_dtype', c.teacher.kind == c.reference.kind == teachers.NONE
         and not has_adapter(c), 'there is no teacher, no reference and no adapter')
  unread('eval/overlap_top_k', c.teacher.kind == teachers.NONE, 'there is no teacher')
  unread('doctor/max_reverse_kl', c.doctor.support != 'on' or c.data.source != 'student',
         'the check support does not run')
  return out


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
                     ('doctor.rollouts', 1), ('doctor.max_new_tokens', 1),
                     ('eval.overlap_top_k', 0), ('diagnose.batches', 8),
                     ('diagnose.prompts', 1), ('diagnose.top_k', 2)):
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
    for part in ('student', 'teacher', 'reference'):
      path = stage[part].path
      if path.startswith(STAGE) and path[len(STAGE):] not in done:
        raise ConfigError(f'stages.{name}.{part}.path={path!r}; allowed: an earlier stage, one of '
                          f'{done}')
      if path.startswith(STAGE):
        made_by = c.stages[path[len(STAGE):]].student.factory
        if stage[part].get('factory', '') != made_by:
          raise ConfigError(f"stages.{name}.{part}.factory={stage[part].get('factory', '')!r} with "
                            f'the path {path!r}; allowed: {made_by!r}, as in that stage')
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
  template = config_lib.default_pipeline()
  template.stages = c.stages
  return template
