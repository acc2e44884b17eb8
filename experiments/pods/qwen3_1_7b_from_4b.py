"""On-policy distillation of Qwen3-4B into Qwen3-1.7B-Base on mathematics, every weight.

The smallest of the experiments here: for one host, and to try a slice with.

    opd train --config experiments/pods/qwen3_1_7b_from_4b.py:v6e-16
    opd train --config experiments/pods/qwen3_1_7b_from_4b.py:v6e-16,answers=long
    opd plan --config experiments/pods/qwen3_1_7b_from_4b.py:v6e-16 --topology v6e:4x4 \
        --models experiments/pods/models

Sizes: `v5p-8` (4 chips, v5p:2x2x1), `v5p-64` (32 chips, v5p:2x4x4), `v6e-16` (v6e:4x4), `v6e-64`
(v6e:8x8), `h100x8` (a host of eight H100) and `h200` (a host of eight H200); `answers` are short,
2048 tokens, or long, 16384. What each takes of memory, time and chip-hours, `opd plan` says:
PLAN.md beside this file. It has not been run.

Expected: no number is published for this pair.
"""

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment, presets


def get_config(arg: str | None = None) -> ConfigDict:
  """Arguments: size (of the machines, see above), answers (short or long)."""
  arg = experiment.parse_arg(arg, size='v6e-16', answers='short')
  c = presets.apply(config_lib.default_config(), 'opd')
  experiment.set_for_pods(c, 'qwen3_1_7b_from_4b', arg, student='Qwen/Qwen3-1.7B-Base',
                          teacher='Qwen/Qwen3-4B')
  return c
