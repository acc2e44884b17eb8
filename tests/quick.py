"""XLA flags that turn optimizations of CPU code off: what is computed stays, compiling is three
times faster, running slower."""

from __future__ import annotations

import os
import subprocess
import sys

_CANDIDATES = (
    '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false',
    '--xla_backend_optimization_level=0',  # the other is gone from jaxlib 0.12
)


def flags() -> str:
  """Finds those that the XLA of this environment knows: it ends a process over any other."""
  for candidate in _CANDIDATES:
    known = subprocess.run(
        [sys.executable, '-c', 'import jax; jax.devices()'], capture_output=True, check=False,
        env=dict(os.environ, XLA_FLAGS=candidate, JAX_PLATFORMS='cpu'))
    if known.returncode == 0:
      return candidate
  return ''
