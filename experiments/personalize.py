"""New knowledge, and the old skills back (Thinking Machines Lab 2025, "On-Policy Distillation",
section on personalization and continual learning).

A model that follows instructions (`before`) is trained on documents, alone or mixed with what it
could do already; it learns their facts and loses its skills. Then the model from before is the
teacher, on prompts of the old skills: do they come back, and does the knowledge stay? In the post
instruction following falls from 85 to 45 % (79 % with 30 % of chat mixed in) and comes back to
83 %, while the knowledge rises from 36 to 41 %.

`tiny` makes everything from nothing, from the task `skills`. Expected (three seeds,
docs/results.md, "The ablations at tiny size"): documents cost all of the skill, mixing saves half,
OPD after it brings 0.9 of it back and loses a part of the facts; with documents beside it loses
few. Time: about five minutes a seed on one CPU core.

`smollm2` teaches SmolLM2-135M 16 facts (`experiments/assets/documents.jsonl`). The skill is to
follow rules (`held_out/rules.jsonl`), and facts are asked for (`held_out/facts.jsonl`). It has not
been run yet.

    opd train --config experiments/personalize.py:tiny,seeds=3
    opd train --config experiments/personalize.py:smollm2
"""

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment
from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim

CHAT = 0.02  # of the mixture: with 30 % of old skills nothing was lost (seed 0)


def get_config(arg: str | None = None) -> ConfigDict:
  """Arguments: size (tiny, smollm2), seeds, models (of smollm2, see `ablation.parse_arg`)."""
  arg = ablation.parse_arg(arg)
  return experiment.pick({'tiny': from_nothing, 'smollm2': smollm2}, size=arg.size)(arg)


def from_nothing(arg: ConfigDict) -> ConfigDict:
  """A model that knows two skills, made here, and three ways back."""
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
  lost = f'(before.{skill} - documents.{skill})'
  return ablation.pipeline('personalize', arg, arms, {
      'forgets': Claim('Documents cost the old skills', 'IFEval 85 to 45 %', lost[1:-1], 0.0, 0.4),
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
                        f'opd.{skill} - documents.{skill} - 0.95 * {lost}', 0.0, 0.0),
      'keeps': Claim('OPD after documents only keeps the knowledge', '-',
                     f'opd.{fact} - documents.{fact}', -0.05, -0.05),
      'keeps_beside': Claim('OPD with documents beside keeps the knowledge', 'alternating phases',
                            f'alternate.{fact} - documents.{fact}', -0.05, -0.05),
      'recovers_beside': Claim('OPD with documents beside brings the old skills back',
                               'alternating phases',
                               f'alternate.{skill} - documents.{skill} - 0.95 * {lost}', 0.0, 0.0),
      'opd_over_sft': Claim('After documents only, OPD brings more back than SFT', '-',
                            f'opd.{skill} - sft.{skill}', 0.0, 0.02)})


def smollm2(arg: ConfigDict) -> ConfigDict:
  """SmolLM2-135M reads 64 short documents on a company that does not exist, and the model from
  before teaches it what that cost; phases alternate, as in the post."""
  c = ablation.opd(arg)
  c.task.options.eval_source = str(ablation.ASSETS / 'held_out')  # rules and questions on the facts
  c.student.path = c.teacher.path
  rows = ablation.changed(ablation.sampled(c), task=config_lib.task_config(
      'prompts', source=str(ablation.ASSETS / 'documents.jsonl'), prompt_column='prompt',
      completion_column='completion', eval='ifeval', eval_source=c.task.options.eval_source))
  supervised(rows, 'train')
  arms = {
      'documents': ('+ documents', rows),
      'opd': ('+ documents + OPD', ablation.changed(c, student__path='stage:documents')),
      'documents_again': ('+ documents + OPD + documents', ablation.changed(
          ablation.with_rate(rows, 0.5), student__path='stage:opd', steps=20)),
      'opd_again': ('+ documents + OPD + documents + OPD', ablation.changed(
          ablation.with_rate(c, 0.5), student__path='stage:documents_again', steps=20))}
  skill, fact = 'by_group.rule', 'by_group.fact'
  lost = f'(documents.before.{skill} - documents.{skill})'
  learnt = f'(documents.{fact} - documents.before.{fact})'
  return ablation.pipeline('personalize', arg, arms, {
      'learns': Claim('Documents are learnt', '-', learnt[1:-1], 0.0, 0.2),
      'forgets': Claim('Documents cost the old skills', '-', lost[1:-1], 0.0, 0.1),
      'recovers': Claim('OPD brings the old skills back', '-',
                        f'opd.{skill} - documents.{skill} - 0.95 * {lost}', 0.0, 0.0),
      'keeps': Claim('OPD keeps the knowledge', '-', f'opd.{fact} - documents.{fact}', -0.05,
                     -0.05),
      'recovers_again': Claim('After alternating phases the old skills are back', '83 % of 85 %',
                              f'opd_again.{skill} - documents.{skill} - 0.95 * {lost}', 0.0, 0.0),
      'keeps_again': Claim('After alternating phases the knowledge is there', '36 to 41 %',
                           f'opd_again.{fact} - documents.{fact}', -0.05, -0.05)})


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
