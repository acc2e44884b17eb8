"""Distils a shipped teacher into a shipped base student on 64 problems, on policy and off, in about
a minute on two CPU cores.

`opd`: the student answers 64 problems anew in every step, the teacher grades every token by the
exact full-vocabulary reverse KL, the student moves. `sft`: the teacher has answered the same 64
problems once, the student imitates. So few answers are soon known by heart; the teacher's view of
what the student writes never runs out, and it is about the states that the student gets into. Each
has the learning rate that was the best of four for it on seed 100, and as many steps. Both models
are Hugging Face directories in `experiments/assets/` (see the README there), made by
`dense_vs_rl.py:tiny`; `sft_vs_opd.py` has other numbers of problems.

    opd train --config experiments/quickstart.py
    opd train --config experiments/quickstart.py:seeds=3     (seeds 0, 1, 2)
"""

import pathlib

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment

ASSETS = pathlib.Path(__file__).resolve().parent / 'assets'


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: seeds (how many, from 0)."""
  arg = experiment.parse_arg(arg, seeds=1)
  c = experiment.default_pipeline()
  c.name = 'quickstart'
  c.seeds = tuple(range(arg.seeds))
  c.stages = ConfigDict(dict(opd=opd(), sft=sft()))
  c.order = ('opd', 'sft')
  c.report.methods = ('opd', 'sft')
  c.report.labels = ('OPD (exact reverse KL)', "SFT on the teacher's answers")
  return c


def opd() -> ConfigDict:
  """On-policy: the student writes."""
  c = config_lib.default_config()
  c.steps = 60
  c.student.path = str(ASSETS / 'base')
  c.teacher.kind, c.teacher.path = 'checkpoint', str(ASSETS / 'teacher')
  c.compute.layer_unroll = 2
  c.data.limit = c.data.prompts_per_step = 64
  c.objective.route, c.objective.support = 'direct', 'full'
  c.objective.importance = 'none'
  c.optimizer.learning_rate, c.optimizer.final_learning_rate = 1e-3, 1e-4
  c.optimizer.schedule, c.optimizer.warmup_steps = 'linear', 10
  c.eval.every_steps = 20
  c.eval.problems, c.eval.samples_per_problem = 256, 2
  c.checkpoint.every_steps = 60
  return c


def sft() -> ConfigDict:
  """Off-policy: the teacher wrote once, the student imitates."""
  c = opd()
  c.data.source, c.data.teacher_answers = 'teacher', 'fixed'
  c.objective.route, c.objective.support = 'policy_gradient', 'sampled'
  c.objective.distill_coef, c.objective.likelihood_coef = 0.0, 1.0
  c.optimizer.learning_rate, c.optimizer.final_learning_rate = 5e-4, 5e-5
  return c
