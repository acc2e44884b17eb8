"""Random damage: to JSON, to bytes, to files. What a `random.Random` draws, so that it can be drawn
again. Every function says what it has done."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
from typing import Any

# Values of other types, at the edges of their types, and beyond them.
ODD = (None, True, False, 0, 1, -1, 2, 3, 1.5, -0.5, float('nan'), float('inf'), -float('inf'),
       1e300, 1e-300, 2**31, 2**63, -2**63, 10**30, 10**400, '', ' ', 'x', '1', 'é\n', '\x00',
       '../x', '{{', '[', '\ud800', 'a' * 3000, [], [1], ['x'], [None], [[]], [{}], {}, {'a': 1},
       {'': None}, {'content': 'x'}, [1, 'x'], [0] * 100)
BYTES = (b'\x00', b'\xff', b'\n', b'\r', b'"', b'{', b'[', b',', b'\xef\xbb\xbf', b'\xe9', b'0',
         b'\x7f\x80', b'\\u', b'\\ud800')


def shown(value: Any) -> str:
  """Writes a value, a long one not to its end."""
  text = ascii(value) if not isinstance(value, int) or abs(value) < 2**70 else 'a long number'
  return text if len(text) <= 60 else text[:60] + '...'


def change_tree(rng: random.Random, tree: Any) -> tuple[Any, str]:
  """Changes one node of JSON content; the tree is changed in place where it is not the root."""
  parent, key, path = None, None, ''
  node = tree
  while isinstance(node, dict | list) and node and rng.random() < (1 if node is tree else 0.8):
    parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    node, path = parent[key], f'{path}.{key}'
  if parent is None or rng.random() < 0.02:
    value = rng.choice(ODD)
    return value, f'the root = {shown(value)}'
  path = path[:200]
  how = rng.choice(('set', 'set', 'set', 'delete', 'add', 'nudge', 'nudge', 'copy'))
  if how == 'delete':
    del parent[key]
    return tree, f'{path} deleted'
  if how == 'add' and isinstance(parent, dict):
    name, value = rng.choice((f'{key}_', str(key).upper(), 'x', '')), rng.choice(ODD)
    parent[name] = value
    return tree, f'{path} has a neighbour {name!r} = {shown(value)}'
  value = rng.choice(ODD)
  if how == 'nudge':
    value = _nudge(rng, node)
  elif how == 'copy':  # something of the same file in another place
    value = rng.choice(list(parent.values()) if isinstance(parent, dict) else parent)
  parent[key] = value
  return tree, f'{path} = {shown(value)}'


def _nudge(rng, value):
  """Something close to a value."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int | float):
    return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, float(value),
                       str(value)))
  if isinstance(value, str):
    return rng.choice((value[:-1], value + 'x', value * 2, value.upper(), [value], value + '\n'))
  if isinstance(value, list):
    return rng.choice((value[:-1], value * 2, value[::-1], dict(enumerate(value)), [*value, None]))
  if isinstance(value, dict):
    return rng.choice((list(value), {k: v for k, v in list(value.items())[1:]}, [value]))
  return rng.choice(ODD)


def dump(tree: Any) -> bytes:
  """Writes JSON, with what is no number or no Unicode as Python writes it."""
  return json.dumps(tree).encode()


def change_bytes(rng: random.Random, data: bytes, within: int | None = None) -> tuple[bytes, str]:
  """Changes bytes, of the first `within` ones."""
  size = min(within or len(data), len(data))
  at, length = rng.randrange(size + 1), rng.choice((1, 1, 1, 2, 8, 64))
  how = rng.choice(('flip', 'flip', 'flip', 'cut', 'delete', 'insert', 'repeat', 'deep', 'empty'))
  if how == 'flip' and size:
    out = bytearray(data)
    for place in range(at, min(at + length, size)):
      out[place] ^= 1 << rng.randrange(8) if rng.random() < 0.5 else 0xff
    return bytes(out), f'{length} bytes at {at} flipped'
  if how == 'cut':
    return data[:at], f'cut at {at}'
  if how == 'delete':
    return data[:at] + data[at + length:], f'{length} bytes at {at} deleted'
  if how == 'repeat':
    return data[:at] + data[max(at - length, 0):], f'{length} bytes before {at} repeated'
  if how == 'deep':
    return data[:at] + b'[' * 100_000 + data[at:], f'100,000 brackets at {at}'
  if how == 'empty' and rng.random() < 0.5:
    return b'', 'emptied'
  more = rng.choice(BYTES) * length
  return data[:at] + more + data[at:], f'{more[:20]!r} inserted at {at}'


def change_path(rng: random.Random, path: pathlib.Path) -> str:
  """Puts something else in the place of a file or a folder."""
  how = rng.choice(('removed', 'a folder', 'a pipe', 'a link to nowhere', 'a link to itself',
                    'empty', 'a device', 'null', 'a large file'))
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
  if how == 'a folder':
    path.mkdir()
  elif how == 'a pipe':
    os.mkfifo(path)
  elif how == 'a link to nowhere':
    path.symlink_to(path.with_name('nowhere'))
  elif how == 'a link to itself':
    path.symlink_to(path)
  elif how == 'a device':
    path.symlink_to('/dev/zero')
  elif how == 'empty':
    path.write_bytes(b'')
  elif how == 'null':
    path.write_bytes(b'null')
  elif how == 'a large file':
    path.write_bytes(b'{"a": [' + b'1, ' * 1_000_000 + b'1]}')
  return f'{path.name}: {how}'


def change_json_file(rng: random.Random, path: pathlib.Path) -> str:
  """Changes a JSON file in one to three places; where it is none (any more), its bytes."""
  did = []
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    data = path.read_bytes()
    try:
      tree, what = change_tree(rng, json.loads(data))
      data = dump(tree)
    except (ValueError, RecursionError):
      data, what = change_bytes(rng, data)
    path.write_bytes(data)
    did.append(what)
  return f'{path.name}: {"; ".join(did)}'


def change_file(rng: random.Random, path: pathlib.Path) -> str:
  """Changes a file that is read as JSON, or as anything."""
  draw = rng.random()
  if draw < 0.12:
    return change_path(rng, path)
  if draw < 0.3 or path.suffix not in ('.json', '.jsonl'):
    data, what = change_bytes(rng, path.read_bytes())
    path.write_bytes(data)
    return f'{path.name}: {what}'
  if path.suffix == '.jsonl':
    return change_lines(rng, path)
  return change_json_file(rng, path)


def change_lines(rng: random.Random, path: pathlib.Path) -> str:
  """Changes a row of a file with one in each line."""
  lines = path.read_bytes().split(b'\n')
  at = rng.randrange(len(lines))
  try:
    tree, what = change_tree(rng, json.loads(lines[at]))
    lines[at] = dump(tree)
  except ValueError:
    lines[at], what = change_bytes(rng, lines[at])
  path.write_bytes(b'\n'.join(lines))
  return f'{path.name} line {at + 1}: {what}'
