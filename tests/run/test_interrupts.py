"""Signals that ask a run to stop."""

import os
import signal

import pytest

from opd_jax.run.interrupts import Interrupts

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize('number', NUMBERS)
def test_the_first_one_raises_a_flag(number):
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
