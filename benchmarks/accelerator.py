"""What the programs of a step reach on the accelerator that is here, with weights at random.

    python benchmarks/accelerator.py                            (Qwen3-0.6B, then 4B)
    python benchmarks/accelerator.py --only 0.6b --rows 64,256 --answer 1024 --json out.json

Of student and teacher alike in shape, one device: writing in tokens/s, and the share of the
bandwidth of a copy that reading weights and cache once a token takes; scoring and updating in
TFLOP/s of the method (run/flops.py), and as a share of the fastest matrix product. Copy and product
are measured in the same run. No token ends a row, so that all do the same work.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from opd_jax import config, load, presets, programs, settings  # noqa: E402
from opd_jax.algorithm import slots  # noqa: E402
from opd_jax.models import params  # noqa: E402
from opd_jax.run import flops  # noqa: E402
from opd_jax.tools.plan import shapes  # noqa: E402
from opd_jax.types import Model  # noqa: E402

SHAPES = {  # of the published config.json: [layers, width, feed-forward, heads, key/value heads]
    'tiny': (2, 64, 192, 4, 2),
    '0.6b': (28, 1024, 3072, 16, 8), '1.7b': (28, 2048, 6144, 16, 8), '4b': (36, 2560, 9728, 32, 8)}
VOCABULARY = 151936
TIMES = 3  # of which the median is taken, after one that compiles, where not said


def hf_config(shape: str, vocabulary: int) -> dict[str, Any]:
  """Makes the config.json of a Qwen3 of some shape."""
  layers, width, mlp, heads, kv_heads = SHAPES[shape]
  return dict(
      model_type='qwen3', vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp,
      num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
      head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True,
      max_position_embeddings=40960)


def timed(call: Any, times: int = TIMES) -> tuple[float, float, Any]:
  """Calls something: (seconds of the first call, the median of the others, what came out)."""
  seconds = []
  for _ in range(times + 1):
    began = time.perf_counter()
    out = jax.block_until_ready(call())
    seconds.append(time.perf_counter() - began)
  return seconds[0], statistics.median(seconds[1:]), out


def machine(dtype: str, size: int) -> dict[str, float]:
  """Measures the fastest product of square matrices, and a copy, counting what is read and what is
  written."""
  a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
  # Some in a program: a call costs the host as long as a small product takes.
  chained = jax.jit(lambda a, b: jax.lax.fori_loop(0, 10, lambda _, x: (x @ b) * (size**-0.5), a))
  product = timed(functools.partial(chained, a, b))[1] / 10
  large = jnp.ones(size * size * 8, jnp.float32)
  copied = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda i, x: x + 1, x))
  copy = timed(functools.partial(copied, large))[1] / 10
  return {'flops_per_s': 2 * size**3 / product, 'bytes_per_s': 2 * large.nbytes / copy}


def cache_bytes(model: Model, rows: int, prompt: int, answer: int) -> float:
  """Counts the bytes of keys and values that the steps of decoding read, one after another."""
  kept = jax.eval_shape(lambda: model.init_cache(rows, 1)['kv'])
  place, total, done = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)), 0.0, 0
  for length in slots.lengths(answer):
    steps = min(length, answer - 1) - done
    total, done = total + steps * place * (prompt + length), done + steps
  return total


def make_run(shape: str, rows: int, args: argparse.Namespace, folder: str) -> settings.Run:
  """Makes the settings of a run of two models of a shape."""
  (pathlib.Path(folder) / 'config.json').write_text(json.dumps(hf_config(shape, args.vocabulary)))
  c = config.default_config()
  c.name, c.student.path = shape, folder
  c.teacher.kind, c.teacher.path = 'checkpoint', folder
  presets.apply(c, args.preset)
  c.data.prompts_per_step, c.data.samples_per_prompt = rows, 1
  c.data.max_prompt_tokens, c.data.max_new_tokens = args.prompt, args.answer
  c.compute.dtype, c.compute.chunk_tokens = args.dtype, args.chunk_tokens
  c.compute.microbatch_rows = min(rows, args.microbatch_rows)
  c.compute.attention, c.compute.remat = args.attention, args.remat
  c.compute.length_buckets = 1  # all are of one length
  return config.parse(c)


def open_programs(run: settings.Run) -> programs.Programs:
  """Makes the programs of a run whose models are drawn at random where they are to be."""
  parts = shapes.open_parts(run, jax.devices()[:1])

  def draws(loaded, seed):
    def read(dtype=jnp.float32, shardings=None):
      init = jax.jit(functools.partial(params.init_params, loaded.model.specs, dtype=dtype),
                     out_shardings=shardings)
      return init(jax.random.key(seed))
    return dataclasses.replace(loaded, read=read)

  examples = {s.name: shapes.Shapes([{}] * s.prompts, run.data.max_prompt_tokens)
              for s in parts.streams}
  return programs.compile_programs(run, dataclasses.replace(
      parts, student=draws(parts.student, 0), teacher=draws(parts.teacher, 1), examples=examples,
      stop_tokens=()))


def step(run: settings.Run, can: dict[str, float], times: int) -> dict[str, Any]:
  """Times the phases of a step, each so many times."""
  there = open_programs(run)
  (stream,), student = there.parts.streams, there.parts.student.model
  rows, length = stream.rows, run.data.max_prompt_tokens + run.data.max_new_tokens
  lengths, out = np.full(rows, length), {}
  graders, state = there.connect(None), there.init(there.parts.read_trained())
  indices, key = np.arange(rows), load.fold_in(jax.random.key(0), load.SAMPLE, 0)

  def note(name, first, seconds, operations, moved=0.0):
    out[name] = dict(first_s=first, s=seconds, tokens_per_s=rows * (
        run.data.max_new_tokens if name == 'write' else length) / seconds,
        flops_share=operations / seconds / can['flops_per_s'])
    if moved:
      out[name]['bandwidth_share'] = moved / seconds / can['bytes_per_s']
    print(f'  {name:14}', ', '.join(f'{k} {v:.4g}' for k, v in out[name].items()), flush=True)

  with jax.set_mesh(there.parts.mesh):
    forward = flops.forward_flops(student, lengths)
    itemsize = jnp.dtype(run.compute.dtype).itemsize
    weights = params.count_params(student.specs, matmul_only=True) * itemsize
    steps = run.data.max_new_tokens - 1
    first, seconds, (rollout,) = timed(lambda: list(there.write(
        stream, state.params, graders, indices, key)), times)
    note('write', first, seconds, forward, steps * weights + cache_bytes(
        student, rows, run.data.max_prompt_tokens, run.data.max_new_tokens))
    first, seconds, _ = timed(lambda: graders['teacher'].score(rollout, stream), times)
    note('score teacher', first, seconds, forward)
    batch = there.grade(stream, state.params, graders, indices, [rollout])

    def update():
      nonlocal state
      state, metrics = there.update(state, (stream,), [batch], graders, None, key)
      return metrics

    first, seconds, _ = timed(update, times)
    note('update', first, seconds, 3 * forward)
  used = jax.devices()[0].memory_stats() or {}
  out['peak_bytes'] = used.get('peak_bytes_in_use')
  return out


def main() -> None:
  """Measures what is asked for."""
  flags = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
  flags.add_argument('--only', default='0.6b,4b', help=f'of {", ".join(SHAPES)}')
  flags.add_argument('--rows', default='64', help='a number, or several, one after another')
  flags.add_argument('--prompt', type=int, default=128, help='tokens')
  flags.add_argument('--answer', type=int, default=512, help='tokens')
  flags.add_argument('--microbatch_rows', type=int, default=8)
  flags.add_argument('--chunk_tokens', type=int, default=4096)
  flags.add_argument('--vocabulary', type=int, default=VOCABULARY)
  flags.add_argument('--dtype', default='bfloat16')
  flags.add_argument('--preset', default='opd')
  flags.add_argument('--attention', default='auto')
  flags.add_argument('--remat', default='none')
  flags.add_argument('--times', type=int, default=TIMES)
  flags.add_argument('--product', type=int, default=8192, help='rows of the matrices multiplied')
  flags.add_argument('--json', help='a file for all numbers')
  args = flags.parse_args()
  can = machine(args.dtype, args.product)
  device = jax.devices()[0]
  found = {'device': device.device_kind, 'jax': jax.__version__, **can, 'settings': vars(args)}
  print(f'{device.device_kind}, jax {jax.__version__}: product {can["flops_per_s"] / 1e12:.4g} '
        f'TFLOP/s, copy {can["bytes_per_s"] / 1e9:.4g} GB/s', flush=True)
  for shape in args.only.split(','):
    for rows in map(int, args.rows.split(',')):
      print(f'{shape}, {rows} rows of {args.prompt} + {args.answer} tokens', flush=True)
      with tempfile.TemporaryDirectory() as folder:
        found[f'{shape}, {rows} rows'] = step(
            make_run(shape, rows, args, folder), can, args.times)
      jax.clear_caches()
      if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
