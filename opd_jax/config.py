"""The config of a run: a `ConfigDict` with the fields of `settings.Run`.

It is what people write (`default_config`, config files, `--config.FIELD=`, config.json); `parse` is
the one reader of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import copy
import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

from opd_jax import tasks
from opd_jax.errors import ConfigError
from opd_jax.files import hub
from opd_jax.files import workdir as workdir_lib
from opd_jax.parallel import hosts
from opd_jax.rules import run as rules
from opd_jax.settings import Run
from opd_jax.tasks import _tables


def default_config() -> ConfigDict:
  """Makes the config of a run with every field at its default, locked: assigning a field that is
  not here raises."""
  values = dataclasses.asdict(Run())
  del values['objective']['temperature']  # it is the sampler's
  values['task'] = task_config(values['task']['name'])
  return ConfigDict(values).lock()


def parse(c: ConfigDict, prefix: str = '') -> Run:
  """Reads a config, checking all that can be checked without loading anything.

  Args:
    c: with the fields of `default_config`.
    prefix: before the names in errors, such as 'stages.NAME.'.

  Raises:
    ConfigError: the first problem found: fields that are unknown, missing or of another type, and
      what `rules` refuses.
  """
  check_fields(c, default_config(), prefix)
  try:
    task = tasks.get(c.task.name)
    values = c.to_dict()
    values['task']['options'] = tasks.options(task, values['task']['options'])
    # The student is trained at the temperature that it samples at.
    values['objective']['temperature'] = values['sample']['temperature']
    run = _build(Run, values)
    rules.check(run)
  except (ValueError, TypeError) as e:
    raise ConfigError(f'{prefix}{e}') from e
  return run


def _build(kind: type, values: Mapping[str, Any]) -> Any:
  """A dataclass of dataclasses from nested dicts; which fields are groups, their defaults say."""
  default = kind()
  return kind(**{name: _build(type(part), value) if dataclasses.is_dataclass(
      part := getattr(default, name)) and not dataclasses.is_dataclass(value) else value
      for name, value in values.items()})


def check_fields(c: ConfigDict, template: ConfigDict, prefix: str) -> None:
  """Checks that a config has the fields of a template, and that they are of its types.

  Raises:
    ConfigError: the first field that is missing, unknown or of another type; `prefix` is before it.
  """
  free = ('student.fresh', 'task.options')  # checked by the family and by the task
  for name, value in template.items():
    field = f'{prefix}{name}'
    if name not in c:
      raise ConfigError(f'{field} is missing')
    if isinstance(value, ConfigDict):
      if not isinstance(c[name], ConfigDict):
        raise ConfigError(f'{field}={c[name]!r}; allowed: a group with fields {sorted(value)}')
      if not field.endswith(free):
        check_fields(c[name], value, f'{field}.')
    elif type(c[name]) is not type(value):
      was = " ('layer' for True, 'none' for False)" if field.endswith('compute.remat') else ''
      raise ConfigError(f'{field}={c[name]!r} has type {type(c[name]).__name__}; allowed: '
                        f'{type(value).__name__}{was}')
  unknown = sorted(set(c) - set(template))
  if unknown:
    raise ConfigError(f'unknown config keys {[prefix + k for k in unknown]}; allowed: '
                      f'{[prefix + k for k in sorted(template)]}')


def pin(c: ConfigDict, workdir: str | pathlib.Path, keep: bool = True) -> ConfigDict:
  """Puts commits in the place of branches and tags (and of nothing, for the main branch) of what is
  on the hub: those that the work directory has kept from the first start, or that the hub says now.

  Args:
    c: of a run, or of a pipeline, whose stages are pinned together.
    workdir: of the run or the pipeline.
    keep: whether they are kept there for later starts, and said.

  Returns:
    A copy.

  Raises:
    ConfigError: a name that the hub does not know or that cannot be asked for; names the field.
  """
  file, out = pathlib.Path(workdir) / workdir_lib.REVISIONS, copy.deepcopy(c)
  known = before = workdir_lib.read_revisions(file)
  stages = out.get('stages') if isinstance(out.get('stages'), ConfigDict) else {'': out}
  for stage, run in stages.items():
    for where, group, name, path, kind in _on_the_hub(run):
      asked = group[name]
      key = f'{kind} {path} {asked or "(main)"}'
      field = f'{f"stages.{stage}." if stage else ""}{where}{name}={asked!r}'
      if key not in known:
        try:
          known = {**known, key: hosts.decide(functools.partial(
              hub.find_commit, path, asked, kind))}
        except ValueError as e:
          raise ConfigError(
              f'{field} of {path!r}, which is not here: {e}; allowed: a branch, a tag, the 40 hex '
              "digits of a commit, or '' for the main branch") from e
        if keep:
          print(f'{field} of {path!r} is the commit {known[key]}, which {file} keeps', flush=True)
      group[name] = known[key]
  if keep and known != before:
    workdir_lib.write_revisions(file, known)
  return out


def place_models(c: ConfigDict, find: Callable[[str, str, str], str]) -> ConfigDict:
  """Puts directories in the place of the names of a run's models.

  Args:
    c: of a run.
    find: (field, path, revision) -> the directory.

  Returns:
    A copy.
  """
  out = copy.deepcopy(c)
  for part in ('student', 'teacher', 'reference'):
    group = out.get(part)
    if isinstance(group, ConfigDict) and isinstance(group.get('path'), str) and group.path:
      group.path = find(f'{part}.path', group.path, group.revision)
      group.revision = ''
  return out


def _on_the_hub(run: ConfigDict) -> Iterator[tuple[str, ConfigDict, str, str, str]]:
  """(where, group, field of the revision, repository, kind) of what has no commit yet. A config
  that is not what it should be is for `parse` to refuse."""
  places = [(f'{part}.', run.get(part), 'path', 'revision', 'model')
            for part in ('student', 'teacher', 'reference')]
  task = run.get('task')
  options = task.get('options') if isinstance(task, ConfigDict) else None
  places += [('task.options.', options, f'{prefix}source', f'{prefix}revision', 'dataset')
             for prefix in ('', 'eval_')]
  for where, group, source, name, kind in places:
    if not isinstance(group, ConfigDict):
      continue
    path, asked = group.get(source), group.get(name)
    if not isinstance(path, str) or not isinstance(asked, str) or hub.is_commit(asked):
      continue
    here = pathlib.Path(path)
    missing_file = kind == 'dataset' and here.suffix in _tables.READERS
    if re.fullmatch(hub.NAMES[kind], path) and not here.exists() and not missing_file:
      yield where, group, name, path, kind


def task_config(name: str, **options: Any) -> ConfigDict:
  """Makes the `task` group for a task, with all of its knobs spelled out.

  Raises:
    ValueError: an unknown task or knob.
  """
  values = dataclasses.asdict(tasks.options(tasks.get(name), options))
  return ConfigDict(dict(name=name, options=ConfigDict(values)))


def to_dict(c: ConfigDict) -> dict[str, Any]:
  """Turns a config into plain JSON content (tuples become lists)."""
  return json.loads(c.to_json())


def from_dict(values: dict[str, Any]) -> ConfigDict:
  """Inverts `to_dict`, for a single run. Which fields there are is for `parse` to check."""
  def tuples(tree):
    if isinstance(tree, dict):
      return {name: tuples(value) for name, value in tree.items()}
    return tuple(tree) if isinstance(tree, list) else tree

  out = tuples(values)
  if isinstance(out.get('student'), dict) and 'fresh' in out['student']:
    out['student']['fresh'] = values['student']['fresh']  # a config.json, whose lists are lists
  return ConfigDict(out)
