"""Runs that use programs which an earlier run of the same process made.

Nearly all the time of a tiny run goes into tracing and lowering its programs, and a test of
checkpoints, files or signals does not look at those. `reuse.train` is `train.train`, but a function
that is, closure by closure, the same as one that an earlier run compiled is not compiled again.
With `anew=True` every one is, for tests that count them, and later runs may have it. Where XLA
optimizes as it does for users (see conftest.py), nothing is taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import types
from typing import Any
from unittest import mock

import jax
from ml_collections import ConfigDict
import numpy as np

from opd_jax import programs
from opd_jax import train as train_lib
from opd_jax.doctor import rollouts

ON = 'optimization_level=0' in os.environ.get('XLA_FLAGS', '')
# The same by their value. Types go along: 1, 1.0 and True are equal, and traced they differ.
VALUES = (type(None), bool, int, float, str, bytes, type, np.dtype, types.BuiltinFunctionType,
          jax.custom_jvp, jax.custom_vjp, type(jax.jit(abs)), range, jax.sharding.Sharding,
          jax.sharding.PartitionSpec, jax.tree_util.PyTreeDef)
_programs: dict[Any, Callable] = {}


class UnknownError(TypeError):
  """Raised for what cannot be told from another of its kind."""


def same(x: Any) -> Any:
  """A value that is equal for two functions exactly if they trace to the same program."""
  if isinstance(x, VALUES):
    return type(x), x
  if isinstance(x, functools.partial):
    return 'partial', same(x.func), same(x.args), same(x.keywords)
  if isinstance(x, types.MethodType):
    return 'method', same(x.__func__), same(x.__self__)
  if isinstance(x, types.FunctionType):
    if getattr(sys.modules.get(x.__module__), x.__qualname__, None) is x:
      return x
    if hasattr(x, '__wrapped__'):  # by the checks of shapes, see conftest.py
      return x.__code__, same(x.__wrapped__)
    cells = tuple(cell.cell_contents for cell in x.__closure__ or ())
    return x.__code__, id(x.__globals__), same((x.__defaults__, x.__kwdefaults__)), same(cells)
  if isinstance(x, tuple | list):
    return type(x), tuple(map(same, x))
  if isinstance(x, dict):
    return 'dict', tuple((key, same(x[key])) for key in sorted(x))
  if dataclasses.is_dataclass(x):
    return type(x), tuple(same(getattr(x, f.name)) for f in dataclasses.fields(x))
  raise UnknownError(type(x))


def jit(f: Callable, anew: bool = False, **options: Any) -> Callable:
  """`jax.jit`, or, unless it is to be made anew, what it made of the same function before."""
  shardings = jax.tree.flatten(options.pop('out_shardings', None))
  try:
    key = same(f), same(shardings), same(options)
  except (UnknownError, RecursionError):
    key = object()
  if anew or key not in _programs:
    if shardings[0]:
      options['out_shardings'] = shardings[1].unflatten(shardings[0])
    _programs[key] = jax.jit(f, **options)
  return _programs[key]


class _Jax:
  """JAX, but for its `jit`."""

  def __init__(self, anew: bool):
    self.jit = functools.partial(jit, anew=anew)

  def __getattr__(self, name: str) -> Any:
    return getattr(jax, name)


@contextlib.contextmanager
def programs_of_earlier_runs(anew: bool = False) -> Iterator[None]:
  """Where runs within share their programs, and have those of earlier ones."""
  if not ON:
    yield
    return
  with (mock.patch.object(programs, 'jax', _Jax(anew)),
        mock.patch.object(rollouts, 'jax', _Jax(anew))):
    yield


def train(c: ConfigDict, workdir: pathlib.Path, anew: bool = False) -> dict[str, Any]:
  """`train.train` with the programs of earlier runs."""
  with programs_of_earlier_runs(anew):
    return train_lib.train(c, workdir)
