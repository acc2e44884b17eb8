"""What travels in the loop's programs, and what models compute, on meshes: for the children of
test_layout.py.

The sizes are Qwen3-0.6B's, with 4 layers: 64 rows of 128 + 128 tokens, 16 of them in a pass.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import collectives
import jax
import jax.numpy as jnp
import optax

from opd_jax import models
from opd_jax.algorithm import sample, score, update
from opd_jax.algorithm.objective import Objective
from opd_jax.models.placement import LaidOut
from opd_jax.parallel import sharding
from opd_jax.parallel import state as state_lib
from opd_jax.types import Batch, Heads, Prompts, Rollout, Scores, Wants

QWEN3 = dict(
    model_type='qwen3', rms_norm_eps=1e-6, rope_theta=1e6, vocab_size=151936, head_dim=128,
    hidden_act='silu', attention_bias=False, max_position_embeddings=40960, hidden_size=1024,
    num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8, intermediate_size=3072,
    tie_word_embeddings=True)
PROMPT, ROOM, CHUNK = 128, 128, 4096


def make_mesh(split: int = 1, devices: list[Any] | None = None, **sizes: int
              ) -> jax.sharding.Mesh:
  """A mesh of these sizes and of ones."""
  return sharding.make_mesh(dict.fromkeys(sharding.SIZES, 1) | sizes, devices, split)


class Lowered:
  """The programs of the loop for a mesh, without an array."""

  def __init__(self, mesh: jax.sharding.Mesh, rows: int = 64, microbatch_rows: int = 16,
               prompt: int = PROMPT, room: int = ROOM, **shape: Any):
    self.mesh, self.rows, self.micro = mesh, rows, microbatch_rows
    self.prompt, self.room = prompt, room
    self.model = models.build(QWEN3 | shape, dtype=jnp.bfloat16, remat='layer')
    self.optimizer = optax.adamw(1e-4)
    self.state = state_lib.abstract(self.model.specs, self.optimizer, mesh)
    self.rollout = Rollout(
        tokens=self._rows(prompt + room, dtype=jnp.int32),
        valid=self._rows(prompt + room, dtype=jnp.bool_), mask=self._per_token(),
        sampler_logprobs=self._per_token(), policy_offset=self._per_token(),
        ended=self._rows(dtype=jnp.bool_), prompt_length=prompt)
    key = jax.eval_shape(lambda: jax.random.key(0))
    self.key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))

  def _rows(self, *shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((self.rows, *shape), dtype, sharding=sharding.by_rows(self.mesh))

  def _per_token(self):
    return self._rows(self.prompt + self.room - 1)

  def score(self, dtype: Any = jnp.float32):
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
                          self.state.params)
    return jax.jit(functools.partial(
        score.teacher_logprob_fn, model=self.model, temperature=1.0, wants=Wants(logprobs=True),
        chunk_tokens=CHUNK, microbatch_rows=self.micro),
        out_shardings=sharding.by_rows(self.mesh)).lower(params, self.rollout)

  def update(self):
    scores = Scores(self._per_token(), self._per_token(), None)
    term = update.Term('own', Objective(), microbatch_rows=self.micro)
    where = jax.tree.map(lambda x: x.sharding, self.state)
    return jax.jit(functools.partial(
        update.update_fn, model=self.model, optimizer=self.optimizer, terms=(term,),
        chunk_tokens=CHUNK), donate_argnums=0, out_shardings=(
            where, sharding.replicated(self.mesh))).lower(
                self.state, (Batch(self.rollout, scores, scores),), Heads(), None, self.key)

  def truncated(self):
    """The sampler with both kinds of truncation."""
    return self.sample(top_p=0.9, top_k=20)

  def sample_laid_out(self):
    """The sampler as the loop calls it, after the weights were laid out."""
    laid = jax.jit(lambda params: LaidOut(self.model.for_decoding(params))).lower(
        self.state.params)
    weights = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                           laid.out_info, laid.compile().output_shardings)
    return self.sample(weights=weights)

  def sample(self, top_p: float = 1.0, top_k: int = 0, weights: Any = None):
    """The sampler, which lays the weights out for decoding first."""
    prompts = Prompts(self._rows(self.prompt, dtype=jnp.int32),
                      self._rows(self.prompt, dtype=jnp.bool_))
    return jax.jit(functools.partial(
        sample.sample_fn, model=self.model, max_new_tokens=self.room, temperature=1.0, top_p=top_p,
        top_k=top_k, stop_tokens=(7,), pad_token=0),
        out_shardings=sharding.by_rows(self.mesh)).lower(
            self.state.params if weights is None else weights, prompts, self.key)

  def decode_layout(self):
    return jax.jit(self.model.for_decoding).lower(self.state.params)


# (program, rows, rows of a pass, decode_split, mesh).
CASES = {
    'update': ('update', 64, 16, 1, dict(fsdp=8)),
    'update of twice the rows': ('update', 128, 32, 1, dict(fsdp=8)),
    'score': ('score', 64, 16, 1, dict(fsdp=8)),
    'score of twice the rows': ('score', 128, 32, 1, dict(fsdp=8)),
    'score with tensor': ('score', 64, 16, 1, dict(fsdp=4, tensor=2)),
    'sample gathered': ('sample', 64, 16, 1, dict(fsdp=8)),
    'sample split': ('sample', 64, 16, 8, dict(fsdp=8)),
    'sample half split': ('sample', 64, 16, 2, dict(fsdp=4, tensor=2)),
    'sample laid out': ('sample_laid_out', 64, 16, 2, dict(fsdp=8)),
    'truncated split': ('truncated', 64, 16, 8, dict(fsdp=8)),
    'layout gathered': ('decode_layout', 64, 16, 1, dict(fsdp=8)),
    'layout split': ('decode_layout', 64, 16, 8, dict(fsdp=8)),
    'layout half split': ('decode_layout', 64, 16, 2, dict(fsdp=8))}
# With numbers of rows and tokens that are no width of the model, nor a part of one; one layer.
ODD = {f'{name} of 72 rows': (name, 72, 24, split, dict(fsdp=8))
       for name, split in (('update', 1), ('score', 1), ('sample', 8))}


def _gathered_logits(mesh):
  """What must not travel: the logits of all rows on each device."""
  hidden = jax.ShapeDtypeStruct((72, 1024), jnp.float32, sharding=sharding.by_rows(mesh))
  head = jax.ShapeDtypeStruct((1024, QWEN3['vocab_size']), jnp.float32,
                              sharding=sharding.replicated(mesh))
  return jax.jit(jnp.matmul, out_shardings=sharding.replicated(mesh)).lower(hidden, head)


def traffic() -> dict[str, Any]:
  """By case: the collectives (see `collectives.of_program`), and what is said to be received."""
  out = {}
  mesh = make_mesh(fsdp=8)
  with jax.set_mesh(mesh):
    out['gathered logits'] = dict(found=collectives.of_program(
        _gathered_logits(mesh).compile().as_text()))
  for name, (program, rows, micro, split, sizes) in ODD.items():
    mesh = make_mesh(split, **sizes)
    with jax.set_mesh(mesh):
      text = getattr(Lowered(mesh, rows, micro, num_hidden_layers=1), program)().compile().as_text()
    out[name] = dict(found=collectives.of_program(text))
  for name, (program, rows, micro, split, sizes) in CASES.items():
    mesh = make_mesh(split, **sizes)
    with jax.set_mesh(mesh):
      lowered = Lowered(mesh, rows, micro)
      text = getattr(lowered, program)().compile().as_text()
    # The CPU's bfloat16 travels as float32.
    out[name] = dict(found=collectives.of_program(text),
                     said=sharding.decode_bytes(lowered.model.specs, mesh, 4))
    print(name, file=sys.stderr, flush=True)
  return out
