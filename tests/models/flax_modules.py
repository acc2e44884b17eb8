"""What tests of Flax modules share: a Linen transformer and an NNX one, as models and factories."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from conftest import left_padded, quick_jit
from flax import linen, nnx
import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

from opd_jax.algorithm import sample, score, update
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface
from opd_jax.models import flax_module
from opd_jax.types import Batch, Heads, Model, Params, TrainState, Wants

VOCAB, LENGTH = 48, 32
CONFIG = flax_module.Config(vocab_size=VOCAB, max_position_embeddings=LENGTH)
# Float32 sums in another order, of numbers of about 1.
FLOAT32 = dict(rtol=1e-5, atol=1e-5)
QWEN3 = tiny.ROOT / 'experiments' / 'assets' / 'base'
ROWS = [[5], [7, 11, 2, 30], [3, 3, 9]]


class LinenLM(linen.Module):
  """A decoder with a tied head; `logits` makes it multiply by the head itself."""

  vocab: int = VOCAB
  layers: int = 1
  logits: bool = False
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @linen.compact
  def __call__(self, tokens, positions, valid):
    normal = linen.initializers.normal
    embed = linen.Embed(
        self.vocab, 16, name='embed', dtype=self.dtype,
        embedding_init=linen.with_partitioning(normal(0.3), ('vocab', 'embed')))
    x = embed(tokens) + linen.Embed(LENGTH, 16, name='place', dtype=self.dtype)(positions)
    mask = linen.make_causal_mask(tokens, dtype=bool) & valid[:, None, None, :]
    for i in range(self.layers):
      h = linen.LayerNorm(dtype=self.dtype)(x)
      x = x + linen.MultiHeadDotProductAttention(2, name=f'attention_{i}', dtype=self.dtype)(
          h, mask=mask)
      h = linen.LayerNorm(dtype=self.dtype)(x)
      h = linen.Dense(24, name=f'up_{i}', dtype=self.dtype, kernel_init=linen.with_partitioning(
          normal(0.3), ('embed', 'a name of its own')))(h)
      h = linen.Dropout(self.dropout, deterministic=not self.dropout)(linen.gelu(h))
      x = x + linen.Dense(16, name=f'down_{i}', dtype=self.dtype)(h)
    x = linen.LayerNorm(dtype=self.dtype)(x)
    return embed.attend(x) if self.logits else x


class Block(nnx.Module):
  def __init__(self, rngs, dtype):
    self.norms = nnx.List([nnx.LayerNorm(16, rngs=rngs, dtype=dtype) for _ in range(2)])
    self.attention = nnx.MultiHeadAttention(2, 16, rngs=rngs, dtype=dtype, decode=False)
    self.up = nnx.Linear(16, 24, rngs=rngs, dtype=dtype, kernel_init=nnx.with_partitioning(
        nnx.initializers.normal(0.3), ('embed', 'mlp'), eager_sharding=False))
    self.down = nnx.Linear(24, 16, rngs=rngs, dtype=dtype)

  def __call__(self, x, mask):
    x = x + self.attention(self.norms[0](x), mask=mask)
    return x + self.down(nnx.silu(self.up(self.norms[1](x))))


class NNXLM(nnx.Module):
  """A decoder with a head of its own."""

  def __init__(self, rngs, vocab=VOCAB, dtype=jnp.float32, layers=1):
    self.embed = nnx.Embed(vocab, 16, rngs=rngs, dtype=dtype)
    self.place = nnx.Embed(LENGTH, 16, rngs=rngs, dtype=dtype)
    self.blocks = nnx.List([Block(rngs, dtype) for _ in range(layers)])
    self.out = nnx.Linear(16, vocab, use_bias=False, rngs=rngs, dtype=dtype,
                          kernel_init=nnx.initializers.normal(0.5))

  def hidden(self, tokens, positions, valid):
    x = self.embed(tokens) + self.place(positions)
    mask = nnx.make_causal_mask(tokens, dtype=bool) & valid[:, None, None, :]
    for block in self.blocks:
      x = block(x, mask)
    return x

  def __call__(self, tokens, positions, valid):
    return self.out(self.hidden(tokens, positions, valid))


def inputs(rows=ROWS, width=6):
  """Tokens, positions and what is valid."""
  prompts = left_padded(rows, width)
  return prompts.tokens, sample.positions_of(prompts.valid), prompts.valid


def tied(params: Params) -> jax.Array:
  """The head that is the embedding."""
  return params['embed']['embedding'].T


def linen_model(**options) -> tuple[Model, Params]:
  module = LinenLM(**options)
  variables = quick_jit(module.init)(jax.random.key(0), *inputs())
  return flax_module.from_linen(module, variables, CONFIG, head=None if module.logits else tied)


def nnx_model(seed=0, vocab=VOCAB, dtype=jnp.float32, layers=1) -> tuple[Model, Params]:
  return flax_module.from_nnx(
      NNXLM(nnx.Rngs(seed), vocab, dtype, layers), dataclasses.replace(CONFIG, vocab_size=vocab),
      head=lambda m: m.out.kernel[...], apply=lambda m, *args: m.hidden(*args))


def nnx_logits_model() -> tuple[Model, Params]:
  return flax_module.from_nnx(NNXLM(nnx.Rngs(0)), CONFIG)


KINDS = {name: functools.cache(make) for name, make in (
    ('linen', linen_model), ('linen_logits', functools.partial(linen_model, logits=True)),
    ('nnx', nnx_model), ('nnx_logits', nnx_logits_model))}
each_kind = pytest.mark.parametrize('kind', KINDS)


def logits_of(model, params, *arguments):
  """By the model's forward and its head."""
  def run(params, *arguments):
    hidden, cache = model.forward(params, *arguments, None)
    assert cache is None
    return model.head(params).logits(hidden)
  return quick_jit(run)(params, *arguments)


def trained(model, params, objective, teacher=None, steps=8):
  """Losses of some steps on one rollout, and the parameters after them."""
  optimizer = optax.adam(1e-2)
  rollout = quick_jit(functools.partial(
      sample.sample_fn, model=model, max_new_tokens=7, temperature=1.0, top_p=1.0, top_k=0,
      stop_tokens=(1,), pad_token=0))(params, left_padded(ROWS * 2, 6), jax.random.key(1))
  scores = head = None
  if teacher is not None:
    scores = quick_jit(functools.partial(
        score.teacher_logprob_fn, model=teacher[0], temperature=1.0, wants=Wants(hidden=True),
        chunk_tokens=16, microbatch_rows=0))(teacher[1], rollout)
    head = teacher[0].head(teacher[1])
  step = quick_jit(functools.partial(
      update.update_fn, model=model, optimizer=optimizer,
      terms=(update.Term('own', objective),), chunk_tokens=16))
  state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))
  losses = []
  for _ in range(steps):
    state, metrics = step(state, (Batch(rollout, scores),), Heads(head))
    losses.append(float(metrics['loss']))
  return losses, state.params, rollout


# --- what configs name as a factory ---


def make_linen(key: jax.Array, dtype: Any) -> tuple[Model, Params]:
  module = LinenLM(vocab=64, dtype=dtype)
  return flax_module.from_linen(module, module.init(key, *inputs()),
                                flax_module.Config(64, LENGTH), head=tied)


def make_nnx(key: jax.Array, dtype: Any) -> tuple[Model, Params]:
  return nnx_model(key, 64, dtype)


def make_narrow(key: jax.Array, dtype: Any) -> tuple[Model, Params]:
  return nnx_model(key, 60, dtype)


def make_float32(key: jax.Array, dtype: Any) -> tuple[Model, Params]:
  return nnx_model(key, 64)


def make_acausal(key: jax.Array, dtype: Any) -> tuple[Model, Params]:
  return flax_module.from_nnx(
      NNXLM(nnx.Rngs(key), 64), flax_module.Config(64, LENGTH),
      apply=lambda m, *a: m(*a) + jnp.mean(m(*a), axis=1, keepdims=True))


def make_nothing(key: jax.Array, dtype: Any) -> None:
  del key, dtype


def make_without_dtype(key: jax.Array) -> tuple[Model, Params]:
  return nnx_model(key, 64)


def make_nan_within(key: jax.Array, dtype: Any) -> tuple[Model, Params]:
  """Its last step divides by a norm without an epsilon, and is zero on padding before that."""
  module = LinenLM(vocab=64, dtype=dtype)

  def apply(params, tokens, positions, valid):
    x = module.apply({'params': params}, tokens, positions, valid) * valid[:, :, None]
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  return flax_module.from_linen(module, module.init(key, *inputs()),
                                flax_module.Config(64, LENGTH), head=tied, apply=apply)


def directory(path, make, seed=0, alphabet=prompts_lib.ALPHABET):
  """Writes the checkpoint of a factory's model."""
  made = []

  def run(key):
    model, params = make(key, jnp.float32)
    made.append(model)
    return params

  params = quick_jit(run)(jax.random.key(seed))
  model, = made
  huggingface.write_checkpoint(path, model, jax.device_get(params),
                               prompts_lib.character_tokenizer(alphabet))
  return path
