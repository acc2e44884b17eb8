"""Whether a chat template comes to an end: it is a program of somebody else's, which may loop or
fill the memory.

`check` renders it once in a process of its own, which is this file as a script: it imports nothing
but Jinja, so that it takes a fifth of a second, and can be stopped, which a thread cannot.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import subprocess
import sys

import jinja2
from jinja2 import ext, nodes, sandbox

CPU_S, WALL_S, MEMORY_BYTES, CHARACTERS = 2, 60, 2**30, 10**6
TOO_LARGE = 3  # exit status


@functools.cache
def check(template: str, variables: str) -> None:
  """Renders short conversations.

  Args:
    template: a chat template.
    variables: JSON of what else it may read, such as `bos_token`.

  Raises:
    ValueError: it does not end, or writes without end. Other errors of the template are for those
      who render with it.
  """
  try:
    done = subprocess.run([sys.executable, '-P', __file__], input=json.dumps([template, variables]),
                          capture_output=True, text=True, timeout=WALL_S)
  except subprocess.TimeoutExpired:
    status = -1
  else:
    status = done.returncode
  if status == TOO_LARGE:
    raise ValueError('it writes a text without end, or needs more than '
                     f'{MEMORY_BYTES // 2**20} MiB')
  if status < 0:  # a signal, such as that of the limit
    raise ValueError(f'it does not end within {CPU_S} seconds')


class _Generation(ext.Extension):
  """The tag that transformers adds, as a block that does nothing."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    return nodes.Scope(parser.parse_statements(('name:endgeneration',), drop_needle=True),
                       lineno=line)


def _main() -> None:
  template, variables = json.load(sys.stdin)
  resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
  with contextlib.suppress(ValueError, OSError):  # not every system has this limit
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, 'jinja2.ext.loopcontrols'])

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment.globals |= {'raise_exception': refuse, 'strftime_now': lambda form: '1 Jan 2026'}
  given = json.loads(variables) | {'tools': None, 'documents': None}
  turns = [{'role': role, 'content': 'probe'} for role in ('system', 'user', 'assistant')]
  for messages in (turns[1:2], turns[:2], turns[1:], turns):
    for begin in (True, False):
      for thinking in ({}, {'enable_thinking': True}, {'enable_thinking': False}):
        try:
          text = environment.from_string(template).render(
              messages=messages, add_generation_prompt=begin, **given, **thinking)
        except MemoryError:
          sys.exit(TOO_LARGE)
        except Exception:  # a template may raise anything, and whoever renders with it will see
          continue
        if len(text) > CHARACTERS:
          sys.exit(TOO_LARGE)


if __name__ == '__main__':
  _main()
