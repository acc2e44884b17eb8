"""Asks a judge about one question a line: python serve.py CPU_SECONDS FILE.

FILE is Python and has `judge`, a function of what a line holds that returns what JSON can hold; and
may have `prepare`, another, called before and not counted. Both files are run by their paths, so
that nothing of this package (and so no JAX) is imported. Writes 'ready', then a line of JSON for
each line of JSON [...] that it reads. A judgement that takes longer than CPU_SECONDS ends the
process: the default of SIGPROF, which no code in C can hold up and no `except` can catch. It counts
the time of this process alone, so that a busy machine gives no other verdicts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import resource
import signal
import sys

MEMORY_BYTES = 4 << 30  # 9^{9^9} would like more


def main(cpu_seconds: float, file: str) -> None:
  """Answers until its input ends."""
  spec = importlib.util.spec_from_file_location('judge', file)
  judge = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(judge)
  prepare = getattr(judge, 'prepare', lambda *question: None)
  with contextlib.suppress(ValueError, OSError):  # some systems know no such limit
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  logging.disable(logging.CRITICAL)
  # What a library prints must be no answer, nor fill up a pipe that nobody reads.
  answers, nowhere = os.fdopen(os.dup(1), 'w'), os.open(os.devnull, os.O_WRONLY)
  print('ready', file=answers, flush=True)
  os.dup2(nowhere, 1)
  os.dup2(nowhere, 2)
  for line in sys.stdin:
    question = json.loads(line)
    prepare(*question)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    verdict = judge.judge(*question)
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(verdict), file=answers, flush=True)


if __name__ == '__main__':
  main(float(sys.argv[1]), sys.argv[2])
