"""The machines that can be planned for: what a chip holds and does, and how chips are connected."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
import numpy as np

from opd_jax.errors import ConfigError

GIB, GB = 2**30, 1e9
# What a collective costs however little it moves. Estimates without a source: a few hops of 1 us,
# and a small all-reduce of NCCL within a host.
LATENCY_S = {'tpu': 5e-6, 'gpu': 15e-6}


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a data sheet says of a chip.

  Attributes:
    flops_per_s: of dense bfloat16 products.
    wide_flops_per_s: of products of float32 arrays at jax's default precision, which is one pass of
      bfloat16 on TPUs and TF32 on GPUs.
    hbm_bytes: that a program can have (of TPUs: what libtpu says when it refuses one).
    hbm_bytes_per_s: of them.
    link_bytes_per_s: one way, of an ICI link to a neighbour, or of a GPU's NVLink.
    host_bytes_per_s: one way to chips of other hosts, a chip: InfiniBand. TPUs of a slice have ICI.
    dims: of a TPU's torus; 0 for GPUs.
    wraps: the ends of a dimension are connected where it is a multiple of so many chips (of three,
      where each is).
    most: chips of a slice.
    source: where the figures are from.
  """

  flops_per_s: float
  wide_flops_per_s: float
  hbm_bytes: float
  hbm_bytes_per_s: float
  link_bytes_per_s: float
  source: str
  host_bytes_per_s: float = math.inf
  dims: int = 0
  wraps: int = 0
  most: int = 0


# All pages were read on 28 November 2026. HBM of TPUs: what libtpu 0.0.52 calls available where it
# refuses a program. Links: the ICI of a chip, both ways, over its links and by two; the
# all-reduce bandwidth that the pages give for a pod, by chips and links, is the same. Of a v4 there
# is only that (1.1 PB/s of 4096 chips with six links; its bisection would say 47 GBps). One pass of
# bfloat16 for float32 on TPUs: jax's page of jax_default_matmul_precision. Which ends of v5e and
# v6e are connected, is in no page of these: those of 16 chips, a whole side of their pod, is from
# jax-ml.github.io/scaling-book.
_TPU, _GPU = 'docs.cloud.google.com/tpu/docs/', 'nvidia.com, data sheet of '
CHIPS = {
    'v4': Chip(275e12, 275e12, 30.75 * GIB, 1200 * GB, 45 * GB, _TPU + 'v4: 275 TFLOPs, 32 GiB, '
               '1200 GBps, a torus where each side is a multiple of 4, all-reduce of 1.1 PB/s a '
               'pod', dims=3, wraps=4, most=4096),
    'v5e': Chip(197e12, 197e12, 15.75 * GIB, 819 * GB, 50 * GB, _TPU + 'v6e, its column v5e: 197 '
                'TFLOPs, 16 GB, 819 GBps, 1600 Gbps over four ports', dims=2, wraps=16, most=256),
    'v5p': Chip(459e12, 459e12, 95.73 * GIB, 2765 * GB, 100 * GB, _TPU + 'v5p: 459 TFLOPs, 95 GiB, '
                '2765 GBps, 1200 GBps both ways, a torus from 4x4x4 on', dims=3, wraps=4,
                most=6144),
    'v6e': Chip(918e12, 918e12, 31.24 * GIB, 1638 * GB, 100 * GB, _TPU + 'v6e: 918 TFLOPs, 32 GB, '
                '1638 GBps, 800 GBps both ways over four ports', dims=2, wraps=16, most=256),
    # With sparsity the data sheets say twice the FLOPs. InfiniBand is what machines have with which
    # MLPerf was run: a ConnectX-7 of 400 Gb/s for each GPU (github.com/mlcommons,
    # inference_results_v3.1, v4.1 and v6.0, systems/ of Dell, NVIDIA and Nebius); others have less.
    'h100': Chip(989e12, 494e12, 80 * GB, 3350 * GB, 450 * GB, _GPU + 'H100 SXM: 1979 TFLOPS of '
                 'BF16 and 989 of TF32 with sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways',
                 host_bytes_per_s=50 * GB),
    'h200': Chip(989e12, 494e12, 141 * GB, 4800 * GB, 450 * GB, _GPU + 'H200 SXM: 1979 TFLOPS of '
                 'BF16 and 989 of TF32 with sparsity, 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways',
                 host_bytes_per_s=50 * GB),
    'b200': Chip(2250e12, 1100e12, 180 * GB, 8000 * GB, 900 * GB, _GPU + 'HGX B200: 4500 TFLOPS of '
                 'BF16 and 2200 of TF32 with sparsity, 180 GB, 8 TB/s, NVLink 1.8 TB/s both ways',
                 host_bytes_per_s=50 * GB),
}
GPUS_A_HOST = 8
ALLOWED = ('a slice of TPUs such as v5p:4x4x4, v4:2x2x1, v6e:8x8 or v5e:4x4, or GPUs such as '
           'gpu:8xh100, gpu:8xh200 or gpu:16xb200')


@dataclasses.dataclass(frozen=True)
class Topology:
  """Some chips of a kind, connected.

  Attributes:
    name: as it was asked for, such as 'v5p:4x4x4'.
    kind: of CHIPS.
    shape: of a slice of TPUs; (count,) of GPUs.
  """

  name: str
  kind: str
  shape: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    """What one of them is."""
    return CHIPS[self.kind]

  @property
  def chips(self) -> int:
    """How many there are."""
    return math.prod(self.shape)

  @property
  def platform(self) -> str:
    """'tpu' or 'gpu'."""
    return 'tpu' if self.chip.dims else 'gpu'

  def link(self, members: Iterable[int], devices: list[Any]) -> tuple[str, float]:
    """Says over what some chips exchange data, and how many bytes a second each sends at most.

    A ring along one dimension of a torus sends both ways, one way where its ends are not connected
    or where only some of its chips take part; along several dimensions at once.

    Args:
      members: places in `devices` of the chips of a group.
      devices: of the mesh, in its order.
    """
    members = list(members)
    if self.platform == 'gpu':
      hosts = {m // GPUS_A_HOST for m in members}
      return ('IB', self.chip.host_bytes_per_s) if len(hosts) > 1 else (
          'NVLink', self.chip.link_bytes_per_s)
    places = np.array([devices[m].coords for m in members])[:, :len(self.shape)]
    rate = 0.0
    for size, ring, seen in zip(self.shape, self.rings, places.T, strict=True):
      if (there := len(set(seen.tolist()))) > 1:
        rate += self.chip.link_bytes_per_s * (2 if ring and there == size else 1)
    return 'ICI', rate or self.chip.link_bytes_per_s

  @property
  def rings(self) -> tuple[bool, ...]:
    """Whether the ends of each dimension of a slice of TPUs are connected."""
    whole = [n % self.chip.wraps == 0 for n in self.shape]
    return tuple(whole) if self.chip.dims == 2 else (all(whole),) * len(whole)


def parse(text: str) -> Topology:
  """Reads 'v5p:4x4x4' or 'gpu:8xh100'.

  Raises:
    ConfigError: it is no such thing.
  """
  kind, _, shape = text.partition(':')
  if gpu := re.fullmatch(r'gpu:([1-9]\d*)x(\w+)', text):
    count, kind = int(gpu[1]), gpu[2]
    whole = count <= GPUS_A_HOST or count % GPUS_A_HOST == 0
    if kind in CHIPS and not CHIPS[kind].dims and whole:
      return Topology(text, kind, (count,))
  elif kind in CHIPS and CHIPS[kind].dims and re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape):
    dims = tuple(map(int, shape.split('x')))
    if len(dims) == CHIPS[kind].dims and math.prod(dims) <= CHIPS[kind].most:
      return Topology(text, kind, dims)
  raise ConfigError(f'--topology={text!r}; allowed: {ALLOWED} (GPUs: at most {GPUS_A_HOST}, or '
                    f'whole hosts of {GPUS_A_HOST}; chips of a slice: at most '
                    f"{', '.join(f'{n} of {kind}' for kind, c in CHIPS.items() if (n := c.most))})")


def devices(topology: Topology) -> list[Any]:
  """Makes the devices to compile for: descriptions of TPUs; for GPUs, as many of this process's
  CPU as there are.

  Raises:
    ConfigError: there is no libtpu, or none of that shape in it.
  """
  if topology.platform == 'gpu':
    found = jax.devices('cpu')
    if len(found) < topology.chips:  # `opd plan` asks for them before anything asks for a device
      raise ConfigError(f'--topology={topology.name!r}: this process has {len(found)} CPU devices; '
                        'allowed: at most so many chips')
    return found[:topology.chips]
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError(f'--topology={topology.name!r} needs the compiler in libtpu, which is not '
                      "installed; allowed: after `pip install 'opd_jax[plan]'`")
  # Or it asks the network for the machine that it is on, and writes what went wrong to stderr.
  for name, value in (('TPU_SKIP_MDS_QUERY', '1'), ('TPU_WORKER_HOSTNAMES', 'localhost'),
                      ('TPU_ACCELERATOR_TYPE', 'v5p-8'), ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
                      ('TPU_MIN_LOG_LEVEL', '3'), ('TPU_STDERR_LOG_LEVEL', '3')):
    os.environ.setdefault(name, value)
  os.environ.pop('XLA_FLAGS', None)  # libtpu ends the process over one that it does not know
  # Where libtpu can, the two cores of a chip are one device, as on the machines; of a v4 it asks.
  one = {'chip_config_name': 'megacore'} if topology.kind == 'v4' else {}
  try:
    return list(topologies.get_topology_desc(
        platform='tpu', topology_name=topology.name, **one).devices)
  except jax.errors.JaxRuntimeError as e:
    why = ' '.join(str(e).split())[:300]
    raise ConfigError(f'--topology={topology.name!r}: libtpu has no such slice ({why}); allowed: '
                      f'{ALLOWED}') from e
