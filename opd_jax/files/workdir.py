"""The work directory of a run: whose it is, what the run read, and whether it has finished."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import sys
from typing import Any

from opd_jax.errors import ConfigError
from opd_jax.files import digest
from opd_jax.files.digest import Digests
from opd_jax.files.huggingface import ORIGIN
from opd_jax.models.params import flatten

# What a run leaves there, beside `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
CONFIG, RESULT, EXPORT, ADAPTER = 'config.json', 'result.json', 'export', 'adapter'
INPUTS, REVISIONS, CHECKPOINTS = 'inputs.json', 'revisions.json', 'checkpoints'


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


def read_revisions(file: pathlib.Path) -> dict[str, str]:
  """Reads which commits names on the hub stood for at the first start; {} where there were none.

  Raises:
    ConfigError: the file is damaged.
  """
  try:
    return json.loads(file.read_text()) if file.exists() else {}
  except (OSError, ValueError) as e:
    raise ConfigError(f'{file} cannot be read ({e}); allowed: what a run wrote there, or commits '
                      'in the config and no such file') from e


def write_revisions(file: pathlib.Path, commits: dict[str, str]) -> None:
  """Writes what `read_revisions` reads.

  Raises:
    ConfigError: the directory cannot be written.
  """
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, commits, sort_keys=True)
  except OSError as e:
    raise ConfigError(f'workdir={str(file.parent)!r} cannot be used: {e}; allowed: a directory '
                      'that can be created and written') from e


def fingerprint(settings: dict[str, Any]) -> str:
  """Computes the digest of a config, but for `doctor`, which changes no step of a run."""
  rest = {name: value for name, value in settings.items() if name != 'doctor'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def origin(settings: dict[str, Any], inputs: dict[str, Digests], step: int, checksums: list[int]
           ) -> dict[str, Any]:
  """Makes what the directories that a run delivers say of where they are from (ORIGIN in them).

  Args:
    settings: the config.
    inputs: what the run read.
    step: of the train state.
    checksums: of the train state: no other has the same.
  """
  return {'name': settings['name'], 'seed': settings['seed'], 'step': step,
          'config': fingerprint(settings), 'inputs': inputs, 'checksums': checksums}


def read_origin(folder: pathlib.Path) -> dict[str, Any]:
  """Reads where a directory is from; {} if it does not say."""
  file = folder / ORIGIN
  try:
    content = json.loads(file.read_text()) if file.exists() else {}
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}


def delivered(folder: pathlib.Path, origin: dict[str, Any]) -> bool:
  """Tells whether a directory of that very origin is there; removes any other."""
  if folder.exists() and read_origin(folder) != origin:
    shutil.rmtree(folder)
  return folder.exists()


def _strangers(workdir: pathlib.Path, settings: dict[str, Any]) -> list[str]:
  """What another run left there, which would be taken for this one's."""
  claimed, mine = (workdir / CONFIG).exists(), fingerprint(settings)
  out = [name for name in (EXPORT, ADAPTER) if (workdir / name).exists() and not (
      claimed and read_origin(workdir / name).get('config') == mine)]
  if not claimed:
    out += [name for name, found in (
        (RESULT, (workdir / RESULT).exists()),
        (CHECKPOINTS, any(p.name.isdigit() for p in (workdir / CHECKPOINTS).glob('*')))) if found]
  return out


def check(workdir: pathlib.Path, settings: dict[str, Any]) -> None:
  """Checks that a directory is new, or holds a run of this very config (but for `doctor`), and
  nothing of another.

  Raises:
    ConfigError: the directory holds another config's run or what is left of one, or cannot be
      written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / CONFIG).exists():
      partial = workdir / f'.{CONFIG}.partial'
      partial.write_text('')  # whether it can be written shows only by writing
      partial.unlink()
      theirs = settings
    else:
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
  if strangers := _strangers(workdir, settings):
    raise ConfigError(
        f'workdir={str(workdir)!r} holds {strangers} of another run (or of one by an older version '
        'of this program); allowed: a directory without, so move or remove them')


def read_inputs(workdir: pathlib.Path) -> dict[str, Digests]:
  """Reads what a run was started on.

  Raises:
    ConfigError: the directory does not say.
  """
  try:
    content = json.loads((workdir / INPUTS).read_text())
    if not isinstance(content, dict) or not all(isinstance(x, dict) for x in content.values()):
      raise ValueError('no object of objects')
    return content
  except (OSError, ValueError) as e:
    raise ConfigError(
        f'workdir={str(workdir)!r} does not say what its run was started on ({INPUTS}: {e}); '
        "allowed: a new directory, or doctor.changed_inputs='REASON' to take what is there now"
        ) from e


def check_inputs(workdir: pathlib.Path, inputs: dict[str, Digests], reason: str) -> None:
  """Checks that a run goes on with what it was started on; with a reason, warns where it does not.

  Args:
    workdir: its directory; a new one is fine.
    inputs: what would be read now, of those inputs that matter.
    reason: doctor.changed_inputs; '' for none.

  Raises:
    ConfigError: something has changed, and there is no reason.
  """
  if not (workdir / CONFIG).exists():
    return
  try:
    before = read_inputs(workdir)
    changes = digest.changes({name: before.get(name, {}) for name in inputs}, inputs)
  except ConfigError:
    if not reason:
      raise
    changes = [f'{INPUTS} cannot be read']
  more = f' and {len(changes) - 8} more' if changes[8:] else ''
  told = (f'workdir={str(workdir)!r}: its run began with other inputs ({"; ".join(changes[:8])}'
          f'{more})')
  if changes and not reason:
    raise ConfigError(f"{told}; allowed: those again, a new directory, or "
                      "doctor.changed_inputs='REASON' to go on with these")
  if changes:
    print(f'WARNING: {told}; goes on, {reason!r}', file=sys.stderr, flush=True)


def claim(workdir: pathlib.Path, settings: dict[str, Any], inputs: dict[str, Digests]) -> None:
  """Checks a directory, and then it belongs to this config and these inputs.

  Raises:
    ConfigError: see `check`.
  """
  check(workdir, settings)
  try:
    write_json(workdir / INPUTS, inputs, sort_keys=True)  # first: a config.json has its inputs
    if not (workdir / CONFIG).exists():
      write_json(workdir / CONFIG, settings, sort_keys=True)
  except OSError as e:
    raise ConfigError(f'workdir={str(workdir)!r} cannot be used: {e}; allowed: a directory that '
                      'can be written') from e
