"""Chat templates: the text of conversations, as transformers writes it."""

from __future__ import annotations

import json
from typing import Any

from opd_jax.data import render_probe

# Ends with an expression, after which Jinja leaves line breaks alone.
FIXED_DATE = '{%- macro strftime_now(format) %}{{ opd_date }}{% endmacro %}{{ "" }}'


def render(style: Any, conversations: list[Any], add_generation_prompt: bool = True,
           unknown: bool = False) -> list[str]:
  """Renders conversations in the template of a `prompts.Style`.

  Args:
    style: has a `chat`.
    conversations: lists of messages.
    add_generation_prompt: whether the assistant's turn begins at the end.
    unknown: whether nobody knows what they are like. Then they are rendered elsewhere first, where
      a template that comes to no end with one of them can be stopped.

  Raises:
    ValueError: the template refuses a conversation, fails, or comes to no end.
  """
  known = {'add_generation_prompt': add_generation_prompt}
  if style.thinking != 'default':
    known['enable_thinking'] = style.thinking == 'on'
  try:
    template, tokens = style.chat.get_chat_template(), style.chat.special_tokens_map
    render_probe.check(template, json.dumps(tokens, default=str))
    if style.date:  # in the place of the clock that transformers offers to templates
      known['opd_date'] = style.date
      template = FIXED_DATE + template
    if unknown:
      render_probe.check_all(template, conversations, {**tokens, **known})
    return style.chat.apply_chat_template(conversations, chat_template=template, tokenize=False,
                                          **known)
  except Exception as e:  # a template may refuse a role, divide by zero, call itself without end
    raise ValueError(
        f'prompt.template={style.template!r}: the chat template in {style.chat.name_or_path!r} '
        f'refuses a conversation with prompt.system={style.system!r}: {type(e).__name__}: {e}; '
        'allowed: what the template supports') from e
