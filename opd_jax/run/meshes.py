"""From the settings of a run to its meshes: which devices, and what is split over them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.data.streams import Stream
from opd_jax.errors import refuse
from opd_jax.files.huggingface import LoadedModel
from opd_jax.models import params as params_lib
from opd_jax.parallel import apart as apart_lib
from opd_jax.parallel import hosts, sharding
from opd_jax.parallel.apart import Apart
from opd_jax.settings import Compute, Run
from opd_jax.types import Model


def make_mesh(compute: Compute, writers: list[Model], devices: list[Any] | None = None,
              in_order: bool = False) -> jax.sharding.Mesh:
  """Makes the mesh of a run on all devices (or on those given, in their order if that is said),
  for models that write.

  Raises:
    ValueError: it does not fit the devices, or compute.decode_split the models.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dataclasses.asdict(compute.mesh)
  fits = [sharding.decode_splits(model.specs, sizes, len(devices)) for model in writers]
  fits = sorted(set.intersection(*map(set, fits))) if fits else [1]
  split = compute.decode_split or max(
      [1] + [choose_decode_split(compute, m, len(devices), fits) for m in writers])
  mesh = sharding.make_mesh(sizes, devices, split, in_order)
  if writers and split not in fits:
    raise ValueError(f'compute.decode_split={split} does not divide the heads, the feed-forward '
                     'width or the experts of '
                     f"{' or '.join(m.family for m in writers)}; allowed: {fits}")
  return mesh


def make_meshes(compute: Compute, student: LoadedModel, teacher: LoadedModel | None,
                devices: list[Any] | None = None) -> tuple[jax.sharding.Mesh, Apart | None]:
  """Makes the mesh of a run on all devices (or on those given), and that of a teacher with devices
  of its own.

  Raises:
    ValueError: see `make_mesh`; compute.teacher_devices does not fit the processes.
  """
  if not compute.teacher_devices:
    models = [m.model for m in (student, teacher) if m and m.model]
    return make_mesh(compute, models, devices), None
  devices = jax.devices() if devices is None else devices
  ours, theirs = apart_lib.split_devices(devices, compute.teacher_devices)
  home = make_mesh(compute, [student.model], ours, in_order=True)
  try:
    there = make_mesh(dataclasses.replace(compute, mesh=compute.teacher_mesh, decode_split=0),
                      [teacher.model], theirs, in_order=True)
  except ValueError as e:
    raise ValueError(str(e).replace('compute.mesh', 'compute.teacher_mesh')) from e
  return home, Apart(there, home, compute.chunk_tokens * sharding.row_shards(there),
                     compute.microbatch_rows, compute.pipeline_parts)


def check_apart(run: Run, streams: tuple[Stream, ...], apart: Apart, teacher: LoadedModel) -> None:
  """Checks that rows, parts and weights fit the devices of a teacher of its own.

  Raises:
    ValueError, ConfigError: they do not; names the field.
  """
  try:
    sharding.param_shardings(teacher.model.specs, apart.mesh)
  except ValueError as e:
    raise ValueError(str(e).replace('compute.mesh', 'compute.teacher_mesh')) from e
  for field, mesh in (('compute.mesh', apart.home), ('compute.teacher_mesh', apart.mesh)):
    shards = sharding.row_shards(mesh)
    if shards % hosts.count():
      refuse(run, 'compute.teacher_devices', f'{field} splits rows {shards} ways, and they go over '
             f'within each of {hosts.count()} processes', f'a multiple of {hosts.count()} ways')
  for stream in streams:
    parts = run.compute.pipeline_parts if stream.on_policy else 1
    for field, mesh in (('compute.mesh', apart.home), ('compute.teacher_mesh', apart.mesh)):
      shards = sharding.row_shards(mesh)
      if stream.rows % (shards * parts):
        refuse(run, 'compute.teacher_devices compute.pipeline_parts',
               f'of {stream.rows} rows in {parts} parts, {field} splits each {shards} ways',
               f'a multiple of {shards * parts} rows in a step')


def choose_decode_split(compute: Compute, model: Model, devices: int, fits: list[int]) -> int:
  """Chooses into how many parts, of those that fit, the weights of a model are split where it
  decodes: the fewest that leave a device at most 1 GiB of them, else the most.

  A device reads its weights for every token, 1 GiB in about a millisecond of today's memories,
  and a split model adds up its activations twice a layer, some 10 microseconds each.
  """
  sizes = dataclasses.asdict(compute.mesh)
  _, _, tensor, expert = sharding.resolve(sizes, devices)
  size = params_lib.count_params(model.specs) * jnp.dtype(compute.dtype).itemsize
  parts = tensor * (expert if 'experts' in _axes(model.specs) else 1)
  return next((n for n in fits if size / (parts * n) <= 2**30), fits[-1])


def _axes(specs):
  return {axis for spec in params_lib.flatten(specs).values() for axis in spec.axes}
