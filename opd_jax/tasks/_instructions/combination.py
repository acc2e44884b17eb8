"""Two answers, or the question again before the answer."""

from __future__ import annotations


def two_responses(text: str) -> bool:
  """Asks for two different answers with six stars between them."""
  parts = text.split('******')
  answers = [part.strip() for part in parts]
  if not all(answers[1:-1]):
    return False
  given = [answer for answer in answers if answer]
  return len(given) == 2 and given[0] != given[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
  """Asks for a text that begins with the prompt, whatever its case."""
  return text.strip().lower().startswith(prompt_to_repeat.strip().lower())
