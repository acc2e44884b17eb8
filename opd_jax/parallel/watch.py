"""The process beside each process of a run on several hosts, which notices when another has died.

It holds a connection to the one beside process 0, says so every few seconds, and hears what becomes
of the others. When one has died, or has failed, all agree which was the first, each says its name
in one line and ends the process that it is beside, whatever that hangs in: a collective of XLA,
for one, waits for a dead host without an end. It is a process of its own because such a wait may
hold the interpreter, and because jax ends a process whose coordinator is gone with a page of C++
(client.h, LOG(FATAL)): the error output of libraries goes through here, and what they say within
seconds of such an end is left out.

Only the standard library is imported, so that it starts in milliseconds.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import socket
import sys
import time
from typing import Any

BEAT_S = 2.0  # between two signs of life
GRACE_S = 2.0  # in which what failed is gathered before one is said to be the first
KILL_S = 5.0  # in which a process may end by itself
NOISE = re.compile(rb'^[EF]\d{4} \d\d:\d\d:\d\d', re.MULTILINE)  # how errors of C++ begin
# What gloo says when all is well, in pieces of several threads; it has no switch.
GLOO = re.compile(rb'\[Gloo\]|peer ranks|^\d*\s*$')
# What happened, the worst first: of several, this is the one that the others come from.
DIED, REFUSED, FAILED = range(3)


class Watch:
  """What one of these processes knows.

  Attributes:
    verdict: [kind, index of the process, what became of it], once it is known.
  """

  def __init__(self, index: int, names: list[str], peers: dict[int, int], noise: int,
               silent_s: float):
    """Takes the connections.

    Args:
      index: of the process beside this one.
      names: of all processes, for the line.
      peers: index -> descriptor of a connected socket: of all others for 0, and of 0 for them.
      noise: the descriptor from which the error output of libraries is read.
      silent_s: how long a peer may say nothing.
    """
    self._index, self._names, self._silent_s = index, names, silent_s
    self._peers = {i: socket.socket(fileno=fd) for i, fd in peers.items()}
    self._parting: set[int] = set()  # peers whose run is over, and whose connections are open
    self._heard = {i: time.monotonic() for i in peers}
    self._rest: dict[Any, bytes] = {}
    self._noise, self._line, self._held, self._held_until = noise, b'', b'', 0.0
    self._events: list[tuple[int, int, str]] = []
    self._deadline = float('inf')
    self._alive = self._speaks = True
    self.verdict: list[Any] | None = None

  def run(self) -> None:
    """Watches until the process beside this one has ended, or is to end."""
    selector, beat = selectors.DefaultSelector(), 0.0
    for i, peer in self._peers.items():
      selector.register(peer, selectors.EVENT_READ, i)
    selector.register(0, selectors.EVENT_READ, 'main')
    selector.register(self._noise, selectors.EVENT_READ, 'noise')
    while self.verdict is None and (self._alive or self._deadline < float('inf')):
      for key, _ in selector.select(timeout=0.2):
        data = self._read(key.fd)
        if not data:
          selector.unregister(key.fileobj)
        self._hear(key.data, data)
      now = time.monotonic()
      if now > beat:
        beat = now + BEAT_S
        self._tell({'beat': 0})
      for i, heard in self._heard.items():
        if i in self._peers and i not in self._parting and now - heard > self._silent_s:
          self._happened(DIED, i, f'has not been heard of for {self._silent_s:.0f} s')
      if self._held and now > self._held_until:
        self._flush()
      if now > self._deadline:
        self.verdict = list(min(self._events))
    self._end()

  def _read(self, fd: int) -> bytes:
    try:
      return os.read(fd, 2**16)
    except OSError:  # a connection that was reset
      return b''

  def _hear(self, who: Any, data: bytes) -> None:
    if who == 'noise':
      return self._hear_noise(data)
    self._rest[who] = self._rest.get(who, b'') + data
    *lines, self._rest[who] = self._rest[who].split(b'\n')
    for line in lines:
      self._obey(who, json.loads(line))
    if who != 'main':
      self._heard[who] = time.monotonic()
    if not data and who == 'main':
      self._alive = False
      if self._speaks:
        self._happened(DIED, self._index, 'has died')
    elif not data and who in self._peers:
      del self._peers[who]
      if who not in self._parting:
        self._happened(DIED, who, 'has died')

  def _obey(self, who: Any, said: dict[str, Any]) -> None:
    if 'bye' in said and who == 'main':  # the run is over, here and everywhere
      self._tell(said)
      self._speaks = False
    elif 'bye' in said:  # it has to hear the same from here before the connection ends
      self._parting.add(who)
    elif 'verdict' in said:
      self.verdict = said['verdict']
    elif 'event' in said:
      self._speaks = self._speaks and who != 'main'
      kind, index, text = said['event']
      self._happened(kind, index, text)

  def _happened(self, kind: int, index: int, text: str) -> None:
    """Remembers it until it is clear which was the first; that is for the one beside process 0 to
    say, unless it is gone."""
    self._events.append((kind, index, text))
    away = self._index and (kind, index) != (DIED, 0)
    if away:
      self._tell({'event': [kind, index, text]})
    self._deadline = min(self._deadline, time.monotonic() + GRACE_S * (3 if away else 1))
    if self._index and not away:
      self._deadline = 0.0

  def _tell(self, what: dict[str, Any]) -> None:
    for peer in self._peers.values():
      try:
        peer.sendall(json.dumps(what).encode() + b'\n')
      except OSError:  # it is read as an end
        pass

  def _part(self, patience_s: float) -> None:
    """Closes the connections once the others have read what was said last, and close theirs: a
    socket that is closed before all that came is read takes it back."""
    end = time.monotonic() + patience_s
    for peer in self._peers.values():
      try:
        peer.shutdown(socket.SHUT_WR)
        peer.settimeout(max(end - time.monotonic(), 0.01))
        while peer.recv(2**16):
          pass
      except OSError:  # it has gone, or takes too long
        pass

  def _hear_noise(self, data: bytes) -> None:
    whole, newline, self._line = (self._line + data).rpartition(b'\n')
    data = b''.join(line for line in (whole + newline).splitlines(keepends=True)
                    if not GLOO.search(line))
    if not self._held and (found := NOISE.search(data)):
      os.write(2, data[:found.start()])
      data, self._held_until = data[found.start():], time.monotonic() + 4 * GRACE_S
    elif not self._held:
      os.write(2, data)
      return
    self._held += data

  def _flush(self) -> None:
    held, self._held = self._held, b''
    os.write(2, held)

  def _end(self) -> None:
    self._held += self._line  # one without an end
    if self.verdict is None:
      self._flush()
      self._part(self._silent_s)
      return
    self._tell({'verdict': self.verdict})
    kind, index, text = self.verdict
    if index == self._index:
      self._flush()  # which may say why
    own = index == self._index and kind != DIED
    if not own:
      line = f'error: {self._names[index]} {text}'
      os.write(2, f'{line}\n'.encode(errors='replace'))
    self._part(KILL_S)
    try:  # the process beside this one ends, and says why itself if it is the one that failed
      os.write(1, json.dumps({'own': own}).encode() + b'\n')
    except OSError:  # it has ended
      return
    end, parent = time.monotonic() + KILL_S, int(sys.argv[2])
    while not own and os.getppid() == parent:
      if time.monotonic() > end:
        os.kill(parent, signal.SIGKILL)
        return
      time.sleep(0.05)


def main() -> None:
  """Runs `watch.py SETTINGS PARENT`."""
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
    signal.signal(number, signal.SIG_IGN)  # they are for the process beside this one
  settings = json.loads(sys.argv[1])
  peers = {int(i): fd for i, fd in settings.pop('peers').items()}
  Watch(peers=peers, **settings).run()


if __name__ == '__main__':
  main()
