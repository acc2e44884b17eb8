"""`opd export`: a checkpoint of a run, finished or not, as a directory that others open.

'full' is a Hugging Face directory (adapters merged into the weights) for transformers or vLLM,
'adapter' a PEFT directory for the model that the run started from.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from typing import Any

import jax

from opd_jax import build, load
from opd_jax import config as config_lib
from opd_jax.doctor import rollouts
from opd_jax.errors import ConfigError
from opd_jax.files import checkpoint, huggingface, peft
from opd_jax.files import workdir as workdir_lib
from opd_jax.models import lora
from opd_jax.parallel import hosts, sharding
from opd_jax.parallel import state as state_lib
from opd_jax.run import meshes
from opd_jax.settings import Checkpoint, Run

FORMATS = ('full', 'adapter')
DTYPES = ('', *rollouts.DTYPES)


def export(workdir: pathlib.Path, output: pathlib.Path, form: str, step: int, dtype: str = '',
           changed_inputs: str = '') -> int:
  """Writes the parameters of a checkpoint to `output`, which appears whole or not at all.

  Args:
    workdir: of one run (of a pipeline: that of a stage, WORKDIR/seed_S/STAGE).
    output: a directory that does not exist.
    form: one of FORMATS.
    step: of the checkpoint; -1 is the newest.
    dtype: of the weights, one of DTYPES; '' is float32, in which the export is the model that was
      evaluated. Adapters are merged in float32 and rounded once; what is merged or rounded is
      compared with that model, and the KL printed (`rollouts.measure_export`).
    changed_inputs: why the base (and the teacher, where the run takes stop tokens or a template
      from it) may be others than those that the run read; '' refuses them.

  Returns:
    The step of the checkpoint.

  Raises:
    ConfigError: a directory without a run, a step without a checkpoint, a format that the run has
      not, an output that exists, other inputs than the run's.
  """
  if form not in FORMATS:
    raise ConfigError(f'format={form!r}; allowed: {list(FORMATS)}')
  if dtype not in DTYPES or (dtype and form == 'adapter'):
    raise ConfigError(f'dtype={dtype!r} with format={form!r}; allowed: {list(DTYPES)}, '
                                 "and '' for an adapter")
  if os.path.lexists(output):
    raise ConfigError(f'output={str(output)!r} exists; allowed: a new directory')
  run = read_config(workdir)
  run = dataclasses.replace(run, doctor=dataclasses.replace(
      run.doctor, changed_inputs=changed_inputs))
  if form == 'adapter' and not run.has_adapter:
    raise ConfigError(f"format='adapter': the run in workdir={str(workdir)!r} trained the whole "
                      "model; allowed: 'full'")
  borrows = run.prompt.template == 'teacher' or run.sample.stop != 'student'
  read = load.model_inputs(run, ('student', 'teacher') if borrows else ('student',))
  hosts.require_same(read)
  workdir_lib.check_inputs(workdir, read, changed_inputs)
  try:
    student = load.open_student(run)
    adapter = load.make_adapter(run, student)
    teacher = load.open_teacher(run, student) if borrows else None
    tokenizer, mesh = build.final_tokenizer(run.prompt.template, student, teacher), _mesh(run)
    specs = adapter.specs if adapter else student.model.specs
    shape = state_lib.abstract(specs, build.make_optimizer(run), mesh)
    step, state = _restore(run.checkpoint, workdir, step, shape)
    origin = _origin(workdir, read, step, state)
    if form == 'adapter':
      peft.write_adapter(output, student.model, state.params, adapter.settings, tokenizer,
                         run.student.path, origin, run.student.revision)
    else:
      stops, dtype = build.choose_stop_tokens(run.sample.stop, student, teacher), dtype or 'float32'
      params = lora.join(load.read_base(student, adapter, run.frozen_dtype, mesh), state.params)
      if adapter or dtype != 'float32':
        _measure(run, student, teacher, stops, mesh, params, dtype)
      huggingface.write_checkpoint(output, student.model, params, tokenizer, stop_tokens=stops,
                                   dtype=dtype, sampling=student.sampling, origin=origin)
  except (ValueError, OSError) as e:
    raise ConfigError(str(e)) from e
  return step


def _origin(workdir, read, step, state):
  """As the run itself says it, but for what was `read` now."""
  settings = workdir_lib.read_config(workdir)
  return workdir_lib.origin(settings, workdir_lib.read_inputs(workdir) | read, step,
                            hosts.fetch(checkpoint.checksums(state)).tolist())


def _measure(run, student, teacher, stop_tokens, mesh, params, dtype):
  """Prints how far the export is from the model that was evaluated; or why nobody knows, on a
  machine without the run's data, where there is still a model to export."""
  try:
    style = build.prompt_style(run, student.tokenizer, teacher and teacher.tokenizer, stop_tokens)
    examples = build.load_examples(run, run.data.split, run.data.limit, student.tokenizer, style)
  except (ValueError, OSError) as e:
    print(f'WARNING: the KL to the student that was evaluated is not measured: {e}',
          file=sys.stderr)
    return
  kl = rollouts.measure_export(run, student, stop_tokens, examples, mesh, params)
  print(rollouts.describe_export(run.name, dtype, kl))


def _mesh(run: Run) -> jax.sharding.Mesh:
  """The run's mesh, or one for whatever devices there are on another machine."""
  try:
    return meshes.make_mesh(run.compute, [])
  except ValueError:
    return sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1, expert=1))


def _restore(settings: Checkpoint, workdir: pathlib.Path, step: int, shape: Any
             ) -> tuple[int, Any]:
  """The step and the state of one checkpoint.

  Raises:
    ValueError: there is none of that step, or it cannot be read.
  """
  folder, steps = workdir / workdir_lib.CHECKPOINTS, []
  if folder.is_dir():
    store = checkpoint.of_run(settings, workdir, read_only=True)
    steps = store.steps()
  if not steps or step not in (-1, *steps):
    raise ValueError(f'step={step}: workdir={str(workdir)!r} has no such checkpoint; allowed: -1 '
                     f'for the newest, or one of {steps}')
  step = steps[-1] if step == -1 else step
  try:
    return step, store.restore(step, shape)[0]
  except Exception as e:  # tensorstore, orbax and JSON each raise their own
    raise ValueError(f'step={step}: that checkpoint in workdir={str(workdir)!r} cannot be read '
                     f'({" ".join(str(e).split())[:300]}); allowed: another of '
                     f'{[other for other in steps if other != step]}') from e
  finally:
    store.close()


def read_config(workdir: pathlib.Path) -> Run:
  """Reads the settings of the run that a work directory belongs to.

  Raises:
    ConfigError: there are none, or they are those of an older version of this program.
  """
  values = workdir_lib.read_config(workdir)
  try:
    return config_lib.parse(config_lib.from_dict(values))
  except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as e:
    raise ConfigError(
        f'workdir={str(workdir)!r} holds no run of this version ({workdir_lib.CONFIG}: {e}); '
        'allowed: the work directory of one run, in a pipeline WORKDIR/seed_S/STAGE') from e
