"""Which language a text is in, as `langdetect` says."""

from __future__ import annotations

import importlib.util

NEEDED_BY = ('change_case:english_capital', 'change_case:english_lowercase',
             'language:response_language')


def require(name: str) -> None:
  """Checks that `langdetect` is installed, if the instruction called `name` needs it.

  Raises:
    ValueError: it is not; says how to install it.
  """
  if name in NEEDED_BY and importlib.util.find_spec('langdetect') is None:
    raise ValueError(f"{name}, which needs langdetect, and that is not installed; allowed: `pip "
                     "install -e '.[ifeval]'`, or prompts without it")


def is_in(text: str, language: str) -> bool:
  """Tells whether the text is in the language, a code such as 'en'; yes where nobody can tell, as
  of a text of digits."""
  import langdetect  # an extra
  langdetect.DetectorFactory.seed = 0  # it draws, and must not say something else tomorrow
  try:
    return langdetect.detect(text) == language
  except langdetect.LangDetectException:
    return True
