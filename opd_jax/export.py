"""`opd export`: a checkpoint of a run, finished or not, as a directory that others open.

'full' is a Hugging Face directory (adapters merged into the weights) for transformers or vLLM,
'adapter' a PEFT directory for the model that the run started from.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax

from opd_jax import build, checkpoint, checks, hf, lora, peft, sharding, train
from opd_jax import config as config_lib

FORMATS = ('full', 'adapter')
DTYPES = ('', 'float32', 'bfloat16')


def export(workdir: pathlib.Path, output: pathlib.Path, form: str, step: int, dtype: str = ''
           ) -> int:
  """Writes the parameters of a checkpoint to `output`, which appears whole or not at all.

  Args:
    workdir: of one run (of a pipeline: that of a stage, WORKDIR/seed_S/STAGE).
    output: a directory that does not exist.
    form: one of FORMATS.
    step: of the checkpoint; -1 is the newest.
    dtype: of the weights, one of DTYPES; '' leaves them as they are kept, float32 for a model that
      was trained whole.

  Returns:
    The step of the checkpoint.

  Raises:
    ConfigError: a directory without a run, a step without a checkpoint, a format that the run has
      not, an output that exists.
  """
  if form not in FORMATS:
    raise config_lib.ConfigError(f'format={form!r}; allowed: {list(FORMATS)}')
  if dtype not in DTYPES or (dtype and form == 'adapter'):
    raise config_lib.ConfigError(f'dtype={dtype!r} with format={form!r}; allowed: {list(DTYPES)}, '
                                 "and '' for an adapter")
  if output.exists():
    raise config_lib.ConfigError(f'output={str(output)!r} exists; allowed: a new directory')
  c = read_config(workdir)
  if form == 'adapter' and not config_lib.has_adapter(c):
    raise config_lib.ConfigError("format='adapter': the run in workdir="
                                 f"{str(workdir)!r} trained the whole model; allowed: 'full'")
  try:
    student = build.load_student(c)
    adapter = build.make_adapter(c, student)
    borrows = c.prompt.template == 'teacher' or c.sample.stop != 'student'
    teacher = build.get_teacher(c, student) if borrows else None
    tokenizer = build.final_tokenizer(c, student, teacher)
    mesh = _mesh(c)
    specs = adapter.specs if adapter else student.model.specs
    shape = train.abstract_state(specs, build.make_optimizer(c), mesh)
    step, state = _restore(c, workdir, step, shape)
    if form == 'adapter':
      peft.write_adapter(output, student.model, state.params, adapter.settings, tokenizer,
                         c.student.path)
    else:
      weights = sharding.param_shardings(student.model.specs, mesh)
      frozen = adapter and lora.Frozen(build.read('student.path', student, build.frozen_dtype(c),
                                                  weights),
                                       adapter.settings.scale)
      hf.write_checkpoint(output, student.model, lora.join(frozen, state.params), tokenizer,
                          stop_tokens=build.choose_stop_tokens(c, student, teacher),
                          dtype=dtype or None)
  except (ValueError, OSError) as e:
    raise config_lib.ConfigError(str(e)) from e
  return step


def _mesh(c: config_lib.ConfigDict) -> jax.sharding.Mesh:
  """The run's mesh, or one for whatever devices there are on another machine."""
  try:
    return sharding.make_mesh(c.compute.mesh.to_dict())
  except ValueError:
    return sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1, expert=1))


def _restore(c: config_lib.ConfigDict, workdir: pathlib.Path, step: int, shape: Any
             ) -> tuple[int, Any]:
  """The step and the state of one checkpoint.

  Raises:
    ValueError: there is none of that step, or it cannot be read.
  """
  folder, steps = workdir / 'checkpoints', []
  if folder.is_dir():
    store = checkpoint.Checkpoints(
        folder, keep_latest=c.checkpoint.keep_latest, keep_best=c.checkpoint.keep_best,
        best_metric=c.checkpoint.best_metric, read_only=True)
    steps = store.steps()
  if not steps or step not in (-1, *steps):
    raise ValueError(f'step={step}: workdir={str(workdir)!r} has no such checkpoint; allowed: -1 '
                     f'for the newest, or one of {steps}')
  step = steps[-1] if step == -1 else step
  try:
    return step, store.restore(step, shape)[0]
  except Exception as e:  # tensorstore, orbax and JSON each raise their own
    raise ValueError(f'step={step}: that checkpoint in workdir={str(workdir)!r} cannot be read '
                     f'({" ".join(str(e).split())[:300]}); allowed: another of {steps}') from e
  finally:
    store.close()


def read_config(workdir: pathlib.Path) -> config_lib.ConfigDict:
  """The config that a run's work directory belongs to.

  Raises:
    ConfigError: there is none, or it is that of an older version of this program.
  """
  file = workdir / build.CONFIG
  try:
    c = config_lib.from_dict(json.loads(file.read_text()))
  except (OSError, ValueError) as e:
    raise config_lib.ConfigError(
        f'workdir={str(workdir)!r} holds no run ({e}); allowed: the work directory of one run, in '
        'a pipeline WORKDIR/seed_S/STAGE') from e
  checks.validate(c)
  return c
