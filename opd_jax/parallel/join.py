"""Several processes become one run: who they are, and how they find each other.

Said by `--coordinator=HOST:PORT --processes=N --process=I`, or found where jax knows the cluster:
SLURM, Cloud TPU (GCE and GKE), Open MPI, Kubernetes (jax._src.clusters). Before jax's own start,
which ends a process in C++ when somebody is missing, the processes meet here: the first one listens
on the coordinator's port, each of the others connects, and who is missing after a stated time is
said in a line. The connections stay, for watch.py.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import os
import re
import socket
import time
from typing import Any

import jax
from jax._src import hardware_utils  # what jax warns by, where it falls back to the CPU
from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() asks

from opd_jax.errors import ConfigError
from opd_jax.parallel import hosts

TIMEOUT_S = 300.0  # for all to be there; another: OPD_JOIN_TIMEOUT_S
SILENT_S = 30.0  # after which a host of which nothing is heard is dead; another: OPD_SILENT_S
RETRY_S = 0.2
# What says that there are more processes than this one, and how many.
SIGNS = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'TPU_WORKER_HOSTNAMES',
         'TPU_PROCESS_ADDRESSES', 'MEGASCALE_NUM_SLICES')


@dataclasses.dataclass(frozen=True)
class Start:
  """How this process starts with others.

  Attributes:
    address: host:port of the coordinator, where the first process listens.
    processes: how many there are.
    process: which of them this is.
    local_devices: the devices that are this process's own; None for all of the host.
    found: what said so, for errors.
  """

  address: str
  processes: int
  process: int
  local_devices: tuple[int, ...] | None = None
  found: str = ''

  @property
  def where(self) -> str:
    """Names the coordinator as the user did."""
    return f'coordinator={self.address!r}{self.found and f" ({self.found})"}'


def find(coordinator: str, processes: int, process: int) -> Start | None:
  """Finds out with whom this process is to start; None if alone.

  Args:
    coordinator, processes, process: the flags; '', 0 and -1 where they were not given. With
      processes=1 alone, whatever the environment says.

  Raises:
    ConfigError: flags that belong together and are not; or several processes or hosts to be seen,
      that nothing joins.
  """
  given = {'coordinator': coordinator != '', 'processes': processes != 0, 'process': process != -1}
  if given['processes'] and processes < 1:
    raise ConfigError(f'processes={processes}; allowed: at least 1')
  if processes == 1 and not given['coordinator'] and process in (-1, 0):
    return None
  if any(given.values()):
    if missing := [name for name, there in given.items() if not there]:
      raise ConfigError(f'coordinator={coordinator!r}, processes={processes}, process={process}: '
                        f'{missing} not given; allowed: all three, or --processes=1 alone')
    if not _is_address(coordinator):
      raise ConfigError(f"coordinator={coordinator!r}; allowed: 'HOST:PORT' of process 0")
    if not 0 <= process < processes:
      raise ConfigError(f'process={process} of processes={processes}; allowed: 0 to '
                        f'{processes - 1}')
    return Start(coordinator, processes, process) if processes > 1 else None
  return _detect(os.environ)


def _detect(environment: Mapping[str, str]) -> Start | None:
  kind = next((kind for kind in ClusterEnv._cluster_types
               if not kind.opt_in_only_method and kind.is_env_present()), None)
  if kind is None:
    for sign in SIGNS:
      if several := _several(sign, environment.get(sign, '')):
        raise ConfigError(
            f'{sign}={environment[sign]!r} says that there are {several} processes or hosts, and '
            'nothing says which one this is: each would train alone; allowed: a start of all (srun '
            'on SLURM, jax[tpu] on TPUs, or --coordinator=HOST:PORT --processes=N --process=I), or '
            '--processes=1 for one that is to run alone')
    return None
  wait_s = int(timeout_s())
  try:
    processes, process = kind.get_process_count(), kind.get_process_id()
    if processes == 1:
      return None
    address = kind.get_coordinator_address(
        timeout_secs=wait_s,
        override_coordinator_port=environment.get('JAX_COORDINATOR_PORT'))
  except (RuntimeError, ValueError, KeyError, OSError) as e:
    raise ConfigError(f'{kind.name} cannot be read: {e}; allowed: --coordinator=HOST:PORT '
                      '--processes=N --process=I, or --processes=1 to run alone') from e
  if not _is_address(address):  # jax takes its port from the environment as it stands there
    raise ConfigError(f"{kind.name} says coordinator={address!r}; allowed: 'HOST:PORT', of which "
                      'JAX_COORDINATOR_PORT may say the port')
  return Start(address, processes, process, _own_devices(kind, environment), f'of {kind.name}')


def _own_devices(kind: Any, environment: Mapping[str, str]) -> tuple[int, ...] | None:
  """jax gives each task of SLURM and Open MPI one GPU; one that is alone on its node has them all.
  """
  place = kind.get_local_process_id()
  tasks = environment.get('SLURM_STEP_TASKS_PER_NODE', environment.get('SLURM_TASKS_PER_NODE', ''))
  alone = kind.name == 'slurm' and re.fullmatch(r'1(\(x\d+\))?', tasks)
  if place is None or alone:
    return None
  of_a_node = {int(n) for n in re.findall(r'(?:^|,)(\d+)', tasks)}
  gpus = environment.get('SLURM_GPUS_ON_NODE', '')
  if kind.name == 'slurm' and gpus.isdigit() and of_a_node and of_a_node != {int(gpus)}:
    raise ConfigError(f'SLURM_GPUS_ON_NODE={gpus!r} and tasks of a node {tasks!r}: each task takes '
                      'one GPU; allowed: one task a node, which takes all of its GPUs, or as many '
                      'tasks as GPUs')
  return (place,)


def _several(sign: str, value: str) -> int:
  """How many processes a variable speaks of; 0 for one or none."""
  count = int(value) if value.isdigit() else len([part for part in value.split(',') if part])
  return count if count > 1 else 0


def timeout_s() -> float:
  """Returns how long the start waits for all processes."""
  return _seconds('OPD_JOIN_TIMEOUT_S', TIMEOUT_S)


def _seconds(variable: str, default: float) -> float:
  text = os.environ.get(variable) or str(default)
  if not re.fullmatch(r'\d+(\.\d+)?', text) or not float(text):
    raise ConfigError(f'{variable}={text!r}; allowed: seconds, above 0')
  return float(text)


def require_accelerators() -> None:
  """Refuses to run on the CPU beside accelerators that nobody renounced.

  Raises:
    ConfigError: jax fell back to the CPU of a machine that has TPUs or NVIDIA GPUs.
  """
  if jax.config.jax_platforms or os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1'):
    return  # on purpose
  chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
  extra = 'tpu' if chips else 'cuda' if hardware_utils.has_visible_nvidia_gpu() else ''
  if extra and jax.default_backend() == 'cpu':
    raise ConfigError(f"JAX_PLATFORMS='': this machine has {'TPUs' if chips else 'an NVIDIA GPU'}, "
                      f"and jax found only its CPU; allowed: after `pip install 'opd_jax[{extra}]'`"
                      ', or with JAX_PLATFORMS=cpu')


def join(start: Start) -> None:
  """Starts jax with the other processes, before anything has touched a device.

  Raises:
    ConfigError: they have not all come within the time, or do not fit together.
  """
  silent_s, deadline = _seconds('OPD_SILENT_S', SILENT_S), time.monotonic() + timeout_s()
  names, peers = (_receive if start.process == 0 else _connect)(start, deadline)
  hosts.watch_over(start.process, names, {i: s.detach() for i, s in peers.items()}, silent_s)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # A vote, or a read of spread arrays, must not meet an update's collectives in gloo.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  jax.config.update('jax_enable_preemption_service', False)  # run/interrupts.py has its own
  jax.distributed.initialize(
      start.address, start.processes, start.process, local_device_ids=start.local_devices,
      cluster_detection_method='deactivate', initialization_timeout=int(timeout_s()),
      heartbeat_timeout_seconds=100)  # watch.py comes first


def _is_address(text: str) -> bool:
  return bool(re.fullmatch(r'.+:\d{1,5}', text)) and 0 < _split(text)[1] < 65536


def _split(address: str) -> tuple[str, int]:
  host, _, port = address.rpartition(':')
  return host.strip('[]'), int(port)


def _receive(start: Start, deadline: float) -> tuple[list[str], dict[int, socket.socket]]:
  """Waits, as process 0, for all others; (names of all, connections)."""
  port = _split(start.address)[1]
  try:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    listener = socket.create_server(('', port), family=family, backlog=start.processes,
                                    dualstack_ipv6=family == socket.AF_INET6)
  except OSError as e:
    raise ConfigError(f'{start.where}: process 0 cannot listen there ({e.strerror}); allowed: a '
                      'port of this host that is free') from e
  names, peers = {0: _own_name(start)}, {}
  with listener:
    while len(names) < start.processes:
      try:
        listener.settimeout(max(deadline - time.monotonic(), 0.01))
        peer, _ = listener.accept()
      except OSError as e:
        missing = sorted(set(range(start.processes)) - set(names))
        _refuse([*peers.values()], text := (
            f'{start.where}: {len(names)} of processes={start.processes} have come within '
            f'{timeout_s():.0f} s, and not {missing}; allowed: all of them, each with its own '
            '--process, the same --coordinator and the same --processes'))
        raise ConfigError(text) from e
      hello = _read(peer, min(deadline, time.monotonic() + 10.0))
      if hello is None or 'process' not in hello:  # a scanner of ports
        peer.close()
        continue
      i = hello['process']
      if i in names or hello['processes'] != start.processes:
        _refuse([*peers.values(), peer], text := (
            f'{start.where}: {hello["name"]} came, and {names.get(i, names[0])} is there already; '
            f'allowed: processes 0 to {start.processes - 1}, each once'))
        raise ConfigError(text)
      names[i], peers[i] = hello['name'], peer
  listed = [names[i] for i in range(start.processes)]
  for peer in peers.values():
    _write(peer, {'names': listed})
  return listed, peers


def _connect(start: Start, deadline: float) -> tuple[list[str], dict[int, socket.socket]]:
  """Goes, as another process, to process 0; (names of all, the connection)."""
  said = 'nobody listens there'
  while (left := deadline - time.monotonic()) > 0:
    try:
      peer = socket.create_connection(_split(start.address), timeout=max(left, 0.01))
    except OSError as e:
      said = e.strerror or str(e)
      time.sleep(RETRY_S)
      continue
    _write(peer, {'process': start.process, 'processes': start.processes,
                  'name': _own_name(start)})
    answer = _read(peer, deadline + 5.0)  # process 0 says who is missing
    if answer and 'names' in answer:
      return answer['names'], {0: peer}
    peer.close()
    if answer and 'refused' in answer:
      raise ConfigError(answer['refused'])
    said = 'what listens there is no `opd`, or has ended'
    time.sleep(RETRY_S)
  raise ConfigError(f'{start.where}: process 0 cannot be reached from process {start.process} '
                    f'within {timeout_s():.0f} s ({said}); allowed: the address of the host of '
                    'process 0, which is started too')


def _own_name(start: Start) -> str:
  return (f'process {start.process} of {start.processes} ({socket.gethostname()}, '
          f'pid {os.getpid()})')


def _refuse(peers: list[socket.socket], text: str) -> None:
  for peer in peers:
    _write(peer, {'refused': text})
    peer.close()


def _write(peer: socket.socket, content: dict[str, Any]) -> None:
  with contextlib.suppress(OSError):  # it has gone, and its end is noticed where it is read
    peer.sendall(json.dumps(content).encode() + b'\n')


def _read(peer: socket.socket, deadline: float) -> dict[str, Any] | None:
  """A line of JSON; None for anything else."""
  data = b''
  try:
    while not data.endswith(b'\n') and len(data) < 2**20:
      peer.settimeout(max(deadline - time.monotonic(), 0.01))
      if not (more := peer.recv(1)):  # no byte of what follows the line, which is for watch.py
        return None
      data += more
    peer.settimeout(None)
    content = json.loads(data)
  except (OSError, ValueError):
    return None
  return content if isinstance(content, dict) else None
