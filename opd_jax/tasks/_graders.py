r"""Grades answers by the answer that is known.

Two numbers are compared as numbers (1,000 is 1000.0, \frac{1}{2} is 0.5) and anything else as text,
whatever its case and white space. The answer is looked for in the same way in the completion and in
what it is compared with, so that a worked solution will do there.
"""

from __future__ import annotations

import fractions
import re

NUMBER = r'(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+'


def grade(grader: str, answer: str, text: str) -> float:
  """Returns 1.0 if `text` has the right answer, else 0.0; `grader` is a name of `FIND`."""
  find = FIND[grader]
  found, wanted = find(text), find(answer)
  return float(found is not None and same_answer(found, answer if wanted is None else wanted))


def last_box(text: str) -> str | None:
  r"""Finds what is between the braces of the last \boxed{...}; None without one that is closed."""
  start = text.rfind(r'\boxed{')
  if start < 0:
    return None
  depth = 0
  for i in range(start + len(r'\boxed'), len(text)):
    depth += {'{': 1, '}': -1}.get(text[i], 0)
    if not depth:
      return text[start + len(r'\boxed{'):i].strip()
  return None


def last_number(text: str) -> str | None:
  """Finds the last number of a text: 3, -1,000.5 or 3/4. A minus after a word or a number ('7-3')
  is an operation."""
  found = re.findall(rf'(?:(?<![\w)\]}}.])[-\u2212])?(?:{NUMBER})(?:/(?:{NUMBER}))?', text)
  return found[-1] if found else None


def same_answer(a: str, b: str) -> bool:
  """Tells whether two answers are equal: as numbers where both are, else as texts."""
  numbers = _number(a), _number(b)
  if None not in numbers:
    return numbers[0] == numbers[1]
  a, b = (re.sub(r' ?([^\w ]) ?', r'\1', _plain(x)) for x in (a, b))  # '(1, 2)' is '( 1,2 )'
  return a == b


def _plain(text):
  r"""Without what changes nothing in LaTeX ($, \left, thin spaces), case and white space."""
  text = re.sub(r'\$|\\[!,;: ]|\\(?:left|right)(?![a-zA-Z])', '', text)
  text = re.sub(r'\\[dt]frac', r'\\frac', text)
  return ' '.join(text.casefold().split()).rstrip('.')


def _number(text):
  """As a fraction, exactly; None if it is no number (or too long to be meant as one)."""
  text = _plain(text).replace('\u2212', '-').replace(r'\%', '').removesuffix('%')
  text = re.sub(r'\{,\}|(?<=\d),(?=\d{3}(?!\d))', '', text)
  text = re.sub(r'\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}', r'\1/\2', text).strip()
  match = re.fullmatch(r'([+-]?(?:\d+\.?\d*|\.\d+))(?:/(-?(?:\d+\.?\d*|\.\d+)))?', text)
  if match is None or len(text) > 100:
    return None
  below = fractions.Fraction(match[2] or 1)
  return fractions.Fraction(match[1]) / below if below else None


# Where a grader looks for the answer: a function (text) -> the answer, or None.
FIND = {'exact': str.strip, 'boxed': last_box, 'last_number': last_number}
