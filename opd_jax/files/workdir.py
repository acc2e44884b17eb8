"""The work directory of a run: whose it is, who is at work in it, and whether the run has finished.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import socket
import sys
from typing import Any, TextIO

from opd_jax.errors import ConfigError
from opd_jax.files import disk
from opd_jax.models.params import flatten
from opd_jax.settings import Run

# What a run leaves there, beside `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
CONFIG, RESULT, EXPORT, ADAPTER, LOCK = 'config.json', 'result.json', 'export', 'adapter', '.lock'
# The types of what a result.json holds; 'teacher' may be None.
RESULT_TYPES = {'name': str, 'seed': int, 'steps': int, 'flops': dict, 'before': dict,
                'after': dict, 'evals': list}


def lock(workdir: pathlib.Path) -> TextIO:
  """Takes a directory for this process, until what is returned is closed or the process ends.

  The lock is the kernel's: that of a process which is dead, however it died, is nobody's.

  Raises:
    ConfigError: another process has it.
    StorageError: the file cannot be written.
  """
  file = workdir / LOCK
  with disk.naming(file):
    held = file.open('a+')
  try:
    fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except (BlockingIOError, PermissionError) as e:
    held.seek(0)
    owner = held.read().strip() or 'another process'
    held.close()
    raise ConfigError(f'workdir={str(workdir)!r} is in use by {owner}; allowed: a directory in '
                      'which no other run is at work (wait for it, or end it)') from e
  except OSError as e:  # some network file systems have no locks
    print(f'WARNING: {file} cannot be locked ({e.strerror}): see to it that no other process '
          'runs in this directory', file=sys.stderr, flush=True)
  with disk.naming(file):
    held.truncate(0)
    held.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    held.flush()
  return held


def result(workdir: pathlib.Path, run: Run) -> dict[str, Any] | None:
  """Reads what a finished run came out as; None of one that has not finished.

  Raises:
    ConfigError: result.json is not whole, or another run's.
  """
  file = workdir / RESULT
  if not os.path.lexists(file):
    return None
  try:
    found = json.loads(disk.read_bytes(file))
    _check_result(found)
  except (OSError, ValueError, RecursionError) as e:
    raise ConfigError(
        f'{file} is damaged ({e}); allowed: remove it, and `opd train` with this config and work '
        'directory writes it again from the newest checkpoint') from e
  wanted = {'name': run.name, 'seed': run.seed, 'steps': run.steps}
  theirs = {name: found[name] for name in wanted}
  if found['steps'] < run.steps and run.eval.stop_at_sampled_accuracy:
    theirs['steps'] = run.steps  # it stopped at its goal
  if theirs != wanted:
    raise ConfigError(f'{file} is of another run ({"; ".join(differences(theirs, wanted))}); '
                      'allowed: the result of this config')
  return found


def _check_result(found: Any) -> None:
  if not isinstance(found, dict):
    raise ValueError(f'it holds a {type(found).__name__}')
  for name, kind in RESULT_TYPES.items():
    if type(found.get(name)) is not kind:
      raise ValueError(f'{name} is no {kind.__name__}')
  if not isinstance(found.get('teacher'), dict | None):
    raise ValueError('teacher is no dict')
  for entry in (found['before'], found['after'], *found['evals']):
    if not isinstance(entry, dict) or type(entry.get('step')) is not int or not isinstance(
        entry.get('flops'), dict):
      raise ValueError('an evaluation has no step or no flops')


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
    if os.path.lexists(workdir / CONFIG):
      check_config(workdir, settings)
      return
    partial = workdir / f'.{CONFIG}.partial'
    partial.write_text('')  # whether it can be written shows only by writing
    partial.unlink()
  except OSError as e:
    raise ConfigError(
        f'workdir={str(workdir)!r} cannot be used ({e}); allowed: a directory that can be created '
        'and written, and holds nothing or a run of this config') from e


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads config.json.

  Raises:
    ConfigError: it is not there, or no config.
  """
  try:
    found = json.loads(disk.read_bytes(workdir / CONFIG))
    if not isinstance(found, dict):
      raise ValueError(f'it holds a {type(found).__name__}')
    return found
  except (OSError, ValueError, RecursionError) as e:
    raise ConfigError(
        f'workdir={str(workdir)!r} holds no run ({CONFIG}: {e}); allowed: the work directory of '
        'one run, in a pipeline WORKDIR/seed_S/STAGE') from e


def check_config(workdir: pathlib.Path, settings: dict[str, Any]) -> None:
  """Checks that a directory holds a run of this very config (but for `doctor`).

  Raises:
    ConfigError: another config's run, or none.
  """
  # The doctor changes no step of a run: one that it will not let resume needs its switches.
  theirs = {**read_config(workdir), 'doctor': settings['doctor']}
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
    if not os.path.lexists(workdir / CONFIG):
      disk.write_json(workdir / CONFIG, settings, sort_keys=True)
  except OSError as e:
    raise ConfigError(f'workdir={str(workdir)!r} cannot be used: {e}; allowed: a directory that '
                      'can be written') from e
