"""What a run is made of, without weights, tokenizers and data: enough to lower its programs."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import types
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from opd_jax import build, load, models, teachers
from opd_jax import config as config_lib
from opd_jax.build import Parts
from opd_jax.data import streams as streams_lib
from opd_jax.errors import ConfigError, refuse
from opd_jax.files import hub, huggingface
from opd_jax.files.huggingface import LoadedModel
from opd_jax.parallel import sharding
from opd_jax.run import meshes
from opd_jax.settings import Run
from opd_jax.types import Prompts

CONFIG = 'config.json'
INITIAL = 'initial_student'


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Stands for examples, of which only the number and the room are known."""

  rows: list[dict[str, Any]]
  room: int
  report: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.rows)

  def prompts(self, indices: np.ndarray) -> Prompts:
    """Makes prompts of no particular tokens."""
    shape = len(indices), self.room
    return Prompts(tokens=np.zeros(shape, np.int32), valid=np.ones(shape, bool))

  def text(self, index: int) -> str:
    """Renders nothing."""
    return ''


def parse(c: ConfigDict, folder: str) -> Run:
  """Reads a run's config with directories that have a config.json in the place of its models.

  Args:
    c: of a run.
    folder: holds ORGANIZATION/NAME/config.json or NAME/config.json; '' where the hub is asked.

  Raises:
    ConfigError: a model is nowhere.
  """
  return config_lib.parse(config_lib.place_models(
      c, lambda field, path, revision: find(field, path, revision, folder)))


def find(field: str, path: str, revision: str, folder: str) -> str:
  """Finds the directory with the config.json of a model.

  Raises:
    ConfigError: there is none; names the field.
  """
  if pathlib.Path(path).is_dir():
    return path
  names = (path, path.rpartition('/')[2]) if folder else ()
  for place in (pathlib.Path(folder, name) for name in names):
    if (place / CONFIG).is_file():
      return str(place)
  allowed = (f"a directory, or what `--models DIR` has as {path}/{CONFIG} or "
             f"{path.rpartition('/')[2]}/{CONFIG}, or a name that the hub knows")
  if folder or not re.fullmatch(hub.NAMES['model'], path):
    raise ConfigError(f'{field}={path!r} is not here; allowed: {allowed}')
  import huggingface_hub  # takes a while to import: only where it is used
  try:
    return str(pathlib.Path(huggingface_hub.hf_hub_download(
        path, CONFIG, revision=revision or None)).parent)
  except (OSError, ValueError) as e:  # what the hub raises are kinds of these
    raise ConfigError(f'{field}={path!r}: its {CONFIG} cannot be fetched '
                      f'({" ".join(str(e).split())[:200]}); allowed: {allowed}') from e


def open_parts(run: Run, devices: list[Any]) -> Parts:
  """Opens models as shapes, on a mesh of some devices.

  Raises:
    ConfigError: what the run's start would refuse too: sizes that do not fit each other or the
      mesh; or models that are more than a config.json.
  """
  try:
    student = _model(run, 'student')
    teacher, reference = (_grader(run, part, student) for part in ('teacher', 'reference'))
    adapter = load.make_adapter(run, student)
    mesh, apart = meshes.make_meshes(run.compute, student, teacher, devices)
    streams = streams_lib.make(run, sharding.row_shards(mesh))
    build.check_models(run, streams, mesh, adapter, [m for m in (student, teacher, reference) if m],
                       teacher if apart else None)
    if apart:
      meshes.check_apart(run, streams, apart, teacher)
  except ConfigError:
    raise
  except (ValueError, FileNotFoundError) as e:
    raise ConfigError(str(e)) from e
  return Parts(
      student=student, adapter=adapter, teacher=teacher, reference=reference,
      frozen_dtype=jnp.dtype(run.frozen_dtype),
      task=types.SimpleNamespace(grade=lambda row, text: 0.0), streams=streams,
      examples={}, mesh=mesh, apart=apart, itemsize=jnp.dtype(run.compute.dtype).itemsize,
      chunk_tokens=run.compute.chunk_tokens * sharding.row_shards(mesh),
      optimizer=build.make_optimizer(run), style=None,
      held_out=Shapes([{}] * (run.eval.problems or sharding.row_shards(mesh)),
                      run.data.max_prompt_tokens),
      stop_tokens=student.stop_tokens, pad_token=0)


def _model(run: Run, part: str) -> LoadedModel:
  group = getattr(run, part)
  if getattr(group, 'factory', ''):
    refuse(run, f'{part}.factory', f'a plan reads no more of a model than its {CONFIG}', "''")
  if not group.path:
    return load.open_student(run)
  with load.naming(f'{part}.path={group.path!r}', f'a directory with a {CONFIG}'):
    model = models.build(huggingface.read_config(group.path), **load.compute_options(run.compute))
  nothing = types.SimpleNamespace(pad_token_id=0, eos_token_id=0)
  return LoadedModel(model, nothing, (model.config.vocab_size - 1,), read=None)


def _grader(run: Run, part: str, student: LoadedModel) -> LoadedModel | None:
  group = getattr(run, part)
  if group.kind == teachers.NONE:
    return None
  if group.kind == INITIAL:
    return student
  if not group.path:
    refuse(run, f'{part}.kind {part}.path', f'a plan reads the {CONFIG} of a model', 'its path')
  return _model(run, part)
