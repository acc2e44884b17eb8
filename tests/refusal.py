"""Checking a config, and what its refusal has to name: fields, values and what is allowed; how it
says so is free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
import pytest

from opd_jax import build, config, experiment
from opd_jax.errors import ConfigError


def check(c: ConfigDict) -> Any:
  """What the fields alone can tell of a run or of a pipeline."""
  return experiment.parse_pipeline(c) if experiment.is_pipeline(c) else config.parse(c)


def refused(c: ConfigDict, *parts: str, by: Callable[[ConfigDict], Any] = check) -> None:
  """The config is refused, in one line with all of these parts and what is allowed."""
  with pytest.raises(ConfigError) as e:
    by(c)
  assert '\n' not in str(e.value)
  for part in (*parts, 'allowed'):
    assert part in str(e.value), f'{part!r} is not in {e.value}'


def open_parts(c: ConfigDict) -> Any:
  """What only the models or the data can tell; no weight is read."""
  return build.open_parts(config.parse(c))
