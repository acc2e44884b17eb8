"""The processes beside those of a run on several hosts, which say when another has died."""

import json
import os
import select
import signal
import socket
import subprocess
import sys

import pytest
import tiny

from opd_jax.parallel import watch


@pytest.fixture
def watchers():
  """Two watchers that are connected, and beside each of them a pipe that nobody has closed."""
  ends, out = socket.socketpair(), []
  for i, end in enumerate(ends):
    noise, errors = os.pipe()
    settings = {'index': i, 'names': ['zero', 'one'], 'peers': {1 - i: end.fileno()},
                'noise': noise, 'silent_s': 5.0}
    out.append(subprocess.Popen(
        # Its parent is no process that it could end.
        [sys.executable, '-I', '-S', watch.__file__, json.dumps(settings), '0'],
        pass_fds=[noise, end.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE))
    os.close(noise)
  for end in ends:
    end.close()
  yield out
  for process in out:
    process.kill()
    process.communicate()
  os.close(errors)


def read_line(stream):
  assert select.select([stream], [], [], tiny.PATIENCE_S)[0], 'waited in vain'
  return stream.readline()


def test_a_host_of_which_nothing_is_heard_is_dead(watchers):
  first, second = watchers
  second.send_signal(signal.SIGSTOP)  # as if its network were gone
  assert json.loads(read_line(first.stdout)) == {'own': False}
  assert read_line(first.stderr) == b'error: one has not been heard of for 5 s\n'


@pytest.mark.parametrize('early', [0, 1])
def test_a_run_that_is_over_here_first_is_no_death(early, watchers):
  one, other = watchers[early], watchers[1 - early]
  one.stdin.write(b'{"bye": 0}\n')  # and is not at its end yet: the process beside it is slow
  one.stdin.flush()
  assert not select.select([one.stderr], [], [], 1.0)[0], one.stderr.readline()
  other.stdin.write(b'{"bye": 0}\n')
  other.stdin.close()
  assert not select.select([one.stderr], [], [], 1.0)[0], one.stderr.readline()
  one.stdin.close()
  for watcher in watchers:
    assert read_line(watcher.stderr) == read_line(watcher.stdout) == b''
    assert watcher.wait(tiny.PATIENCE_S) == 0
    watcher.stdin = None


def test_of_several_that_end_the_one_from_which_it_came_is_named(watchers):
  first, second = watchers
  # A collective fails because the other has gone; that is heard of first.
  first.stdin.write(json.dumps({'event': [watch.FAILED, 0, 'has ended: gloo']}).encode() + b'\n')
  first.stdin.flush()
  second.stdin.close()  # it has died
  for watcher in watchers:
    assert read_line(watcher.stderr) == b'error: one has died\n'
  second.stdin = None
