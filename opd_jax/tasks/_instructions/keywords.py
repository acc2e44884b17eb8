"""Words and letters that a text must or must not have, whatever their case."""

from __future__ import annotations

import re

from opd_jax.tasks._instructions._relation import Relation, holds


def existence(text: str, *, keywords: list[str]) -> bool:
  """Asks for all keywords, be it within longer words."""
  return all(word.lower() in text.lower() for word in keywords)


def frequency(text: str, *, keyword: str, frequency: int, relation: Relation) -> bool:
  """Asks how often the keyword stands there, be it within longer words."""
  return holds(text.lower().count(keyword.lower()), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
  """Asks for none of the words, as words: a longer one that has it is fine."""
  return not any(re.search(rf'(?<!\w){re.escape(word)}(?!\w)', text, re.IGNORECASE)
                 for word in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: Relation) -> bool:
  """Asks how often the letter stands there."""
  return holds(text.lower().count(letter.lower()), let_relation, let_frequency)
