"""Placeholders and postscripts."""

from __future__ import annotations

import re


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
  """Asks for at least so many placeholders such as [address], each in one line."""
  return len(re.findall(r'\[[^\n\]]*\]', text)) >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
  """Asks for a postscript that begins with the marker, whatever its case; of 'P.S.' and 'P.P.S',
  spaces between the letters do not count."""
  spelled = {'P.P.S': r'p\.\s?p\.\s?s', 'P.S.': r'p\.\s?s\.'}
  marker = spelled.get(postscript_marker, re.escape(postscript_marker))
  return bool(re.search(marker, text, re.IGNORECASE))
