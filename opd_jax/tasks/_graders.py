r"""Grades answers by the answer that is known.

The answer is looked for in the same way in the completion and in what it is compared with, so that
a worked solution will do there. Two numbers are compared exactly, as numbers (1,000 is 1000.0,
\frac12 is 0.5), and equal texts are equal, whatever their case and white space. 'exact' and
'choice' know no more than that; the others ask `math-verify` about the rest: expressions, sets,
intervals, matrices.
"""

from __future__ import annotations

from collections.abc import Callable
import fractions
import re

from opd_jax.tasks import _math

NUMBER = r'(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+'
_GROUP = r'(?:\{[^{}]*\}|\d)'
_LATEX = rf'(?:\\[dtc]?frac\s*{_GROUP}\s*{_GROUP}|\\sqrt(?:\[\d+\])?\s*{_GROUP})'
# A number with what belongs to it: a sign, a fraction (3/4, 3 1/2, 3\frac{1}{2}), a root, a power.
# A minus after a word or a number ('7-3') is an operation.
_QUANTITY = (rf'(?:(?<![\w)\]}}.])[-\u2212])?(?:\d+\s+(?=\d+/\d))?(?:{_LATEX}|{NUMBER})'
             rf'(?:\s?{_LATEX}|/(?:{NUMBER})|\.\d+|\s*\^\s*(?:\{{[^{{}}]*\}}|\d+))*')
_ATTACHED = r'[\^_]\s*(?:\{[^{}]*\}|\w+)'  # of x^2 and x_2: no number of its own
_TEXT = r'\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}'
_SPELLINGS = {
    '\u2212': '-', '\u00b0': r'^\circ', '\u03c0': r'\pi ', '\u221e': r'\infty ',
    '\u00d7': r'\times ', '\u22c5': r'\cdot ', '\u00b7': r'\cdot ', '\u2264': r'\le ',
    '\u2265': r'\ge ', '\u222a': r'\cup ', '\u00b1': r'\pm ', '~': ' '}
_REWRITES = tuple((re.compile(pattern), to) for pattern, to in (
    (r'\\(?:left|right)\.', ''),
    (r'\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])', ''),
    (r'(?<!\\)\\[!,;:]', ''), (r'(?<!\\)\\ ', ' '),  # spaces; in '\\ ' they end the row of a matrix
    (r'\\?\$', ''), (r'\\[dtc]frac', r'\\frac'), (r'\\lbrace', r'\\{'), (r'\\rbrace', r'\\}'),
    (r'\\varnothing', r'\\emptyset'), (r'\s*\\\\\s*$', ''),
    (r'\\degree(?![a-zA-Z])|\s*\^\s*\{?\s*\\circ\s*\}?', r'^{\\circ}'),
    (r'\\frac\s*(\\[a-zA-Z]+)', r'\\frac{\1}'),
    (r'(?<![\d./])(\d+)\s+(\d+)/(\d+)(?![\d/])', r'\1\\frac{\2}{\3}'),  # 3 1/2
    (r'(?<=\d)\{,\}(?=\d{3})', ','), (r'(?<=\d)\s+(?=[a-z](?![a-zA-Z]))', '')))  # 1{,}000; 4 i
_BASE = re.compile(r'\d[0-9A-Z]*_\{?(\d+)\}?')


def grade(grader: str, answers: list[str], text: str) -> float:
  """Returns 1.0 if `text` has one of the right answers, else 0.0; `grader` is a name of `FIND`."""
  find = FIND[grader]
  same = same_text if grader in ('exact', 'choice') else same_answer
  found = find(text)
  if not found:
    return 0.0
  wanted = ((find(answer), answer) for answer in answers)
  return float(any(same(whole if short is None else short, found) for short, whole in wanted))


def last_box(text: str) -> str | None:
  r"""Finds what is in the last \boxed{...} or \fbox{...}, or the digit after \boxed; None without
  one that is closed."""
  starts = list(re.finditer(r'\\(?:boxed|fbox)(?![a-zA-Z])\s*', text))
  if not starts:
    return None
  start, depth = starts[-1].end(), 0
  if text[start:start + 1] != '{':
    return text[start:start + 1].strip() or None
  for i in range(start, len(text)):
    depth += {'{': 1, '}': -1}.get(text[i], 0)
    if not depth:
      return text[start + 1:i].strip()
  return None


def last_number(text: str) -> str | None:
  r"""Finds the last number of a text with its fraction, root and power: 3, -1,000.5, 3/4,
  \frac{1}{2}, 2^{10}. What stands in an exponent or an index is none."""
  last = None
  for match in re.finditer(rf'({_QUANTITY})|{_ATTACHED}', text):
    last = match[1] or last
  return last


def answer_line(text: str) -> str | None:
  """Finds what the last line of the form 'Answer: ...' says, whatever its case and its stars."""
  found = re.findall(r'(?im)^[ \t>*_#]*(?:final\s+)?answer\**\s*:[ \t*_]*(\S.*?)[ \t*_.]*$', text)
  return found[-1] if found else None


def choice(text: str) -> str | None:
  r"""Finds the letter of a multiple choice, in the last \boxed{} or else in the last line 'Answer:
  ...': B, (B), B) with the text of the choice, \text{B}."""
  found = last_box(text) or answer_line(text) or text
  found = re.sub(_TEXT, r'\1', found)
  match = re.fullmatch(r'(?s)[\s$*(\[]*([A-Z])(?:\s*[)\].:].*|[\s$*]*)', found)
  return match[1] if match else None


def same_text(wanted: str, found: str) -> bool:
  """Tells whether two answers are equal as numbers, where both are, else as texts."""
  same = _same_value(wanted, found)
  return _plain(wanted) == _plain(found) if same is None else same


def same_answer(wanted: str, found: str) -> bool:
  """Tells whether two answers mean the same."""
  same = _same_value(wanted, found)
  if same is not None or not _plain(found):
    return bool(same)
  if _plain(wanted) == _plain(found):
    return True
  # Most wrong answers to a question of numbers need nobody who knows algebra.
  if _value(wanted) and not re.search(r'[\d\\\u03c0]', found):
    return False
  wanted, found = _tidy(wanted), _tidy(found)
  bases = _BASE.fullmatch(wanted), _BASE.fullmatch(found)
  if all(bases) and bases[0][1] != bases[1][1]:
    return False  # 1011_2 is not 1011_3, of which math-verify sees 1011
  if '%' in wanted and '%' in found:
    wanted, found = (re.sub(r'\s*\\?%', '', x) for x in (wanted, found))
  return _math.equal(wanted, found)


def _tidy(text):
  r"""In one spelling, without what changes nothing in LaTeX ($, \left, thin spaces)."""
  text = ' '.join(text.split())
  for character, spelling in _SPELLINGS.items():
    text = text.replace(character, spelling)
  for pattern, to in _REWRITES:
    text = pattern.sub(to, text)
  text = re.sub(r'\\(?:text|mbox)\s*\{\s*\}', '', text)  # of \text{\$}
  return text.strip().rstrip('.').strip()


def _plain(text):
  """As a text: case, white space and fonts do not count."""
  text = re.sub(_TEXT, r'\1', _tidy(text))
  text = ' '.join(text.casefold().split()).rstrip('.')
  return re.sub(r' ?([^\w ]) ?', r'\1', text)  # '(1, 2)' is '( 1,2 )'


def _same_value(wanted, found):
  """Whether two numbers are equal; None if one is no number. 25 % is 25 and 0.25 where the other is
  no percentage."""
  a, b = _value(wanted), _value(found)
  if a is None or b is None:
    return None
  return a[0] == b[0] or a[1] != b[1] and a[0] / (100 if a[1] else 1) == b[0] / (100 if b[1] else 1)


def _value(text):
  """(the number that a text is, exactly; whether it is of per cent); None if it is no number."""
  if re.fullmatch(r'\s*-?\d{1,100}\s*', text):  # most of them, and most of the time
    return fractions.Fraction(int(text)), False
  if len(text) > 200:  # too long to be meant as one
    return None
  text = re.sub(_TEXT, r'\1', _tidy(text)).strip()
  short = re.sub(r'\s*(?:\\?%|percent)$', '', text)
  power = re.fullmatch(r'(.*?)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?(-?\d{1,3})\}?', short)
  number = _number(power[1] if power else short)
  return None if number is None else (
      number * fractions.Fraction(10) ** int(power[2] if power else 0), short != text)


def _number(text):
  """A number, or a fraction of two, as a fraction; None if it is neither."""
  text = re.sub(r'(?<=\d),(?=\d{3}(?!\d))', '', text)
  sign, text = re.fullmatch(r'(?s)([-+]?)\s*(.*)', text).groups()
  latex = re.fullmatch(r'(\d*)\s*\\frac\s*(?:\{\s*(-?[\d.]+)\s*\}|(\d))\s*'
                       r'(?:\{\s*(-?[\d.]+)\s*\}|(\d))', text)
  plain = re.fullmatch(r'(\d+\.?\d*|\.\d+)\s*(?:/\s*(-?[\d.]+))?', text)
  if latex:
    whole, above, below = latex[1] or 0, latex[2] or latex[3], latex[4] or latex[5]
  elif plain:
    whole, above, below = 0, plain[1], plain[2] or 1
  else:
    return None
  try:
    value = fractions.Fraction(whole) + fractions.Fraction(above) / fractions.Fraction(below)
  except (ValueError, ZeroDivisionError):  # '1.2.3', '3/0'
    return None
  return -value if sign == '-' else value


# Where a grader looks for the answer: a function (text) -> the answer, or None.
FIND: dict[str, Callable[[str], str | None]] = {
    'exact': str.strip, 'boxed': last_box, 'last_number': last_number, 'answer_line': answer_line,
    'choice': choice}
