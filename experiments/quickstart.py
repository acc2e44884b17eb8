"""Distils a shipped teacher into a shipped base student, on policy, in two and a half minutes.

The student writes 128 answers a step, the teacher grades every token by the exact full-vocabulary
reverse KL, the student moves. Beside it, the same number of steps of off-policy supervised
fine-tuning on answers that the teacher wrote. Both models are Hugging Face directories in
`experiments/assets/` (see the README there), made by `dense_vs_rl.py:tiny`.

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
  c.report.labels = ('OPD (exact reverse KL)', 'SFT on teacher samples')
  return c


def opd() -> ConfigDict:
  """On-policy: the student writes."""
  c = config_lib.default_config()
  c.steps = 80
  c.student.path = str(ASSETS / 'base')
  c.teacher.kind, c.teacher.path = 'checkpoint', str(ASSETS / 'teacher')
  c.compute.layer_unroll = 2
  c.compute.microbatch_rows = 64
  c.data.prompts_per_step = 128
  c.objective.route, c.objective.support = 'direct', 'full'
  c.objective.importance = 'none'
  c.optimizer.learning_rate, c.optimizer.final_learning_rate = 4e-3, 4e-4
  c.optimizer.schedule, c.optimizer.warmup_steps = 'linear', 10
  c.eval.every_steps = 10
  c.eval.problems, c.eval.samples_per_problem = 512, 2
  c.checkpoint.every_steps = 40
  return c


def sft() -> ConfigDict:
  """Off-policy: the teacher writes, the student imitates."""
  c = opd()
  c.data.source = 'teacher'
  c.objective.route, c.objective.support = 'policy_gradient', 'sampled'
  c.objective.distill_coef, c.objective.likelihood_coef = 0.0, 1.0
  return c
