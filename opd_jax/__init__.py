"""opd_jax: on-policy distillation of language models in JAX.

The three pure functions of the method; the loop that joins them is `opd_jax.train`.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {'reverse_kl_update': 'update', 'sample_fn': 'sample', 'teacher_logprob_fn': 'score'}
__all__ = ['reverse_kl_update', 'sample_fn', 'teacher_logprob_fn']


def __getattr__(name: str) -> Any:
  """Imports one of the three when it is asked for: JAX takes seconds, and the console command has
  to hear of Ctrl-C, and to print its help, before."""
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.algorithm.{_MODULES[name]}'), name)
