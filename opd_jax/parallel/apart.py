"""A teacher on devices of its own: which they are, and how arrays go over and come back."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.parallel import hosts, sharding
from opd_jax.types import Prompts, Wants


def split_devices(devices: list[Any], for_teacher: int) -> tuple[list[Any], list[Any]]:
  """Splits devices into the student's and the teacher's, of every process the same share, so that
  rows go over within each.

  Raises:
    ValueError: shares that are not the same, or nothing left for the student.
  """
  of_process: dict[int, list[Any]] = {}
  for device in devices:
    of_process.setdefault(device.process_index, []).append(device)
  share, rest = divmod(for_teacher, len(of_process))
  fewest = min(map(len, of_process.values()))
  if rest or not share < fewest:
    raise ValueError(
        f'compute.teacher_devices={for_teacher}; allowed: 0, or a multiple of the '
        f'{len(of_process)} processes that leaves each of them a device of its {fewest}')
  return ([d for own in of_process.values() for d in own[:-share]],
          [d for own in of_process.values() for d in own[-share:]])


@dataclasses.dataclass(frozen=True)
class Apart:
  """The way from the student's devices to those of a teacher, and back.

  Attributes:
    mesh: of the teacher.
    home: of the student.
    chunk_tokens: of all its devices together.
    microbatch_rows: of each part into which its mesh splits rows, 0 for all.
    parts: into which the rows of a step are split.
  """

  mesh: jax.sharding.Mesh
  home: jax.sharding.Mesh
  chunk_tokens: int
  microbatch_rows: int
  parts: int

  def rows_of_pass(self, rows: int) -> int:
    """Counts the rows of a forward pass on all its devices, of so many that it grades at once."""
    return math.gcd(self.microbatch_rows * sharding.row_shards(self.mesh), rows)

  def call(self, program: Any, params: Any, rollout: Any) -> Any:
    """Runs a compiled (params, rollout) -> rows on the teacher's devices, for rows that lie on
    the student's; so does what comes back."""
    with jax.set_mesh(self.mesh):
      out = program(params, move_rows(rollout, self.mesh))
    return move_rows(out, self.home)

  def bring(self, head: Any) -> Any:
    """Copies the matrix of the teacher's head to the student's devices, split as the student's."""
    if head is None or head.matrix is None:
      return head
    with jax.set_mesh(self.mesh):
      matrix = hosts.fetch(head.matrix)
    where = sharding.fitting(matrix.shape, head.axes, self.home)
    return head.replace(matrix=sharding.put(matrix, where))


def move_key(key: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
  """Makes a random key over on another mesh: it belongs to the one on which it was made."""
  data = hosts.fetch(jax.random.key_data(key))
  with jax.set_mesh(mesh):
    return jax.random.wrap_key_data(jnp.asarray(data))


def move_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Moves arrays that are split by rows to another mesh, whose rows are split among the processes
  as theirs are."""
  target = sharding.by_rows(mesh)
  if hosts.count() == 1:
    return jax.device_put(tree, target)
  return jax.tree.map(lambda x: _through_host(x, target), tree)


def _through_host(x, target):
  """Every process has the rows that its devices need."""
  here = {}
  for shard in x.addressable_shards:
    here.update(zip(range(*shard.index[0].indices(x.shape[0])), np.asarray(shard.data),
                    strict=True))

  def rows(index):
    asked = range(*index[0].indices(x.shape[0]))
    if missing := [i for i in asked if i not in here]:
      raise ValueError(f'the rows {missing[:4]} are of another process; allowed: meshes that split '
                       'rows among the processes alike')
    return np.stack([here[i] for i in asked])

  return jax.make_array_from_callback(x.shape, target, rows)


def part_places(rows: int, parts: int, mesh: jax.sharding.Mesh) -> np.ndarray:
  """Lists the rows of a step that are in each part, int32 [parts, rows / parts]; see
  `split_prompts`."""
  places = np.arange(rows, dtype=np.int32).reshape(sharding.row_shards(mesh), parts, -1)
  return places.swapaxes(0, 1).reshape(parts, -1)


def split_prompts(prompts: Prompts, parts: int, mesh: jax.sharding.Mesh) -> Iterator[Prompts]:
  """Splits the prompts of a step, host arrays, into parts; of each the rows on a device are some of
  those that it has of the whole, so that `join_parts` moves none."""
  if parts == 1:
    yield prompts
    return
  for here in part_places(len(prompts.tokens), parts, mesh):
    yield Prompts(prompts.tokens[here], prompts.valid[here], here)


def join_parts(parts: list[Any], mesh: jax.sharding.Mesh) -> Any:
  """Inverts `split_prompts`, for pytrees of arrays [B / parts, ...]."""
  shards = sharding.row_shards(mesh)

  def join(*leaves):
    cut = [x.reshape(shards, -1, *x.shape[1:]) for x in leaves]
    return jnp.concatenate(cut, axis=1).reshape(-1, *leaves[0].shape[1:])

  return jax.tree.map(join, *parts)


def describe(name: str, apart: Apart, wanted: dict[str, Wants], width: int, itemsize: int) -> str:
  """Says, for the log of a run, where its teacher is and what comes back of a token, by stream."""
  def of_token(w):
    back = [('hidden states', width * itemsize)] * w.hidden + [('log-probs', 8)] * w.logprobs
    back += [(f'the {w.top_k} most likely tokens', 8 * w.top_k + 4)] * bool(w.top_k)
    return f"{' and '.join(what for what, _ in back)} ({sum(n for _, n in back)} bytes a token)"

  sizes = ', '.join(f'{axis}={n}' for axis, n in apart.mesh.shape.items() if n > 1)
  back = '; '.join(f'{stream}: {of_token(w)}' for stream, w in wanted.items() if w)
  return (f'{name}: the teacher is on {apart.mesh.size} devices of its own ({sizes or "one"}), '
          f'{apart.parts} parts a step; back come {back or "rows that it writes"}')


def least(asked: Wants, top_k: int, width: int, itemsize: int) -> Wants:
  """Chooses what comes back of a token: the hidden state that is asked for, `width` numbers of so
  many bytes, or in its place the `top_k` most likely tokens, where they are all that is looked at
  (0: they are not), with the log-probs that come with them."""
  if asked.hidden and top_k and 8 * top_k + 12 < width * itemsize:
    return Wants(logprobs=True, top_k=top_k)
  return asked
