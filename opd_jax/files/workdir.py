"""The work directory of a run: whose it is, and whether the run has finished."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from opd_jax.errors import ConfigError
from opd_jax.models.params import flatten

# What a run leaves there, beside `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
CONFIG, RESULT, EXPORT, ADAPTER = 'config.json', 'result.json', 'export', 'adapter'


def write_json(file: pathlib.Path, content: Any, **options: Any) -> None:
  """Writes a JSON file that appears whole or not at all."""
  partial = file.with_name(f'.{file.name}.partial')
  partial.write_text(json.dumps(content, indent=2, **options) + '\n')
  partial.rename(file)


def result(workdir: pathlib.Path) -> dict[str, Any] | None:
  """Reads what a finished run came out as; None of one that has not finished."""
  file = workdir / RESULT
  return json.loads(file.read_text()) if file.exists() else None


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
  """Lists 'field: old -> new' for every field in which two configs differ."""
  a, b = flatten(a), flatten(b)
  return [f'{k}: {a.get(k, "(absent)")!r} -> {b.get(k, "(absent)")!r}'
          for k in sorted(set(a) | set(b)) if a.get(k, '(absent)') != b.get(k, '(absent)')]


def check(workdir: pathlib.Path, settings: dict[str, Any]) -> None:
  """Checks that a directory is new, or holds a run of this very config (but for `doctor`).

  Raises:
    ConfigError: the directory holds another config's run, or cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / CONFIG).exists():
      partial = workdir / f'.{CONFIG}.partial'
      partial.write_text('')  # whether it can be written shows only by writing
      partial.unlink()
      return
    # The doctor changes no step of a run: one that it will not let resume needs its switches.
    theirs = {**json.loads((workdir / CONFIG).read_text()), 'doctor': settings['doctor']}
  except (OSError, TypeError, json.JSONDecodeError) as e:
    raise ConfigError(
        f'workdir={str(workdir)!r} cannot be used ({CONFIG}: {e}); allowed: a directory that can '
        'be created and written, and holds nothing or a run of this config') from e
  if theirs != settings:
    changes = '; '.join(differences(theirs, settings)[:8])
    raise ConfigError(
        f'workdir={str(workdir)!r} holds a run of another config ({changes}); allowed: a new '
        'directory, or the config that the run was started with')


def claim(workdir: pathlib.Path, settings: dict[str, Any]) -> None:
  """Checks a directory, and then it belongs to this config.

  Raises:
    ConfigError: see `check`.
  """
  check(workdir, settings)
  try:
    if not (workdir / CONFIG).exists():
      write_json(workdir / CONFIG, settings, sort_keys=True)
  except OSError as e:
    raise ConfigError(f'workdir={str(workdir)!r} cannot be used: {e}; allowed: a directory that '
                      'can be written') from e
