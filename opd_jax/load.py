"""Opening the models of a run, and reading their weights.

Opening checks all that can be checked without reading a weight; reading comes when everything else
is known to be right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import models, tasks, teachers
from opd_jax.data import prompts as prompts_lib
from opd_jax.errors import ConfigError
from opd_jax.files import digest, factory, huggingface, peft
from opd_jax.files import workdir as workdir_lib
from opd_jax.files.digest import Digests
from opd_jax.files.huggingface import LoadedModel
from opd_jax.models import flax_module, lora
from opd_jax.models import params as params_lib
from opd_jax.parallel import hosts, sharding
from opd_jax.settings import Compute, Lora, Run
from opd_jax.types import Params

INIT, SAMPLE, EVAL, BESIDE, GATE, ANSWERS = range(6)  # what a random key is for
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
    ConfigError: for a ValueError or a file that cannot be read.
  """
  try:
    yield
  except (ValueError, OSError) as e:
    part = where.partition('.')[0]
    text = str(e) if re.match(rf'{part}\.[\w.]+=', str(e)) else f'{where}: {e}'
    raise ConfigError(text if not allowed or 'allowed: ' in text else
                      f'{text}; allowed: {allowed}') from e


def compute_options(compute: Compute) -> dict[str, Any]:
  """Picks the `models.build` options of a run."""
  return dict(dtype=jnp.dtype(compute.dtype), attention=compute.attention, remat=compute.remat,
              layer_unroll=compute.layer_unroll)


def inputs(run: Run) -> dict[str, Digests]:
  """Computes the digests of everything that a run reads, by the field that names it.

  Raises:
    ConfigError: it cannot be read; names the field.
  """
  return model_inputs(run, ('student', 'teacher', 'reference')) | data_inputs(run)


def data_inputs(run: Run) -> dict[str, Digests]:
  """Computes the digests of the data that a run reads.

  Raises:
    ConfigError: see `inputs`.
  """
  out = {}
  for name, path in tasks.sources(run.task.options).items():
    with naming(f'task.options.{name}={str(path)!r}', 'what this process can read'):
      out[f'task.options.{name}'] = digest.of_data(path)
  return out


def model_inputs(run: Run, parts: Iterable[str]) -> dict[str, Digests]:
  """Computes the digests of some models of a run, of 'student', 'teacher' and 'reference'; those of
  the adapter that it starts from are the student's.

  Raises:
    ConfigError: see `inputs`.
  """
  out = {}
  for part in parts:
    group = getattr(run, part)
    if group.path:
      with naming(f'{part}.path={group.path!r}', DIRECTORY):
        out[f'{part}.path'] = digest.of_model(huggingface.fetch(group.path, group.revision))
  if run.student.lora.path and 'student' in parts:
    with naming(f'student.lora.path={run.student.lora.path!r}', 'a PEFT directory'):
      out['student.lora.path'] = digest.of_model(run.student.lora.path)
  return out


def _check_base(run: Run) -> None:
  """Refuses an adapter that a run of this program trained on another base than the student's."""
  made_on = workdir_lib.read_origin(pathlib.Path(run.student.lora.path)).get('inputs', {})
  base = made_on.get('student.path')
  if base is None or run.doctor.changed_inputs:
    return

  def weights(files):  # the same base may come with another tokenizer
    return {'its base': {n: d for n, d in files.items() if n.endswith('.safetensors')}}

  here = model_inputs(dataclasses.replace(run, student=dataclasses.replace(
      run.student, lora=Lora())), ('student',)).get('student.path', {})
  if changes := digest.changes(weights(base), weights(here)):
    raise ConfigError(
        f'student.path={run.student.path!r}, student.lora.path={run.student.lora.path!r}: the '
        f'adapter was trained on another base ({"; ".join(changes[:4])}); allowed: that one, or '
        "doctor.changed_inputs='REASON'")


def open_student(run: Run) -> LoadedModel:
  """Opens the student before training: a checkpoint, or fresh parameters from the seed.

  Raises:
    ConfigError: it cannot be opened.
  """
  if run.student.factory:
    return open_flax(run, 'student')
  if run.student.path:
    with naming(f'student.path={run.student.path!r}', DIRECTORY):
      return huggingface.load(run.student.path, compute_options(run.compute), run.student.revision)
  characters = prompts_lib.character_tokenizer()
  model = models.build({**run.student.fresh, 'vocab_size': len(characters)},
                       **compute_options(run.compute))
  return LoadedModel(model, characters, (characters.eos_token_id,),
                     _fresh_reader(run.seed, model.specs))


def make_adapter(run: Run, student: LoadedModel) -> Adapter | None:
  """Makes the adapters to train, fresh from the seed or from a PEFT directory; None without any.

  Raises:
    ConfigError: settings or a directory that do not fit the student.
  """
  group = run.student.lora
  if not run.has_adapter:
    return None
  if group.path:
    _check_base(run)
    with naming(f'student.lora.path={group.path!r}', 'a PEFT directory for this student'):
      settings, read = peft.read_adapter(group.path, student.model, run.student.path)
    return Adapter(settings, lora.adapter_specs(student.model.specs, settings), read)
  settings = lora.Settings(rank=group.rank, alpha=group.alpha, targets=group.targets)
  try:
    specs = lora.adapter_specs(student.model.specs, settings)
  except ValueError as e:  # which begins with 'lora.'
    raise ConfigError(f'student.{e}') from e
  return Adapter(settings, specs, _fresh_reader(run.seed, specs))


def _fresh_reader(seed: int, specs: dict[str, Any]) -> Callable[..., Params]:
  """(dtype, shardings) -> fresh parameters from a run's seed, in the form of a `read`."""
  def read(dtype: Any = jnp.float32, shardings: Any = None) -> Params:
    fresh = params_lib.init_params(specs, fold_in(jax.random.key(seed), INIT, 0), dtype)
    return hosts.fetch(fresh) if shardings is None else sharding.put(fresh, shardings)

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
    return teachers.load(t.kind, t.path, student, compute_options(run.compute), t.revision)


def open_reference(run: Run, student: LoadedModel) -> LoadedModel | None:
  """Opens the reference model, if there is one: any kind of teacher, of the student's vocabulary.

  Raises:
    ConfigError: it cannot be opened, or has other tokens.
  """
  if run.reference.kind == teachers.NONE:
    return None
  where = f'reference.path={run.reference.path!r}'
  with naming(where, DIRECTORY):
    loaded = teachers.load(run.reference.kind, run.reference.path, student,
                           compute_options(run.compute), run.reference.revision)
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


def require_same_inputs(run: Run) -> None:
  """Refuses several processes that would read other models or other data.

  Raises:
    ConfigError: names the files and the processes.
  """
  if hosts.count() > 1:
    hosts.require_same(inputs(run))


def check_directory(run: Run, settings: dict[str, Any], workdir: pathlib.Path
                    ) -> dict[str, Digests]:
  """Checks that a work directory is for this config, and for the inputs as they are, on all hosts;
  returns what they contain, whatever they are called."""
  workdir_lib.check(workdir, settings)
  found = inputs(run)
  hosts.require_same(found)
  workdir_lib.check_inputs(workdir, found, run.doctor.changed_inputs)
  return found
