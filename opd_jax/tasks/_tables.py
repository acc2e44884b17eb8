"""Rows of a file, a folder or a data set on the hub, as they were written.

Files of text are read here and not by `datasets`, whose readers guess types: they turn
'2024-01-31' into a timestamp, the texts True and NA of a CSV into a truth value and nothing, and
know no integer from 2^63 on. What is left to it are Parquet, saved data sets, other folders and the
hub, whose columns have types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import csv
import dataclasses
import io
import json
import pathlib
import re
from typing import Any

import datasets

from opd_jax.files import disk, hub

READERS = ('.csv', '.json', '.jsonl', '.parquet')
KINDS = (f'a file of {list(READERS)}, a folder of such files or one that `save_to_disk` wrote, or '
         'the name of a data set on the hub')
csv.field_size_limit(1 << 30)  # of characters in a cell; the default refuses a long text


@dataclasses.dataclass(frozen=True)
class Part:
  """Where the rows of one split come from; `prefix` is that of its fields in a task's Options."""

  prefix: str
  source: str
  subset: str
  revision: str
  split: str
  prompt_column: str
  messages_column: str
  answer_column: str
  completion_column: str
  filters: tuple[str, ...]

  def field(self, name: str) -> str:
    """Names a field with its value, as errors begin."""
    return f'task.options.{self.prefix}{name}={getattr(self, name)!r}'

  def pick(self, splits: Sequence[str]) -> str:
    """Picks a split of those that the source has.

    Raises:
      ValueError: it is not there, or several are and none is named.
    """
    name = self.split or (splits[0] if len(splits) == 1 else '')
    if name not in splits:
      key = 'eval_split' if self.prefix else 'train_split'
      raise ValueError(f'task.options.{key}={self.split!r}; allowed: a split of {self.source!r}, '
                       f'{list(splits)}')
    return name


@dataclasses.dataclass(frozen=True)
class Table:
  """Some rows, of which columns are read when they are asked for.

  Attributes:
    names: of the columns.
    rows: which rows of the source these are, by their number there.
    read: (name of a column, numbers of rows) -> its values there.
    files: (file, how many rows are in it) in order.
    only_texts: whether every value is a text, as in CSV.
  """

  names: Sequence[str]
  rows: Sequence[int]
  read: Callable[[str, Sequence[int]], list[Any]]
  files: tuple[tuple[str, int], ...]
  only_texts: bool = False

  def __len__(self) -> int:
    return len(self.rows)

  def select(self, places: Sequence[int]) -> Table:
    """Keeps the rows at some places among these."""
    return dataclasses.replace(self, rows=[self.rows[i] for i in places])

  def where(self, place: int) -> str:
    """Names a row for an error: its number in the file that it is from."""
    row = self.rows[place]
    for name, count in self.files:
      if row < count:
        return f'row {row} of {name!r}'
      row -= count
    raise IndexError(place)

  def has(self, column: str) -> bool:
    """Tells whether there is such a column; 'a.b' is also the field b in the column a."""
    return column in self.names or column.split('.')[0] in self.names

  def column(self, column: str, asked: str = '') -> list[Any]:
    """Reads a column; `asked` is the field, with its value, that names it.

    Raises:
      ValueError: a row has no such field; names it.
    """
    asked = asked or f'column {column!r}'
    name, *path = [column] if column in self.names else column.split('.')
    values = self.read(name, self.rows)
    for field in path:
      for place, value in enumerate(values):
        if not isinstance(value, dict) or field not in value:
          raise ValueError(f'{asked}: {self.where(place)} has {shown(value)} without '
                           f'{field!r}; allowed: a row with it')
      values = [value[field] for value in values]
    return values


def shown(value: Any) -> str:
  """Writes a value for an error, a long one not to its end."""
  text = repr(value)
  return text if len(text) <= 200 else text[:200] + '...'


def read(part: Part) -> Table:
  """Reads the table that a part names.

  Raises:
    ValueError: it cannot be read; what is wrong with it, and what is allowed.
  """
  path = pathlib.Path(part.source)
  _check(part, path)
  try:
    splits = _splits(part, path)
  except UnicodeDecodeError as e:
    wide = e.object.startswith((b'\xff\xfe', b'\xfe\xff'))  # the mark of UTF-16
    line = e.object.count(b'\n', 0, e.start) + 1
    raise ValueError(
        f'{part.field("source")} cannot be read: line {line} of {e.reason!r} is not UTF-8 (byte '
        f"0x{e.object[e.start]:02x}, in {e.object[max(e.start - 20, 0):e.start + 20]!r}); allowed: "
        f"UTF-8, such as `iconv -f {'utf-16' if wide else 'latin1'} -t utf-8` makes of it") from e
  except (ValueError, OSError, StopIteration, csv.Error, RecursionError,
          datasets.exceptions.DatasetsError) as e:
    why = str(e.__cause__ or e) or 'it is empty'  # what an empty file raises has no text
    raise ValueError(f'{part.field("source")}, subset={part.subset!r} cannot be read: {why}; '
                     f'allowed: {KINDS}') from e
  return splits[part.pick(list(splits))]()


def _check(part, path):
  """Refuses a source that is none, and what has no effect on it."""
  if path.exists():
    if part.revision:
      raise ValueError(f'{part.field("revision")} has no effect on the local {part.source!r}; '
                       "allowed: ''")
    if part.subset and (path.is_file() or _saved(path)):
      raise ValueError(f"{part.field('subset')} has no effect on {part.source!r}; allowed: ''")
    if path.is_file() and path.suffix not in READERS:
      raise ValueError(f'{part.field("source")}; allowed: files of {sorted(READERS)}')
    if pipes := disk.find_pipes(path):  # to read one would wait for ever
      raise ValueError(f'{part.field("source")} has {pipes}, no regular files; allowed: files')
  elif not re.fullmatch(hub.NAMES['dataset'], part.source) or path.suffix in READERS:
    raise ValueError(f'{part.field("source")} does not exist; allowed: {KINDS}')
  elif not hub.is_commit(part.revision):
    raise ValueError(f'{part.field("revision")} with the data set {part.source!r} of the hub '
                     '(there is no such file or folder); allowed: a commit, branch or tag of it')


def _splits(part, path):
  """The name of each split -> a function that reads it."""
  if _saved(path):
    return _typed(part, datasets.load_from_disk(part.source))
  if path.is_file():
    files = {'train': [part.source]}
    if path.suffix == '.parquet':
      return _typed(part, datasets.load_dataset('parquet', data_files=part.source))
  else:
    files = {}
    if path.is_dir() and not part.subset:  # which file is of which split, `datasets` knows
      found = datasets.load_dataset_builder(part.source).config.data_files or {}
      files = {str(split): list(names) for split, names in found.items()}
    suffixes = {pathlib.Path(name).suffix for names in files.values() for name in names}
    if not suffixes or suffixes - {'.csv', '.json', '.jsonl'}:
      return _typed(part, datasets.load_dataset(part.source, name=part.subset or None,
                                                revision=part.revision or None))
  tables = {split: _texts(names) for split, names in files.items()}
  return {split: lambda table=table: table for split, table in tables.items()}


def _saved(path):
  """Whether `save_to_disk` wrote it."""
  return (path / 'dataset_dict.json').exists() or (path / 'state.json').exists()


def _typed(part, table):
  """Splits of a data set, whose columns have types."""
  splits = {'train': table} if isinstance(table, datasets.Dataset) else table

  def one(rows):
    rows = rows.with_format(None)
    return Table(rows.column_names, range(len(rows)),
                 lambda name, places: rows.select(places)[name][:], ((part.source, len(rows)),))

  return {str(name): lambda rows=rows: one(rows) for name, rows in splits.items()}


def _texts(names):
  """The table of one split in files of text."""
  rows, files = [], []
  for name in names:
    path = pathlib.Path(name)
    data = path.read_bytes()
    try:
      text = data.decode('utf-8-sig')
    except UnicodeDecodeError as e:
      raise UnicodeDecodeError(e.encoding, data, e.start, e.end, name) from e
    more = {'.csv': _csv, '.json': _json, '.jsonl': _lines}[path.suffix](text)
    rows += more
    files.append((name, len(more)))
  if not rows:
    raise ValueError('it is empty')
  columns = list(dict.fromkeys(name for row in rows for name in row))
  return Table(columns, range(len(rows)), lambda name, places: [rows[i].get(name) for i in places],
               tuple(files), all(name.endswith('.csv') for name in names))


def _csv(text):
  lines = csv.reader(io.StringIO(text, newline=''), strict=True)
  names = next(lines)
  if len(names) == 1 and (other := next((c for c in ';\t' if c in names[0]), '')):
    raise ValueError(f'its first line is {shown(names[0])}: cells are divided by commas, not by '
                     f'{other!r}')
  if len(set(names)) < len(names):
    raise ValueError(f'its first line has a name twice, {names}')
  rows = []
  for cells in lines:
    if cells and len(cells) != len(names):
      raise ValueError(f'the row that ends in line {lines.line_num} has {len(cells)} cells, and '
                       f'the first line {len(names)}')
    if cells:
      rows.append(dict(zip(names, cells, strict=True)))
  return rows


def _json(text):
  try:
    rows = json.loads(text, parse_constant=_nothing)
  except json.JSONDecodeError:
    return _lines(text)  # many a .json has an object a line
  rows = rows if isinstance(rows, list) else [rows]
  return [_object(row, f'entry {i}', text) for i, row in enumerate(rows)]


def _lines(text):
  rows = []
  for number, line in enumerate(text.split('\n'), 1):
    if line.strip():
      try:
        row = json.loads(line, parse_constant=_nothing)
      except ValueError as e:
        raise ValueError(f'line {number} is no JSON: {e}') from None
      rows.append(_object(row, f'line {number}', line))
  return rows


def _object(row, place, written):
  if not isinstance(row, dict):
    raise ValueError(f'{place} is {shown(row)}, no JSON object')
  for name, value in row.items() if re.search(r'\\u[dD]', written) else ():
    try:
      json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # no tokenizer, no file takes it
      raise ValueError(f'{place} has half of a surrogate pair in {name!r}, '
                       f'{json.dumps(value)[:200]}') from None
  return row


def _nothing(name):
  """NaN, which pandas writes where there is no value."""
  return None
