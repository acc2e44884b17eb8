"""Signals that ask a run to stop."""

from __future__ import annotations

from collections.abc import Callable
import signal
from typing import Any


class PreemptedError(Exception):
  """SIGTERM, SIGINT or SIGHUP arrived; a checkpoint of the step it interrupted is on disk."""

  def __init__(self, what: str):
    super().__init__(f'{what}; the same command goes on from there')


class Interrupts:
  """Turns the first SIGTERM, SIGINT or SIGHUP into a flag that the loop reads between steps.

  A signal that is ignored stays ignored: `nohup` asks for that.
  """

  def __enter__(self) -> Callable[[], bool]:
    seen: list[int] = []
    self._old = {}

    def handle(number, frame):
      seen.append(number)
      signal.signal(number, self._old[number])  # a second one ends the process

    try:
      for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
          continue
        self._old[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the caller's business
      pass
    return lambda: bool(seen)

  def __exit__(self, *exc: Any) -> None:
    for number, old in self._old.items():
      signal.signal(number, old)
