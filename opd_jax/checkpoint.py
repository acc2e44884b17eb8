"""Checkpoints with orbax: asynchronous, atomic, the last few and the best, and a way back.

A checkpoint holds the train state (parameters, optimizer, step) and a JSON item with the data
position, the FLOPs so far, the evaluations and the config. Random keys are functions of the step.
"""

from __future__ import annotations

import pathlib
import shutil
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from opd_jax.types import TrainState


class Checkpoints:
  """The checkpoints in one directory."""

  def __init__(self, path: pathlib.Path, *, keep_latest: int, keep_best: int, best_metric: str):
    self._path, self._best_metric = path.resolve(), best_metric
    policies = [managers.LatestN(keep_latest)]
    if keep_best:
      policies.append(managers.BestN(
          get_metric_fn=lambda metrics: metrics[best_metric], n=keep_best,
          keep_checkpoints_without_metrics=False))
    self._options = ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(policies),
        # What a killed process left half-written is swept away at the next start.
        cleanup_tmp_directories=True, create=True)
    self._open()

  def _open(self):
    self._manager = ocp.CheckpointManager(
        self._path, options=self._options,
        item_handlers={'state': ocp.StandardCheckpointHandler(),
                       'host': ocp.JsonCheckpointHandler()})

  def steps(self) -> list[int]:
    """The steps that have a finished checkpoint."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, step: int, host: dict[str, Any],
           metrics: dict[str, float] | None) -> None:
    """Copies the state to the host, then writes in the background. Saving a step twice is a no-op.

    Args:
      state: the train state.
      step: its step, as a Python int.
      host: JSON content.
      metrics: of an evaluation at this step, or None; those with the best metric are kept longer.
    """
    if step in self._manager.all_steps():
      return
    self._manager.save(step, metrics=metrics, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)))

  def wait(self) -> None:
    """Blocks until everything is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and ends the background threads."""
    self._manager.wait_until_finished()
    self._manager.close()

  def restore_latest(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint that can be read, or None if there is none at all.

    One that cannot be read is moved to `damaged/` beside the checkpoints, and said so on stderr;
    then the one before is tried.

    Args:
      abstract: the state's shapes, dtypes and shardings.

    Raises:
      RuntimeError: there are checkpoints, and all of them are damaged.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        restored = self._manager.restore(step, args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore()))
        return jax.block_until_ready(restored['state']), restored['host']
      except Exception as e:  # tensorstore, orbax and JSON each raise their own
        self._set_aside(step, e)
    if steps:
      raise RuntimeError(f'no checkpoint in {self._path} can be read; all of {steps} were moved '
                         f"to {self._path.parent / 'damaged'}. Remove the work directory to start "
                         'anew')
    return None

  def _set_aside(self, step: int, error: Exception) -> None:
    self._manager.close()
    target = self._path.parent / 'damaged' / str(step)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    shutil.move(self._path / str(step), target)
    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ''
    print(f'WARNING: the checkpoint of step {step} is damaged ({type(error).__name__}: {first}); '
          f'moved to {target}, falling back to the one before', file=sys.stderr, flush=True)
    self._open()
