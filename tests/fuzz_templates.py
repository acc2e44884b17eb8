"""Random chat templates, and conversations of every shape to render with them."""

from __future__ import annotations

import random
from typing import Any

import tiny

NUMBERS = ('0', '1', '3', '50', '99999', '10**9', '-1', 'messages|length',
           'messages[0].content|int')
CONDITIONS = (
    'true', 'messages|length > 4', "messages[0]['content']|length > 200", "'Q' in m['content']",
    "m.role == 'tool'", 'loop.index > 3', 'add_generation_prompt', 'not add_generation_prompt',
    'undefined_name', 'm.content is none', 'enable_thinking is defined', "messages[-1].role == 'x'",
    "'é' in messages[0]['content']", 'tools', 'documents', 'm.nothing.more', '1 / 0')
PIECES = (
    '{{ m.content }}', '{{ messages[7].content }}', '{{ messages[0].content }}', '{{ 1 / 0 }}',
    '{{ nowhere }}', '{{ nowhere.x }}', '{{ messages|tojson }}', "{{ raise_exception('no') }}",
    "{{ 'x' * (NUMBER) }}", "{{ ('x' * 1000) * (NUMBER) }}", '{{ range(NUMBER)|list|length }}',
    '{% for i in range(NUMBER) %}{{ i }}{% endfor %}',
    '{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}',
    '{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}',
    '{% macro g(n) %}{% if n %}{{ g(n - 1) }}{{ g(n - 1) }}{% endif %}{% endmacro %}{{ g(40) }}',
    "{% include 'x' %}", "{% import 'os' as o %}", "{{ ''.__class__.__mro__ }}",
    "{{ '%0999999d'|format(1) }}", "{{ strftime_now('%d') }}", '{% break %}', '{% continue %}',
    '{% generation %}x{% endgeneration %}', "{{ messages[0].content|int }}", '{{ messages|sort }}',
    "{{ 'x'.ljust(NUMBER) }}", "{{ messages.append(1) }}", "{% do messages.pop() %}",
    "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}", '{{ bos_token }}', '{{ eos_token }}',
    "{{ lipsum(n=1000) }}", "{{ cycler }}", "{{ dict(a=1) }}", "{{ self }}", "{{ m }}",
    "{{ m.content.split('x')[9] }}", "{{ m.content|replace('', 'xxxxxxxxxxxxxxxx') }}",
    "{{ m.tool_calls[0].function }}", '{{ tools|length }}', '{{ [].__len__() }}', '{{ 10 ** 10 }}',
    '{{ 9 ** 9 ** 9 }}', '{{ ' + '(' * 80 + '1' + ')' * 80 + ' }}', '\x00', '\ud7ff', '<|end|>',
    '<|over|>', '{{ "<|over|>" }}', '{{ m.content|upper }}', '{{ m.content[1:] }}', '{{ loop.x }}',
    '{{ messages[:1] }}', '{% raw %}{{ {% endraw %}', '{# comment #}', '{{', '{% if %}', '%}',
    '{% endfor %}', '{% for x in %}', '{{ m.content.format(m) }}',
    "{{ '{0.__class__}'.format(m) }}",
    "{{ m['content'] | map('upper') | list }}", "{{ range(3) | sum(start='x') }}", '{{ caller() }}',
    "{% filter upper %}x{% endfilter %}", "{% call f() %}{% endcall %}", '{% set m = 3 %}',
    '{{ m.content ~ m }}', '{{ messages | map(attribute="role") | join }}', '{{ true + none }}')


def _piece(rng: random.Random, depth: int = 0) -> str:
  draw = rng.random()
  if depth < 3 and draw < 0.3:
    condition = rng.choice(CONDITIONS)
    return f'{{% if {condition} %}}{_piece(rng, depth + 1)}{{% endif %}}'
  if depth < 3 and draw < 0.4:
    return _piece(rng, depth + 1) + _piece(rng, depth + 1)
  if depth < 2 and draw < 0.45:
    return '{% for m in messages %}' + _piece(rng, depth + 1) + '{% endfor %}'
  return rng.choice(PIECES).replace('NUMBER', rng.choice(NUMBERS))


def template(rng: random.Random) -> str:
  """Makes a template: one that works with something in it, or something alone."""
  if rng.random() < 0.2:
    return _piece(rng)
  places = [i for i, c in enumerate(tiny.CHAT) if tiny.CHAT[i:i + 2] in ('{%', '{{')]
  at = rng.choice([*places, len(tiny.CHAT)])
  return tiny.CHAT[:at] + _piece(rng) + tiny.CHAT[at:]


def conversations() -> list[list[dict[str, Any]]]:
  """Lists conversations, of which only the first are of the shape that most have."""
  user, answer = {'role': 'user', 'content': 'hello 1'}, {'role': 'assistant', 'content': 'yes'}
  return [
      [user], [{'role': 'user', 'content': 'What is 2?'}], [user, answer, user],
      [{'role': 'system', 'content': 'Be kind.'}, user],
      [user, answer] * 4 + [{'role': 'user', 'content': 'again'}],
      [{'role': 'user', 'content': 'word ' * 100}], [{'role': 'user', 'content': 'Q: é'}],
      [user, {'role': 'tool', 'content': '4'}, user], [{'role': 'user', 'content': ' \n'}]]
