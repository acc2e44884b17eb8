"""The operation counts against XLA's own, and the bookkeeping of a step."""

from __future__ import annotations

from conftest import family_config, qwen3_config, ways_to_tie
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import models
from opd_jax.algorithm.objective import Objective
from opd_jax.models import lora, params
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


def test_step_flops_books_every_forward_where_it_belongs():
  small = models.build(qwen3_config(**SIZES))
  large = models.build(qwen3_config(**{**SIZES, 'hidden_size': 128}))
  lengths = np.array([10, 20, 7])
  own, theirs = (flops.forward_flops(m, lengths) for m in (small, large))
  assert own < theirs

  def step(teacher, **kwargs):
    return flops.step_flops(small, teacher, lengths, **kwargs)

  assert step(large, source='student', teacher_scores=True, student_rescores=True, updates=2) == {
      'student': 7 * own, 'sampling': own, 'teacher': theirs}
  assert step(large, source='teacher', teacher_scores=False, student_rescores=False, updates=1) == {
      'student': 3 * own, 'sampling': theirs, 'teacher': 0.0}
  assert step(None, source='dataset', teacher_scores=False, student_rescores=False, updates=1) == {
      'student': 3 * own, 'sampling': 0.0, 'teacher': 0.0}


def test_adapters_need_no_gradient_of_the_base():
  model = models.build(qwen3_config(**SIZES))
  specs = lora.adapter_specs(model.specs, lora.Settings(rank=3, alpha=1.0, targets='attention'))
  lengths = np.array([10, 20, 7])
  own, c = flops.forward_flops(model, lengths), model.config
  wide = {'q': c.num_attention_heads, 'k': c.num_key_value_heads, 'v': c.num_key_value_heads,
          'o': c.num_attention_heads}
  extra = sum(2 * 37 * c.num_hidden_layers * 3 * (c.hidden_size + heads * c.head_dim)
              for heads in wide.values())
  spent = flops.step_flops(model, None, lengths, source='student', teacher_scores=False,
                           student_rescores=True, updates=2, adapter_specs=specs)
  # A forward pass, the gradient of the activations, and of the adapters' own weights; rescoring is
  # one more forward pass.
  assert spent['student'] == pytest.approx(2 * (2 * own + 3 * extra) + own + extra, rel=1e-12)
  assert spent['sampling'] == pytest.approx(own + extra, rel=1e-12)


def test_heads_that_are_applied_again_count():
  model = models.build(qwen3_config())
  lengths = np.array([5.0, 9.0])
  head = 2.0 * model.config.vocab_size * model.config.hidden_size * lengths.sum()
  assert flops.head_flops(model, lengths) == head
  how = dict(source='student', teacher_scores=True, student_rescores=1, updates=1)
  plain = flops.step_flops(model, model, lengths, **how)
  for o, student, teacher in (
      (Objective(), 0, 0), (Objective(baseline='exact'), 1, 1),
      (Objective(route='direct', support='full', importance='none'), 0, 0)):
    spent = flops.step_flops(model, model, lengths, **how, extra_heads=o.extra_heads)
    assert spent['student'] - plain['student'] == pytest.approx(student * head)
    assert spent['teacher'] - plain['teacher'] == pytest.approx(teacher * head)
