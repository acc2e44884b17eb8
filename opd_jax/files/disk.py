"""What is asked of the file system: that a file appears whole, stays, and that a refusal is a line
with the path. Of several processes, the first one writes."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import json
import os
import pathlib
import shutil
from typing import Any

from opd_jax.parallel import hosts


class StorageError(OSError):
  """The file system refuses something that is to be written; the message names the path."""


class ExportError(OSError):
  """A directory that could not be written, and of which nothing was left behind."""


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
  """Names the path in what goes wrong within: writing to an open file does not say which.

  Raises:
    StorageError: in place of any other OSError.
  """
  try:
    yield
  except StorageError:
    raise
  except OSError as e:
    raise StorageError(f'{path} cannot be written: {e.strerror or e}; what was there before is '
                       'as it was') from e


def sync(path: pathlib.Path) -> None:
  """Waits until a file, or the names in a directory, would outlive a power failure."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as e:
    # Some network file systems sync no directories.
    if e.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
      raise
  finally:
    os.close(descriptor)


def write_bytes(file: pathlib.Path, content: bytes) -> None:
  """Writes a file that appears whole or not at all, and then stays. Of several processes, only the
  first one does.

  Raises:
    StorageError: the file system refuses.
  """
  if not hosts.is_primary():
    return
  partial = file.with_name(f'.{file.name}.partial')
  with naming(file):
    partial.write_bytes(content)
    sync(partial)  # a name can reach the disk before the content does
    rename(partial, file)


def append_bytes(file: pathlib.Path, content: bytes) -> None:
  """Writes behind what a file holds, and then it stays; a part of it may be there if the process
  ends. Of several processes, only the first one does.

  Raises:
    StorageError: the file system refuses, or the file is gone.
  """
  if not hosts.is_primary():
    return
  with naming(file), file.open('r+b') as f:  # which makes no file anew, as 'ab' would
    f.seek(0, os.SEEK_END)
    f.write(content)
    f.flush()
    os.fsync(f.fileno())


def truncate(file: pathlib.Path, size_bytes: int) -> None:
  """Cuts off the end of a file. Of several processes, only the first one does.

  Raises:
    StorageError: the file system refuses.
  """
  if not hosts.is_primary():
    return
  with naming(file):
    os.truncate(file, size_bytes)
    sync(file)


def rename(file: pathlib.Path, to: pathlib.Path) -> None:
  """Gives a file whose content is on disk its name. Of several processes, only the first one does.

  Raises:
    StorageError: the file system refuses.
  """
  if not hosts.is_primary():
    return
  with naming(to):
    file.rename(to)
    sync(to.parent)


def write_text(file: pathlib.Path, text: str) -> None:
  """Writes a file as `write_bytes` does."""
  write_bytes(file, text.encode())


def write_json(file: pathlib.Path, content: Any, **options: Any) -> None:
  """Writes a JSON file as `write_bytes` does."""
  write_text(file, json.dumps(content, indent=2, **options) + '\n')


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Makes a hidden directory that gets its name when all went well, and is removed when not. Of
  several processes the first one does; the others are back when it is there.

  Raises:
    FileExistsError: `path` exists.
    ExportError: the file system refuses.
  """
  path = pathlib.Path(path)
  partial = path.with_name(f'.{path.name}.partial')
  if not hosts.is_primary():
    yield partial
    hosts.decide(lambda: None)
    return
  if os.path.lexists(path):
    raise FileExistsError(f'{path} exists already; allowed: a path that does not, so choose '
                          'another or remove it')
  try:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for file in (*partial.rglob('*'), partial):  # a name can reach the disk before the content does
      sync(file)
    os.replace(partial, path)
    sync(path.parent)
  except OSError as e:
    raise ExportError(f'{path} could not be written, and nothing was left there: '
                      f'{e.strerror or e}') from e
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  hosts.decide(lambda: None)


def find_pipes(path: pathlib.Path) -> list[str]:
  """Lists what is there and is neither file nor folder, of a path and of what is in a folder: a
  pipe would be waited for without an end, and a device may have none."""
  entries = [path, *(path.iterdir() if path.is_dir() else ())]
  return sorted(str(p) for p in entries if p.exists() and not (p.is_file() or p.is_dir()))


def refuse_pipes(path: pathlib.Path, named: str) -> None:
  """Refuses what `find_pipes` finds.

  Raises:
    ValueError: there is something; `named` is how the user named the path.
  """
  if pipes := find_pipes(path):
    raise ValueError(f'{named} has {pipes}, no regular files; allowed: files')


def read_bytes(path: pathlib.Path) -> bytes:
  """Reads a file.

  Raises:
    OSError: it is no file, but a pipe or a device, or it cannot be read.
  """
  if find_pipes(path):
    raise OSError(errno.EINVAL, 'no regular file', str(path))
  return path.read_bytes()


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    OSError: see `read_bytes`.
    ValueError: it holds something else.
  """
  try:
    content = json.loads(read_bytes(path).decode())
  except RecursionError as e:
    raise ValueError('it is nested too deeply') from e
  if not isinstance(content, dict):
    raise ValueError(f'it holds a {type(content).__name__}')
  return content
