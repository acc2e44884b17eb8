"""On-policy distillation of Qwen3-32B into adapters of Qwen3-8B-Base on mathematics.

As qwen3_8b_from_32b.py, but that rank-128 adapters on every linear layer learn; the base is frozen
in bfloat16.

    opd train --config experiments/pods/qwen3_8b_lora.py:v6e-16
    opd train --config experiments/pods/qwen3_8b_lora.py:v6e-16,answers=long
    opd plan --config experiments/pods/qwen3_8b_lora.py:v6e-16 --topology v6e:4x4 \
        --models experiments/pods/models

Sizes: `v5p-8` (4 chips, v5p:2x2x1), `v5p-64` (32 chips, v5p:2x4x4), `v6e-16` (v6e:4x4), `v6e-64`
(v6e:8x8), `h100x8` (a host of eight H100) and `h200` (a host of eight H200); `answers` are short,
2048 tokens, or long, 16384. What each takes of memory, time and chip-hours, `opd plan` says:
PLAN.md beside this file. It has not been run.

Expected: rank-32 adapters came 6 % less far than the whole model, of which see qwen3_8b_from_32b.py
(Thinking Machines Lab 2025, "On-Policy Distillation"); for rank 128 no number is published.
"""

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment, presets


def get_config(arg: str | None = None) -> ConfigDict:
  """Arguments: size (of the machines, see above), answers (short or long)."""
  arg = experiment.parse_arg(arg, size='v6e-16', answers='short')
  c = presets.apply(config_lib.default_config(), 'opd')
  experiment.set_for_pods(c, 'qwen3_8b_lora', arg, student='Qwen/Qwen3-8B-Base',
                          teacher='Qwen/Qwen3-32B')
  c.student.lora.rank = 128
  c.optimizer.learning_rate = 1e-4
  return c
