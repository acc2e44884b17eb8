"""New knowledge, and the old skills back (Thinking Machines Lab 2025, "On-Policy Distillation",
section on personalization and continual learning).

A model that follows instructions (`before`) is trained on documents, alone or mixed with what it
could do already; it learns their facts and loses its skills. Then the model from before is the
teacher, on prompts of the old skills: do they come back, and does the knowledge stay? In the post
instruction following falls from 85 to 45 % (79 % with 30 % of chat mixed in) and comes back to
83 %, while the knowledge rises from 36 to 41 %.

Everything is made from nothing, from the task `skills`. Expected (three seeds, docs/results.md,
"The ablations at tiny size"): documents cost all of the skill, mixing saves half, OPD after it
brings 0.9 of it back and loses a part of the facts; with documents beside it loses few. Time:
about five minutes a seed on one CPU core.

    opd train --config experiments/personalize.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment
from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim

CHAT = 0.02  # of the mixture: with 30 % of old skills nothing was lost (seed 0)


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size (tiny), seeds."""
  arg = ablation.parse_arg(arg)
  experiment.pick({'tiny': 0}, size=arg.size)
  arms = {
      'before': ('before', before()),
      'documents': ('+ documents only', documents(0.0)),
      'mixed': (f'+ {1 - CHAT:.0%} documents, {CHAT:.0%} skills', documents(CHAT)),
      'opd': ('documents only + OPD', opd('documents')),
      'sft': ("documents only + SFT on the teacher's answers",
              ablation.sft(opd('documents'), 'fresh')),
      'opd_mixed': ('mixed + OPD', opd('mixed')),
      'sft_mixed': ("mixed + SFT on the teacher's answers", ablation.sft(opd('mixed'), 'fresh')),
      'alternate': ('documents only + OPD, with documents beside', alternate('documents'))}
  skill, fact = 'by_group.instruction', 'by_group.fact'
  return ablation.pipeline('personalize', arg, arms, {
      'forgets': Claim('Documents cost the old skills', 'IFEval 85 to 45 %',
                       f'before.{skill} - documents.{skill}', 0.0, 0.4),
      'mixing': Claim('Mixing saves a part of the old skills', '79 % of 85 %',
                      f'mixed.{skill} - documents.{skill}', 0.0, 0.2),
      'mixing_not_all': Claim('Mixing does not save all of the old skills', '79 % against 85 %',
                              f'before.{skill} - mixed.{skill}', 0.0, 0.02),
      'recovers_mixed': Claim('OPD brings the old skills back after mixed training', '83 % of 85 %',
                              f'opd_mixed.{skill} - mixed.{skill}'
                              f' - 0.95 * (before.{skill} - mixed.{skill})', 0.0, 0.0),
      'keeps_mixed': Claim('OPD after mixed training keeps the knowledge', '36 to 41 %',
                           f'opd_mixed.{fact} - mixed.{fact}', -0.05, -0.05),
      'opd_over_sft_mixed': Claim(
          'After mixed training, OPD brings more back than SFT', '-',
          f'opd_mixed.{skill} - sft_mixed.{skill}', 0.0, 0.02),
      'recovers': Claim('OPD brings the old skills back after documents only', '-',
                        f'opd.{skill} - documents.{skill}'
                       f' - 0.95 * (before.{skill} - documents.{skill})', 0.0, 0.0),
      'keeps': Claim('OPD after documents only keeps the knowledge', '-',
                     f'opd.{fact} - documents.{fact}', -0.05, -0.05),
      'keeps_beside': Claim('OPD with documents beside keeps the knowledge', 'alternating phases',
                            f'alternate.{fact} - documents.{fact}', -0.05, -0.05),
      'recovers_beside': Claim('OPD with documents beside brings the old skills back',
                               'alternating phases', f'alternate.{skill} - documents.{skill}'
                               f' - 0.95 * (before.{skill} - documents.{skill})', 0.0, 0.0),
      'opd_over_sft': Claim('After documents only, OPD brings more back than SFT', '-',
                            f'opd.{skill} - sft.{skill}', 0.0, 0.02)})


def tiny() -> ConfigDict:
  """What all stages share."""
  c = config_lib.default_config()
  c.task = config_lib.task_config('skills')
  c.compute.layer_unroll = 2
  c.optimizer.schedule = 'linear'
  c.data.prompts_per_step = 64
  c.eval.every_steps, c.eval.problems = 20, 0
  c.checkpoint.keep_best, c.log.transcripts = 0, 0
  return c


def supervised(c: ConfigDict, split: str) -> None:
  """Cross-entropy on a split with answers."""
  c.data.source, c.data.split = 'dataset', split
  c.objective.distill_coef, c.objective.likelihood_coef = 0.0, 1.0
  c.objective.importance = 'none'


def before() -> ConfigDict:
  """From nothing, on both skills."""
  c = tiny()
  c.steps = 1200
  supervised(c, 'corpus')
  ablation.rate(c, 4e-3)
  c.optimizer.warmup_steps = 50
  c.eval.every_steps = 300
  c.checkpoint.every_steps = 600
  return c


def documents(chat: float) -> ConfigDict:
  """Mid-training on facts, with so large a share of the old skills."""
  c = tiny()
  c.steps = 300
  c.student.path = 'stage:before'
  c.task.options.chat = chat
  supervised(c, 'documents')
  ablation.rate(c, 2e-3)
  c.eval.every_steps = 100
  return c


def opd(student: str) -> ConfigDict:
  """The model from before teaches, on prompts of the old skills."""
  c = tiny()
  c.steps = 40
  c.student.path, c.teacher.kind, c.teacher.path = f'stage:{student}', 'checkpoint', 'stage:before'
  c.objective.route, c.objective.support, c.objective.importance = 'direct', 'full', 'none'
  ablation.rate(c, 5e-4)
  return c


def alternate(student: str) -> ConfigDict:
  """The same, and as many rows of documents in each step."""
  c = opd(student)
  c.given.source, c.given.split, c.given.prompts_per_step = 'dataset', 'documents', 64
  c.given.likelihood_coef = 1.0
  return c
