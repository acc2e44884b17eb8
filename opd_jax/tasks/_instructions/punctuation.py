"""Punctuation."""

from __future__ import annotations


def no_comma(text: str) -> bool:
  """Asks for no comma."""
  return ',' not in text
