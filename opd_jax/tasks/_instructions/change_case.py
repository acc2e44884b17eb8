"""Capital and small letters."""

from __future__ import annotations

import re

from opd_jax.tasks._instructions import _detect
from opd_jax.tasks._instructions._relation import Relation, holds


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: Relation
                           ) -> bool:
  """Asks how many words are in capitals; 'WELL-KNOWN' and 'U.S.' are one each, and so is 'I'."""
  words = re.findall(r"\w+(?:[-.'\u2019]\w+)*", text)
  return holds(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
  """Asks for English without a small letter."""
  return text.isupper() and _detect.is_in(text, 'en')


def english_lowercase(text: str) -> bool:
  """Asks for English without a capital letter."""
  return text.islower() and _detect.is_in(text, 'en')
