"""What rollouts in slots gain where the lengths of answers have a long tail.

    python benchmarks/slots.py                        (256 rows through 64 slots, and all at once)
    python benchmarks/slots.py --slots 32,64,128 --sigma 1.0 --json out.json

A Qwen3-shaped model of random weights to which a rule is added for when it stops: the logit of the
stop token is such that the lengths are log-normal, with room for eight times the median. Both
samplers draw the same rows, in turn, and the useful tokens (of rows, not of slots) of a second
are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import scipy.stats  # noqa: E402

from opd_jax import models  # noqa: E402
from opd_jax.algorithm import sample, slots  # noqa: E402
from opd_jax.models import params as params_lib  # noqa: E402
from opd_jax.types import Model, Prompts  # noqa: E402

STOP = 1
SHAPE = dict(  # the student of benchmarks/step.py
    model_type='qwen3', hidden_size=256, intermediate_size=768, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4, head_dim=32, rms_norm_eps=1e-6, rope_theta=1e4,
    tie_word_embeddings=True, max_position_embeddings=1 << 20)


def stopping(model: Model, hazard: np.ndarray) -> Model:
  """Makes a model stop, whatever it has written, with a probability that is a function of the
  position: its hidden states get one more number, which is that logit."""
  odds = jnp.asarray(np.log(hazard) - np.log1p(-hazard), jnp.float32)

  def forward(params, tokens, positions, valid, cache):
    hidden, cache = model.forward(params, tokens, positions, valid, cache)
    return jnp.concatenate([hidden, odds[positions][..., None].astype(hidden.dtype)], -1), cache

  def head(params):
    inner = model.head(params)
    # All others weigh one together: they are as good as alike with fresh weights.
    matrix = inner.matrix.T if inner.tied else inner.matrix
    matrix = jnp.pad(matrix, ((0, 1), (0, 0))).at[:, STOP].set(0.0)
    matrix = matrix.at[-1, STOP].set(1.0)
    return inner.replace(matrix=matrix, tied=False)

  return dataclasses.replace(model, forward=forward, head=head)


def hazards(prompt: int, median: float, sigma: float, room: int, vocabulary: int) -> np.ndarray:
  """Computes, for each position, the probability to stop there of a log-normal length; scaled so
  that as a logit it stands against the sum of the others."""
  lengths = scipy.stats.lognorm(sigma, scale=median)
  t = np.arange(room + 1)
  left = np.maximum(lengths.sf(t[:-1]), 1e-12)
  p = np.clip((lengths.sf(t[:-1]) - lengths.sf(t[1:])) / left, 1e-9, 0.5)
  odds = p / (1 - p) * (vocabulary - 1)
  out = np.full(prompt + room, 1e-9)
  out[prompt - 1:prompt - 1 + room] = odds / (1 + odds)
  return out


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """Times the plain sampler and some numbers of slots, in turn."""
  room = 8 * args.median
  model = models.build(dict(SHAPE, vocab_size=args.vocabulary), dtype=args.dtype)
  params = params_lib.init_params(model.specs, jax.random.key(0), jnp.dtype(args.dtype))
  # Small, so that what is drawn is drawn from nearly alike: only the lengths matter here.
  params['final_norm'] = 0.1 * params['final_norm']
  model = stopping(model, hazards(args.prompt, args.median, args.sigma, room, args.vocabulary))
  rng = np.random.RandomState(0)
  shape = args.rows, args.prompt
  prompts = Prompts(jnp.asarray(rng.randint(2, args.vocabulary, shape), jnp.int32),
                    jnp.ones(shape, bool))
  ways = {n: jax.jit(functools.partial(
      sample.sample_fn, model=model, max_new_tokens=room, temperature=1.0, top_p=1.0, top_k=0,
      stop_tokens=(STOP,), pad_token=0, slots=n)) for n in (0, *map(int, args.slots.split(',')))}
  seconds: dict[int, list[float]] = {n: [] for n in ways}
  for round_ in range(args.rounds + 1):  # the first compiles
    key, first = jax.random.key(round_), None
    for n, write in ways.items():
      began = time.perf_counter()
      mask = np.asarray(write(params, prompts, key).mask)
      if round_:
        seconds[n].append(time.perf_counter() - began)
      else:
        print(f'slots {n or "none"}: {time.perf_counter() - began:.1f} s with compiling',
              flush=True)
      lengths = mask.sum(axis=1).astype(int)
      first = lengths if first is None else first
      assert np.mean(first == lengths) > 0.9, 'other rows'  # but for draws on an edge
  out = {}
  for n in ways:
    s = statistics.median(seconds[n])
    out[str(n)] = dict(s=s, useful_tokens_per_s=lengths.sum() / s,
                       useful_share=slots.useful_share([lengths], n))
  for n, row in out.items():
    row['gain'] = out['0']['s'] / row['s']
    print(f'slots {n}:', ', '.join(f'{k} {v:.4g}' for k, v in row.items()), flush=True)
  return {'mean': lengths.mean(), 'longest': int(lengths.max()), **out}


def main() -> None:
  """Measures what is asked for."""
  flags = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
  flags.add_argument('--rows', type=int, default=256)
  flags.add_argument('--slots', default='64', help='a number, or several')
  flags.add_argument('--prompt', type=int, default=32, help='tokens')
  flags.add_argument('--median', type=int, default=32, help='of the lengths of the answers')
  flags.add_argument('--sigma', type=float, default=0.7, help='of their logarithms')
  flags.add_argument('--vocabulary', type=int, default=2048)
  flags.add_argument('--dtype', default='float32')
  flags.add_argument('--rounds', type=int, default=5)
  flags.add_argument('--json', help='a file for all numbers')
  args = flags.parse_args()
  found = {'device': jax.devices()[0].device_kind, 'settings': vars(args), **measure(args)}
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(found, indent=1, default=float) + '\n')


if __name__ == '__main__':
  main()
