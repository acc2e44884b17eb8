"""Opening the models of a run, and reading their weights.

Opening checks all that can be checked without reading a weight; reading comes when everything else
is known to be right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import models, teachers
from opd_jax.data import prompts as prompts_lib
from opd_jax.errors import ConfigError
from opd_jax.files import factory, huggingface, peft
from opd_jax.files.huggingface import LoadedModel
from opd_jax.models import flax_module, lora
from opd_jax.models import params as params_lib
from opd_jax.parallel import sharding
from opd_jax.settings import Run
from opd_jax.types import Params

INIT, SAMPLE, EVAL, BESIDE, GATE = range(5)  # what a random key is for
DIRECTORY = 'a Hugging Face checkpoint directory'


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The low-rank adapters that are trained, before training.

  Attributes:
    settings: rank, alpha and targets.
    specs: the table of what is trained (`lora.adapter_specs`).
    read: (dtype, shardings) -> fresh adapters, or those of a PEFT directory.
  """

  settings: lora.Settings
  specs: dict[str, Any]
  read: Callable[..., Params]


def fold_in(key: jax.Array, purpose: int, step: int) -> jax.Array:
  """Makes the key for one purpose at one step; no key is ever stored."""
  return jax.random.fold_in(jax.random.fold_in(key, purpose), step)


@contextlib.contextmanager
def naming(where: str, allowed: str = '') -> Iterator[None]:
  """Puts 'field=value: ' before what is refused within, and what is allowed after it, unless the
  text begins with a field of the same part, or says what is allowed.

  Raises:
    ConfigError: for a ValueError or a missing file.
  """
  try:
    yield
  except (ValueError, FileNotFoundError) as e:
    part = where.partition('.')[0]
    text = str(e) if re.match(rf'{part}\.[\w.]+=', str(e)) else f'{where}: {e}'
    raise ConfigError(text if not allowed or 'allowed: ' in text else
                      f'{text}; allowed: {allowed}') from e


def compute_options(run: Run) -> dict[str, Any]:
  """Picks the `models.build` options of a run."""
  return dict(dtype=jnp.dtype(run.compute.dtype), remat=run.compute.remat,
              layer_unroll=run.compute.layer_unroll)


def open_student(run: Run) -> LoadedModel:
  """Opens the student before training: a checkpoint, or fresh parameters from the seed.

  Raises:
    ConfigError: it cannot be opened.
  """
  if run.student.factory:
    return open_flax(run, 'student')
  if run.student.path:
    with naming(f'student.path={run.student.path!r}', DIRECTORY):
      return huggingface.load(run.student.path, compute_options(run), run.student.revision)
  characters = prompts_lib.character_tokenizer()
  model = models.build({**run.student.fresh, 'vocab_size': len(characters)},
                       **compute_options(run))
  return LoadedModel(model, characters, (characters.eos_token_id,),
                     _fresh_reader(run, model.specs))


def make_adapter(run: Run, student: LoadedModel) -> Adapter | None:
  """Makes the adapters to train, fresh from the seed or from a PEFT directory; None without any.

  Raises:
    ConfigError: settings or a directory that do not fit the student.
  """
  group = run.student.lora
  if not run.has_adapter:
    return None
  if group.path:
    with naming(f'student.lora.path={group.path!r}'):
      settings, read = peft.read_adapter(group.path, student.model, run.student.path)
    return Adapter(settings, lora.adapter_specs(student.model.specs, settings), read)
  settings = lora.Settings(rank=group.rank, alpha=group.alpha, targets=group.targets)
  try:
    specs = lora.adapter_specs(student.model.specs, settings)
  except ValueError as e:  # which begins with 'lora.'
    raise ConfigError(f'student.{e}') from e
  return Adapter(settings, specs, _fresh_reader(run, specs))


def _fresh_reader(run: Run, specs: dict[str, Any]) -> Callable[..., Params]:
  """(dtype, shardings) -> fresh parameters from the run's seed, in the form of a `read`."""
  def read(dtype: Any = jnp.float32, shardings: Any = None) -> Params:
    fresh = params_lib.init_params(specs, fold_in(jax.random.key(run.seed), INIT, 0), dtype)
    return jax.device_get(fresh) if shardings is None else sharding.put(fresh, shardings)

  return read


def open_flax(run: Run, part: str, path: str | None = None) -> LoadedModel:
  """Opens the 'student' or 'teacher' that the code named by its `factory` makes.

  Args:
    run: the settings.
    part: which of the two.
    path: a directory in place of the part's own.

  Raises:
    ConfigError: names the fields; so does `read`, for parameters that do not do.
  """
  group = getattr(run, part)
  revision = group.revision if path is None else ''
  path = group.path if path is None else path
  where = f'{part}.factory={group.factory!r}, {part}.path={path!r}'
  with naming(where):
    directory = str(huggingface.fetch(path, revision)) if path else ''
    loaded = factory.load(group.factory, directory, jnp.dtype(run.compute.dtype),
                          fold_in(jax.random.key(run.seed), INIT, 0))

  def read(dtype=jnp.float32, shardings=None):
    with naming(where):
      params = loaded.read(dtype, shardings)
      if part == 'student':
        flax_module.check_gradient(loaded.model, params)
      return params

  return dataclasses.replace(loaded, read=read)


def open_teacher(run: Run, student: LoadedModel) -> LoadedModel | None:
  """Opens the teacher, if there is one. Whether it fits the student is for the doctor to say.

  Raises:
    ConfigError: it cannot be opened.
  """
  t = run.teacher
  if t.kind == teachers.NONE:
    return None
  if t.factory:
    return open_flax(run, 'teacher')
  with naming(f'teacher.path={t.path!r}', DIRECTORY):
    return teachers.load(t.kind, t.path, student, compute_options(run), t.revision)


def open_reference(run: Run, student: LoadedModel) -> LoadedModel | None:
  """Opens the reference model, if there is one: any kind of teacher, of the student's vocabulary.

  Raises:
    ConfigError: it cannot be opened, or has other tokens.
  """
  if run.reference.kind == teachers.NONE:
    return None
  where = f'reference.path={run.reference.path!r}'
  with naming(where, DIRECTORY):
    loaded = teachers.load(run.reference.kind, run.reference.path, student, compute_options(run),
                           run.reference.revision)
  if not prompts_lib.same_vocabulary(student.tokenizer, loaded.tokenizer):
    raise ConfigError(f'{where} has {len(loaded.tokenizer)} tokens, not those of the student '
                      f'({len(student.tokenizer)}); allowed: a model that maps the same strings to '
                      'the same token ids')
  return loaded


def read(field: str, source: LoadedModel | Adapter, specs: dict[str, Any], dtype: Any,
         mesh: jax.sharding.Mesh) -> Params:
  """Reads weights, laid out by the table of their specs, to their devices.

  Raises:
    ConfigError: names the config field: NaN or infinity, or a copy of a tied head that differs.
  """
  shardings = sharding.param_shardings(specs, mesh)
  with naming(field):
    return source.read(dtype, shardings)


def read_base(student: LoadedModel, adapter: Adapter | None, dtype: Any, mesh: jax.sharding.Mesh
              ) -> lora.Frozen | None:
  """Reads the base under the adapters to its devices; None where the whole student is trained."""
  if adapter is None:
    return None
  return lora.Frozen(read('student.path', student, student.model.specs, jnp.dtype(dtype), mesh),
                     adapter.settings.scale)
