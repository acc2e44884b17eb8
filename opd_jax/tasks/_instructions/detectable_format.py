"""Lists, sections, titles, JSON."""

from __future__ import annotations

import json
import re

ANSWERS = ('My answer is yes.', 'My answer is no.', 'My answer is maybe.')


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
  """Asks for exactly so many bullet points: lines that begin with '*' and no second one, or '-'."""
  return sum(len(re.findall(rf'(?m)^\s*{point}.*$', text))
             for point in (r'\*[^*]', '-')) == num_bullets


def constrained_response(text: str) -> bool:
  """Asks for one of three answers, wherever it stands."""
  return any(answer in text for answer in ANSWERS)


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
  """Asks for at least so many parts between single or double stars, each in one line."""
  single = (part.strip('*') for part in re.findall(r'\*[^\n*]*\*', text))
  double = (part[2:-2] for part in re.findall(r'\*\*[^\n*]*\*\*', text))
  return sum(bool(part.strip()) for part in (*single, *double)) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
  """Asks for at least so many headings of the form 'SECTION 1'."""
  return len(re.findall(rf'{re.escape(section_spliter)}\s?\d+', text)) >= num_sections


def json_format(text: str) -> bool:
  """Asks for JSON and nothing else, but for the fence of a block of code."""
  text = re.sub(r'^```(?:json|Json|JSON)?', '', text.strip()).removesuffix('```').strip()
  try:
    json.loads(text)
  except (ValueError, RecursionError):
    return False
  return True


def title(text: str) -> bool:
  """Asks for a title, such as <<poem of joy>>."""
  return any(found.strip('<>').strip() for found in re.findall(r'<<[^\n]+>>', text))
