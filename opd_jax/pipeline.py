"""Experiments of several runs: named stages, once for every seed, then the report.

Each stage is an ordinary run with a config and a work directory of its own
(`WORKDIR/seed_S/STAGE`), so it resumes by itself, and one that has finished is not run again.
"""

from __future__ import annotations

import copy
import json
import pathlib
import sys
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from opd_jax import build, checks, diagnose, doctor, hf, report, tokenizer, train
from opd_jax import config as config_lib


def run(c: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Runs every stage for every seed, then writes the report.

  Raises:
    ConfigError: before the first stage starts, whichever stage is wrong.
  """
  workdir = pathlib.Path(workdir).resolve()  # stages refer to each other by absolute paths
  checks.validate_pipeline(c)
  check_data(c)
  for seed in c.seeds:
    for name in c.order:
      build.check_workdir(stage_config(c, name, seed, workdir), stage_dir(workdir, name, seed))
  for seed in c.seeds:
    for i, name in enumerate(c.order, 1):
      many = f'seed {seed}, ' if len(c.seeds) > 1 else ''
      done = (stage_dir(workdir, name, seed) / train.RESULT).exists()
      print(f'== {many}stage {i}/{len(c.order)}: {name}{" (finished before)" if done else ""}',
            flush=True)
      train.train(stage_config(c, name, seed, workdir), stage_dir(workdir, name, seed))
  return report.write(c, workdir)


def examine(c: ConfigDict, only: str | None, workdir: str | pathlib.Path) -> bool:
  """`opd doctor`: the checks of a run, or of each stage of a pipeline (or of one).

  A stage that starts from an earlier stage's model is examined once that model is in `workdir`.

  Returns:
    Whether no check failed.
  """
  console = Console(highlight=False)
  if not config_lib.is_pipeline(c):
    pick_stage(c, only)
    return doctor.diagnose(c, c.name, console)
  checks.validate_pipeline(c)
  if only is not None:
    pick_stage(c, only)
  workdir, fine = pathlib.Path(workdir).resolve(), True
  for name in [only] if only else c.order:
    stage = stage_config(c, name, c.seeds[0], workdir)
    missing = [part for part in ('student', 'teacher', 'reference')
               if c.stages[name][part].path.startswith(config_lib.STAGE)
               and not pathlib.Path(stage[part].path).exists()]
    if missing:
      console.print(f'{name}: not examined: its {" and ".join(missing)} will be made by '
                    f'{[c.stages[name][part].path for part in missing]}')
    else:
      fine &= doctor.diagnose(stage, name, console)
  return fine


def measure(c: ConfigDict, stage: str | None, workdir: str | pathlib.Path, *, write: bool) -> None:
  """`opd diagnose`: a run, or a stage of a pipeline with the pipeline's first seed.

  Args:
    c: of a run or a pipeline.
    stage: its name; None for a run.
    workdir: where earlier stages are.
    write: whether diagnose.json goes there too, to the stage's own directory.

  Raises:
    ConfigError: see `diagnose.run`; no such stage, or one whose models are not made yet.
  """
  workdir = pathlib.Path(workdir).resolve()
  pick_stage(c, stage)
  if config_lib.is_pipeline(c):
    checks.validate_pipeline(c)
    seed = c.seeds[0]
    c, workdir = stage_config(c, stage, seed, workdir), stage_dir(workdir, stage, seed)
  # A file is read at leisure: there, tables need not be as narrow as a terminal.
  console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
  diagnose.run(c, c.name, workdir if write else None, console)


def check_data(c: ConfigDict) -> None:
  """Encodes every later stage's examples once, so that a prompt that does not fit the last stage is
  found before the first one has run (which looks at its own at once).

  Raises:
    ConfigError: names the stage and the field.
  """
  seen = set()
  for name in c.order[1:]:
    stage = c.stages[name]
    student = teacher = origin(c, stage.student)
    if stage.teacher.path and stage.prompt.template != 'none':
      teacher = origin(c, stage.teacher)
    groups = (stage.task, stage.prompt, stage.data)
    key = json.dumps([*map(config_lib.to_dict, groups), stage.eval.problems, student, teacher])
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
      raise config_lib.ConfigError(f'stages.{name}: {e}') from e


def origin(c: ConfigDict, model: ConfigDict) -> tuple[str, str]:
  """(path, revision) of the checkpoint whose tokenizer a student or teacher group ends up with; the
  path is '' where an earlier stage makes a fresh model."""
  while model.path.startswith(config_lib.STAGE):
    model = c.stages[model.path.removeprefix(config_lib.STAGE)].student
  return model.path, model.revision


def vocabulary(path: str, revision: str) -> tuple[Any, tuple[int, ...]]:
  """The tokenizer and the stop tokens of a checkpoint; of a fresh model where path is ''."""
  if not path:
    characters = tokenizer.character_tokenizer()
    return characters, (characters.eos_token_id,)
  path = hf.fetch(path, revision)
  tokens = tokenizer.load(path)
  return tokens, tokenizer.stop_tokens(path, tokens)


def stage_dir(workdir: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  """The work directory of a stage."""
  return workdir / f'seed_{seed}' / name


def stage_config(c: ConfigDict, name: str, seed: int, workdir: pathlib.Path) -> ConfigDict:
  """The stage's config as it runs: its name, its seed, and 'stage:X' paths resolved."""
  stage = copy.deepcopy(c.stages[name])
  stage.name, stage.seed = name, seed
  for part in ('student', 'teacher', 'reference'):
    stage[part].path = resolve(stage[part].path, seed, workdir)
  return stage


def pick_stage(c: ConfigDict, name: str | None) -> ConfigDict:
  """The config of a stage; the config of a single run is returned as it is.

  Raises:
    ConfigError: no such stage.
  """
  if not config_lib.is_pipeline(c):
    if name is not None:
      raise config_lib.ConfigError(f'stage={name!r} has no effect: the config {c.name!r} is a '
                                   'single run; allowed: no stage')
    return c
  if name not in c.stages:
    raise config_lib.ConfigError(f'stage={name!r}; allowed: {sorted(c.stages)}')
  return c.stages[name]


def resolve(path: str, seed: int, workdir: pathlib.Path) -> str:
  """'stage:NAME' to the directory of that stage's final model; other paths as they are."""
  if not path.startswith(config_lib.STAGE):
    return path
  return str(stage_dir(workdir, path.removeprefix(config_lib.STAGE), seed) / train.EXPORT)
