"""What experiment files are written with: the argument of `--config FILE.py:ARGUMENT`, and
pipelines of several runs."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
import copy
import dataclasses
import math
import pathlib
from typing import Any, TypeVar

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax.errors import ConfigError
from opd_jax.experiment import claims
from opd_jax.experiment.claims import Claim
from opd_jax.files.workdir import EXPORT
from opd_jax.rules.run import STAGE
from opd_jax.settings import Run

T = TypeVar('T')
PARTS = ('student', 'teacher', 'reference')  # those of a stage that an earlier stage may make


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Parses the string after the colon of `--config file.py:arg`, strictly.

  'tiny,seeds=3' sets `size='tiny'` (a bare word, where the experiment has a `size`) and seeds=3.
  Values take the type of their default.

  Raises:
    ConfigError: an unknown name or a value of another type.
  """
  out = ConfigDict(defaults)
  for part in filter(None, (arg or '').split(',')):
    name, has_value, text = part.partition('=')
    if not has_value and 'size' in defaults:
      name, text = 'size', part
    if name not in defaults:
      raise ConfigError(f'config argument {part!r}: unknown name {name!r}; allowed: '
                        f'{sorted(defaults)}')
    default, value = defaults[name], text
    if not isinstance(default, str):
      try:
        value = ast.literal_eval(text)
      except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if type(value) is not type(default):
      raise ConfigError(f'config argument {part!r}: {name} takes a {type(default).__name__}; '
                        f'allowed: such as {default!r}')
    out[name] = value
  return out


def find_made(folder: str, names: Sequence[str], command: str) -> pathlib.Path:
  """Finds the models that a command makes, before the experiment.

  Args:
    folder: its argument `models`.
    names: of the directories in it.
    command: that makes them.

  Raises:
    ConfigError: one is missing.
  """
  path = pathlib.Path(folder)
  if absent := [name for name in names if not (path / name / 'config.json').is_file()]:
    raise ConfigError(f'models={folder!r} has no model {absent}; allowed: a folder that this made: '
                      f'{command}')
  return path


@dataclasses.dataclass(frozen=True)
class Machines:
  """Accelerators that an experiment has a size for.

  Attributes:
    topology: what `opd plan --topology` calls them.
    chips: how many they are.
  """

  topology: str
  chips: int


# By the names under which they are rented: of a v5p, Cloud TPU counts cores, two a chip, and of a
# v6e chips; GPUs are a host of eight.
MACHINES = {
    'v5p-8': Machines('v5p:2x2x1', 4), 'v5p-64': Machines('v5p:2x4x4', 32),
    'v6e-16': Machines('v6e:4x4', 16), 'v6e-64': Machines('v6e:8x8', 64),
    'h100x8': Machines('gpu:8xh100', 8), 'h200': Machines('gpu:8xh200', 8)}
ANSWERS = {'short': 2048, 'long': 16384}  # tokens


def pick(table: Mapping[str, T], **named: str) -> T:
  """Picks what an argument names, as in `pick(MACHINES, size=arg.size)`.

  Raises:
    ConfigError: there is no such thing.
  """
  (argument, name), = named.items()
  if name not in table:
    raise ConfigError(f'{argument}={name!r}; allowed: {list(table)}')
  return table[name]


def set_for_pods(c: ConfigDict, name: str, arg: ConfigDict, student: str, teacher: str) -> None:
  """Sets what the experiments of experiments/pods/ share: 256 answers a step (64 problems of
  DeepMath, four each) by one published model, graded by another, in bfloat16, for 100 steps.

  Args:
    c: with its objective; changed.
    name: of the experiment.
    arg: of `parse_arg`, with `size`, of MACHINES, and `answers`, of ANSWERS.
    student, teacher: names on the hub.

  Raises:
    ConfigError: there is no such size or length.
  """
  pick(MACHINES, size=arg.size)  # refuses another
  room = pick(ANSWERS, answers=arg.answers)
  c.name, c.steps = f'{name}-{arg.size}-{arg.answers}', 100
  c.student.path = student
  c.teacher.kind, c.teacher.path = 'checkpoint', teacher
  c.prompt.template, c.sample.stop = 'teacher', 'union'  # a base model ends no turn
  c.prompt.thinking = 'on' if arg.answers == 'long' else 'off'
  c.task = config_lib.task_config(
      'prompts', source='zwhe99/DeepMath-103K', prompt_column='question',
      answer_column='final_answer', grader='boxed', holdout_examples=512)
  c.data.prompts_per_step, c.data.samples_per_prompt = 64, 4
  c.data.max_prompt_tokens, c.data.max_new_tokens, c.data.overlong = 512, room, 'drop'
  c.compute.dtype, c.compute.remat = 'bfloat16', 'layer'
  c.compute.microbatch_rows = 2 if arg.answers == 'short' else 1
  c.compute.chunk_tokens = 1024
  c.sample.slots = 0 if arg.answers == 'short' else 64  # of 256 rows: few are long
  c.optimizer.learning_rate, c.optimizer.warmup_steps = 5e-5, 5
  c.eval.every_steps, c.eval.problems, c.eval.samples_per_problem = 25, 128, 2
  c.checkpoint.every_steps = 25


@dataclasses.dataclass(frozen=True)
class Report:
  """What the report of a pipeline shows; every field names stages."""

  teacher: str = ''  # 'stage:NAME' of the method that made the teacher, '' if none of them did
  methods: tuple[str, ...] = ()  # the rows of the table and the curves of the picture
  labels: tuple[str, ...] = ()  # their names, in the same order
  levels: tuple[float, ...] = (0.9, 0.95)  # shares of the teacher's accuracy to reach
  baseline: str = ''  # the method whose steps and compute the others are compared with, '' for the
  # one that made the teacher, if one of several did
  claims: Mapping[str, Claim] = dataclasses.field(default_factory=dict)  # by short names
  # Methods that are shown together, by the title of a table and a picture; without, all are.
  sections: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  # Methods whose evaluations a scaling law is fitted to (scaling.py), by a title; of them, those
  # that it has to predict.
  scaling: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  held_out: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Named stages, each a run of its own, in `order` for every seed."""

  name: str = 'pipeline'
  seeds: tuple[int, ...] = (0,)
  order: tuple[str, ...] = ()
  stages: Any = None  # their configs by name, as written; `stage_config` has them as they run
  report: Report = Report()
  runs: dict[str, Run] = dataclasses.field(default_factory=dict)  # what those configs say


def default_pipeline() -> ConfigDict:
  """Makes the config of a pipeline without stages."""
  values = dataclasses.asdict(Pipeline(stages={}))
  del values['runs']  # read from `stages`
  return ConfigDict(values)


def is_pipeline(c: ConfigDict) -> bool:
  """Tells a pipeline from one run."""
  return 'stages' in c


def parse_pipeline(c: ConfigDict) -> Pipeline:
  """Reads the config of a pipeline: every stage, and the references between them.

  Raises:
    ConfigError: the first problem found, whichever stage is wrong.
  """
  if not isinstance(c.stages, ConfigDict) or not all(
      isinstance(stage, ConfigDict) for stage in c.stages.values()):
    raise ConfigError('stages is no group of configs; allowed: NAME=config.default_config(), '
                      'changed, for every stage')
  template = default_pipeline()
  template.stages = c.stages
  for group in ('claims', 'sections', 'scaling'):  # whose fields are names; checked below
    if isinstance(c.get('report'), ConfigDict) and isinstance(c.report.get(group), ConfigDict):
      template.report[group] = c.report[group]
  config_lib.check_fields(c, template, '')
  values = {name: c[name] for name in c}
  claimed = {name: claims.parse(name, claim, c.report.methods)
             for name, claim in c.report.to_dict()['claims'].items()}
  out = Pipeline(**{**values, 'report': Report(**{**c.report.to_dict(), 'claims': claimed})})
  if sorted(map(str, out.order)) != sorted(c.stages):
    raise ConfigError(f'order={out.order}; allowed: each of {sorted(c.stages)} once')
  if len(set(out.seeds)) != len(out.seeds) or not out.seeds or not all(
      type(seed) is int and 0 <= seed < 2**32 for seed in out.seeds):
    raise ConfigError(f'seeds={out.seeds}; allowed: at least one seed of 0 to {2**32 - 1}, each '
                      'once')
  runs: dict[str, Run] = {}
  for name in out.order:
    runs[name] = _parse_stage(c.stages[name], f'stages.{name}.', runs)
  made, r, done = out.report.teacher, out.report, list(runs)
  if made and not (made.startswith(STAGE) and made[len(STAGE):] in done):
    raise ConfigError(f"report.teacher={made!r}; allowed: '', or 'stage:NAME' of {done}")
  if set(r.methods) - set(done) or not r.methods or len(r.methods) != len(r.labels):
    raise ConfigError(f'report.methods={r.methods}, labels={r.labels}; allowed: at least one stage '
                      f'of {done}, with one label each')
  if not all(type(level) in (int, float) and 0 < level < math.inf for level in r.levels):
    raise ConfigError(f'report.levels={r.levels}; allowed: numbers above 0, shares of the '
                      "teacher's accuracy")
  for field in ('sections', 'scaling'):
    for title, some in getattr(r, field).items():
      if not isinstance(some, tuple) or not some:
        raise ConfigError(f'report.{field}.{title}={some!r}; allowed: some of {r.methods}')
  scaled = {m for some in r.scaling.values() for m in some}
  for field, named, known in (
      ('sections', {m for some in r.sections.values() for m in some}, r.methods),
      ('scaling', scaled, r.methods), ('held_out', set(r.held_out), sorted(scaled))):
    if strangers := sorted(named - set(known)):
      raise ConfigError(f'report.{field} has {strangers}; allowed: of {known}')
  taught = any(runs[name].teacher.kind != 'none' for name in r.methods)
  if r.baseline and (r.baseline not in r.methods or len(r.methods) < 2 or not taught):
    raise ConfigError(f"report.baseline={r.baseline!r}; allowed: '', or one of several "
                      f'report.methods, which are {r.methods}, of which one has a teacher whose '
                      'accuracy is to be reached')
  return dataclasses.replace(out, runs=runs)


def _parse_stage(c: ConfigDict, prefix: str, done: dict[str, Run]) -> Run:
  run = config_lib.parse(c, prefix)
  for part, maker in makers(run).items():
    path, factory = (getattr(getattr(run, part), n, '') for n in ('path', 'factory'))
    if maker not in done:
      raise ConfigError(f'{prefix}{part}.path={path!r}; allowed: an earlier stage, one of '
                        f'{list(done)}')
    maker = done[maker]
    if factory != maker.student.factory:
      raise ConfigError(f'{prefix}{part}.factory={factory!r} with the path {path!r}; allowed: '
                        f'{maker.student.factory!r}, as in that stage')
    if maker.checkpoint.export != 'full':
      raise ConfigError(f'{prefix}{part}.path={path!r}: that stage leaves no whole model behind; '
                        "allowed: a stage with checkpoint.export='full'")
  if run.seed:
    raise ConfigError(f'{prefix}seed={run.seed} has no effect; allowed: 0, and the field seeds of '
                      'the pipeline')
  return run


def makers(run: Run) -> dict[str, str]:
  """Lists which of a stage's models earlier stages make: {part: name of the stage}."""
  paths = {part: getattr(run, part).path for part in PARTS}
  return {part: path[len(STAGE):] for part, path in paths.items() if path.startswith(STAGE)}


def stage_dir(workdir: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  """Names the work directory of a stage."""
  return workdir / f'seed_{seed}' / name


def stage_config(p: Pipeline, name: str, seed: int, workdir: pathlib.Path) -> ConfigDict:
  """Makes a stage's config as it runs: its name, its seed, and 'stage:X' paths resolved."""
  stage = copy.deepcopy(p.stages[name])
  stage.name, stage.seed = name, seed
  for part, maker in makers(p.runs[name]).items():
    stage[part].path = str(stage_dir(workdir, maker, seed) / EXPORT)
  return stage


def stage_run(p: Pipeline, name: str, seed: int) -> Run:
  """Makes what a stage's config says, with its name and its seed, before any stage has run."""
  return dataclasses.replace(p.runs[name], name=name, seed=seed)


def default_workdir(c: ConfigDict) -> pathlib.Path:
  """Names the work directory of a run or a pipeline for which none is asked."""
  return pathlib.Path('runs') / c.name


def pick_stage(c: ConfigDict, name: str | None) -> ConfigDict:
  """Picks the config of a stage; that of a single run is returned as it is.

  Raises:
    ConfigError: no such stage.
  """
  if not is_pipeline(c):
    if name is not None:
      raise ConfigError(f'stage={name!r} has no effect: the config {c.name!r} is a single run; '
                        'allowed: no stage')
    return c
  if name not in c.stages:
    raise ConfigError(f'stage={name!r}; allowed: {sorted(c.stages)}')
  return c.stages[name]
