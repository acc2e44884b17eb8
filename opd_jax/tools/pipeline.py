"""Experiments of several runs: named stages, once for every seed, then the report.

Each stage is an ordinary run with a config and a work directory of its own
(`WORKDIR/seed_S/STAGE`), so it resumes by itself, and one that has finished is not run again.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from ml_collections import ConfigDict

from opd_jax import build, experiment, train
from opd_jax import config as config_lib
from opd_jax.data import prompts as prompts_lib
from opd_jax.doctor import examine as doctor
from opd_jax.errors import ConfigError
from opd_jax.experiment import Pipeline, stage_config, stage_dir, stage_run
from opd_jax.files import huggingface
from opd_jax.files import workdir as workdir_lib
from opd_jax.parallel import hosts
from opd_jax.rules.run import STAGE
from opd_jax.run import metrics
from opd_jax.settings import Student, Teacher
from opd_jax.tools import compare_estimators, report, times


def run(c: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Runs every stage for every seed, then writes the report.

  Raises:
    ConfigError: before the first stage starts, whichever stage is wrong.
  """
  workdir = pathlib.Path(workdir).resolve()  # stages refer to each other by absolute paths
  p = experiment.parse_pipeline(config_lib.pin(c, workdir))
  check_data(p)
  done = {}
  for seed in p.seeds:
    for name in p.order:
      stage, folder = stage_config(p, name, seed, workdir), stage_dir(workdir, name, seed)
      workdir_lib.check(folder, config_lib.to_dict(stage))
      done[seed, name] = workdir_lib.result(folder, stage_run(p, name, seed)) is not None
  for seed in p.seeds:
    for i, name in enumerate(p.order, 1):
      many = f'seed {seed}, ' if len(p.seeds) > 1 else ''
      before = ' (finished before)' if done[seed, name] else ''
      print(f'== {many}stage {i}/{len(p.order)}: {name}{before}', flush=True)
      train.train(stage_config(p, name, seed, workdir), stage_dir(workdir, name, seed))
  return hosts.decide(lambda: _report(p, workdir))


def examine(c: ConfigDict, only: str | None, workdir: str | pathlib.Path) -> bool:
  """Runs `opd doctor`: the checks of a run, or of each stage of a pipeline (or of one).

  A stage that starts from an earlier stage's model is examined once that model is in `workdir`.

  Returns:
    Whether no check failed.
  """
  console = metrics.make_console()
  if only is not None:
    experiment.pick_stage(c, only)  # there has to be one
  if not experiment.is_pipeline(c):
    return doctor.command(c, console)
  p = experiment.parse_pipeline(c)
  workdir, fine = pathlib.Path(workdir).resolve(), True
  for name in [only] if only else p.order:
    missing = {part: maker for part, maker in experiment.makers(p.runs[name]).items()
               if not (stage_dir(workdir, maker, p.seeds[0]) / workdir_lib.EXPORT).exists()}
    if missing:
      console.print(f'{name}: not examined: its {" and ".join(missing)} will be made by '
                    f'{[STAGE + maker for maker in missing.values()]}')
    else:
      fine &= doctor.command(stage_config(p, name, p.seeds[0], workdir), console)
  return fine


def measure(c: ConfigDict, stage: str | None, workdir: str | pathlib.Path, *, write: bool) -> None:
  """Runs `opd diagnose`: a run, or a stage of a pipeline with the pipeline's first seed.

  Args:
    c: of a run or a pipeline.
    stage: its name; None for a run.
    workdir: where earlier stages are.
    write: whether diagnose.json goes there too, to the stage's own directory.

  Raises:
    ConfigError: see `compare_estimators.command`; no such stage, or one whose models are not made
      yet.
  """
  workdir = pathlib.Path(workdir).resolve()
  experiment.pick_stage(c, stage)
  if experiment.is_pipeline(c):
    p = experiment.parse_pipeline(c)
    c = stage_config(p, stage, p.seeds[0], workdir)
    workdir = stage_dir(workdir, stage, p.seeds[0])
  # A file is read at leisure: there, tables need not be as narrow as a terminal.
  console = metrics.make_console(None if sys.stdout.isatty() else 140)
  compare_estimators.command(c, workdir if write else None, console)


def write_report(c: ConfigDict, workdir: str | pathlib.Path) -> None:
  """Runs `opd report`.

  Raises:
    ConfigError: a single run's config; a stage that has not finished, or that is another config's.
  """
  if not experiment.is_pipeline(c):
    raise ConfigError('--config is of a single run; allowed: that of a pipeline, which is what has '
                      'a report')
  p, workdir = experiment.parse_pipeline(c), pathlib.Path(workdir).resolve()
  _report(p, workdir)


def _report(p: Pipeline, workdir: pathlib.Path) -> dict[str, Any]:
  summary = report.write(p, report.read_results(p, workdir), workdir)
  times.write(p, summary, workdir)
  return summary


def check_data(p: Pipeline) -> None:
  """Encodes every later stage's examples once, so that a prompt that does not fit the last stage is
  found before the first one has run (which looks at its own at once).

  Raises:
    ConfigError: names the stage and the field.
  """
  seen = set()
  for name in p.order[1:]:
    stage = p.runs[name]
    student = teacher = origin(p, stage.student)
    if stage.teacher.path and stage.prompt.template != 'none':
      teacher = origin(p, stage.teacher)
    key = repr([stage.task, stage.prompt, stage.data, stage.eval.problems, student, teacher])
    if key in seen:
      continue
    seen.add(key)
    try:
      (tokens, mine), (teachers_tokens, theirs) = vocabulary(*student), vocabulary(*teacher)
      # Of both: what an earlier stage will make of its own stop tokens is not known yet.
      style = build.prompt_style(stage, tokens, teachers_tokens, tuple({*mine, *theirs}))
      build.load_examples(stage, stage.data.split, stage.data.limit, tokens, style)
      build.load_examples(stage, 'eval', stage.eval.problems, tokens, style)
    except (ValueError, FileNotFoundError) as e:
      raise ConfigError(f'stages.{name}: {e}') from e


def origin(p: Pipeline, model: Student | Teacher) -> tuple[str, str]:
  """Finds (path, revision) of the checkpoint whose tokenizer a student or teacher group ends up
  with; the path is '' where an earlier stage makes a fresh model."""
  while model.path.startswith(STAGE):
    model = p.runs[model.path.removeprefix(STAGE)].student
  return model.path, model.revision


def vocabulary(path: str, revision: str) -> tuple[Any, tuple[int, ...]]:
  """Loads the tokenizer and the stop tokens of a checkpoint; of a fresh model where path is ''."""
  if not path:
    characters = prompts_lib.character_tokenizer()
    return characters, (characters.eos_token_id,)
  path = huggingface.fetch(path, revision)
  tokens = prompts_lib.load(path)
  return tokens, prompts_lib.stop_tokens(path, tokens)
