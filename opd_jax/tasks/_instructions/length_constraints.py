"""How many words, sentences and paragraphs."""

from __future__ import annotations

import re

from opd_jax.tasks._instructions._relation import Relation, holds

# What a dot behind does not end a sentence.
_ABBREVIATION = re.compile(
    r'(?:^|[\s("\'])(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|vs|etc|e\.g|i\.e|cf|No|Vol|Fig|Inc|Ltd|'
    r'Co|Corp|Gen|Col|Lt|Capt|Rev|Hon|Gov|Sen|Rep|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|'
    r'[ap]\.m|Ph\.D|U\.S|U\.K)\.$')


def number_words(text: str, *, num_words: int, relation: Relation) -> bool:
  """Asks how many words there are: runs of letters, digits and underscores."""
  return holds(len(re.findall(r'\w+', text)), relation, num_words)


def number_sentences(text: str, *, num_sentences: int, relation: Relation) -> bool:
  """Asks how many sentences there are."""
  return holds(_count_sentences(text), relation, num_sentences)


def _count_sentences(text):
  """Counts what ends in '.', '!', '?' or an ellipsis before white space, and what is left. The dot
  of an abbreviation or an initial ends none, unless the text does."""
  count, begin = 0, 0
  for match in re.finditer(r'[.!?\u2026]+["\'\u201d\u2019)\]*_]*(?=\s|$)', text):
    sentence = text[begin:match.end()]
    if match[0] == '.' and _ABBREVIATION.search(sentence) and text[match.end():].strip():
      continue
    if re.search(r'\w', sentence):
      count, begin = count + 1, match.end()
  return count + bool(re.search(r'\w', text[begin:]))


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
  """Asks for so many paragraphs with '***' between them; none inside may be empty."""
  first, *middle, last = parts if len(parts := text.split('***')) > 1 else [text, '']
  if not all(part.strip() for part in middle):
    return False
  return bool(first.strip()) + len(middle) + bool(last.strip()) == num_paragraphs


def nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int,
                             first_word: str) -> bool:
  """Asks for so many paragraphs with an empty line between them, and for the word, whatever its
  case, that begins the n-th (from 1)."""
  parts = text.split('\n\n')
  count = sum(bool(part.strip()) for part in parts)
  if not 1 <= nth_paragraph <= count or not parts[nth_paragraph - 1].strip():
    return False
  word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
  begins = re.match(r'[^.,?!\'"]*', word)[0]
  return count == num_paragraphs and begins.lower() == first_word.lower()
