"""What models of every kind compute on meshes of four devices, less what they do on one: for the
child of test_layout.py."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from conftest import FAMILY_FIELDS, left_padded, quick_jit, qwen3_config, sharp_params
import jax
import jax.numpy as jnp
import meshed_layout
import numpy as np
import optax

from opd_jax import models
from opd_jax.algorithm import sample, score, update
from opd_jax.algorithm.objective import Objective
from opd_jax.models import lora
from opd_jax.models import params as params_lib
from opd_jax.parallel import sharding
from opd_jax.types import Batch, Heads, Model, Params, Scores, TrainState, Wants

EXACT = Objective(route='direct', support='full', importance='none')
PROMPTS = [[5, 9, 1, 2], [7], [3, 3, 8], [4], [11, 2], [6], [1, 1, 1], [8, 9]]
ADAPTER = lora.Settings(rank=4, alpha=8.0)


@dataclasses.dataclass
class Case:
  """A model, its parameters, a mesh, whether adapters are what is trained, and how the draws of
  the sampler are truncated."""

  model: Model
  params: Params
  mesh: jax.sharding.Mesh
  adapted: bool = False
  slots: int = 0  # on the mesh
  buckets: int = 1  # there, too
  top_p: float = 1.0
  top_k: int = 0


def _build(family: str = 'qwen3', **options: Any) -> tuple[Model, Params]:
  fields = {n: options.pop(n) for n in list(options) if n not in ('dtype', 'remat')}
  c = qwen3_config(model_type=family, num_attention_heads=8, num_key_value_heads=4,
                   **FAMILY_FIELDS.get(family, {}))
  if family == 'gemma2':
    c |= dict(tie_word_embeddings=True, hidden_activation='gelu_pytorch_tanh')
  model = models.build({**c, **fields}, **options)
  return model, sharp_params(model)


def _whole():
  return Case(*_build(tie_word_embeddings=True, remat='layer'), meshed_layout.make_mesh(4, fsdp=4))


def _windows():
  return Case(*_build('gemma2'), meshed_layout.make_mesh(2, fsdp=2, tensor=2), top_p=0.8, top_k=9,
              slots=4, buckets=2)


def _experts():
  return Case(*_build('qwen3_moe'), meshed_layout.make_mesh(2, fsdp=2, expert=2))


def _adapters():
  return Case(*_build(), meshed_layout.make_mesh(1, data=2, fsdp=2), adapted=True, slots=4,
              buckets=3)


def _bfloat16():
  return Case(*_build('qwen2', dtype=jnp.bfloat16), meshed_layout.make_mesh(2, fsdp=4))


def _module():
  import flax_modules  # of tests/models, where the child finds it
  return Case(*flax_modules.linen_model(), meshed_layout.make_mesh(2, fsdp=4))


CASES = {'whole': _whole, 'windows': _windows, 'experts': _experts, 'adapters': _adapters,
         'bfloat16': _bfloat16, 'module': _module}


def _programs(case, slots, buckets):
  optimizer, model = optax.sgd(1.0), case.model
  common = dict(model=model, chunk_tokens=16)
  write = quick_jit(lambda params, prompts, key: sample.sample_fn(
      model.for_decoding(params), prompts, key, model=model, max_new_tokens=7, temperature=1.0,
      top_p=case.top_p, top_k=case.top_k, stop_tokens=(1,), pad_token=0, slots=slots))
  grade = quick_jit(functools.partial(
      score.teacher_logprob_fn, temperature=1.0, wants=Wants(logprobs=True, hidden=True),
      microbatch_rows=4, length_buckets=buckets, **common))
  step = quick_jit(functools.partial(
      update.update_fn, optimizer=optimizer, terms=(
          update.Term('own', EXACT, microbatch_rows=4, length_buckets=buckets),),
      **common))
  return write, grade, step


def _run(case, trained, frozen, teacher, prompts, given=None, slots=0, buckets=1):
  """What the student writes, what the teacher says of it (or of a rollout that is given), and where
  the student moves on that."""
  write, grade, step = _programs(case, slots, buckets)
  wait = jax.block_until_ready  # collectives of several programs can deadlock on few processors
  rollout = wait(write(lora.join(frozen, trained), prompts, jax.random.key(3)))
  given = rollout if given is None else given
  scores = wait(grade(teacher, given))
  state = TrainState(step=jnp.int32(0), params=trained, opt_state=optax.sgd(1.0).init(trained))
  heads = Heads(case.model.head(teacher))
  batch = Batch(given, Scores(None, None, scores.hidden))
  state, metrics = wait(step(state, (batch,), heads, frozen, jax.random.key(0)))
  return jax.device_get((rollout, scores.logprobs, state.params, metrics['loss']))


def _noisy(params, seed):
  keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
  return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), params)


def differences() -> dict[str, dict[str, float]]:
  """By case: tokens that differ; the largest difference of the sampler's log-probs up to the first
  such token, of the teacher's, of the loss, and of a parameter after a step of SGD on the same
  rows, this relative to the largest step."""
  out, prompts = {}, left_padded(PROMPTS, 5)
  for name, make in CASES.items():
    case = make()
    specs, frozen, trained = case.model.specs, None, case.params
    teacher, where = _noisy(case.params, 1), sharding.param_shardings(specs, case.mesh)
    of_trained = where
    if case.adapted:
      adapters = lora.adapter_specs(specs, ADAPTER)
      trained = _noisy(params_lib.init_params(adapters, jax.random.key(2)), 4)
      frozen = lora.Frozen(case.params, ADAPTER.scale)
      of_trained = sharding.param_shardings(adapters, case.mesh)
    want = _run(case, trained, frozen, teacher, prompts)
    with jax.set_mesh(case.mesh):
      placed = (sharding.put(trained, of_trained),
                frozen and frozen.replace(base=sharding.put(frozen.base, where)),
                sharding.put(teacher, where), sharding.put(prompts, sharding.by_rows(case.mesh)),
                sharding.put(want[0], sharding.by_rows(case.mesh)))
      got = _run(case, *placed, slots=case.slots, buckets=case.buckets)
    moved = max(np.abs(np.asarray(a) - np.asarray(b)).max()
                for a, b in zip(*map(jax.tree.leaves, (want[2], trained)), strict=True))
    far = [max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(
        *map(jax.tree.leaves, pair), strict=True)) for pair in zip(want[1:], got[1:], strict=True)]
    other = want[0].tokens != got[0].tokens
    same = np.cumsum(other, axis=1)[:, 1:] == 0
    gap = np.abs(want[0].sampler_logprobs - got[0].sampler_logprobs)
    out[name] = dict(
        tokens=int(other.sum()), sampler=float((gap * same).max()),
        scores=float(far[0]), params=float(far[1] / moved), loss=float(far[2] / abs(want[3])),
        written=float(want[0].mask.sum()))
    assert math.isfinite(sum(out[name].values())), name
  return out
