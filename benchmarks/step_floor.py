"""The floor of a step: the arithmetic and the bytes that it cannot do without, at the speed of the
best matrix product and the best copy of this machine.

As a worker (turns.py) a turn measures the machine once more; the best of all turns counts.
"""

from __future__ import annotations

from collections.abc import Callable
import importlib.util
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import turns  # noqa: E402

from opd_jax import types  # noqa: E402
from opd_jax.algorithm.objective import Objective, wants  # noqa: E402
from opd_jax.models import params  # noqa: E402
from opd_jax.run import flops  # noqa: E402

# Large ones, those of the models (rows of tokens, inner, outer), and one step of decoding.
SHAPES = ((2048, 2048, 2048), (5120, 256, 768), (5120, 512, 1536), (640, 512, 1536),
          (512, 256, 32768), (32, 256, 768))
ON_DEVICE = ((8192, 8192, 8192), (16384, 2048, 6144))  # of an accelerator, beside those
COPIES = tuple(2**20 * n for n in (1, 4, 16, 64, 256))  # bytes
REPEAT_S = 0.15  # for each product and each copy, in each turn


def _best(f: Callable[[], Any]) -> float:
  """Seconds of the fastest call of some."""
  f()
  taken, began = [], time.perf_counter()
  while not taken or time.perf_counter() - began < REPEAT_S:
    start = time.perf_counter()
    f()
    taken.append(time.perf_counter() - start)
  return min(taken)


def _products(dtype: str) -> dict[str, Callable[[int, int, int], Callable[[], Any]]]:
  """By library: (m, k, n) -> a call that multiplies [m, k] by [k, n]."""
  product = jax.jit(jnp.matmul)

  def by_xla(m, k, n):
    a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
    return lambda: product(a, b).block_until_ready()

  def by_numpy(m, k, n):
    a, b, out = (np.ones(s, np.float32) for s in ((m, k), (k, n), (m, n)))
    return lambda: np.matmul(a, b, out=out)

  def by_torch(m, k, n):
    import torch
    kind = getattr(torch, dtype)
    a, b, out = (torch.ones(s, dtype=kind) for s in ((m, k), (k, n), (m, n)))
    return lambda: torch.matmul(a, b, out=out)

  found = {'xla': by_xla}
  if jax.default_backend() == 'cpu':
    found |= {'numpy': by_numpy} if dtype == 'float32' else {}
    found |= {'torch': by_torch} if importlib.util.find_spec('torch') else {}
  return found


def measure(dtypes: list[str]) -> dict[str, dict[str, float]]:
  """Measures this machine as it is now.

  Returns:
    'flops_per_s' by '<dtype> <library> <m>x<k>x<n>', and 'bytes_per_s' (read and written) by the
    size of what is copied, both arrays together.
  """
  shapes = SHAPES + (ON_DEVICE if jax.default_backend() != 'cpu' else ())
  speed = {f'{dtype} {name} {"x".join(map(str, shape))}':
           2 * np.prod(shape, dtype=float) / _best(make(*shape))
           for dtype in dtypes for name, make in _products(dtype).items() for shape in shapes}
  copied, add = {}, jax.jit(lambda x: x + 1)  # a copy of an array may be no copy
  for size in COPIES:
    x = jnp.ones(size // 8, jnp.float32)
    copied[str(size)] = size / _best(lambda x=x: add(x).block_until_ready())
    if jax.default_backend() == 'cpu':
      a, b = np.ones(size // 8, np.float32), np.empty(size // 8, np.float32)
      copied[str(size)] = max(copied[str(size)], size / _best(lambda a=a, b=b: np.copyto(b, a)))
  return {'flops_per_s': speed, 'bytes_per_s': copied}


def best_of(turns_taken: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
  """Takes the best of several turns, each by itself."""
  return {kind: {name: max(t[kind][name] for t in turns_taken) for name in turns_taken[0][kind]}
          for kind in turns_taken[0]}


def describe(machine: dict[str, dict[str, float]]) -> str:
  """Says the best product of each library and type, and the best copies."""
  speeds: dict[str, tuple[float, str]] = {}
  for name, speed in machine['flops_per_s'].items():
    dtype, library, shape = name.split()
    speeds[f'{library} {dtype}'] = max(speeds.get(f'{library} {dtype}', (0.0, '')), (speed, shape))
  return ', '.join(f'{name} {speed / 1e9:.0f} GFLOP/s ({shape})' for name, (speed, shape)
                   in speeds.items()) + '; copies ' + ', '.join(
      f'{int(size) / 2**20:.0f} MiB {speed / 1e9:.0f} GB/s'
      for size, speed in machine['bytes_per_s'].items())


def phase_flops(student: types.Model, teacher: types.Model, o: Objective, rows: int, prompt: int,
                new: int) -> dict[str, float]:
  """Counts the operations of each phase that are needed, each once (run/flops.py).

  A row of P + C tokens has P + C - 1 positions, from C of which a token is predicted; only there is
  a head. The update is three forward passes of the student. With a loss over the vocabulary the
  heads of those who score it are applied in the update.
  """
  positions, answers = np.full(rows, prompt + new - 1), np.full(rows, new)

  def body(model):
    return flops.forward_flops(model, positions) - flops.head_flops(model, positions)

  def head(model):
    return flops.head_flops(model, answers)

  asked = wants(o)
  own = body(student) + head(student)
  out = {'generate': own,
         'score_teacher': body(teacher) + asked['teacher'].logprobs * head(teacher)}
  if asked['student']:
    out['score_student'] = body(student) + asked['student'].logprobs * head(student)
  out['update'] = 3 * own + asked['teacher'].hidden * head(teacher)
  return out


def phase_bytes(student: types.Model, teacher: types.Model, o: Objective, rows: int, prompt: int,
                new: int, itemsize: int) -> dict[str, tuple[float, float]]:
  """Counts the bytes of each phase that have to be moved, and those that it comes back to.

  A step of decoding reads the weights, and of each row the keys and values so far; scoring reads
  the weights once; AdamW reads and writes parameters, two moments and the gradient in float32.
  Activations and logits are not counted: they can stay near.

  Returns:
    By phase, (bytes moved, bytes that are in use together): a copy of at least so many bytes is
    the one whose speed counts.
  """
  weights = {m: itemsize * params.count_params(m.specs) for m in (student, teacher)}
  c = student.config
  cache = itemsize * rows * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
  seen = sum(range(prompt + 1, prompt + new))  # slots read in the steps after the first
  out = {'generate': (new * weights[student] + cache * seen,
                      weights[student] + cache * (prompt + new)),
         'score_teacher': (weights[teacher],) * 2}
  if wants(o)['student']:
    out['score_student'] = (weights[student],) * 2
  trained = 4 * params.count_params(student.specs)
  out['update'] = (8 * trained, 4 * trained)
  return out


def floors(operations: dict[str, float], moved: dict[str, tuple[float, float]],
           machine: dict[str, dict[str, float]], dtype: str) -> dict[str, dict[str, float]]:
  """Computes the floor of each phase: the longer of its operations at the best product's speed, in
  float32 or in `dtype`, and its bytes at that of the best copy that is as large (or the largest).
  """
  speed = max(v for name, v in machine['flops_per_s'].items()
              if name.split()[0] in ('float32', dtype))
  out = {}
  for phase, n in operations.items():
    size, together = moved[phase]
    copies = {int(s): v for s, v in machine['bytes_per_s'].items()}
    near = [v for s, v in copies.items() if s >= together] or [copies[max(copies)]]
    times = {'flops_s': n / speed, 'bytes_s': size / max(near)}
    out[phase] = {'flops': n, 'bytes': size, **times, 'floor_s': max(times.values())}
  return out


def main() -> None:
  """Measures the machine at every turn."""
  here, dtypes = turns.Turns(), sys.argv[1:]
  here.say(backend=jax.default_backend(), device=jax.devices()[0].device_kind,
           torch=importlib.util.find_spec('torch') is not None)
  while here.wait():
    here.say(spent=measure(dtypes))
  here.say(peak_bytes=turns.peak_bytes())


if __name__ == '__main__':
  main()
