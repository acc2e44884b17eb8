"""On-policy distillation of Qwen3-32B into Qwen3-8B-Base on mathematics, every weight.

The student writes 256 answers a step (64 problems of DeepMath, four each), the teacher grades every
token, the sampled-token policy gradient moves it.

    opd train --config experiments/pods/qwen3_8b_from_32b.py:v5p-64
    opd train --config experiments/pods/qwen3_8b_from_32b.py:v5p-64,answers=long
    opd plan --config experiments/pods/qwen3_8b_from_32b.py:v5p-64 --topology v5p:2x4x4 \
        --models experiments/pods/models

Sizes: `v5p-8` (4 chips, v5p:2x2x1), `v5p-64` (32 chips, v5p:2x4x4), `v6e-16` (v6e:4x4), `v6e-64`
(v6e:8x8), `h100x8` (a host of eight H100) and `h200` (a host of eight H200); `answers` are short,
2048 tokens, or long, 16384. What each takes of memory, time and chip-hours, `opd plan` says:
PLAN.md beside this file. It has not been run.

Expected: from this student after supervised fine-tuning, and with a teacher of this size, AIME'24
goes from 60 % to 70 % in about 150 steps (Thinking Machines Lab 2025, "On-Policy Distillation");
from the base itself no number is published.
"""

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment, presets


def get_config(arg: str | None = None) -> ConfigDict:
  """Arguments: size (of the machines, see above), answers (short or long)."""
  arg = experiment.parse_arg(arg, size='v5p-64', answers='short')
  c = presets.apply(config_lib.default_config(), 'opd')
  experiment.set_for_pods(c, 'qwen3_8b_from_32b', arg, student='Qwen/Qwen3-8B-Base',
                          teacher='Qwen/Qwen3-32B')
  return c
