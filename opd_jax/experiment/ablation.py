"""What the ablations in `experiments/` share: the sizes at which each of them runs, and what is
changed from one arm to another.

An ablation is one file. Its argument picks a size, which says student, teacher, task and budget
(`opd`); its arms change one thing each, and its claims say what a paper found (claims.py).
"""

from __future__ import annotations

from collections.abc import Mapping
import copy
import dataclasses
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment, presets
from opd_jax.errors import ConfigError
from opd_jax.experiment import claims as claims_lib
from opd_jax.experiment.claims import Claim
from opd_jax.rules.run import STAGE

ROOT = pathlib.Path(__file__).resolve().parents[2]
ASSETS = ROOT / 'experiments' / 'assets'
SMALL, SMOLLM2 = ROOT / 'runs' / 'dense_vs_rl_small' / 'seed_0', ROOT / 'runs' / 'smollm2_models'
HUB = {  # student and teacher
    '0.6b': ('Qwen/Qwen3-0.6B-Base', 'Qwen/Qwen3-4B'),
    '1.7b': ('Qwen/Qwen3-1.7B-Base', 'Qwen/Qwen3-4B'),
    '8b': ('Qwen/Qwen3-8B-Base', 'Qwen/Qwen3-32B')}
MADE = ('small', 'smollm2')  # sizes whose models a command makes
SIZES = ('tiny', *MADE, *HUB)
Arms = Mapping[str, tuple[str, ConfigDict]]  # {stage: (label, config)}


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Parses an ablation's argument: size, of SIZES; seeds (how many, from 0); models (the folder of
  student and teacher, for the sizes 'small' and 'smollm2'); and the ablation's own.

  Raises:
    ConfigError: an unknown name, size or type.
  """
  out = experiment.parse_arg(arg, **{'size': 'tiny', 'seeds': 1, 'models': '', **defaults})
  experiment.pick(dict.fromkeys(SIZES), size=out.size)
  if out.models and out.size not in MADE:
    raise ConfigError(f"models={out.models!r} with size={out.size!r}; allowed: '', or a size of "
                      f'{MADE}')
  if out.seeds < 1:
    raise ConfigError(f'seeds={out.seeds}; allowed: at least 1')
  return out


def opd(arg: ConfigDict) -> ConfigDict:
  """Makes the run that arms are changed from: on-policy, by the exact full-vocabulary reverse KL,
  from the student of a size to its teacher.

  Raises:
    ConfigError: the models of the size are not there; the message has the command that makes them.
  """
  c = config_lib.default_config()
  c.teacher.kind = 'checkpoint'
  presets.apply(c, 'opd_exact')
  c.optimizer.schedule = 'linear'
  c.checkpoint.keep_best = 0
  {'tiny': _tiny, 'small': _small, 'smollm2': _smollm2}.get(arg.size, _published)(c, arg)
  return c


def _tiny(c, arg):
  """The shipped models (experiments/assets/README.md), 105 thousand parameters each."""
  c.student.path, c.teacher.path = str(ASSETS / 'base'), str(ASSETS / 'teacher')
  c.steps, c.data.prompts_per_step, c.compute.layer_unroll = 80, 64, 2
  rate(c, 2e-3)
  c.optimizer.warmup_steps = 10
  c.eval.every_steps, c.eval.problems = 20, 512
  c.checkpoint.every_steps, c.log.transcripts = 80, 0


def _small(c, arg):
  """Models of 1.1 million parameters that dense_vs_rl.py:small has made from nothing."""
  models = experiment.find_made(
      arg.models or str(SMALL), ('base/export', 'teacher/export'),
      'opd train --config experiments/dense_vs_rl.py:small --workdir runs/dense_vs_rl_small, which '
      'makes seed_0')
  c.student.path, c.teacher.path = (str(models / name / 'export') for name in ('base', 'teacher'))
  c.task = config_lib.task_config('arithmetic', operations=(10,), eval_operations=10)
  c.data.max_prompt_tokens, c.data.max_new_tokens = 26, 96
  c.steps, c.data.prompts_per_step, c.compute.microbatch_rows = 120, 64, 32
  rate(c, 1e-3)
  c.optimizer.warmup_steps = 10
  c.eval.every_steps, c.eval.problems = 20, 256
  c.checkpoint.every_steps, c.log.transcripts = 40, 1


def _smollm2(c, arg):
  """SmolLM2-135M and what is left of it without six layers (experiments/assets/smollm2.py), on
  instructions, evaluated on others with rules."""
  folder = arg.models or str(SMOLLM2)
  models = experiment.find_made(folder, ('teacher', 'without_12_to_17'),
                                f'python experiments/assets/smollm2.py --out {folder}')
  c.student.path, c.teacher.path = str(models / 'without_12_to_17'), str(models / 'teacher')
  c.prompt.template = 'student'
  c.task = config_lib.task_config(
      'prompts', source=str(ASSETS / 'instructions.jsonl'), prompt_column='instruction',
      eval='ifeval', eval_source=str(ASSETS / 'held_out' / 'rules.jsonl'))
  c.data.max_prompt_tokens, c.data.max_new_tokens = 64, 64
  c.steps, c.data.prompts_per_step, c.compute.microbatch_rows = 40, 16, 16
  rate(c, 1e-4)
  c.eval.every_steps, c.eval.problems = 20, 0
  # An answer that does not end is wrong: here the teacher's have room to end.
  c.eval.samples_per_problem, c.eval.pass_k, c.eval.max_new_tokens = 1, 1, 128
  c.checkpoint.every_steps, c.log.plain_every_steps = 20, 2
  c.doctor.truncation = 'off: answers are cut at 64 tokens on purpose'


def _published(c, arg):
  """Qwen3 on DeepMath, evaluated on AIME 2024, as in experiments/pods/."""
  c.student.path, c.teacher.path = HUB[arg.size]
  c.prompt.template, c.prompt.thinking, c.sample.stop = 'teacher', 'off', 'union'
  c.task = config_lib.task_config('deepmath')
  c.data.max_prompt_tokens, c.data.max_new_tokens, c.data.overlong = 512, 4096, 'drop'
  c.data.prompts_per_step, c.data.samples_per_prompt = 64, 4
  c.compute.dtype, c.compute.remat = 'bfloat16', 'layer'
  c.compute.microbatch_rows, c.compute.chunk_tokens = 2, 1024
  c.steps = 100
  rate(c, 5e-5)
  c.optimizer.warmup_steps = 5
  c.eval.every_steps, c.eval.problems, c.eval.samples_per_problem = 25, 0, 16
  c.checkpoint.every_steps = 25


# --- what an arm changes; each takes a config and returns a changed copy ---


def changed(c: ConfigDict, **fields: Any) -> ConfigDict:
  """Sets fields by their names with '__' for the dot, as in `optimizer__b2=0.99`."""
  out = copy.deepcopy(c)
  for name, value in fields.items():
    *groups, last = name.split('__')
    group = out
    for part in groups:
      group = group[part]
    group[last] = value
  rows = out.data.prompts_per_step * out.data.samples_per_prompt
  if out.compute.microbatch_rows and rows % out.compute.microbatch_rows:
    out.compute.microbatch_rows = rows
  return out


def rate(c: ConfigDict, peak: float) -> None:
  """Sets the learning rate, and a tenth of it for the end where the schedule falls."""
  c.optimizer.learning_rate = peak
  c.optimizer.final_learning_rate = 0.0 if c.optimizer.schedule == 'constant' else peak / 10


def with_rate(c: ConfigDict, times: float) -> ConfigDict:
  """Multiplies the learning rate."""
  out = copy.deepcopy(c)
  rate(out, c.optimizer.learning_rate * times)
  return out


def sampled(c: ConfigDict) -> ConfigDict:
  """Takes the paper's own loss: the policy gradient of sampled tokens."""
  return changed(c, objective=copy.deepcopy(config_lib.default_config().objective))


def sft(c: ConfigDict, answers: str = 'fixed') -> ConfigDict:
  """Distils off-policy: the teacher writes once ('fixed') or in every step ('fresh'), the
  student imitates."""
  return changed(c, data__source='teacher', data__teacher_answers=answers,
                 objective__route='policy_gradient', objective__support='sampled',
                 objective__distill_coef=0.0, objective__likelihood_coef=1.0)


def lora(c: ConfigDict, rank: int, times: float) -> ConfigDict:
  """Trains adapters of a rank instead of the whole model, at `times` the learning rate."""
  return with_rate(changed(c, student__lora__rank=rank, student__lora__alpha=float(rank)), times)


def other_teacher(c: ConfigDict) -> ConfigDict:
  """Makes a teacher for the tiny size that has nothing of the student: pretrained on right
  solutions until nine in ten of its samples are right, and of another width, because the shipped
  base began with the random weights that seed 0 gives to its own."""
  out = config_lib.default_config()
  out.student.fresh.update(hidden_size=96, intermediate_size=256)
  out.steps, out.data.prompts_per_step = 2500, 64
  out.data.source, out.data.split = 'dataset', 'corpus'
  out.task = config_lib.task_config('arithmetic', operations=(1, 2, 3, 4))
  out.objective.distill_coef, out.objective.likelihood_coef = 0.0, 1.0
  out.objective.importance = 'none'
  out.compute = copy.deepcopy(c.compute)
  out.optimizer.learning_rate, out.optimizer.warmup_steps = 4e-3, 50
  out.eval = copy.deepcopy(c.eval)
  out.eval.every_steps, out.eval.stop_at_sampled_accuracy = 50, 0.9
  out.checkpoint.every_steps, out.checkpoint.keep_best, out.log.transcripts = 2500, 0, 0
  return out


def pipeline(name: str, arg: ConfigDict, arms: Arms, claims: Mapping[str, Claim],
             baseline: str = '') -> ConfigDict:
  """Makes the pipeline of an ablation.

  Args:
    name: of the ablation.
    arg: of `parse_arg`.
    arms: its stages, by name.
    claims: what they are to show, by a short name.
    baseline: the stage whose steps and compute the others are compared with.
  """
  c = experiment.default_pipeline()
  c.name = f'{name}_{arg.size}'
  c.seeds = tuple(range(arg.seeds))
  c.stages = ConfigDict({stage: config for stage, (_, config) in arms.items()})
  c.order = c.report.methods = tuple(arms)
  c.report.labels = tuple(label for label, _ in arms.values())
  c.report.baseline = baseline
  # By what a teacher says of the samples, which no source has.
  for name, claim in claims.items():
    if re.search(r'\.(reverse_kl|teacher_logprob)', claim.measure):
      claims = {**claims, name: dataclasses.replace(claim, post='–')}
  c.report.claims = ConfigDict({name: dataclasses.asdict(claim) for name, claim in claims.items()})
  return c


def join(name: str, parts: Mapping[str, ConfigDict]) -> ConfigDict:
  """Joins pipelines into one, with a section of the report for each; stages and claims have the
  name of the part in front. A stage that an earlier part has is not run again.

  Args:
    name: of the whole.
    parts: pipelines with the same seeds, by name.
  """
  out = experiment.default_pipeline()
  out.name = name
  stages, labels, claimed, sections, known = {}, {}, {}, {}, {}
  for part, c in parts.items():
    out.seeds, mine = c.seeds, {}
    for stage in c.order:
      run = copy.deepcopy(c.stages[stage])
      for group in (run.student, run.teacher, run.reference):
        if group.path.startswith(STAGE):
          group.path = STAGE + mine[group.path.removeprefix(STAGE)]
      key = run.to_json(sort_keys=True)
      mine[stage] = known.setdefault(key, f'{part}_{stage}')
      stages[mine[stage]] = run
    for stage, label in zip(c.report.methods, c.report.labels, strict=True):
      labels.setdefault(mine[stage], label)
    sections[part] = tuple(mine[stage] for stage in c.report.methods)
    for short, claim in c.report.claims.items():
      claimed[f'{part}_{short}'] = {**claim, 'measure': claims_lib.rename(claim.measure, mine)}
  out.stages, out.order = ConfigDict(stages), tuple(stages)
  out.report.methods, out.report.labels = tuple(labels), tuple(labels.values())
  out.report.claims, out.report.sections = ConfigDict(claimed), ConfigDict(sections)
  return out
