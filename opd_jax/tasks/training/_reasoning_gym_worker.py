"""Judges answers to problems of `reasoning-gym`, one a line, in a process of its own: some of its
verifiers evaluate what they are given, and may not come back.

Run as a script by `reasoning_gym.py`, in the way of `_math_worker.py`. Reads lines of JSON [data
set, problem, answer], the problem pickled and in base 64; writes the score of each.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
import os
import pickle
import resource
import signal
import sys
from typing import Any

import reasoning_gym

MEMORY_BYTES = 4 << 30
source = functools.cache(functools.partial(reasoning_gym.create_dataset, size=1, seed=0))


def score(name: str, problem: str, answer: str) -> float:
  """Returns the library's score, 0 to 1; 0 where it fails on an answer, as some do on what is none.
  """
  entry: dict[str, Any] = pickle.loads(base64.b64decode(problem))  # the run made it
  try:
    return float(min(max(source(name).score_answer(answer, entry), 0.0), 1.0))
  except Exception:  # whatever a parser of theirs raises
    return 0.0


def main(cpu_seconds: float) -> None:
  """Answers until its input ends."""
  with contextlib.suppress(ValueError, OSError):  # some systems know no such limit
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  logging.disable(logging.CRITICAL)
  answers, nowhere = os.fdopen(os.dup(1), 'w'), os.open(os.devnull, os.O_WRONLY)
  print('ready', file=answers, flush=True)
  os.dup2(nowhere, 1)
  os.dup2(nowhere, 2)
  for line in sys.stdin:
    name, problem, answer = json.loads(line)
    source(name)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    got = score(name, problem, answer)
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(got), file=answers, flush=True)


if __name__ == '__main__':
  main(float(sys.argv[1]))
