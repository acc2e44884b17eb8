"""Checkpoints with orbax: asynchronous, atomic, the last few and the best, and a way back.

A checkpoint holds the train state (parameters, optimizer, step) and a JSON item with the data
position, the FLOPs so far, the evaluations and the config. Random keys are functions of the step.
Every bit of both is under a checksum: of the state a sum for each leaf, kept in the JSON item, and
of the JSON item a digest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from opd_jax.files import disk
from opd_jax.files.workdir import CHECKPOINTS
from opd_jax.parallel import hosts
from opd_jax.settings import Checkpoint
from opd_jax.types import TrainState

# Where orbax moves a checkpoint that is to be deleted, in one step. A process that is killed while
# it deletes leaves no half of one under its name.
DELETED = 'deleted'
# What a file system refuses with, whoever says so in whatever exception.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
            errno.EIO, errno.ESTALE, errno.ENOENT)


class DamagedError(RuntimeError):
  """None of the checkpoints of a run can be read."""


def checksums(tree: Any) -> jax.Array:
  """Computes one uint32 a leaf: sum over words of word * (2 index + 1), modulo 2^32.

  Odd weights make it change with any one word. Integer sums are the same in whatever order and
  sharding they are taken, so a state may be checked on another mesh than the one it was saved from.
  """
  def one(x: jax.Array) -> jax.Array:
    width = min(x.dtype.itemsize, 4)  # a float64 becomes two words along a new axis
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * width}')).astype(jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
      index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
      stride *= words.shape[axis]
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)

  return jnp.stack([one(x) for x in jax.tree.leaves(tree)])


def digest(step: int, host: dict[str, Any]) -> str:
  """Computes the digest of a JSON item and of the step it belongs to.

  A float is written such that it is read as the same one, and keys are sorted: what was read from
  the file has the digest of what was written to it.
  """
  return hashlib.sha256(json.dumps([step, host], sort_keys=True).encode()).hexdigest()


class Checkpoints:
  """The checkpoints in one directory."""

  def __init__(self, path: pathlib.Path, *, keep_latest: int, keep_best: int, best_metric: str,
               checksums: Callable[[Any], jax.Array] = checksums, read_only: bool = False):
    """`checksums` may be the jitted function of that name. Files that orbax reads without a
    complaint can still hold other bits than were written. With
    `read_only`, nothing is swept away or moved: the run may be going on."""
    self._path, self._checksums, self._read_only = path.resolve(), checksums, read_only
    self._reader = ocp.StandardCheckpointHandler()

    def quality(metrics: dict[str, float]) -> float:
      return metrics.get(best_metric, -math.inf)  # a checkpoint between two evaluations has none

    policies = [managers.LatestN(keep_latest)]
    if keep_best:
      policies.append(managers.BestN(get_metric_fn=quality, n=keep_best,
                                     keep_checkpoints_without_metrics=False))
    self._options = ocp.CheckpointManagerOptions(
        best_fn=quality,  # or orbax does not store the metrics, and forgets the best at a restart
        preservation_policy=managers.AnyPreservationPolicy(policies),
        todelete_subdir=None if read_only else DELETED,
        lightweight_initialize=read_only,  # reads no metrics, whose damage would be in the way
        # What a killed process left half-written is swept away at the next start.
        cleanup_tmp_directories=not read_only, create=not read_only, read_only=read_only)
    self._open()
    self._own = self._path.stat()

  def _open(self):
    hosts.decide(self._tidy)
    self._manager = ocp.CheckpointManager(
        self._path, options=self._options,
        item_handlers={'state': ocp.StandardCheckpointHandler(),
                       'host': ocp.JsonCheckpointHandler()})

  def _tidy(self):
    if not self._read_only:
      self._delete()
    # Orbax reads two small files of every checkpoint when it starts, and gives up on one bad one.
    finished = {int(p.name): p for p in self._path.glob('*') if p.name.isdigit()}
    bad = {} if self._read_only else {
        step: error for step, folder in finished.items() if (error := _unopenable(folder))}
    if bad and len(bad) == len(finished):
      self._give_up(bad)
    for step, error in bad.items():
      self._move_away(step, error)

  def steps(self) -> list[int]:
    """Lists the steps that have a finished checkpoint."""
    return hosts.decide(lambda: sorted(self._manager.all_steps()))

  def save(self, state: TrainState, step: int, host: dict[str, Any],
           metrics: dict[str, float] | None) -> None:
    """Copies the state to the host, then writes in the background. Saving a step twice is a no-op.

    Args:
      state: the train state.
      step: its step, as a Python int.
      host: JSON content.
      metrics: of an evaluation at this step, or None; those with the best metric are kept longer.

    Raises:
      StorageError: the file system refused this checkpoint or the one before, here or in `wait` or
        in `close`; what is there already stays.
    """
    if step in self.steps():
      return
    # A deep copy: orbax writes in the background while the caller goes on counting.
    metrics = metrics or {}
    host = json.loads(json.dumps({
        **host, 'metrics': metrics, 'checksums': hosts.fetch(self._checksums(state)).tolist()}))
    host['digest'] = digest(step, host)
    self.wait()
    if self._is_removed():
      raise disk.StorageError(f'{self._path} was removed while the run was going on')
    with self._saving():
      self._manager.save(step, metrics=metrics, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)))

  def wait(self) -> None:
    """Blocks until everything is on disk."""
    with self._saving(background=True):
      self._manager.wait_until_finished()
    self._delete()

  def close(self) -> None:
    """Waits and ends the background threads."""
    try:
      if not self._read_only:
        self.wait()
    finally:
      with self._saving(background=True):
        self._manager.close()

  @contextlib.contextmanager
  def _saving(self, background: bool = False) -> Iterator[None]:
    try:
      yield
    except Exception as e:
      if self._is_removed():
        raise disk.StorageError(f'{self._path} was removed while the run was going on') from e
      said = [os.strerror(n) for n in REFUSALS if os.strerror(n) in str(e)]
      # A ValueError of what is written in the background is orbax's word for files that went
      # missing before a checkpoint was whole.
      if not said and not isinstance(e, (OSError, ValueError) if background else OSError):
        raise
      reason = said[0] if said else getattr(e, 'strerror', None) or _first_line(e)
      raise disk.StorageError(f'{self._path} cannot be written: {reason}; the checkpoints in it '
                              'are as they were') from e

  def _is_removed(self) -> bool:
    """Whether the directory is gone, or one that orbax made again, with its last checkpoint alone.
    """
    return not self._path.is_dir() or not os.path.samestat(self._path.stat(), self._own)

  def _delete(self) -> None:
    if hosts.is_primary():
      shutil.rmtree(self._path / DELETED, ignore_errors=True)

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *exc: Any) -> None:
    self.close()

  def restore_latest(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """Reads the newest checkpoint that can be read, or None if there is none at all.

    Newer ones that cannot be read are moved to `damaged/` beside the checkpoints, with a warning
    on stderr.

    Args:
      abstract: the state's shapes, dtypes and shardings.

    Raises:
      DamagedError: there are checkpoints, and all of them are damaged.
    """
    failures: dict[int, Exception] = {}
    for step in reversed(self.steps()):
      try:
        state, host = self.restore(step, abstract)
      except Exception as e:  # tensorstore, orbax and JSON each raise their own
        failures[step] = e
        continue
      # Only now is it certain that the newer ones are at fault, and not, say, a full device.
      for newer, error in failures.items():
        self._set_aside(newer, error)
      return state, host
    if failures:
      self._give_up(failures)
    return None

  def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Reads the checkpoint of a step, whose bits are checked.

    Args:
      step: one of `steps()`.
      abstract: the state's shapes, dtypes and shardings.

    Raises:
      ValueError: other bits than were saved; tensorstore and orbax raise errors of their own.
    """
    restored, host, error = None, None, None
    try:
      _refuse_pipes(self._path / str(step))
      # Not by the manager, whose processes wait for each other: one of them may fail to read.
      restored = self._reader.restore(self._path / str(step) / 'state',
                                      args=ocp.args.StandardRestore(abstract))
      host = disk.read_json(self._path / str(step) / 'host' / 'metadata')
    except Exception as e:  # of what this process reads; others may have read theirs
      error = e
    failed = [text for text in hosts.exchange(error and f'{type(error).__name__}: {error}') if text]
    if failed:
      raise error or ValueError(failed[0])
    state = jax.block_until_ready(restored)
    if host.pop('digest', None) != digest(step, host):
      raise ValueError('the history does not have the digest it was saved with')
    del host['metrics']
    if hosts.fetch(self._checksums(state)).tolist() != host.pop('checksums'):
      raise ValueError('the state does not have the checksums it was saved with')
    return state, host

  def _give_up(self, failures: dict[int, Exception]) -> None:
    raise DamagedError(
        f'no checkpoint in {self._path} can be read; nothing was changed. '
        + '; '.join(f'step {step}: {_first_line(e)}' for step, e in failures.items())
        + '. If they are lost, remove the work directory to start anew')

  def _set_aside(self, step: int, error: Exception) -> None:
    self._manager.close()
    hosts.decide(lambda: self._move_away(step, error))
    self._open()

  def _move_away(self, step: int, error: Exception) -> None:
    target = self._path.parent / 'damaged' / str(step)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    shutil.move(self._path / str(step), target)
    print(f'WARNING: the checkpoint of step {step} is damaged ({_first_line(error)}); moved to '
          f'{target}, falling back to the one before', file=sys.stderr, flush=True)


def of_run(settings: Checkpoint, workdir: pathlib.Path,
           checksums: Callable[[Any], jax.Array] = checksums, read_only: bool = False
           ) -> Checkpoints:
  """Opens the checkpoints of the run in a work directory, as its settings say."""
  return Checkpoints(
      workdir / CHECKPOINTS, keep_latest=settings.keep_latest, keep_best=settings.most_best,
      best_metric=settings.best_metric, checksums=checksums, read_only=read_only)


def _unopenable(folder: pathlib.Path) -> Exception | None:
  """What is wrong with the files that orbax reads of every checkpoint; None where nothing is, and
  of metrics that cannot be compared, which reading the checkpoint will show."""
  def read(*names: str) -> dict[str, Any]:
    return disk.read_json(folder.joinpath(*names))

  try:
    _refuse_pipes(folder)
    found = read('metrics', 'metrics')
  except (OSError, ValueError) as e:
    return e
  try:
    read('_CHECKPOINT_METADATA')
    saved = read('host', 'metadata')['metrics']
  except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError):
    return None
  except ValueError as e:
    return e
  return None if found == saved else ValueError('the metrics are not those it was saved with')


def _refuse_pipes(folder: pathlib.Path) -> None:
  """Raises ValueError for what is no file somewhere in a checkpoint: orbax would wait for it."""
  for path in [folder, *folder.rglob('*')]:
    if path.is_dir():
      disk.refuse_pipes(path, path.name)


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return f'{type(error).__name__}: {lines[0][:300] if lines else ""}'
