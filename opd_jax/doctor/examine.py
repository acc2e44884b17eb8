"""Whether a student, a teacher and a config belong together: `opd doctor`, and every start.

Runs that cannot be reproduced fail first of all on templates, end-of-text tokens and vocabularies,
and a wrong pairing trains without a complaint: here it is found before the first step. Every check
has a switch in `config.doctor`: 'on', or 'off: REASON', which goes to the log.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from opd_jax import build, load
from opd_jax import config as config_lib
from opd_jax.build import Parts
from opd_jax.doctor import memory, rollouts, static
from opd_jax.doctor.finding import FAIL, OFF, OK, SKIPPED, WARN, Finding
from opd_jax.errors import ConfigError
from opd_jax.files import disk
from opd_jax.models import lora
from opd_jax.programs import Programs, compile_programs
from opd_jax.rules import rule
from opd_jax.settings import Doctor, Run
from opd_jax.types import Params

RESULT = 'doctor.json'


def _checks(*modules: Any) -> dict[str, Callable[..., Finding]]:
  """The checks of some modules by their names: a new one is found by its own."""
  return {name.removeprefix('check_'): f for module in modules
          for name, f in vars(module).items() if name.startswith('check_')}


STATIC, COMPILED, ROLLOUTS = _checks(static), _checks(memory), _checks(rollouts)


def examine_parts(run: Run, parts: Parts) -> list[Finding]:
  """Makes the checks that only compare."""
  return _examine(run, STATIC, run, parts)


def examine(run: Run, programs: Programs, say: Callable[[str], None] = lambda text: None,
            look: bool = False) -> list[Finding]:
  """Makes the checks that run no model and read no weight: those that compare, and, where none of
  them failed, those that compile what the run will call anyway, which `say` hears of; if this is
  all that it is for, to `look`, as quickly as it goes."""
  out = examine_parts(run, programs.parts)
  if any(f.status == FAIL for f in out):
    return out + [Finding(name, SKIPPED, 'the run is refused as it is') for name in COMPILED]
  return out + _examine(run, COMPILED, run, programs, say, look)


def examine_rollouts(run: Run, parts: Parts, student: Params, teacher: Params | None,
                     look: bool = False) -> list[Finding]:
  """Makes the checks on a few rollouts of the student; nothing is run if all of them are off. To
  `look` only: as quickly as it goes."""
  if all(_reason(run.doctor, name) for name in ROLLOUTS):
    return _examine(run, ROLLOUTS)
  probe = rollouts.take_probe(run, parts, student, teacher, look)
  return _examine(run, ROLLOUTS, run, parts, probe)


def _reason(settings: Doctor, name: str) -> str:
  """Why a check is off; '' if it is on."""
  switch = getattr(settings, name)
  return '' if switch == 'on' else switch.partition(':')[2].strip()


def _examine(run: Run, checks: dict[str, Callable[..., Finding]], *args: Any) -> list[Finding]:
  return [Finding(name, OFF, reason, f'doctor.{name}') if (reason := _reason(run.doctor, name))
          else check(*args) for name, check in checks.items()]


def settle(run: Run, findings: list[Finding], workdir: pathlib.Path,
           say: Callable[[str], None]) -> None:
  """Writes doctor.json, says what is off or worth a look, and lets no run start on a failure.

  Raises:
    ConfigError: some check failed; names the fields to change.
  """
  disk.write_json(workdir / RESULT, [dataclasses.asdict(f) for f in findings])
  for f in findings:
    if f.status in (WARN, OFF):
      say(f'doctor: {f.check} {f.status}: {f.detail}' + (f' ({f.field})' if f.field else ''))
  require(run, findings)


def require(run: Run, findings: list[Finding]) -> list[Finding]:
  """Refuses a run of which a check failed; returns the findings of any other.

  Raises:
    ConfigError: names the fields to change.
  """
  failed = [f for f in findings if f.status == FAIL]
  if failed:
    raise ConfigError('; '.join(
        f"{f.field}={_value(run, f.field)!r}: the check '{f.check}' failed: {f.detail}"
        for f in failed) + f" (or doctor.{failed[0].check}='off: REASON')")
  return findings


def _value(run: Run, field: str) -> Any:
  if field.startswith('student.fresh.'):
    return run.student.fresh[field.removeprefix('student.fresh.')]
  return rule.get(run, field)


def table(title: str, findings: list[Finding]) -> Table:
  """Makes the table for the terminal."""
  out = Table('check', 'result', 'what was seen', 'field', title=title)
  style = {OK: 'green', WARN: 'yellow', FAIL: 'bold red'}
  for f in findings:
    out.add_row(f.check, f.status, f.detail, f.field if f.status in (WARN, FAIL, OFF) else '',
                style=style.get(f.status))
  return out


def command(c: ConfigDict, console: Console) -> bool:
  """Runs `opd doctor` for one run: every check, as a table.

  Returns:
    Whether none failed.

  Raises:
    ConfigError: the config cannot be built at all.
  """
  run = config_lib.parse(c)
  load.require_same_inputs(run)
  def say(text):
    console.print(f'{run.name}: {text}', style='dim')

  say('opening models, tokenizers and data')
  parts = build.open_parts(run)
  findings = examine(run, compile_programs(run, parts), say, look=True)
  say('reading weights')
  base = parts.read_base()
  student = lora.join(base, parts.read_trained())
  say('writing and grading some rollouts')
  findings += examine_rollouts(run, parts, student, parts.read_frozen('teacher', base), look=True)
  console.print(table(run.name, findings))
  return all(f.status != FAIL for f in findings)
