"""Judges answers to problems of `reasoning-gym`: some of its verifiers evaluate what they are
given, and may not come back. Run by `serve.py`."""

from __future__ import annotations

import base64
import functools
import pickle
from typing import Any

import reasoning_gym

source = functools.cache(functools.partial(reasoning_gym.create_dataset, size=1, seed=0))


def prepare(name: str, problem: str, answer: str) -> None:
  """Makes the data set, which may take longer than an answer."""
  source(name)


def judge(name: str, problem: str, answer: str) -> float:
  """Returns the library's score, 0 to 1; 0 where it fails on an answer, as some do on what is none.

  Args:
    name: of the data set.
    problem: pickled and in base 64.
    answer: what stood in <answer>.
  """
  entry: dict[str, Any] = pickle.loads(base64.b64decode(problem))  # the run made it
  try:
    return float(min(max(source(name).score_answer(answer, entry), 0.0), 1.0))
  except Exception:  # whatever a parser of theirs raises
    return 0.0
