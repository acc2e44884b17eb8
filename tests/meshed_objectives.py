"""Steps and scores on a mesh of four devices and on one device: for the child of test_mesh.py."""

from __future__ import annotations

import dataclasses
import functools
import re

from conftest import make_rollout, quick_jit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabular
import tiny

from opd_jax import config as config_lib
from opd_jax import presets
from opd_jax.algorithm import choices, score, signals, update
from opd_jax.algorithm.objective import KINDS, Objective
from opd_jax.data import streams
from opd_jax.parallel import sharding
from opd_jax.run import evaluate
from opd_jax.types import Batch, Scores, TrainState, Wants

PROMPTS = [[5, 9, 1, 2], [5, 9, 1, 2], [7], [7], [3, 3, 8], [3, 3, 8], [4], [4]]
ROWS = [[3, 1, 4, 1, 0], [9, 0], [6, 5, 3, 8, 9], [7, 9, 0], [0], [8, 6, 2, 6, 4], [1, 11], [2, 0]]
REWARDS = np.array([1.0, 0.0, 0.25, 1.0, 0.0, 0.0, 1.0, 0.0])
# What they cover: a local term that is drawn; a reference, and given rows; the exact baseline, the
# whole vocabulary's; a gate on rows, and a bucket; a mixture's samples; a gate on tokens that sorts
# the batch, by what needs the vocabulary.
CASES = ('tropd', 'stable_opd', 'vopd', 'rg_opd', 'minillm', 'teachability')

TEACHABILITY = Objective(token_gate='teachability(keep=0.5, top_k=3)')


def _objectives(name):
  """(of own rows, of given ones or None)."""
  if name == 'teachability':
    return TEACHABILITY, None
  c = tiny.config('opd_sampled', teacher__kind='initial_student')
  run = config_lib.parse(presets.apply(c, name))
  o = run.objective
  small = (dataclasses.replace(part, support=choices.at_most(KINDS['support'], part.support, 9))
           for part in (o, o.local))
  given = streams.given_objective(run) if run.given.source != 'none' else None
  return dataclasses.replace(next(small), local=next(small)), given


def _put(mesh, state, batches, heads):
  """As the loop does it: rows over the data axes, a head over its width and the vocabulary."""
  whole = sharding.replicated(mesh)
  head = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp', 'tensor'))
  params = {'table': whole, 'head': head}
  return (TrainState(step=sharding.put(state.step, whole), opt_state=state.opt_state,
                     params=sharding.put(state.params, params)),
          sharding.put(batches, sharding.by_rows(mesh)), sharding.put(heads, head), None)


def differences() -> dict[str, float]:
  """The largest difference of a parameter after the step, relative to the largest step."""
  out, model = {}, tabular.model(12, 10, 6)
  sizes = dict(data=1, fsdp=2, tensor=2, expert=1)
  with jax.enable_x64(True):
    params, teacher, reference = (tabular.random_params(model, seed) for seed in (0, 1, 2))
    cast = tabular.Cast(model, params, params, teacher, reference)
    rollout = make_rollout(PROMPTS, ROWS, prompt_width=5, room=5, dtype=jnp.float64)
    rollout = rollout.replace(sampler_logprobs=-2.0 * rollout.mask)
    optimizer, mesh = optax.sgd(1.0), sharding.make_mesh(sizes)
    scorer = functools.lru_cache(lambda temperature: quick_jit(functools.partial(
        score.teacher_logprob_fn, model=model, temperature=temperature,
        wants=Wants(logprobs=True, hidden=True), chunk_tokens=100, microbatch_rows=0)))
    for name in CASES:
      o, beside = _objectives(name)
      batch, heads = tabular.batch(o, cast, rollout, REWARDS, scorer)
      state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))
      terms = tuple(update.Term(stream, objective, group_size, own, microbatch_rows=4)
                    for stream, objective, group_size, own in (
                        (streams.OWN, o, 2, True), (streams.GIVEN, beside, 1, False))
                    if objective is not None)
      # Without the metrics, which nobody reads here, it compiles in half the time.
      step = quick_jit(lambda *inputs, terms=terms: update.update_fn(
          *inputs, model=model, optimizer=optimizer, terms=terms, chunk_tokens=8)[0].params)
      inputs = (state, (batch,) * len(terms), heads, None)
      # One program at a time: collectives of several can deadlock on so few processors.
      want = jax.block_until_ready(step(*inputs, jax.random.key(3)))
      with jax.set_mesh(mesh):
        placed = jax.block_until_ready(_put(mesh, *inputs[:3]))
        got = jax.block_until_ready(step(*placed, jax.random.key(3)))
      moved = max(np.abs(np.asarray(want[k] - params[k])).max() for k in params)
      out[name] = float(max(np.abs(np.asarray(got[k]) - np.asarray(want[k])).max()
                            for k in params) / moved)
  return out


# What `top_k` looks at (of a chunk, some sqrt(k V) candidates a token) is sorted on every device
# for all of them. That is not of hidden states, nor of rows of the vocabulary.
COLLECTIVE = re.compile(r'= \S+ (?:all-gather|all-reduce|all-to-all|collective-permute|'
                        r'reduce-scatter)(?:-start)?\((?!.*/top_k")')


def scoring() -> dict[str, dict[str, float]]:
  """Of each program that looks at the vocabulary and is not differentiated, with its rows over four
  devices and the parameters on each: its collectives but for those of top_k, and the operations of
  a device relative to those of the same program on one device. (A loop's body counts once, on
  both.)"""
  model = tabular.model(64, 40, 16)
  mesh = sharding.make_mesh(dict(data=4, fsdp=1, tensor=1, expert=1))
  params = tabular.random_params(model, 0, jnp.float32)
  rollout = make_rollout(PROMPTS, [[1] * 30] * 8, prompt_width=5, room=30)
  hidden = jnp.zeros((8, 30, 16))

  def teachability(params, rollout, hidden):
    scores = Scores(None, None, hidden)
    over, seen = signals.over_vocabulary(TEACHABILITY, Batch(rollout, scores, scores),
                                         model.head(params), model.head(params), 16), []
    # Of the gate only what looks at the vocabulary: it sorts the whole batch afterwards.
    TEACHABILITY.choice('token_gate')(dict(
        mask=rollout.mask, over_vocabulary=lambda f: seen.append(over(f)) or seen[0]))
    return seen[0]

  programs = {
      'score': (functools.partial(
          score.teacher_logprob_fn, model=model, temperature=1.0,
          wants=Wants(logprobs=True, hidden=True), chunk_tokens=16, microbatch_rows=4), ()),
      'compare': (lambda params, rollout: evaluate.compare(
          params, params, rollout, model=model, teacher=model, temperature=1.0,
          teacher_temperature=1.0, chunk_tokens=16, overlap_top_ks=(3,)), ()),
      'teachability': (teachability, (hidden,))}
  out, whole, rows = {}, sharding.replicated(mesh), sharding.by_rows(mesh)
  for name, (program, more) in programs.items():
    one = jax.jit(program).lower(params, rollout, *more).compile()
    with jax.set_mesh(mesh):
      placed = (sharding.put(params, whole), sharding.put((rollout, *more), rows))
      four = jax.jit(program, out_shardings=rows).lower(placed[0], *placed[1]).compile()
    out[name] = {'collectives': len(COLLECTIVE.findall(four.as_text())),
                 'flops': four.cost_analysis()['flops'] / one.cost_analysis()['flops']}
  return out
