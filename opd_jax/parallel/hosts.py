"""Several processes, most often one a host, that are one run.

All of them run the same code on the same config; they differ in what they hold of an array, and in
that the first one writes. Between them go: arrays, which every process reads through `fetch`;
values of Python (`exchange`, `decide`), over jax's own key-value store, so that no device is waited
for; and the word that one has failed or died, by which all end (watch.py).

One process is the case of `count() == 1`, in which nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import pickle
import platform
import subprocess
import sys
import threading
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # the key-value store has no public name
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from opd_jax.errors import ConfigError
from opd_jax.parallel import watch

T = TypeVar('T')
# Of each process, jax's store holds this much of a value; more goes from device to device.
SMALL_BYTES = 2**18
# Fewer items than that are not worth the way to other processes and back.
FEW = 256
# Whoever waits for another process waits as long as it lives: that it has died, watch.py says.
PATIENCE_MS = 7 * 24 * 3600 * 1000


class HostError(RuntimeError):
  """Another process has refused or failed; the message names it."""


class _State:
  """What this process knows of the others; of the process, as jax's own is."""

  def __init__(self):
    self.names: list[str] = []
    self.watcher: subprocess.Popen[bytes] | None = None
    self.calls = itertools.count()
    self.posted: list[str] = []  # keys in jax's store that others may still want to read
    self.told = threading.Event()
    self.deciding = False


_STATE = _State()


def count() -> int:
  """Counts the processes of the run."""
  return distributed.global_state.num_processes or 1


def index() -> int:
  """Returns the place of this one among them; 0 is the one that writes."""
  return distributed.global_state.process_id or 0


def is_primary() -> bool:
  """Tells whether this is the process that writes files and speaks to the console."""
  return index() == 0


def name(i: int) -> str:
  """Names a process, for errors."""
  return _STATE.names[i] if _STATE.names else f'process {i} of {count()}'


# --- arrays ---


def replicate(tree: Any) -> Any:
  """Gives every process the whole of arrays that are spread over several, without waiting for them:
  a read that comes later then waits for nothing that is dispatched after this."""
  def one(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return x
    with jax.set_mesh(x.sharding.mesh):  # which need not be the one in context
      out = jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
    # On CPU devices, programs with collectives must not be in flight together.
    return jax.block_until_ready(out) if jax.default_backend() == 'cpu' else out

  return jax.tree.map(one, tree)


def fetch(tree: Any) -> Any:
  """Reads arrays to the host, as NumPy arrays; of what is spread over several processes, the whole.
  All of them have to ask. Everything that reads devices goes through here."""
  return jax.device_get(replicate(tree))


# --- values ---


def exchange(value: Any) -> list[Any]:
  """Gives every process the values of all, in their order; all have to call it."""
  if count() == 1:
    return [value]
  assert not _STATE.deciding, 'the others do not take part in a decision'
  data, call = pickle.dumps(value), f'{next(_STATE.calls)}/exchange'
  small = len(data) <= SMALL_BYTES
  _put(f'{call}/{index()}', data if small else b'')
  found = [_get(f'{call}/{i}') for i in range(count())]
  if not all(found):  # equal shapes: sizes as powers of two, so that few programs are compiled
    sizes = multihost_utils.process_allgather(np.int64(len(data)))
    room = 1 << int(sizes.max() - 1).bit_length()
    padded = np.zeros(room, np.uint8)
    padded[:len(data)] = np.frombuffer(data, np.uint8)
    pieces = [multihost_utils.process_allgather(part) for part in np.split(
        padded, max(room // 2**26, 1))]
    found = [b''.join(piece[i].tobytes() for piece in pieces)[:sizes[i]] for i in range(count())]
  # All have given a value to this call, so that they have read those of the calls before.
  for key in _STATE.posted[:-1]:
    distributed.global_state.client.key_value_delete(key)
  del _STATE.posted[:-1]
  return [pickle.loads(data) for data in found]


def decide(choose: Callable[[], T]) -> T:
  """Lets the first process decide, and gives its answer to all: what depends on files, or changes
  them, must not be seen by some before and by others after.

  Raises:
    HostError: on the others, what the first one raises.
  """
  if count() == 1 or _STATE.deciding:  # a decision that is a part of another
    return choose()
  call = f'{next(_STATE.calls)}/decide'
  if not is_primary():
    error, value = pickle.loads(_get(f'{call}/0'))
    if error is not None:
      raise HostError(f'{name(0)}: {error}')
    return value
  try:
    _STATE.deciding = True
    value = choose()
  except Exception as e:
    _put(f'{call}/0', pickle.dumps((str(e), None)))
    raise
  finally:
    _STATE.deciding = False
  _put(f'{call}/0', pickle.dumps((None, value)))
  return value


def divide(items: Sequence[Any], work: Callable[[Any], list[Any]], few: int = 0) -> list[Any]:
  """Does the same work on many items, of which every process takes its share, and joins the
  results; of less than `few` items every process does all."""
  if count() == 1 or len(items) < few:
    return work(items)
  places = np.linspace(0, len(items), count() + 1).astype(int)
  mine = items[places[index()]:places[index() + 1]]
  return [x for part in exchange(work(mine) if len(mine) else []) for x in part]


def any_of(flag: bool) -> bool:
  """Tells whether one of the processes says so; waits for all of them."""
  return any(exchange(flag))


class Votes:
  """Counts a flag of every process once a step, and tells the result a step later: by then it is
  there, and no device is waited for. It is the same for all."""

  def __init__(self):
    devices = np.array(jax.devices())
    self._spread = NamedSharding(jax.sharding.Mesh(devices, ('devices',)), PartitionSpec('devices'))
    self._before: Any = None

  def __call__(self, flag: bool) -> bool:
    """Takes the flag of this step; returns whether any process had raised one at the last."""
    own = [jax.device_put(np.array([flag]), d) for d in self._spread.addressable_devices]
    before, self._before = self._before, replicate(jax.make_array_from_single_device_arrays(
        (self._spread.num_devices,), self._spread, own))
    return before is not None and bool(fetch(before).any())


def _put(key: str, value: bytes) -> None:
  _STATE.posted.append(f'opd/{key}')
  distributed.global_state.client.key_value_set_bytes(f'opd/{key}', value or b'-')


def _get(key: str) -> bytes:
  value = distributed.global_state.client.blocking_key_value_get_bytes(f'opd/{key}', PATIENCE_MS)
  return b'' if value == b'-' else value


# --- the same run everywhere ---


def require_same(facts: dict[str, Any]) -> None:
  """Refuses processes that are not about to do the same.

  Args:
    facts: by name, of this process: JSON; a dict is compared entry by entry.

  Raises:
    ConfigError: names what differs, with the values and the processes.
  """
  found, out = exchange(dict(_leaves(facts, ''))), []
  for fact in sorted({fact for leaves in found for fact in leaves}):
    values: dict[str, list[int]] = {}
    for i, leaves in enumerate(found):
      values.setdefault(leaves.get(fact, 'nothing'), []).append(i)
    if len(values) > 1:
      out.append(f'{fact}=' + ' and '.join(
          f'{value[:80]} on {", ".join(map(name, who[:4]))}{" ..." if who[4:] else ""}'
          for value, who in values.items()))
  if out:
    raise ConfigError(f'the processes of this run differ: {"; ".join(out[:8])}'
                      f'{f"; and {len(out) - 8} more" if out[8:] else ""}; allowed: on all hosts '
                      'the same command, config, code, versions and inputs')


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, str]]:
  if not isinstance(tree, dict):
    yield path, json.dumps(tree)
    return
  for key, value in tree.items():
    yield from _leaves(value, f'{path}.{key}' if path else key)


def versions() -> dict[str, str]:
  """Computes what must be the same of the code: this package by a digest, and what it stands on."""
  package, out = pathlib.Path(__file__).parent.parent, hashlib.sha256()
  for file in sorted(package.rglob('*.py')):
    out.update(f'{file.relative_to(package)}\0'.encode() + file.read_bytes() + b'\0')
  names = ('opd_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'tokenizers',
           'transformers')
  with_version = {name: _version(name) for name in names}
  return {'code': out.hexdigest()[:16], 'python': platform.python_version(), **with_version}


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:  # on PYTHONPATH, and not installed
    return ''


# --- the end ---


def watch_over(place: int, names: list[str], peers: dict[int, int], silent_s: float) -> None:
  """Starts the process that notices when another has died (watch.py).

  Args:
    place: of this process.
    names: of all.
    peers: place -> descriptor of a socket; they are closed here.
    silent_s: after how long a process of which nothing is heard counts as dead.
  """
  _STATE.names = names
  noise, errors = os.pipe()
  settings = {'index': place, 'names': names, 'peers': peers, 'noise': noise, 'silent_s': silent_s}
  _STATE.watcher = subprocess.Popen(
      [sys.executable, '-I', '-S', watch.__file__, json.dumps(settings), str(os.getpid())],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[noise, *peers.values()],
      start_new_session=True)
  for descriptor in (noise, *peers.values()):
    os.close(descriptor)
  # What C++ says goes through the watcher, which knows when it is of no use; what Python says does
  # not.
  for stream, place in (('stdout', 1), ('stderr', 2)):
    _move(stream, os.dup(place))
    os.dup2(errors, place)
  os.close(errors)
  threading.Thread(target=_obey, args=(_STATE.watcher.stdout,), daemon=True).start()


def _move(stream: str, descriptor: int) -> None:
  """Lets Python's own stream write to another descriptor."""
  now = getattr(sys, stream)
  now.flush()
  raw = getattr(getattr(now, 'buffer', None), 'raw', None)
  if hasattr(raw, 'move'):  # run/console.py
    raw.move(descriptor)
  else:
    setattr(sys, stream, os.fdopen(descriptor, 'w', buffering=1))


def _obey(orders: Any) -> None:
  """Ends this process when the watcher says so."""
  line = orders.readline()
  if line and json.loads(line)['own']:
    _STATE.told.set()
    return
  if not line and _STATE.watcher is None:
    return
  if not line:
    print('error: the process that watches over the other hosts has ended', file=sys.stderr)
  end(2)


def _say(what: dict[str, Any]) -> None:
  try:
    _STATE.watcher.stdin.write(json.dumps(what).encode() + b'\n')
    _STATE.watcher.stdin.flush()
  except OSError:  # it has ended, and `_obey` says so
    pass


def leave() -> None:
  """Ends the run for all, once every process is here."""
  if _STATE.watcher is None:
    return
  exchange(None)
  _say({'bye': 0})
  watcher, _STATE.watcher = _STATE.watcher, None
  watcher.stdin.close()
  watcher.wait()


def fail(error: BaseException, foreseen: bool) -> None:
  """Tells the others that this process ends, with what. Where it is another one from which that
  came, as an error of a collective does, does not return: its name is said, and this ends.

  Args:
    error: what happened here.
    foreseen: whether the error says all that is to be said, in a line.
  """
  if _STATE.watcher is None:
    return
  if isinstance(error, HostError):  # the first one says it
    _STATE.told.wait(PATIENCE_MS)
  text = ' '.join(f'{"" if foreseen else type(error).__name__ + ": "}{error}'.split())[:2000]
  kind = watch.REFUSED if foreseen else watch.FAILED
  _say({'event': [kind, index(), f'has ended: {text}']})
  _STATE.told.wait(6 * watch.GRACE_S + watch.KILL_S)


def end(status: int) -> NoReturn:
  """Ends this process at once: what is registered for the end of one waits for the others."""
  for stream in (sys.stdout, sys.stderr):
    stream.flush()
  os._exit(status)

