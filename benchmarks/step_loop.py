"""A worker (turns.py) that takes steps of opd_jax on the work of step_work.py: `train.take_step`
itself, with the programs of `programs.compile_programs`, each of them timed and waited for.

    python benchmarks/step_loop.py WORK SETTINGS      (a folder; JSON, see `Settings`)
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
import numpy as np  # noqa: E402
import step_work  # noqa: E402
import turns  # noqa: E402

from opd_jax import __main__ as launcher  # noqa: E402
from opd_jax import build, presets, train, types  # noqa: E402
from opd_jax import config as config_lib  # noqa: E402
from opd_jax.errors import ConfigError, one_line  # noqa: E402
from opd_jax.parallel import sharding  # noqa: E402
from opd_jax.programs import Programs, compile_programs  # noqa: E402

PRESETS = {'exact': 'opd_exact', 'sampled': 'opd'}
OWN = 'reverse_kl'  # the divergence of both
NEGATIVE_LOGPROB = 'negative_logprob'  # of the given completions, beside the divergences
# As the launcher `opd` starts a run.
ENVIRONMENT = {**launcher._MALLOC, **launcher._LARGE_PAGES, 'TRANSFORMERS_VERBOSITY': 'error',
               'HF_DATASETS_DISABLE_PROGRESS_BARS': '1'}


@dataclasses.dataclass(frozen=True)
class Settings:
  """How opd_jax does the work."""

  objective: str = 'exact'  # of PRESETS
  dtype: str = 'float32'
  # Other fields of the config, 'compute.chunk_tokens=512'; a later one counts.
  fields: tuple[str, ...] = ('compute.microbatch_rows=4', 'compute.chunk_tokens=512')
  losses: tuple[str, ...] = ()  # what is wanted of the given rows: divergences, NEGATIVE_LOGPROB


def make_config(work: pathlib.Path | None, sizes: step_work.Sizes, settings: Settings
                ) -> ConfigDict:
  """Makes the config of a run on the work; None for one that is only parsed.

  Raises:
    ConfigError: a field that is not there or has another type.
  """
  c = config_lib.default_config()
  c.name, c.teacher.kind = 'step', 'checkpoint'
  if work is None:  # a commit of the hub need not be there to be parsed
    c.student.revision = c.teacher.revision = '0' * 40
  models, work = work or 'hub', work or pathlib.Path('work')
  c.student.path, c.teacher.path = f'{models}/student', f'{models}/teacher'
  c.task = config_lib.task_config(
      'prompts', source=str(work / 'prompts.jsonl'), eval_source=str(work / 'eval.jsonl'))
  c.data.prompts_per_step = sizes.rows
  c.data.max_prompt_tokens, c.data.max_new_tokens = sizes.prompt, sizes.new
  c.eval.problems = c.eval.samples_per_problem = c.eval.pass_k = 1
  presets.apply(c, PRESETS[settings.objective])
  c.optimizer.learning_rate, c.compute.dtype = 1e-5, settings.dtype
  for text in settings.fields:
    name, _, value = text.partition('=')
    try:
      c.update_from_flattened_dict({name: _value(value)})
    except (KeyError, TypeError, ValueError) as e:
      raise ConfigError(f'--set {text}: no field of a config, or not of its type; allowed: such as '
                        'compute.chunk_tokens=1024') from e
  return c


def _value(text: str) -> Any:
  try:
    return json.loads(text)
  except ValueError:
    return text


class Step:
  """A run of opd_jax on the work, whose steps are taken one by one."""

  def __init__(self, work: pathlib.Path, settings: Settings, clock: turns.Clock):
    """Reads the models; nothing is compiled before the first step."""
    self.sizes, self.given = step_work.read(work)
    run = self.run = config_lib.parse(make_config(work, self.sizes, settings))
    # An id that no token has: every answer takes its room.
    parts = dataclasses.replace(build.open_parts(run), stop_tokens=(self.sizes.vocab,))
    self.parts, self.programs = parts, timed(compile_programs(run, parts), clock)
    self.base = parts.read_base()
    self.graders = self.programs.connect(self.base)
    self.key, self.taken = jax.random.key(run.seed), 0
    self.state = self.programs.init(self.parts.read_trained())

  def take(self) -> dict[str, Any]:
    """Takes a step of the loop; returns its metrics."""
    with jax.set_mesh(self.parts.mesh):
      self.state, metrics = train.take_step(self.run, self.programs, self.state, self.base,
                                            self.graders, self.taken, self.key)
    self.taken += 1
    return jax.block_until_ready(metrics)

  def given_rollout(self) -> types.Rollout:
    """Makes a rollout of the given rows."""
    b, t = self.given.shape
    mask = np.zeros((b, t - 1), np.float32)
    mask[:, self.sizes.prompt - 1:] = 1.0
    zeros = np.zeros((b, t - 1), np.float32)
    return sharding.put(types.Rollout(
        tokens=self.given, valid=np.ones((b, t), bool), mask=mask, sampler_logprobs=zeros,
        policy_offset=zeros, ended=np.ones(b, bool), prompt_length=self.sizes.prompt),
        sharding.by_rows(self.parts.mesh))

  def first_update(self) -> dict[str, float]:
    """Computes the first update on the given rows; returns loss and log-probability. The state is
    spent."""
    stream = self.parts.streams[0]
    with jax.set_mesh(self.parts.mesh):
      batch = self.programs.grade(stream, self.state.params, self.graders,
                                  np.arange(self.sizes.rows), [self.given_rollout()])
      self.state, metrics = self.programs.update(
          self.state, (stream,), [batch], self.graders, self.base, self.key)
    return {name: float(metrics[name]) for name in ('loss', 'logprob')}

  def counted_flops(self) -> float:
    """Counts what the book of a run would count for a step (run/ledger.py)."""
    lengths = {'lengths': np.full(self.sizes.rows, self.sizes.new),
               'prompt_lengths': np.full(self.sizes.rows, self.sizes.prompt)}
    return self.parts.counter(updates=1).step(self.parts.streams, lengths).total


def timed(programs: Programs, clock: turns.Clock) -> Programs:
  """Puts the compiled functions of a step on the clock."""
  def on(name, f):
    return clock.timed(name, f, jax.block_until_ready)

  return dataclasses.replace(
      programs, writers={k: on('generate', f) for k, f in programs.writers.items()},
      scorers={k: on(f'score_{k[1]}', f) for k, f in programs.scorers.items()},
      updates={k: on('update', f) for k, f in programs.updates.items()})


def peak_bytes() -> int:
  """Reads the peak memory: of an accelerator, or resident in the host's."""
  stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != 'cpu' else None
  return stats['peak_bytes_in_use'] if stats else turns.peak_bytes()


def given_losses(work: pathlib.Path, settings: Settings) -> dict[str, float]:
  """Computes what `settings.losses` names."""
  first = Step(work, settings, turns.Clock()).first_update()
  out = {OWN: first['loss'], NEGATIVE_LOGPROB: -first['logprob']}
  for name in set(settings.losses) - out.keys():
    field = f'objective.divergence={name}'
    other = dataclasses.replace(settings, fields=(*settings.fields, field))
    out[name] = Step(work, other, turns.Clock()).first_update()['loss']
  return out


def main() -> None:
  """Serves steps; or, where losses are wanted, says these only, since that takes memory."""
  work, settings = pathlib.Path(sys.argv[1]), Settings(**json.loads(sys.argv[2]))
  here, imports = turns.Turns(), turns.peak_bytes()
  if settings.losses:
    return here.say(losses=given_losses(work, settings))
  step = Step(work, settings, here.clock)
  began = time.perf_counter()
  step.take()
  first_step_s = time.perf_counter() - began
  here.clock.take()
  here.say(first_step_s=first_step_s, import_bytes=imports, counted_flops=step.counted_flops(),
           backend=jax.default_backend(), threads=len(os.sched_getaffinity(0)))
  while here.wait():
    with here.clock.phase(turns.STEP):
      metrics = step.take()
    here.say(spent=here.clock.take(), loss=float(metrics['loss']))
  here.say(peak_bytes=peak_bytes())


if __name__ == '__main__':
  try:
    main()
  except ConfigError as e:
    sys.exit(f'error: {one_line(str(e))}')
