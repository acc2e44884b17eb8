"""The language of a text."""

from __future__ import annotations

from opd_jax.tasks._instructions import _detect


def response_language(text: str, *, language: str) -> bool:
  """Asks for a language, by its code, such as 'de'."""
  return _detect.is_in(text, language)
