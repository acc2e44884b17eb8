"""Holds every form of attention that this machine has to the reference, and times it.

    python benchmarks/attention.py                 (values, gradients, then times)
    python benchmarks/attention.py --shapes small  (on CPUs: no time of interest)

Values and gradients are held to the reference in float32 on the same bfloat16 numbers, on rows with
padding left and right. TFLOP/s count the causal half of the square: two products forward, five
backward; forward + backward is 3.5 times forward.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from opd_jax.models import attention, kernels  # noqa: E402, the package of this checkout

# rows, tokens; heads, key heads, width.
SHAPES = {'large': ((4, 4096), (1, 16384)), 'small': ((2, 512),)}
HEADS = (16, 8, 128)
# Of the largest value: a bfloat16 has 8 bits, 0.4 %, and the weights (in the gradient also their
# products) are rounded to it before they are summed.
CLOSE = {'value': 0.01, 'gradient': 0.02}


def forms() -> tuple[str, ...]:
  """Lists the forms that there are here."""
  kernel = {'gpu': ('cudnn',), 'tpu': ('splash',)}
  return ('reference', 'blocks', *kernel.get(jax.default_backend(), ()))


def make(rows: int, tokens: int, heads=HEADS, padded: bool = True):
  """Makes queries, keys, values, a cotangent, and which slots are valid."""
  n, kv, width = heads
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = ((rows, tokens, n, width), (rows, kv, tokens, width), (rows, kv, tokens, width),
            (rows, tokens, n, width))
  q, k, v, d = (jax.random.normal(key, shape, jnp.bfloat16)
                for key, shape in zip(keys, shapes, strict=True))
  slots = jnp.arange(tokens)[None, :]
  row = jnp.arange(rows)[:, None]
  valid = (slots >= row * 37) & (slots < tokens - row * 11) if padded else slots >= 0 * row
  return q, k, v, jnp.where(valid[:, :, None, None], d, 0), valid


def compare(how: str, window: int | None) -> bool:
  """Holds a form to the reference, and says how far it is off."""
  q, k, v, d, valid = make(3, 640)

  def read(q, k, v, how):
    mask = attention.Mask(valid, (window,), how=how)
    out = attention.attention(q, k, v, mask).astype(jnp.float32)
    out = jnp.where(valid[:, :, None, None], out, 0)
    return jnp.sum(out * d.astype(jnp.float32)), out

  def both(how, *x):
    f = jax.jit(jax.value_and_grad(functools.partial(read, how=how), (0, 1, 2), has_aux=True))
    (_, out), grads = f(*x)
    return [np.asarray(a, np.float64) for a in (out, *grads)]

  with jax.default_matmul_precision('highest'):
    want = both('reference', *(x.astype(jnp.float32) for x in (q, k, v)))
  got, good = both(how, q, k, v), True
  for name, a, b in zip(('value', 'dq', 'dk', 'dv'), want, got, strict=True):
    off = np.abs(a - b).max() / np.abs(a).max()
    fine = bool(np.isfinite(b).all() and off <= CLOSE['value' if name == 'value' else 'gradient'])
    good &= fine
    print(f'{how:10} window {window!s:5} {name:6} off by {off:.2e} {"" if fine else "TOO FAR"}',
          flush=True)
  return good


def median_s(f, *args, most_s: float = 2.0) -> float:
  """Times calls, each waited for."""
  jax.block_until_ready(f(*args))
  times, began = [], time.perf_counter()
  while len(times) < 3 or (len(times) < 20 and time.perf_counter() - began < most_s):
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    times.append(time.perf_counter() - start)
  return float(np.median(times))


def measure(how: str, rows: int, tokens: int, padded: bool) -> None:
  """Times a form, and says what it reaches."""
  q, k, v, d, valid = make(rows, tokens, padded=padded)
  mask = attention.Mask(valid, how=how)
  run = functools.partial(attention.attention, mask=mask)
  forward = jax.jit(run)
  both = jax.jit(jax.grad(lambda q, k, v: jnp.sum((run(q, k, v) * d).astype(jnp.float32)),
                          (0, 1, 2)))
  n, _, width = HEADS
  work = 4.0 * rows * n * width * tokens * (tokens + 1) / 2
  for name, f, flops in (('forward', forward, work), ('both', both, 3.5 * work)):
    try:
      compiled = f.lower(q, k, v).compile()
      taken = median_s(compiled, q, k, v)
      temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**30
    except jax.errors.JaxRuntimeError as e:
      print(f'{how:10} [{rows}, {tokens}] {name:8} does not run: {str(e).splitlines()[0][:120]}')
      continue
    print(f'{how:10} [{rows}, {tokens}] {name:8} {1e3 * taken:9.3f} ms {flops / taken / 1e12:8.1f} '
          f'TFLOP/s {temporaries:7.2f} GiB of temporaries', flush=True)


def main() -> int:
  """Runs it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shapes', choices=sorted(SHAPES), default='large')
  args = parser.parse_args()
  device = jax.devices()[0]
  print(f'jax {jax.__version__}, {device.device_kind}, traced for {kernels.platform()}')
  good = [compare(how, window) for how in forms() for window in (None, 100)]
  for rows, tokens in SHAPES[args.shapes]:
    for how in forms():
      measure(how, rows, tokens, padded=True)
  print('all close' if all(good) else 'NOT all close')
  return 0 if all(good) else 1


if __name__ == '__main__':
  sys.exit(main())
