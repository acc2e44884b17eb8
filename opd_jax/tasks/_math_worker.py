r"""Judges mathematical answers, one a line, in a process of its own: sympy may not come back.

Run as a script by `_math.py`, and by the path of the file, so that nothing of this package (and so
no JAX) is imported. Reads lines of JSON [wanted, found], LaTeX as it stands in a \boxed{}; writes
'true' or 'false' for each. A judgement that takes longer than `cpu_seconds` ends the process: the
default of SIGPROF, which no code in C can hold up and no `except` can catch. It counts the time of
this process alone, so that a busy machine gives no other verdicts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

import math_verify

MEMORY_BYTES = 4 << 30  # 9^{9^9} would like more


@functools.lru_cache(maxsize=10_000)  # an answer is known for all samples of its prompt
def parse(text: str) -> list[Any]:
  r"""Reads what stood in a \boxed{}: as sympy's expressions, and as text."""
  return math_verify.parse(rf'\boxed{{{text}}}', parsing_timeout=None)


def main(cpu_seconds: float) -> None:
  """Answers until its input ends."""
  with contextlib.suppress(ValueError, OSError):  # some systems know no such limit
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  logging.disable(logging.CRITICAL)
  # What a library prints must be no answer, nor fill up a pipe that nobody reads.
  answers, nowhere = os.fdopen(os.dup(1), 'w'), os.open(os.devnull, os.O_WRONLY)
  print('ready', file=answers, flush=True)
  os.dup2(nowhere, 1)
  os.dup2(nowhere, 2)
  for line in sys.stdin:
    wanted, found = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    right = math_verify.verify(parse(wanted), parse(found), timeout_seconds=None)
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(bool(right)), file=answers, flush=True)


if __name__ == '__main__':
  main(float(sys.argv[1]))
