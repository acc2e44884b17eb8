"""What is wrong with a command line or with a config file, in words."""

from __future__ import annotations

import re
import runpy

from absl import flags

# What absl says of a value, and what it should have been.
KINDS = (('invalid literal for int', 'an integer'),
         ('could not convert string to float', 'a number'),
         ('as a ConfigDict', 'its fields, one by one: --config.GROUP.FIELD=VALUE'),
         ('as tuple', "a tuple, such as (1, 2) or ('a', 'b')"), ('boolean', 'true or false'))
A_CONFIG = ('a Python file whose get_config returns config.default_config() or '
            'experiment.default_pipeline(), changed')


def explain(command: str, known: tuple[str, ...], argv: list[str], e: Exception) -> str:
  """Words what is wrong with a command line or a config file, and what is allowed; `known` are the
  flags of the command."""
  text, given = str(e).strip(), f'--config {config_file(argv)}'
  # Not of --config itself: what is wrong is in the file.
  if illegal := re.match(r'flag --(?!config=)(.*?)=(.*?): ', text, re.DOTALL):
    name, value = illegal.groups()
    allowed = next((kind for said, kind in KINDS if said in text), 'a value of its type')
    return f'--{name}={value!r}; allowed: {allowed}'
  if isinstance(e, flags.UnrecognizedFlagError):
    return f'--{e.flagname} is unknown; allowed: {["--" + n for n in known]}'
  if isinstance(e, flags.Error) and not text.startswith('flag --config='):
    return f'{text}; allowed: flags as --NAME VALUE, see `opd {command} --help`'
  if isinstance(e, AttributeError | KeyError) and (found := unknown_field(argv)):
    return found
  if isinstance(e, OSError):
    return f'{given}: {text.partition("Attempted")[2] or text}; allowed: {A_CONFIG}'
  # What a config file itself raises as one of these arrives as a traceback in the text.
  said = re.split(r'(?:Config|Value|Type)Error: ', text)[-1]
  if 'allowed' in said:
    return said
  if not isinstance(e, TypeError | ValueError | flags.Error):
    said = f'{type(e).__name__}: {said}'
  return f'{given}: {said}; allowed: {A_CONFIG}'


def config_file(argv: list[str]) -> str | None:
  """Finds the FILE of --config FILE:ARGUMENT; None where there is none."""
  words = [w for flag in argv for w in flag.split('=', 1)]
  words = ['--config' if word == '-config' else word for word in words]
  at = words.index('--config') + 1 if '--config' in words else len(words)
  return words[at].partition(':')[0] if at < len(words) else None


def unknown_field(argv: list[str]) -> str | None:
  """Finds which --config.FIELD of the command line does not exist, and what does in its place; None
  where it is the file that is no config."""
  words = [word for flag in argv for word in flag.split('=', 1)]
  argument = next((w.partition(':')[2] for w in words if w.startswith(f'{config_file(argv)}:')), '')
  try:
    config = runpy.run_path(config_file(argv))['get_config'](*filter(None, [argument]))
  except Exception:  # that is what is wrong
    return None
  for word in words:
    path = word.lstrip('-').split('.')
    here = config
    for i, field in enumerate(path[1:] if path[0] == 'config' else [], 1):
      group = '.'.join(path[:i])
      if not hasattr(here, 'items'):
        return f'{word}: {group} has no fields; allowed: --{group}=VALUE'
      if field not in here:
        return f'{word}: {group} has no field {field!r}; allowed: {sorted(here)}'
      here = here[field]
  return None
