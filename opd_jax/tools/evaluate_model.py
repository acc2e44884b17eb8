"""`opd evaluate`: a model in a directory on a run's held-out problems, as the run would."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opd_jax import build, load, tasks
from opd_jax import config as config_lib
from opd_jax.data import prompts as prompts_lib
from opd_jax.errors import ConfigError
from opd_jax.files import digest, huggingface
from opd_jax.files.huggingface import LoadedModel
from opd_jax.models import flax_module
from opd_jax.parallel import hosts
from opd_jax.run import evaluator as evaluator_lib
from opd_jax.run import meshes, metrics
from opd_jax.settings import Run


def evaluate_model(c: ConfigDict, path: str, teacher_path: str) -> dict[str, Any]:
  """Evaluates a Hugging Face directory on a run's held-out problems, as the run would.

  Args:
    c: a run's config; its task, room, sampling and evaluation settings and its seed are used. (In a
      pipeline, stages run with the pipeline's seeds, and this evaluates with seed 0.)
    path: the model.
    teacher_path: another directory to measure the reverse KL to, or ''.

  Raises:
    ConfigError: a path that is no checkpoint directory, or a teacher with other tokens.
  """
  for name, value in (('model', path), ('teacher', teacher_path)):
    if value and not pathlib.Path(value).is_dir():
      raise ConfigError(f'{name}={value!r}; allowed: a Hugging Face directory')
  run = config_lib.parse(c)
  if hosts.count() > 1:
    given = {'model': path, 'teacher': teacher_path}
    hosts.require_same(load.data_inputs(run) | {
        name: digest.of_model(folder) for name, folder in given.items() if folder})
  try:
    student = open_directory(run, 'student', path)
    teacher = open_directory(run, 'teacher', teacher_path) if teacher_path else None
    if teacher and not prompts_lib.same_vocabulary(student.tokenizer, teacher.tokenizer):
      raise ValueError(
          f'teacher={teacher_path!r} has {len(teacher.tokenizer)} tokens, not those of model='
          f'{path!r} ({len(student.tokenizer)}); allowed: a teacher that maps the same strings to '
          'the same token ids')
    stop_tokens = build.choose_stop_tokens(run.sample.stop, student, teacher)
    # What such a run exported has the template it was trained in.
    style = build.prompt_style(run, student.tokenizer, (teacher or student).tokenizer, stop_tokens)
    held_out = build.load_examples(run, 'eval', run.eval.problems, student.tokenizer, style)
    mesh = meshes.make_mesh(run.compute, [student.model])
  except (ValueError, FileNotFoundError) as e:
    raise ConfigError(str(e)) from e
  evaluator = evaluator_lib.make_evaluator(
      run, student, teacher and teacher.model, task=tasks.get(run.task.name), examples=held_out,
      stop_tokens=stop_tokens, mesh=mesh,
      key=load.fold_in(jax.random.key(run.seed), load.EVAL, 0))
  weights = [m and load.read(field, m, m.model.specs, jnp.float32, mesh)
             for field, m in (('model', student), ('teacher', teacher))]
  display = metrics.Display(path, 0, 1)
  with jax.set_mesh(mesh):
    values, shown = evaluator(*weights, run.log.transcripts)
  display.transcripts('transcripts:', shown)
  display.close()
  print(json.dumps(values, indent=2))
  return values


def open_directory(run: Run, part: str, path: str) -> LoadedModel:
  """Opens a directory in place of a run's student or teacher; `run` says how to make it if it is a
  Flax module."""
  if getattr(run, part).factory and (
      huggingface.read_config(path).get('model_type') == flax_module.FAMILY):
    return load.open_flax(run, part, path)
  return huggingface.load(path, load.compute_options(run.compute))
