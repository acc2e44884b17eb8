"""The operation counts of a model against XLA's own."""

from __future__ import annotations

from conftest import family_config, qwen3_config, ways_to_tie
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import models
from opd_jax.models import params
from opd_jax.run import flops

SIZES = dict(vocab_size=512, hidden_size=64, intermediate_size=192, num_attention_heads=6,
             num_key_value_heads=2, head_dim=16, num_hidden_layers=3)


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('length', [16, 96])  # matrices dominate; attention is a fifth
def test_forward_flops_against_xla(tied, length):
  model = models.build(qwen3_config(tie_word_embeddings=tied, **SIZES))
  batch = 2
  # Layers unrolled: XLA counts the body of a loop once, however often it runs.
  weights = jax.eval_shape(model.unstack, params.abstract_params(model.specs))
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

  def logits(p, tokens):
    positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
    hidden, _ = model.forward(p, tokens, positions, jnp.ones(tokens.shape, bool), None)
    return model.head(p).logits(hidden)

  counted = jax.jit(logits).lower(weights, tokens).cost_analysis()['flops']
  ours = flops.forward_flops(model, np.full(batch, length))
  # The program computes the whole length x length square of scores and masks half of it away; the
  # method needs length (length + 1) / 2 pairs, which is what we count.
  c = model.config
  per_pair = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
  square = ours + batch * per_pair * length * (length - 1) / 2
  # What is left is elementwise (norms, softmax, silu, rotation), which we leave out by definition:
  # 2 to 4 % at this width, and less the wider the model. Never less than the products alone.
  assert square <= counted <= 1.06 * square


def test_forward_flops_counts_each_row_by_its_own_length():
  model = models.build(qwen3_config(**SIZES))
  one = [flops.forward_flops(model, np.array([n])) for n in (5, 9)]
  assert flops.forward_flops(model, np.array([5, 9])) == sum(one)
  assert flops.forward_flops(model, np.array([0])) == 0.0


@pytest.mark.parametrize('family', ['mistral', 'gemma2'])
def test_a_sliding_window_bounds_the_pairs(family):
  model = models.build(family_config(family, ways_to_tie(family)[0]))  # windows of 4
  c = model.config
  matrices = 2 * params.count_params(model.specs, matmul_only=True)
  for n in (1, 3, 4, 5, 11):
    seen = [min(i + 1, 4) for i in range(n)]
    pairs = {'mistral': 2 * sum(seen), 'gemma2': sum(seen) + n * (n + 1) / 2}[family]
    want = matrices * n + 4 * c.num_attention_heads * c.head_dim * pairs
    assert flops.forward_flops(model, np.array([n])) == want


def test_of_the_experts_those_in_use_count():
  # 2 of 4 experts a token: as many operations as a dense layer of twice their width, and a router.
  mixture = models.build(family_config('qwen3_moe', False))
  dense = models.build({**family_config('qwen3', False), 'intermediate_size': 24})
  router = 2 * 16 * 4
  assert (params.count_params(mixture.specs, matmul_only=True)
          == params.count_params(dense.specs, matmul_only=True) + router)
  assert (params.count_params(mixture.specs)
          == params.count_params(dense.specs) + router + 2 * 2 * 3 * 16 * 12)
