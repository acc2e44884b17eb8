"""The console, which may go away while a run goes on: a pipe whose reader has seen enough, a
terminal that was closed, a file on a disk that is full."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class Lasting(io.RawIOBase):
  """Writes to a descriptor, and drops what comes after the first error.

  Attributes:
    error: what it was; None while all is well.
  """

  def __init__(self, descriptor: int):
    super().__init__()
    self._descriptor, self.error = descriptor, None

  def writable(self) -> bool:
    """Tells that it is for writing."""
    return True

  def fileno(self) -> int:
    """Returns the descriptor."""
    return self._descriptor

  def move(self, descriptor: int) -> None:
    """Writes to another descriptor from now on."""
    self._descriptor = descriptor

  def isatty(self) -> bool:
    """Tells whether a terminal is behind it."""
    return os.isatty(self._descriptor)

  def write(self, data: Any) -> int:
    """Writes, and says how much of it is done with."""
    if self.error is None:
      try:
        return os.write(self._descriptor, data)
      except BlockingIOError:  # a reader that is slow: this much is not shown
        pass
      except OSError as e:
        self.error = e
    return len(data)


def make_lasting() -> Lasting:
  """Puts `Lasting` under sys.stdout and sys.stderr; returns that of stdout."""
  out = None
  for name in ('stderr', 'stdout'):
    stream, how = getattr(sys, name), {}
    if stream is None:  # closed before the start: what is opened next must not become the console
      out = Lasting(os.open(os.devnull, os.O_WRONLY))
    else:
      stream.flush()
      out = Lasting(stream.fileno())
      how = dict(encoding=stream.encoding, errors=stream.errors,
                 line_buffering=stream.line_buffering)
    setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(out), **how))
  return out
