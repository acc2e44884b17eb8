"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
from typing import Any


class PreemptedError(Exception):
  """SIGTERM, SIGINT or SIGHUP arrived; what was done until then is on disk: a checkpoint of the
  step it interrupted, or before the first step what the teacher has written."""

  def __init__(self, what: str):
    super().__init__(f'{what}; the same command goes on from there')


def end_at_once(text: str) -> None:
  """Lets Ctrl-C end the process with a line and the exit status 130, until `raise_again`: during
  imports there is nothing to clean up, and an exception in the middle of one may come out as any
  other."""
  def end(number: int, frame: Any) -> None:
    os.write(2, f'{text}\n'.encode())  # sys.stderr may be in the middle of something
    os._exit(130)

  if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, end)


def raise_again() -> None:
  """Lets Ctrl-C raise KeyboardInterrupt again, unless it is ignored."""
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Interrupts:
  """Turns the first SIGTERM, SIGINT or SIGHUP into a flag that the loop reads between steps.

  A signal that is ignored stays ignored: `nohup` asks for that. A signal to one of several
  processes stops all, at the same step: they vote in every step, and read the result in the next.
  """

  def __enter__(self) -> Interrupts:
    from opd_jax.parallel import hosts  # which imports JAX: not before `end_at_once`
    self._seen = seen = []
    self._votes = hosts.Votes() if hosts.count() > 1 else None
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
    return self

  def __call__(self) -> bool:
    """Tells, once a step, whether to stop: the same for all processes."""
    seen = bool(self._seen)
    return seen if self._votes is None else self._votes(seen)

  def now(self) -> bool:
    """Tells whether a signal has come to any process until now, the same to all of them; waits for
    all."""
    from opd_jax.parallel import hosts
    return hosts.any_of(bool(self._seen))

  def end(self, what: str) -> None:
    """Ends the run if a signal has come to any process until now; waits for all.

    Raises:
      PreemptedError: says `what`.
    """
    if self.now():
      raise PreemptedError(what)

  def __exit__(self, *exc: Any) -> None:
    for number, old in self._old.items():
      signal.signal(number, old)
