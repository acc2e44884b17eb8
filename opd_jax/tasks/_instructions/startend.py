"""How a text begins and ends."""

from __future__ import annotations


def end_checker(text: str, *, end_phrase: str) -> bool:
  """Asks for a text that ends with the phrase, whatever its case, and quotation marks around it."""
  return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
  """Asks for a text in double quotation marks."""
  text = text.strip()
  return len(text) > 1 and text[0] == text[-1] == '"'
