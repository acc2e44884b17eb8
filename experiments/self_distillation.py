"""Self-distillation: the teacher is the student as it was before training.

Nothing should happen, and with the advantage's two log-probs from one program nothing does: the
parameters stay the same bits. Two controls show what that is worth: the sampler's log-probs in the
advantage (one forward pass cheaper; Adam turns their rounding into full steps) and supervised
fine-tuning on the student's own samples (the paper's table on self-distillation). The shipped
teacher plays both roles.

    opd train --config experiments/self_distillation.py            (about a minute on two CPU cores)
    opd train --config experiments/self_distillation.py:seeds=3
"""

import pathlib

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment

MODEL = str(pathlib.Path(__file__).resolve().parent / 'assets' / 'teacher')


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: seeds (how many, from 0)."""
  arg = experiment.parse_arg(arg, seeds=1)
  c = experiment.default_pipeline()
  c.name = 'self_distillation'
  c.seeds = tuple(range(arg.seeds))
  c.stages = ConfigDict(dict(rescored=rescored(), sampler=sampler(), sft=sft()))
  c.order = ('rescored', 'sampler', 'sft')
  c.report.methods = c.order
  c.report.labels = ('OPD, log p_S rescored', "OPD, the sampler's log p_S", 'SFT on own samples')
  return c


def rescored() -> ConfigDict:
  """The default: an exact fixed point."""
  c = config_lib.default_config()
  c.steps = 80
  c.student.path = MODEL
  c.teacher.kind = 'initial_student'
  c.compute.layer_unroll = 2
  c.compute.microbatch_rows = 64
  c.data.prompts_per_step = 64
  c.optimizer.learning_rate = 2e-3
  c.eval.every_steps = 20
  c.eval.problems, c.eval.samples_per_problem = 512, 2
  return c


def sampler() -> ConfigDict:
  """The cheaper advantage, off by the sampler's rounding."""
  c = rescored()
  c.objective.student_logprobs = 'sampler'
  return c


def sft() -> ConfigDict:
  """Cross-entropy on what the frozen copy of the student writes."""
  c = rescored()
  c.data.source = 'teacher'
  c.objective.distill_coef, c.objective.likelihood_coef = 0.0, 1.0
  c.objective.importance = 'none'
  return c
