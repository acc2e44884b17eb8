"""On-policy distillation between two Hugging Face checkpoints of your own, with adapters.

The student writes in its chat template, the teacher grades every token by the exact full-vocabulary
reverse KL, and rank-32 adapters on every linear layer of the student learn; the base is frozen in
bfloat16. What is yours to say: the two checkpoints (directories, or names on the hub with a
`revision`) and the prompts (`opd_jax/tasks/prompts.py` has every option).

    opd train --config experiments/checkpoints.py --config.student.path=DIR \
        --config.teacher.path=DIR --config.task.options.source=problems.jsonl

A file of prompts needs no other flag where only one of its columns can be the prompts, and at most
one the answers (the log says which; else `prompt_column` and `answer_column` do): without answers
nothing is graded. 320 school problems in `assets/` stand in for yours. `checkpoints.py:rank=0`
trains the whole model, `checkpoints.py:preset=eopd` takes another objective, any of
`docs/presets.md`, and `checkpoints.py:task=deepmath` a published data set (`docs/tasks.md`).
`opd doctor` with the same flags says whether the two belong
together. In the work directory, `export/` is then a Hugging Face directory and `adapter/` a PEFT
one. benchmarks/real_size.py runs this at the size of Qwen3-0.6B.
"""

import pathlib

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment, presets

ASSETS = pathlib.Path(__file__).resolve().parent / 'assets'


def get_config(arg: str | None = None) -> ConfigDict:
  """Arguments: rank (of the adapters; 0 trains the whole model), preset (the objective), task."""
  arg = experiment.parse_arg(arg, rank=32, preset='opd_exact', task='prompts')
  c = config_lib.default_config()
  c.name = 'checkpoints'
  c.student.lora.rank = arg.rank
  c.teacher.kind = 'checkpoint'
  c.prompt.template = 'student'
  c.compute.dtype = 'bfloat16'
  c.compute.remat = 'layer'
  c.compute.microbatch_rows = 8
  c.compute.chunk_tokens = 1024
  c.task = config_lib.task_config(
      'prompts', source=str(ASSETS / 'word_problems.jsonl'), grader='auto',
      holdout_examples=-1) if arg.task == 'prompts' else config_lib.task_config(arg.task)
  c.data.prompts_per_step = 64
  c.data.max_prompt_tokens, c.data.max_new_tokens = 512, 1024
  c.data.overlong = 'drop'
  presets.apply(c, arg.preset)
  # Adapters take about ten times the rate of the whole model (Schulman et al. 2025, "LoRA Without
  # Regret").
  c.optimizer.learning_rate = 1e-4 if arg.rank else 1e-5
  c.optimizer.warmup_steps = 5
  c.eval.every_steps, c.eval.problems = 25, 0  # all that are held out
  return c
