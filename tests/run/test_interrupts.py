"""Signals that ask a run to stop."""

import os
import signal

import pytest

from opd_jax.run.interrupts import Interrupts

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def heard():
  """Signals as in a terminal: where tests run in the background of a script, some are ignored."""
  old = [signal.signal(n, signal.default_int_handler) for n in NUMBERS]
  yield
  for n, handler in zip(NUMBERS, old, strict=True):
    signal.signal(n, handler)


@pytest.mark.parametrize('number', NUMBERS)
def test_the_first_one_raises_a_flag(number, heard):
  before = [signal.getsignal(n) for n in NUMBERS]
  with Interrupts() as interrupted:
    assert not interrupted()
    os.kill(os.getpid(), number)
    assert interrupted()
    # A second one does what it did before.
    assert signal.getsignal(number) == before[NUMBERS.index(number)]
  assert [signal.getsignal(n) for n in NUMBERS] == before


@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGINT])
def test_what_is_ignored_stays_ignored(number):
  # As under nohup, or in the background of a shell script.
  old = signal.signal(number, signal.SIG_IGN)
  try:
    with Interrupts() as interrupted:
      os.kill(os.getpid(), number)
      assert not interrupted()
    assert signal.getsignal(number) == signal.SIG_IGN
  finally:
    signal.signal(number, old)
