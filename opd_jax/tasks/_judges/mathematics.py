r"""Judges mathematical answers, LaTeX as it stands in a \boxed{}: sympy may not come back. Run by
`serve.py`."""

from __future__ import annotations

import functools
from typing import Any

import math_verify


@functools.lru_cache(maxsize=10_000)  # an answer is known for all samples of its prompt
def parse(text: str) -> list[Any]:
  r"""Reads what stood in a \boxed{}: as sympy's expressions, and as text."""
  return math_verify.parse(rf'\boxed{{{text}}}', parsing_timeout=None)


def judge(wanted: str, found: str) -> bool:
  """Tells whether two answers are equal."""
  return bool(math_verify.verify(parse(wanted), parse(found), timeout_seconds=None))
