"""The work directory of a run: whose it is, who is at work in it, what the run read, and whether it
has finished."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import socket
import sys
import time
from typing import Any, TextIO

from opd_jax.errors import ConfigError
from opd_jax.files import digest, disk
from opd_jax.files.digest import Digests
from opd_jax.files.huggingface import ORIGIN
from opd_jax.models.params import flatten
from opd_jax.parallel import hosts
from opd_jax.settings import Run

# What a run leaves there, beside `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
CONFIG, RESULT, EXPORT, ADAPTER = 'config.json', 'result.json', 'export', 'adapter'
INPUTS, REVISIONS, CHECKPOINTS, LOCK = 'inputs.json', 'revisions.json', 'checkpoints', '.lock'
ANSWERS = 'answers_{}.jsonl'  # of a stream, data.teacher_answers='fixed'
SHARED_S = 20.0  # until a file that one host has written is seen by another
# The types of what a result.json holds; 'teacher' may be None.
RESULT_TYPES = {'name': str, 'seed': int, 'steps': int, 'flops': dict, 'before': dict,
                'after': dict, 'evals': list}


def lock(workdir: pathlib.Path) -> contextlib.AbstractContextManager[TextIO | None]:
  """Takes a directory for this process, until what is returned is closed or the process ends. Of
  several processes, the first one takes it for all.

  The lock is the kernel's: that of a process which is dead, however it died, is nobody's. It is one
  of what was opened and not of the process: within one process, too, the second is refused.

  Raises:
    ConfigError: another run has it, or another host has another directory of that name.
    StorageError: the file cannot be written.
  """
  held: list[TextIO] = []
  hosts.decide(lambda: held.append(_lock(workdir)))
  if hosts.count() > 1:
    _check_shared(workdir)
  return held[0] if held else contextlib.nullcontext()


def _check_shared(workdir: pathlib.Path) -> None:
  """Refuses a directory that is another one on another host, which would miss in every checkpoint
  what that host holds."""
  owner = hosts.decide(lambda: (workdir / LOCK).read_text())
  end, seen = time.monotonic() + SHARED_S, False
  while not seen and time.monotonic() < end:
    try:
      seen = (workdir / LOCK).read_text() == owner
    except OSError:  # not there yet, on a network file system
      time.sleep(0.2)
  blind = [hosts.name(i) for i, there in enumerate(hosts.exchange(seen)) if not there]
  if blind:
    raise ConfigError(f'workdir={str(workdir)!r} is not one directory: {blind} do not see what '
                      f'{hosts.name(0)} writes there; allowed: a directory that all hosts share')


def _lock(workdir: pathlib.Path) -> TextIO:
  file = workdir / LOCK
  with disk.naming(file):
    held = file.open('a+')
  try:
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except (BlockingIOError, PermissionError) as e:
    held.seek(0)
    owner = held.read().strip() or 'another process'
    held.close()
    raise ConfigError(f'workdir={str(workdir)!r} is in use by {owner}; allowed: a directory in '
                      'which no other run is at work (wait for it, or end it), or for processes '
                      'that are to be one run --coordinator, --processes and --process') from e
  except OSError as e:  # some network file systems have no locks
    print(f'WARNING: {file} cannot be locked ({e.strerror}): see to it that no other process '
          'runs in this directory', file=sys.stderr, flush=True)
  with disk.naming(file):
    held.truncate(0)
    held.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    held.flush()
    os.fsync(held.fileno())  # NFS else keeps it on this host, and the others do not see it in time
  return held


def result(workdir: pathlib.Path, run: Run) -> dict[str, Any] | None:
  """Reads what a finished run came out as; None of one that has not finished.

  Raises:
    ConfigError: result.json is not whole, or another run's.
  """
  return hosts.decide(lambda: _result(workdir, run))


def _result(workdir: pathlib.Path, run: Run) -> dict[str, Any] | None:
  file = workdir / RESULT
  if not os.path.lexists(file):
    return None
  try:
    found = disk.read_json(file)
    _check_result(found)
  except (OSError, ValueError) as e:
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


def _check_result(found: dict[str, Any]) -> None:
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


def read_revisions(file: pathlib.Path) -> dict[str, str]:
  """Reads which commits names on the hub stood for at the first start; {} where there were none.

  Raises:
    ConfigError: the file is damaged.
  """
  return hosts.decide(lambda: _revisions(file))


def _revisions(file: pathlib.Path) -> dict[str, str]:
  try:
    commits = disk.read_json(file) if os.path.lexists(file) else {}
    if not all(isinstance(commit, str) for commit in commits.values()):
      raise ValueError('a commit is no text')
    return commits
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
    disk.write_json(file, commits, sort_keys=True)
  except OSError as e:
    raise ConfigError(f'workdir={str(file.parent)!r} cannot be used: {e}; allowed: a directory '
                      'that can be created and written') from e


def fingerprint(settings: dict[str, Any]) -> str:
  """Computes the digest of a config, but for what changes no step of a run (`_elsewhere`)."""
  rest = _elsewhere(settings, {'doctor': None, 'compute': {'mesh': None}})
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
  try:
    content = disk.read_json(folder / ORIGIN)
  except (OSError, ValueError):
    return {}
  return content if _are_digests(content.get('inputs')) else {}


def _are_digests(inputs: Any) -> bool:
  return isinstance(inputs, dict) and all(isinstance(files, dict) for files in inputs.values())


def delivered(folder: pathlib.Path, origin: dict[str, Any]) -> bool:
  """Tells whether a directory of that very origin is there; removes any other."""
  return hosts.decide(lambda: _delivered(folder, origin))


def _delivered(folder: pathlib.Path, origin: dict[str, Any]) -> bool:
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
    out += sorted(p.name for p in workdir.glob(f'{ANSWERS.format("*")}*'))
  return out


def check(workdir: pathlib.Path, settings: dict[str, Any]) -> None:
  """Checks that a directory is new, or holds a run of this very config (but for `doctor`), and
  nothing of another.

  Raises:
    ConfigError: the directory holds another config's run or what is left of one, or cannot be
      written.
  """
  hosts.decide(lambda: _check(workdir, settings))


def _check(workdir: pathlib.Path, settings: dict[str, Any]) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(workdir / CONFIG):
      check_config(workdir, settings)
    else:
      partial = workdir / f'.{CONFIG}.partial'
      partial.write_text('')  # whether it can be written shows only by writing
      partial.unlink()
  except OSError as e:
    raise ConfigError(
        f'workdir={str(workdir)!r} cannot be used ({e}); allowed: a directory that can be created '
        'and written, and holds nothing or a run of this config') from e
  if strangers := _strangers(workdir, settings):
    raise ConfigError(
        f'workdir={str(workdir)!r} holds {strangers} of another run (or of one by an older version '
        'of this program); allowed: a directory without, so move or remove them')


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads config.json.

  Raises:
    ConfigError: it is not there, or no config.
  """
  try:
    return disk.read_json(workdir / CONFIG)
  except (OSError, ValueError) as e:
    raise ConfigError(
        f'workdir={str(workdir)!r} holds no run ({CONFIG}: {e}); allowed: the work directory of '
        'one run, in a pipeline WORKDIR/seed_S/STAGE') from e


def check_config(workdir: pathlib.Path, settings: dict[str, Any]) -> None:
  """Checks that a directory holds a run of this very config (but for `doctor` and `compute.mesh`).

  Raises:
    ConfigError: another config's run, or none.
  """
  theirs = _elsewhere(read_config(workdir), settings)
  if theirs != settings:
    changes = '; '.join(differences(theirs, settings)[:8])
    raise ConfigError(
        f'workdir={str(workdir)!r} holds a run of another config ({changes}); allowed: a new '
        'directory, or the config that the run was started with')


def _elsewhere(settings: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
  """A config with what changes no step of a run as it is in another: the doctor, of which a run
  that it will not let resume needs the switches; and the mesh, since a run may go on elsewhere."""
  compute = settings.get('compute')
  if isinstance(compute, dict):  # a file of somebody else's may hold anything
    compute = {**compute, 'mesh': there['compute']['mesh']}
  return {**settings, 'doctor': there['doctor'], 'compute': compute}


def read_inputs(workdir: pathlib.Path) -> dict[str, Digests]:
  """Reads what a run was started on.

  Raises:
    ConfigError: the directory does not say.
  """
  try:
    content = disk.read_json(workdir / INPUTS)
    if not _are_digests(content):
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
  hosts.decide(lambda: _check_inputs(workdir, inputs, reason))


def _check_inputs(workdir: pathlib.Path, inputs: dict[str, Digests], reason: str) -> None:
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
  hosts.decide(lambda: _claim(workdir, settings, inputs))


def _claim(workdir: pathlib.Path, settings: dict[str, Any], inputs: dict[str, Digests]) -> None:
  check(workdir, settings)
  try:
    disk.write_json(workdir / INPUTS, inputs, sort_keys=True)  # first: a config.json has its inputs
    if not os.path.lexists(workdir / CONFIG):
      disk.write_json(workdir / CONFIG, settings, sort_keys=True)
  except OSError as e:
    raise ConfigError(f'workdir={str(workdir)!r} cannot be used: {e}; allowed: a directory that '
                      'can be written') from e
