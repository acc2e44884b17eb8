"""Control tokens that a text writes out, such as '<|im_end|>' in what a user says.

A tokenizer makes tokens of them wherever they stand: a prompt could end its own turn and speak for
the assistant. A text may be no more than text, so there are three choices: 'refuse'; 'text', which
encodes them like any other characters; 'tokens', for texts that write them on purpose, such as
prompts that were rendered before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import json
import re
from typing import Any

import tokenizers

CHOICES = ('refuse', 'text', 'tokens')
# What stands around the thinking of models that think before they answer: text, wherever it stands.
THOUGHTS = (('<think>', '</think>'), ('[THINK]', '[/THINK]'), ('<thinking>', '</thinking>'),
            ('<thought>', '</thought>'), ('<reasoning>', '</reasoning>'),
            ('<|begin_of_thought|>', '<|end_of_thought|>'))
MARK = '\ue0f0'  # a character without a meaning (private use), which no text has


@dataclasses.dataclass(frozen=True)
class Guard:
  """Treats control tokens in texts as `choice` says.

  Attributes:
    tokenizer: a Hugging Face tokenizer.
    names: its control tokens: see `make_guard`.
    choice: one of CHOICES.
  """

  tokenizer: Any
  names: tuple[str, ...]
  choice: str

  @property
  def _pattern(self):
    return re.compile('|'.join(map(re.escape, self.names)) or '(?!)')

  def count(self, prompts: Iterable[Any]) -> int:
    """Counts the control tokens in texts and conversations."""
    return sum(len(self._pattern.findall(text)) for p in prompts for text in texts(p))

  def hide(self, prompts: list[Any], what: str) -> list[Any]:
    """Returns texts or conversations in which a template and a tokenizer see no control token
    (choice 'text'); refuses them, or leaves them as they are.

    Raises:
      ValueError: there are some (choice 'refuse'); names the first example of `what`.
    """
    pattern = self._pattern
    if self.choice == 'tokens':
      return prompts
    if self.choice == 'refuse':
      found = [(i, m[0]) for i, p in enumerate(prompts) for t in texts(p)
               for m in pattern.finditer(t)]
      if found:
        where, first = found[0]
        raise ValueError(
            f"prompt.control_tokens='refuse': {len({i for i, _ in found})} of {len(prompts)} "
            f'{what} contain control tokens, {len(found)} in all, the first is {first!r} in '
            f"example {where}; allowed: texts without, 'text' to encode them like other "
            "characters, or 'tokens' to let them be tokens")
      return prompts
    if any(MARK in text for p in prompts for text in texts(p)):
      raise ValueError(f"prompt.control_tokens='text': {what} contain the character {MARK!r}, "
                       "which marks control tokens; allowed: texts without, 'refuse' or 'tokens'")
    numbers = {name: f'{MARK}{i}{MARK}' for i, name in enumerate(self.names)}
    return [_map(lambda t: pattern.sub(lambda m: numbers[m[0]], t), p) for p in prompts]

  def show(self, text: str) -> str:
    """Returns a text as it was before `hide`."""
    if self.choice != 'text':
      return text
    return re.sub(f'{MARK}(\\d+){MARK}', lambda m: self.names[int(m[1])], text)

  def encode(self, rendered: list[str], special_tokens: bool) -> list[list[int]]:
    """Encodes rendered texts with what `hide` left in them (choice 'text'): what a template wrote
    is a token, and what a text wrote is not.

    Raises:
      ValueError: the tokenizer has no such form.
    """
    renamed = {name: f'{MARK}{name}{MARK}' for name in self.names}
    inner = _rename(self.tokenizer, renamed)
    plain = [self.show(self._pattern.sub(lambda m: renamed[m[0]], t)) for t in rendered]
    return [e.ids for e in inner.encode_batch(plain, add_special_tokens=special_tokens)]


def make_guard(tokenizer: Any, stop_tokens: tuple[int, ...], written: str, choice: str) -> Guard:
  """Makes the guard for a tokenizer: against tokens that it calls special, those that end a
  completion, and added ones that its template writes around a turn (`written`), which some
  tokenizers do not call special."""
  thoughts = {mark for pair in THOUGHTS for mark in pair}
  names = {t.content for i, t in tokenizer.added_tokens_decoder.items()
           if t.special or i in stop_tokens
           # Some tokenizers have added tokens of nothing but spaces or line breaks.
           or t.content.strip() and t.content in written and t.content not in thoughts}
  return Guard(tokenizer, tuple(sorted(filter(None, names), key=len, reverse=True)), choice)


def texts(prompt: Any) -> list[str]:
  """Lists what a prompt says: the text itself, or the roles and contents of a conversation."""
  if isinstance(prompt, str):
    return [prompt]
  return [m[part] for m in prompt for part in ('role', 'content')]


def _map(change: Callable[[str], str], prompt):
  if isinstance(prompt, str):
    return change(prompt)
  return [{**m, 'role': change(m['role']), 'content': change(m['content'])} for m in prompt]


def _rename(tokenizer, names):
  """A copy of the tokenizer whose control tokens have other names and the same ids."""
  spec = json.loads(tokenizer.backend_tokenizer.to_str())
  for added in spec['added_tokens']:
    added['content'] = names.get(added['content'], added['content'])
  model = spec['model']
  if model.get('unk_token') in names:
    model['unk_token'] = names[model['unk_token']]
  if isinstance(model['vocab'], dict):
    model['vocab'] = {names.get(token, token): i for token, i in model['vocab'].items()}
  else:  # a unigram model: pieces with their scores
    model['vocab'] = [[names.get(token, token), score] for token, score in model['vocab']]
  try:
    out = tokenizers.Tokenizer.from_str(json.dumps(spec))
  except Exception as e:  # the Rust side raises bare Exceptions
    raise ValueError(f"prompt.control_tokens='text' cannot be done with this tokenizer ({e}); "
                     "allowed: 'refuse' or 'tokens'") from e
  moved = [name for name, new in names.items()
           if out.token_to_id(new) != tokenizer.convert_tokens_to_ids(name)]
  if moved:
    raise ValueError("prompt.control_tokens='text' cannot be done with this tokenizer (it gives "
                     f"{moved} other ids); allowed: 'refuse' or 'tokens'")
  out.no_truncation()
  out.no_padding()
  return out
