"""XLA flags that turn optimizations of CPU code off: what is computed stays, compiling is three
times faster, running slower."""

from __future__ import annotations

import os
import subprocess
import sys

# The code in one piece, not in one for each of 32 threads: two processes have two cores.
ONE_PIECE = 'xla_cpu_parallel_codegen_split_count'
_LEAST = {'xla_backend_optimization_level': 0, ONE_PIECE: 1}
CANDIDATES: tuple[dict[str, int | bool], ...] = (
    _LEAST | {'xla_cpu_use_fusion_emitters': False},
    _LEAST,  # the other is gone from jaxlib 0.12
    {'xla_backend_optimization_level': 0},
)


def flags(one_piece: bool = True) -> str:
  """Finds those that the XLA of this environment knows: it ends a process over any other. Code in
  `one_piece` rounds otherwise in the last bits."""
  for options in CANDIDATES:
    candidate = ' '.join(f'--{name}={value}'.lower() for name, value in options.items()
                         if one_piece or name != ONE_PIECE)
    known = subprocess.run(
        [sys.executable, '-c', 'import jax; jax.devices()'], capture_output=True, check=False,
        env=dict(os.environ, XLA_FLAGS=candidate, JAX_PLATFORMS='cpu'))
    if known.returncode == 0:
      return candidate
  return ''
