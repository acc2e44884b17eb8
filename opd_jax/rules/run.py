"""The rules of a whole run: each field by itself, and what they refuse together."""

from __future__ import annotations

import math
import pathlib
import re
from typing import Any

from opd_jax import models, teachers
from opd_jax.algorithm.objective import wants
from opd_jax.data import control, examples, prompts
from opd_jax.data.streams import FOREIGN, SOURCES, given_objective
from opd_jax.errors import ConfigError, refuse
from opd_jax.files import huggingface
from opd_jax.models import attention, decoder
from opd_jax.rules import objective as objective_rules
from opd_jax.rules import rule
from opd_jax.rules.rule import Rule, choice, least, unread, within
from opd_jax.run import optim
from opd_jax.settings import Run, Student

STAGE = 'stage:'  # prefix of a path that names an earlier stage of the same pipeline
NO_TEACHER = "teacher.kind='none'"


def check(r: Run) -> None:
  """Checks the settings of a run.

  Raises:
    ConfigError: the first rule that is broken.
  """
  rule.check(FIELDS, r)
  for name, value in vars(r.doctor).items():
    if isinstance(value, str) and name != 'changed_inputs' and not _switch(value):
      refuse(r, f'doctor.{name}', '', "'on', or 'off: REASON'")
  objective_rules.check(r.objective)
  rule.check(GIVEN, r)
  if r.given.source != 'none':
    objective_rules.check(given_objective(r), 'given.')
  for rules in (ROLES, SAMPLES, FOREIGN_ROWS, MIXTURE, REFERENCE, PROMPT, FACTORY, ADAPTER):
    rule.check(rules, r)
  for part in ('student', 'teacher', 'reference'):
    _check_source(part, getattr(r, part))
  if not (r.student.path or r.student.factory):
    try:
      models.build({**r.student.fresh, 'vocab_size': 64})
    except ValueError as e:  # a config.json that nothing implements
      raise ConfigError(f'student.fresh: {e}') from e


def _check_source(part: str, group: Any) -> None:
  if not group.path or group.path.startswith(STAGE):
    if group.revision:
      raise ConfigError(f'{part}.revision={group.revision!r}: no effect with {part}.path='
                        f"{group.path!r}; allowed: ''")
    return
  try:
    huggingface.check_source(group.path, group.revision)
  except ValueError as e:
    raise ConfigError(f"{part}.{e}, or 'stage:NAME' in a pipeline") from e


def _has_teacher(r):
  return r.teacher.kind != teachers.NONE


def _truncated(r):
  return r.sample.top_p < 1 or r.sample.top_k > 0


def _rows(r):
  return r.data.prompts_per_step * r.data.samples_per_prompt


def _updates(r):
  return r.steps * r.optimizer.updates_per_batch


def _switch(value):
  return value == 'on' or value.startswith('off:') and value.removeprefix('off:').strip()


FIELDS = (
    *least('steps', 1),
    # Of a larger one, a random key has only the lower 32 bits.
    Rule('seed', lambda r: not 0 <= r.seed < 2**32, '', f'0 to {2**32 - 1}'),
    *least('data.prompts_per_step data.samples_per_prompt data.max_prompt_tokens '
           'data.max_new_tokens compute.chunk_tokens compute.layer_unroll '
           'optimizer.updates_per_batch eval.samples_per_problem '
           'checkpoint.every_steps checkpoint.keep_latest log.every_steps log.plain_every_steps '
           'doctor.rollouts doctor.max_new_tokens diagnose.prompts', 1),
    *least('data.limit data.warm_steps compute.microbatch_rows optimizer.warmup_steps '
           'eval.every_steps eval.problems eval.max_new_tokens eval.overlap_top_k log.transcripts '
           'sample.top_k eval.top_k', 0),
    Rule('checkpoint.keep_best', lambda r: r.checkpoint.keep_best < -1, '',
         'at least 0, or -1 for 1 where the task grades'),
    *least('diagnose.batches', 8), *least('diagnose.top_k', 2),
    choice('teacher.kind', teachers.names), choice('reference.kind', teachers.names),
    choice('data.source', SOURCES), choice('data.overlong', examples.OVERLONG),
    choice('data.off_policy_source', ('none', *FOREIGN)),
    choice('given.source', ('none', *FOREIGN)),
    choice('data.teacher_answers', ('fresh', 'fixed')),
    *unread('data.teacher_answers', lambda r: 'teacher' not in (
        r.data.source, r.data.off_policy_source, r.given.source), 'no rows that a teacher writes'),
    choice('sample.stop', ('student', 'teacher', 'union')),
    choice('prompt.template', prompts.TEMPLATES), choice('prompt.thinking', prompts.THINKING),
    choice('prompt.control_tokens', control.CHOICES),
    choice('optimizer.name', optim.OPTIMIZERS), choice('optimizer.schedule', optim.SCHEDULES),
    choice('compute.dtype', ('float32', 'bfloat16')),
    choice('compute.frozen_dtype', ('auto', 'float32', 'bfloat16')),
    choice('compute.attention', attention.NAMES),
    choice('compute.remat', decoder.REMATS),
    choice('compute.block', ('auto', 'always', 'never')),
    choice('checkpoint.export', ('full', 'adapter')),
    *within('sample.temperature', 0, above=True, note=' (greedy accuracy is always evaluated too)'),
    *within('sample.top_p eval.top_p', 0, 1, above=True),
    *within('sample.teacher_mix', 0, 1, below=True, note=" (data.source='teacher' is all of it)"),
    *within('data.on_policy_fraction eval.stop_at_sampled_accuracy', 0, 1),
    *within('log.max_sampler_gap optimizer.learning_rate optimizer.final_learning_rate '
            'optimizer.weight_decay optimizer.clip_norm optimizer.eps', 0),
    *within('optimizer.b1 optimizer.b2', 0, 1, below=True),
    Rule('doctor.max_reverse_kl', lambda r: not r.doctor.max_reverse_kl > 0, '', 'above 0'),
    *least('compute.decode_split compute.teacher_devices compute.length_buckets sample.slots', 0),
    *least('compute.pipeline_parts', 1),
    *unread('compute.pipeline_parts compute.teacher_mesh.data compute.teacher_mesh.fsdp '
            'compute.teacher_mesh.tensor compute.teacher_mesh.expert',
            lambda r: not r.compute.teacher_devices, 'compute.teacher_devices=0'),
    *unread('compute.pipeline_parts', lambda r: r.data.source != 'student',
            "data.source other than 'student'"),
    *unread('compute.teacher_devices', lambda r: not _has_teacher(r), NO_TEACHER),
    Rule('compute.teacher_devices teacher.kind',
         lambda r: r.compute.teacher_devices and r.teacher.kind == 'initial_student',
         'a student that is its own teacher is graded by one program, or equal models would differ',
         '0 devices of its own'),
    Rule('compute.teacher_devices sample.teacher_mix',
         lambda r: r.compute.teacher_devices and r.sample.teacher_mix,
         'a teacher that is mixed in reads along, on the same devices', '0, of one of them'),
    Rule('compute.microbatch_rows data.prompts_per_step data.samples_per_prompt',
         lambda r: r.compute.microbatch_rows and _rows(r) % r.compute.microbatch_rows,
         'it does not divide the rows of a batch',
         lambda r: f'a divisor of {_rows(r)}, or 0 for the whole batch'),
    Rule('eval.pass_k eval.samples_per_problem',
         lambda r: not 1 <= r.eval.pass_k <= r.eval.samples_per_problem, '',
         '1 to eval.samples_per_problem'),
    *unread('eval.stop_at_sampled_accuracy', lambda r: not r.eval.every_steps,
            'eval.every_steps=0'),
    Rule('checkpoint.best_metric', lambda r: r.checkpoint.best_metric not in _accuracies(r), '',
         lambda r: _accuracies(r)),
    *unread('optimizer.final_learning_rate', lambda r: r.optimizer.schedule == 'constant',
            "optimizer.schedule='constant'"),
    *unread('optimizer.weight_decay', lambda r: r.optimizer.name == 'sgd', "optimizer.name='sgd'"),
    Rule('optimizer.warmup_steps', lambda r: r.optimizer.warmup_steps >= _updates(r), '',
         lambda r: f'below the {_updates(r)} gradient steps of the run'),
    *(Rule(f'{group}.split', lambda r, group=group: getattr(r, group).split == 'eval',
           'nobody trains on the held-out examples', 'another split of the task')
      for group in ('data', 'given')),
)


def _accuracies(r):
  return ['sampled_accuracy', 'greedy_accuracy', f'pass_at_{r.eval.pass_k}']


GIVEN = (
    *unread('given.split given.prompts_per_step given.likelihood_coef given.distill_coef '
            'given.divergence given.support',
            lambda r: r.given.source == 'none', "given.source='none'"),
    Rule('given.prompts_per_step',
         lambda r: r.given.source != 'none' and r.given.prompts_per_step < 1, '', 'at least 1'),
    Rule('given.source data.source',
         lambda r: r.given.source != 'none' and r.data.source != 'student', '',
         "'none', or data.source='student'"),
    Rule('given.distill_coef given.likelihood_coef',
         lambda r: r.given.source != 'none' and not (
             r.given.distill_coef or r.given.likelihood_coef),
         'both 0: the rows would teach nothing', 'at least one other than 0'),
    *unread('given.divergence given.support', lambda r: not r.given.distill_coef,
            'given.distill_coef=0'),
    Rule('given.support', lambda r: r.given.support == 'sampled',
         "an estimate from one token needs the student's own samples", 'another support'),
)

ROLES = (
    *unread('objective.teacher_temperature', lambda r: not _has_teacher(r), NO_TEACHER),
    *unread('teacher.path', lambda r: not _has_teacher(r), NO_TEACHER),
    Rule('teacher.kind objective.distill_coef given.distill_coef sample.teacher_mix data.source '
         'data.off_policy_source given.source',
         lambda r: not _has_teacher(r) and (
             r.objective.needs_teacher or r.given.distill_coef or r.sample.teacher_mix
             or 'teacher' in (r.data.source, r.data.off_policy_source, r.given.source)),
         'there is no teacher', lambda r: f'one of {teachers.names()[1:]}, or no use of a teacher'),
    Rule('sample.stop teacher.kind', lambda r: r.sample.stop != 'student' and not _has_teacher(r),
         '', "'student'"),
    Rule('log.max_sampler_gap data.source data.on_policy_fraction',
         lambda r: r.log.max_sampler_gap and (
             r.data.source != 'student' or not r.data.on_policy_fraction),
         'no effect on rows that the student does not write', '0'),
    *unread('objective.student_logprobs', lambda r: not r.objective.has_signal,
            'no policy gradient from a teacher'),
    Rule('data.samples_per_prompt objective.reward_baseline',
         lambda r: r.objective.reward_coef and r.objective.reward_baseline != 'none'
         and r.data.samples_per_prompt < 2, 'a group of one has no baseline', 'at least 2'),
    Rule('data.samples_per_prompt objective.baseline',
         lambda r: r.data.samples_per_prompt < 2
         and 'group_size' in r.objective.choice('baseline').inputs,
         'there is no other sample', 'at least 2'),
)


def _sampled_reference(r):
  """Whether the KL to the reference is estimated from one token."""
  return 'log_u' in r.objective.choice('reference_kl').inputs


def _uncorrected(r):
  # The ratio is in the policy-gradient terms only, so that it does not help the estimators.
  o = r.objective
  return (o.estimator != 'none' or _sampled_reference(r)
          or o.has_policy_gradient and o.importance == 'none')


def _outside_of_window(r):
  window, longest = r.objective.choice('window').arguments, r.data.max_new_tokens
  start, count = window.get('start', 0), window.get('count', 0)
  return start >= longest or not start and count >= longest


SAMPLES = (
    Rule('objective.importance objective.estimator objective.reference_kl sample.top_p '
         'sample.top_k sample.teacher_mix optimizer.updates_per_batch',
         lambda r: r.data.source == 'student' and _uncorrected(r) and (
             _truncated(r) or r.sample.teacher_mix or r.optimizer.updates_per_batch > 1),
         'the samples are not from the policy that is updated',
         "importance='ratio' or 'truncated' (for later updates on full samples 'two_sided' and "
         "'ppo_clip' too) with estimator='none' and a reference_kl other than 'k2' and 'k3'"),
    Rule('objective.importance sample.top_p sample.top_k',
         lambda r: _truncated(r) and r.objective.has_signal
         and 'policy_logratio' in r.objective.choice('importance').inputs,
         'it compares with the policy before truncation, so that the samples would count as the '
         "policy's own", "'ratio' or 'truncated'"),
    Rule('objective.advantages optimizer.updates_per_batch objective.baseline '
         'objective.token_gate',
         lambda r: r.optimizer.updates_per_batch > 1 and r.objective.advantages == 'kept'
         and wants(r.objective)['student'].hidden,
         'what those read are hidden states, which need the head of their own time',
         "'recomputed', another baseline and another gate"),
    *unread('objective.advantages',
            lambda r: r.objective.advantages == 'recomputed' and r.optimizer.updates_per_batch == 1,
            'optimizer.updates_per_batch=1'),
    Rule('objective.window data.max_new_tokens', _outside_of_window,
         'no token is inside, or none outside',
         lambda r: f'a start below {r.data.max_new_tokens}, and from 0 fewer tokens than that'),
)


def _foreign_rows(field):
  """Rows that the student did not write."""
  def foreign(r):
    return rule.get(r, field) in FOREIGN

  return (
      Rule(f'objective.importance {field}',
           lambda r: foreign(r) and r.objective.importance != 'none',
           "there is no ratio to the sampler's policy", "'none'"),
      Rule(f'data.samples_per_prompt {field}',
           lambda r: rule.get(r, field) == 'dataset' and r.data.samples_per_prompt > 1,
           'there is one completion a prompt', '1'),
      Rule(f'objective.route objective.support objective.reference_kl {field}',
           lambda r: foreign(r) and (
               r.objective.needs_teacher and r.objective.support == 'sampled'
               or _sampled_reference(r)),
           "an estimate from one token needs the student's own samples",
           "data.source='student', or route='direct' with another support, and no "
           "reference_kl but 'full'"))


def _mixes(r):
  return r.data.on_policy_fraction < 1 or r.data.warm_steps > 0


FOREIGN_ROWS = (*_foreign_rows('data.source'), *_foreign_rows('data.off_policy_source'))

MIXTURE = (
    Rule('data.off_policy_source data.on_policy_fraction data.warm_steps',
         lambda r: (r.data.off_policy_source != 'none') != _mixes(r), '',
         "'teacher' or 'dataset' below 1 or with warm steps, else 'none'"),
    Rule('data.on_policy_fraction data.warm_steps data.source objective.reward_coef '
         'objective.row_gate',
         lambda r: _mixes(r) and (r.data.source != 'student' or r.objective.needs_rewards), '',
         "1 and 0, or data.source='student' and no use of rewards, which are for what the student "
         'wrote'),
    *unread('data.warm_steps', lambda r: not r.data.on_policy_fraction,
            'data.on_policy_fraction=0, where the student never writes'),
    Rule('data.warm_steps steps', lambda r: r.data.warm_steps >= r.steps and r.data.warm_steps,
         'the student would never write', 'fewer than the steps of the run'),
    Rule('sample.teacher_mix data.source data.on_policy_fraction sample.top_p sample.top_k',
         lambda r: r.sample.teacher_mix and (
             r.data.source != 'student' or _truncated(r) or not r.data.on_policy_fraction), '',
         "0, or data.source='student', above 0, 1 and 0"),
    Rule('sample.teacher_mix objective.importance',
         lambda r: r.sample.teacher_mix and r.objective.has_policy_gradient
         and 'logratio' not in r.objective.choice('importance').inputs,
         'the second does not correct for the mixture', "'ratio' or 'truncated'"),
)

REFERENCE = (
    Rule('reference.kind objective.reference_kl objective.extrapolation',
         lambda r: bool(wants(r.objective)['reference']) != (r.reference.kind != teachers.NONE), '',
         lambda r: f'one of {teachers.names()[1:]} with a reference_kl or an extrapolation other '
         "than 1, 'none' without"),
    Rule('reference.path reference.kind',
         lambda r: bool(r.reference.path) != (r.reference.kind == 'checkpoint'), '',
         "a checkpoint with 'checkpoint', '' without"),
)

PROMPT = (
    *unread('prompt.system prompt.thinking prompt.date', lambda r: r.prompt.template == 'none',
            "prompt.template='none'"),
    Rule('prompt.special_tokens prompt.template',
         lambda r: r.prompt.special_tokens and r.prompt.template != 'none',
         'a template writes its special tokens itself', 'False'),
    Rule('prompt.template teacher.kind',
         lambda r: r.prompt.template == 'teacher' and not _has_teacher(r), '',
         "'none', 'student', or a teacher"),
    Rule('data.overlong prompt.template prompt.special_tokens',
         lambda r: r.data.overlong == 'cut' and (
             r.prompt.template != 'none' or r.prompt.special_tokens),
         'what a template or the tokenizer puts first would be cut off', "'raise' or 'drop'"),
)

FACTORY = (
    *(Rule(f'{part}.factory',
           lambda r, part=part: (name := getattr(r, part).factory)
           and not re.fullmatch(r'[\w.]+:\w+', name), '', "'package.module:function', or ''")
      for part in ('student', 'teacher')),
    Rule('teacher.factory teacher.kind teacher.path',
         lambda r: r.teacher.factory and (r.teacher.kind != 'checkpoint' or not r.teacher.path), '',
         "teacher.kind='checkpoint' and a path"),
    Rule('student.lora.rank student.lora.path student.factory',
         lambda r: r.student.factory and r.has_adapter,
         'adapters are for families in opd_jax/models/families', "0 and ''"),
    *unread('compute.attention compute.remat compute.layer_unroll', lambda r: r.student.factory,
            'student.factory, a module that knows its own layers'),
)

ADAPTER = (
    *least('student.lora.rank', 0),
    Rule('student.lora.path',
         lambda r: r.student.lora.path and not pathlib.Path(r.student.lora.path).is_dir(),
         'not a directory', "a PEFT checkpoint directory, or ''"),
    *unread('student.lora.rank student.lora.alpha student.lora.targets',
            lambda r: r.student.lora.path, 'student.lora.path, which says it'),
    *unread('student.lora.alpha student.lora.targets', lambda r: not r.student.lora.rank,
            'student.lora.rank=0'),
    Rule('student.lora.alpha', lambda r: not 0 < r.student.lora.alpha < math.inf, '',
         'above 0, and finite'),
    Rule('checkpoint.export student.lora.rank',
         lambda r: r.checkpoint.export == 'adapter' and not r.has_adapter, 'there is no adapter',
         "'full'"),
)


def unused_options(r: Run) -> list[str]:
  """Lists 'field=value (why)' for options that were changed and that nothing will read."""
  teacherless = not _has_teacher(r)
  fresh = Student().fresh
  changed = [f'student.fresh.{k}={v!r}' for k, v in sorted(r.student.fresh.items())
             if fresh.get(k, v) != v]
  out = []
  for name in ('path', 'factory'):
    if getattr(r.student, name):
      out += [f'{field} (student.{name} is set)' for field in changed]
  for fields, when, why in (
      ('optimizer.b2 optimizer.eps', r.optimizer.name == 'sgd', "optimizer.name='sgd'"),
      ('checkpoint.best_metric', not r.checkpoint.keep_best, 'checkpoint.keep_best=0'),
      ('compute.frozen_dtype', teacherless and r.reference.kind == teachers.NONE
       and not r.has_adapter, 'there is no teacher, no reference and no adapter'),
      ('eval.overlap_top_k', teacherless, 'there is no teacher'),
      ('doctor.max_reverse_kl', r.doctor.support != 'on' or r.data.source != 'student',
       'the check support does not run')):
    out += [f'{field}={rule.get(r, field)!r} ({why})' for field in fields.split()
            if when and rule.get(r, field) != rule.default(r, field)]
  return out
