"""Whether a chat template comes to an end: it is a program of somebody else's, which may loop or
fill the memory, on every conversation or on an unusual one.

`check` renders short conversations, and `check_all` those that are to be rendered, in a process of
its own, which is this file as a script: it imports nothing but Jinja, so that it takes a fifth of a
second (and about as long again as rendering does), and can be stopped, which a thread cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import functools
import json
import math
import resource
import signal
import subprocess
import sys
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

CPU_S, WALL_S, MEMORY_BYTES, CHARACTERS = 2, 600, 2**30, 10**6
TOTAL_CPU_S = 0.01  # more for each conversation: one takes a hundredth of it
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
  turns = [{'role': role, 'content': 'probe'} for role in ('system', 'user', 'assistant')]
  known = json.loads(variables)
  found = _problem(template, [turns[1:2], turns[:2], turns[1:], turns], [
      {**known, 'add_generation_prompt': begin, **thinking} for begin in (True, False)
      for thinking in ({}, {'enable_thinking': True}, {'enable_thinking': False})])
  if found is not None:
    raise ValueError(found[0])


def check_all(template: str, conversations: Sequence[Any], variables: dict[str, Any]) -> None:
  """Renders conversations.

  Args:
    template: a chat template.
    conversations: lists of messages.
    variables: what else it may read; JSON content, or what can be written as a text.

  Raises:
    ValueError: see `check`; says which conversation.
  """
  found = _problem(template, conversations, [variables])
  if found is not None:
    raise ValueError(f'{found[0]}, with {str(conversations[found[1]])[:200]}')


def _problem(template: str, conversations: Sequence[Any], variables: list[dict[str, Any]]
             ) -> tuple[str, int] | None:
  """(what is wrong, with which conversation) of the first with which something is, or None."""
  given = json.dumps([template, conversations, variables], default=str)
  try:
    done = subprocess.run([sys.executable, '-P', __file__], input=given, capture_output=True,
                          text=True, timeout=WALL_S)
    status, written = done.returncode, done.stdout
  except subprocess.TimeoutExpired as e:
    status, written = -1, (e.stdout or b'').decode()
  case = max(written.count('\n') - 1, 0) // len(variables)
  if status == TOO_LARGE:
    return f'it writes a text without end, or needs more than {MEMORY_BYTES // 2**20} MiB', case
  if status < 0:  # a signal, such as that of the limit
    return f'it does not end within {CPU_S} seconds', case
  return None


class _Generation(ext.Extension):
  """The tag that transformers adds, as a block that does nothing."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    return nodes.Scope(parser.parse_statements(('name:endgeneration',), drop_needle=True),
                       lineno=line)


def _main() -> None:
  given = sys.stdin.read()
  template, conversations, variables = json.loads(given)
  limit = CPU_S + math.ceil(TOTAL_CPU_S * len(conversations))
  resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
  with contextlib.suppress(ValueError, OSError):  # not every system has this limit
    size = MEMORY_BYTES + 32 * len(given)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
  environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, 'jinja2.ext.loopcontrols'])

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment.globals |= {'raise_exception': refuse, 'strftime_now': lambda form: '1 Jan 2026'}
  try:
    compiled = environment.from_string(template)
  except MemoryError:
    sys.exit(TOO_LARGE)
  except Exception:  # whoever renders with it will see
    return
  for messages in conversations:
    for more in variables:
      print(flush=True)  # how far it came
      signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal ends the process
      try:
        text = compiled.render(messages=messages, **{'tools': None, 'documents': None, **more})
      except MemoryError:
        sys.exit(TOO_LARGE)
      except Exception:  # a template may raise anything
        continue
      if len(text) > CHARACTERS and len(text) > CHARACTERS + 10 * len(str(messages)):
        sys.exit(TOO_LARGE)


if __name__ == '__main__':
  _main()
