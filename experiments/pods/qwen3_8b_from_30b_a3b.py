"""On-policy distillation of Qwen3-30B-A3B, a mixture of experts, into Qwen3-8B-Base.

As qwen3_8b_from_32b.py, with a teacher that uses 3 of its 30 billion parameters for a token: it
grades for less than what the student costs.

    opd train --config experiments/pods/qwen3_8b_from_30b_a3b.py:v5p-64
    opd train --config experiments/pods/qwen3_8b_from_30b_a3b.py:v5p-64,answers=long
    opd plan --config experiments/pods/qwen3_8b_from_30b_a3b.py:v5p-64 --topology v5p:2x4x4 \
        --models experiments/pods/models

Sizes: `v5p-8` (4 chips, v5p:2x2x1), `v5p-64` (32 chips, v5p:2x4x4), `v6e-16` (v6e:4x4), `v6e-64`
(v6e:8x8), `h100x8` (a host of eight H100) and `h200` (a host of eight H200); `answers` are short,
2048 tokens, or long, 16384. What each takes of memory, time and chip-hours, `opd plan` says:
PLAN.md beside this file. It has not been run.

Expected: no number is published for this pair; for its neighbour see qwen3_8b_from_32b.py.
"""

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment, presets


def get_config(arg: str | None = None) -> ConfigDict:
  """Arguments: size (of the machines, see above), answers (short or long)."""
  arg = experiment.parse_arg(arg, size='v5p-64', answers='short')
  c = presets.apply(config_lib.default_config(), 'opd')
  experiment.set_for_pods(c, 'qwen3_8b_from_30b_a3b', arg, student='Qwen/Qwen3-8B-Base',
                          teacher='Qwen/Qwen3-30B-A3B')
  # Experts over four chips where there are enough: a layer of all 128 is 1.2 GB to gather.
  c.compute.mesh.expert = 4 if experiment.MACHINES[arg.size].chips >= 32 else 1
  return c
