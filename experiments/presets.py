"""Every preset on the embedded task: the same base, teacher, number of rows and of steps.

One stage for each of `opd_jax/presets.py`, with 80 gradient steps on 128 rows (samples of one
prompt are rows too; beside them distillm2 has 64 rows of the teacher, and stable_opd 16 golden
ones: clean solutions of the corpus). A learning rate for each kind of update, as in
`dense_vs_rl.py`: 4e-3 where a divergence is differentiated or a text imitated, 2e-3 for policy
gradients from a teacher, 8e-4 for those from a verifier; nothing is tuned for a single preset. With
a vocabulary of 64, top-k supports have k = 16 at most.

    opd train --config experiments/presets.py                      (half a minute a preset)
    opd train --config experiments/presets.py:only=opd+gkd,seeds=3
"""

import pathlib

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment, presets
from opd_jax.algorithm import choices
from opd_jax.algorithm.objective import KINDS

ASSETS = pathlib.Path(__file__).resolve().parent / 'assets'
ROWS = 128


def get_config(arg: str | None = None) -> ConfigDict:
  """Arguments: only (names joined by '+', all of them by default), seeds (how many, from 0)."""
  arg = experiment.parse_arg(arg, only='', seeds=1)
  names = arg.only.split('+') if arg.only else list(presets.PRESETS)
  c = experiment.default_pipeline()
  c.name = 'presets'
  c.seeds = tuple(range(arg.seeds))
  c.stages = ConfigDict({name: stage(name) for name in names})
  c.order = c.report.methods = c.report.labels = tuple(names)
  return c


def stage(name: str) -> ConfigDict:
  """One preset."""
  c = config_lib.default_config()
  c.steps = 80
  c.student.path = str(ASSETS / 'base')
  c.teacher.kind, c.teacher.path = 'checkpoint', str(ASSETS / 'teacher')
  c.data.prompts_per_step = ROWS
  presets.apply(c, name)
  o = c.objective
  for group in (o, o.local):
    group.support = choices.at_most(KINDS['support'], group.support, 16)
  if c.data.source == 'dataset':
    c.data.split = 'corpus'
  if c.given.source == 'dataset':
    c.given.split = 'corpus'
  c.compute.layer_unroll, c.compute.microbatch_rows = 2, 64
  imitates = o.route == 'direct' and o.distill_coef > 0 or o.likelihood_coef > 0
  rate = 8e-4 if o.reward_coef else 4e-3 if imitates else 2e-3
  c.optimizer.learning_rate, c.optimizer.final_learning_rate = rate, rate / 10
  c.optimizer.schedule, c.optimizer.warmup_steps = 'linear', 10
  c.eval.every_steps = 20
  c.eval.problems, c.eval.samples_per_problem = 512, 2
  c.checkpoint.every_steps, c.checkpoint.keep_best, c.log.transcripts = 40, 0, 0
  return c
