"""What stands in the columns of a table: texts, answers, conversations; and which columns they are.
"""

from __future__ import annotations

import dataclasses
import json
import math

from opd_jax.tasks._tables import Part, Table, shown

AUTO = 'auto'
# What people call the columns. Guessed is a column only where it is the only candidate.
PROMPTS = ('prompt', 'question', 'problem', 'instruction', 'query', 'input')
CONVERSATIONS = ('messages', 'conversations', 'conversation', 'chat')
ANSWERS = ('answer', 'answers', 'final_answer', 'expected_answer', 'ground_truth',
           'reward_model.ground_truth', 'gold', 'target', 'solution')
# Of conversations of {'from', 'value'}, what `role` is elsewhere.
SPEAKERS = {'human': 'user', 'gpt': 'assistant', 'chatgpt': 'assistant', 'bot': 'assistant',
            'model': 'assistant'}


def guess(table: Table, part: Part, graded: bool) -> tuple[Part, list[str]]:
  """Puts the names of columns in the place of 'auto'; returns what to say about it too.

  Raises:
    ValueError: no column, or more than one, can be that of prompts; more than one that of answers,
      or none though they are to be `graded`.
  """
  told = []
  if part.prompt_column == AUTO:
    named = [name for name in table.names if name in PROMPTS + CONVERSATIONS]
    kinds = {name: _kind(table, name) for name in named or table.names}
    found = [name for name, kind in kinds.items() if kind]
    if len(found) != 1:
      why = f'it could be any of {found}' if found else 'no column has texts or conversations'
      raise ValueError(f'{part.field("prompt_column")}: {why} of {part.source!r}; allowed: one of '
                       f"{found or table.names}, or '' and a messages_column")
    name = kinds[found[0]]
    part = dataclasses.replace(part, **{'prompt_column': '', name: found[0]})
    told.append(f'{part.prefix}{name} is {found[0]!r} (guessed)')
  if part.answer_column == AUTO:
    taken = (part.prompt_column, part.messages_column, part.completion_column)
    found = [name for name in ANSWERS if name not in taken and _is_there(table, name)]
    if len(found) > 1 or graded and not found:
      why = f'it could be any of {found}' if found else f'no column is called any of {ANSWERS}'
      raise ValueError(f'{part.field("answer_column")}: {why} of {part.source!r}; allowed: one of '
                       f"{found or table.names}, or '' with grader='none'")
    part = dataclasses.replace(part, answer_column=found[0] if found else '')
    told.append(f'{part.prefix}answer_column is {found[0]!r} (guessed)' if found
                else 'no answers, nothing is graded')
  return part, told


def _kind(table, name):
  """'prompt_column' for a column of texts, 'messages_column' for one of conversations, or ''."""
  first = next((v for v in table.column(name) if v is not None), None)
  if isinstance(first, list) and first and isinstance(first[0], dict):
    return 'messages_column'
  return 'prompt_column' if isinstance(first, str) else ''


def _is_there(table, name):
  """Whether there is such a column, or such a field in the first row."""
  column, _, inner = name.partition('.')
  if not inner or column not in table.names or not len(table):
    return name in table.names
  first, = table.select([0]).column(column)
  return isinstance(first, dict) and inner in first


def _refuse(table, part, name, place, value, allowed):
  raise ValueError(f'{part.field(name)}: {table.where(place)} has {shown(value)}; allowed: '
                   f'{allowed}')


def texts(table: Table, part: Part, name: str) -> list[str]:
  """Reads the texts of the column that the field `name` of a part names.

  Raises:
    ValueError: a row has something else.
  """
  values = table.column(getattr(part, name), part.field(name))
  for i, value in enumerate(values):
    if not isinstance(value, str):
      hint = ', or messages_column for a conversation' if isinstance(value, list) else ''
      _refuse(table, part, name, i, value, f"['str']{hint}")
  return values


def answers(table: Table, part: Part) -> list[str] | list[list[str]]:
  """Reads the accepted answers: a text or a number in every row, or a list of some; where a row has
  a list, all are lists.

  Raises:
    ValueError: a row has no answer, or something else.
  """
  out = []
  for i, value in enumerate(
      table.column(part.answer_column, part.field('answer_column'))):
    several = value if isinstance(value, list) else [value]
    for v in several or [None]:
      number = isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
      if not number and (not isinstance(v, str) or not v.strip()):
        _refuse(table, part, 'answer_column', i, value,
                "['str', 'int', 'float'] that is not empty, or a list of several accepted ones; "
                f"rows without an answer are left out by filters=('{part.answer_column} != None',)")
    out.append([v if isinstance(v, str) else json.dumps(v) for v in several])
  return out if any(len(a) > 1 for a in out) else [a for a, in out]


def conversations(table: Table, part: Part, suffix: str
                  ) -> tuple[list[list[dict[str, str]]], list[str] | None]:
  """Reads conversations, each up to the user's last turn, which gets the suffix; and the
  assistant's answers to them, None where there are none.

  Raises:
    ValueError: a row that is no conversation, or only some with an answer.
  """
  name, prompts, spoken = 'messages_column', [], []
  for i, value in enumerate(table.column(part.messages_column, part.field(name))):
    turns = [_turn(table, part, i, m) for m in _listed(table, part, i, value)]
    roles = [t['role'] for t in turns]
    if turns and roles[-1] == 'assistant':
      spoken.append(turns.pop()['content'])
    if not turns or turns[-1]['role'] != 'user':
      raise ValueError(f'{part.field(name)}: {table.where(i)} has the roles {roles}; allowed: the '
                       "last one is 'user', or 'user' and then 'assistant'")
    turns[-1]['content'] += suffix
    prompts.append(turns)
  if spoken and len(spoken) != len(prompts):
    raise ValueError(f'{part.field(name)}: {len(spoken)} of {len(prompts)} conversations end with '
                     "'assistant'; allowed: all of them or none")
  return prompts, spoken or None


def _listed(table, part, i, value):
  """The messages of a conversation; in CSV it can only be a text of JSON."""
  if isinstance(value, str) and value.lstrip().startswith('['):
    try:
      value = json.loads(value)
    except (ValueError, RecursionError):
      pass
  if not isinstance(value, list):
    _refuse(table, part, 'messages_column', i, value, "['list'] of messages")
  return value


def _turn(table, part, i, message):
  """{'role', 'content'} of a message, which may also be of {'from', 'value'}, or have its content
  in parts of text."""
  # What is there only because other messages have it (a truth value or a 0 says something).
  given = ({k: v for k, v in message.items() if v not in (None, '', [], {})}
           if isinstance(message, dict) else {})
  names = ('from', 'value') if 'from' in given and 'role' not in given else ('role', 'content')
  role, content = (given.pop(name, '') for name in names)
  if names[0] == 'from' and isinstance(role, str):
    role = SPEAKERS.get(role, role)
  if isinstance(content, list) and all(map(_is_text, content)):
    content = ''.join(p['text'] for p in content)
  if not role or not isinstance(role, str) or not isinstance(content, str) or given or (
      message.get(names[1]) is None):
    raise ValueError(
        f'{part.field("messages_column")}: {table.where(i)} has the message {shown(message)}; '
        "allowed: a 'role' and a 'content' (or 'from' and 'value'), both texts, or parts of the "
        "type 'text', and nothing else")
  return {'role': role, 'content': content}


def _is_text(part):
  """Whether a part of a content is text and nothing more."""
  return isinstance(part, dict) and isinstance(part.get('text'), str) and (
      part.get('type') in ('text', None)
      and not {name for name, value in part.items() if value} - {'type', 'text'})
