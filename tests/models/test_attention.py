"""The forms of attention: against the equation in float64 NumPy, against each other, and what they
spend."""

from __future__ import annotations

import functools
import math

from attending import normal, rows_of, same
from conftest import family_config, qwen3_config, sharp_params, ways_to_tie
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import models
from opd_jax.models import attention, kernels, layout
from opd_jax.models import params as params_lib
from opd_jax.models.attention import Mask
from opd_jax.tools.plan import products

# float32 has 6e-8 relative rounding; sums here are over at most 300 terms of order one.
CLOSE = dict(rtol=2e-6, atol=2e-6)


def _attend(q, k, v, allowed, scale=None, softcap=0.0):
  """One query at a time. q [B,S,N,H]; k, v [B,K,T,H]; allowed [B,S,T]."""
  out = np.zeros_like(q)
  share = q.shape[2] // k.shape[1]
  for b, s, n in np.ndindex(*q.shape[:3]):
    keys = np.flatnonzero(allowed[b, s])
    logits = k[b, n // share, keys] @ q[b, s, n] * (scale or 1 / np.sqrt(q.shape[3]))
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    weights = np.exp(logits - logits.max())
    out[b, s, n] = weights / weights.sum() @ v[b, n // share, keys]
  return out


@pytest.mark.parametrize('more', [(), (0.2,), (None, 1.5), (0.7, 0.4)], ids=str)
@pytest.mark.parametrize(('heads', 'kv_heads'), [(4, 4), (6, 2), (3, 1)])
def test_attention_against_one_query_at_a_time(heads, kv_heads, more):
  q = normal(2, 3, heads, 8)
  k, v = (normal(2, kv_heads, 5, 8, seed=s) for s in (1, 2))
  allowed = np.random.RandomState(3).rand(2, 3, 5) < 0.5
  allowed[:, :, 2] = True  # every query has a key to read
  inputs = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  got = jax.jit(lambda *x: attention.reference(*x, *more))(*inputs, jnp.asarray(allowed))
  np.testing.assert_allclose(got, _attend(q, k, v, allowed, *more), **CLOSE)


def test_attention_ignores_forbidden_keys_exactly_and_survives_a_row_without_any():
  q = jnp.asarray(normal(1, 2, 4, 8), jnp.float32)
  k, v = (jnp.asarray(normal(1, 2, 3, 8, seed=s), jnp.float32) for s in (1, 2))
  allowed = jnp.array([[[True, False, True], [False, False, False]]])

  @jax.jit
  def first_query(k, v):
    return attention.reference(q, k, v, allowed)[:, 0]

  # A weight of exactly zero: what stands in a forbidden slot cannot change one bit.
  other = (k.at[:, :, 1].set(1e3), v.at[:, :, 1].set(-1e3))
  assert jnp.array_equal(first_query(k, v), first_query(*other))
  # The second query may read nothing; neither it nor its gradient is NaN.
  out, grads = jax.jit(jax.value_and_grad(
      lambda *x: jnp.sum(attention.reference(*x, allowed)**2), (0, 1, 2)))(q, k, v)
  assert np.isfinite(out)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)


def test_attention_in_bfloat16_takes_its_softmax_in_float32():
  # 300 equal keys: in bfloat16 a sum of 300 ones stops at 256, and the weights would not add to 1.
  q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 1, 300, 8), jnp.bfloat16)
  v = jnp.ones((1, 1, 300, 8), jnp.bfloat16)
  got = jax.jit(attention.reference)(q, k, v, jnp.ones((1, 1, 300), bool))
  assert got.dtype == jnp.bfloat16
  # The weight 1/300 itself is rounded to bfloat16, 0.4 % at most.
  np.testing.assert_allclose(np.asarray(got, np.float32), 1.0, atol=0.008)


def test_attention_scores_of_bfloat16_factors_are_not_rounded_to_it():
  # Scores 256 and 257 differ by 1, which bfloat16 cannot hold: rounded, both weights would be 1/2.
  q = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
  k = jnp.asarray([[[[256, 256, 0, 0], [256, 256, 1, 1]]]], jnp.bfloat16)
  v = jnp.asarray([[[[0, 0, 0, 0], [1, 1, 1, 1]]]], jnp.bfloat16)
  got = jax.jit(attention.reference)(q, k, v, jnp.ones((1, 1, 2), bool))
  np.testing.assert_allclose(np.asarray(got, np.float32), 1 / (1 + np.exp(-1)), atol=0.004)


# --- whole rows ---


@pytest.mark.parametrize(('length', 'block', 'heads', 'kv_heads', 'window', 'softcap'), [
    (40, 16, 4, 2, None, 0.0),  # no multiple of the block, two queries a key head
    (48, 16, 6, 1, None, 0.7),
    (48, 16, 2, 2, 1, 0.0),  # itself only
    (40, 16, 4, 2, 5, 0.0),  # less than a block
    (50, 16, 4, 2, 17, 1.5),  # a block and a slot
    (40, 16, 2, 2, 400, 0.0),  # all there is
    (40, 64, 4, 2, 9, 0.0)])  # one block
def test_blocks_are_the_reference(length, block, heads, kv_heads, window, softcap):
  q, k, v, d, valid = rows_of(length, heads, kv_heads)
  same(lambda *x: attention.blocks(*x, valid, window, 0.4, softcap, block), q, k, v, d, valid,
        window, 0.4, softcap)


def test_blocks_in_float64_against_one_query_at_a_time():
  with jax.enable_x64(True):
    q, k, v, d, valid = rows_of(40, 4, 2, dtype=jnp.float64)
    mask = Mask(valid, (9,))
    got = jax.jit(lambda *x: attention.blocks(*x, 9, 0.4, 1.5, 16))(q, k, v, valid)
    assert got.dtype == jnp.float64
    allowed = np.array(mask.allowed(40))
    read = np.asarray(valid)
    want = _attend(*map(np.asarray, (q, k, v)), allowed | ~read[:, :, None], 0.4, 1.5)
    np.testing.assert_allclose(np.asarray(got)[read], want[read], rtol=0, atol=1e-13)
    same(lambda *x: attention.blocks(*x, valid, 9, 0.4, 1.5, 16), q, k, v, d, valid, 9, 0.4, 1.5,
          most=1e-12)


def test_blocks_in_bfloat16_keep_their_sums_in_float32():
  # 300 equal keys, as above: neither the weights nor their sum may stop at 256.
  q, k = jnp.zeros((1, 300, 1, 8), jnp.bfloat16), jnp.zeros((1, 1, 300, 8), jnp.bfloat16)
  v = jnp.ones((1, 1, 300, 8), jnp.bfloat16)
  got = jax.jit(lambda *x: attention.blocks(*x, jnp.ones((1, 300), bool), None, 1.0, 0.0, 32))(
      q, k, v)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(got, np.float32), 1.0, atol=0.004)


def test_padding_is_exactly_nobodys_business():
  q, k, v, d, valid = rows_of(40, 4, 2)

  @jax.jit
  def read(k, v):
    out = attention.blocks(q, k, v, valid, None, 0.4, 0.0, 16)
    return jnp.where(valid[:, :, None, None], out, 0)

  outside = ~valid[:, None, :, None]
  assert jnp.array_equal(read(k, v), read(jnp.where(outside, 1e3, k), jnp.where(outside, -1e3, v)))
  # Rows of padding only, too, have no NaN in the gradient of whatever reads them.
  grads = jax.jit(jax.grad(lambda *x: jnp.sum(attention.blocks(
      *x, jnp.zeros_like(valid), None, 0.4, 0.0, 16) + 1.0), (0, 1, 2)))(q, k, v)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)


@pytest.mark.parametrize(('window', 'start', 'want'), [
    (None, 1, [0, 1, 2, 4]), (3, 1, [0, 1, 4]), (3, 0, [0, 4]), (1, 2, [2]), (4, 4, [1, 2, 4]),
    (9, 4, [0, 1, 2, 4])])
def test_one_query_reads_a_ring(window, start, want):
  valid = jnp.array([[True, True, True, False, True]])
  allowed = Mask(valid, (window,), start=jnp.int32(start)).allowed(1)
  assert np.flatnonzero(allowed[0, 0]).tolist() == want


@pytest.mark.parametrize('window', [None, 100, 33])
def test_blocks_beyond_the_mask_are_not_visited(window):
  length, block, heads, width = 512, 32, 2, 8
  q, k, v, _, valid = rows_of(length, heads, heads, width)
  run = functools.partial(attention.blocks, valid=valid, window=window, scale=1.0, block=block)
  forward = jax.jit(run).trace(q, k, v)
  both = jax.jit(jax.grad(lambda *x: jnp.sum(run(*x)), (0, 1, 2))).trace(q, k, v)
  needed = np.asarray(Mask(valid, (window,)).allowed(length)[0])
  count = length // block
  some = needed.reshape(count, block, count, block).any((1, 3)).sum()
  one = 2 * 3 * heads * width * block**2  # of three rows, a product
  assert products.count(forward.jaxpr, 1).flops == 2 * some * one
  assert products.count(both.jaxpr, 1).flops == (2 + 5) * some * one
  square = 2 * count**2 * one
  assert products.count(forward.jaxpr, 1).flops < (0.54 if window is None else 0.3) * square


def test_blocks_by_row_under_vmap_and_a_checkpoint():
  q, k, v, d, valid = rows_of(40, 4, 2)

  def each(q, k, v, valid):
    return attention.blocks(q[None], k[None], v[None], valid[None], 9, 0.4, 0.0, 16)[0]

  same(lambda *x: jax.vmap(jax.checkpoint(each))(*x, valid), q, k, v, d, valid, 9, 0.4, 0.0)


@pytest.mark.parametrize(('length', 'size', 'count'), [
    (1, 128, 1), (512, 512, 1), (513, 384, 2), (1100, 384, 3), (16895, 512, 33)])
def test_blocks_are_few_and_even(length, size, count):
  assert attention.block_size(length) == size
  assert -(-length // size) == count


# --- the choice ---


def _form(how, length, where='cpu', dtype=jnp.float32, width=64, softcap=0.0, start=0, keys=None,
          monkeypatch=None):
  monkeypatch.setattr(kernels, 'platform', lambda: where)
  q = jax.ShapeDtypeStruct((2, length, 4, width), dtype)
  k = jax.ShapeDtypeStruct((2, 2, keys or length, width), dtype)
  return attention.form(Mask(None, how=how, start=start), q, k, softcap)


@pytest.mark.parametrize(('length', 'fields', 'chosen'), [
    (1024, {}, 'reference'), (1025, {}, 'blocks'),
    (256, dict(where='tpu', dtype=jnp.bfloat16), 'reference'),
    (257, dict(where='tpu', dtype=jnp.bfloat16, softcap=2.0), 'splash'),
    (257, dict(where='gpu', dtype=jnp.bfloat16), 'cudnn'),
    (2048, dict(where='gpu', dtype=jnp.float32), 'blocks'),
    (2048, dict(where='gpu', dtype=jnp.bfloat16, softcap=2.0), 'blocks'),
    (2048, dict(where='gpu', dtype=jnp.bfloat16, width=256), 'blocks'),
    (2048, dict(keys=4096), 'reference'), (1, dict(keys=4096), 'reference')])
def test_auto_takes_what_can_do_it_here(monkeypatch, length, fields, chosen):
  assert _form('auto', length, monkeypatch=monkeypatch, **fields) == chosen


@pytest.mark.parametrize(('how', 'fields', 'why'), [
    ('splash', {}, 'TPU'), ('cudnn', {}, 'NVIDIA'), ('cudnn', dict(where='tpu'), 'NVIDIA'),
    ('cudnn', dict(where='gpu'), 'float32'),
    ('cudnn', dict(where='gpu', dtype=jnp.bfloat16, width=256), ' 256'),
    ('cudnn', dict(where='gpu', dtype=jnp.bfloat16, width=20), ' 20'),
    ('cudnn', dict(where='gpu', dtype=jnp.bfloat16, softcap=2.0), '2.0')])
def test_what_cannot_be_done_here_is_refused_by_name(monkeypatch, how, fields, why):
  with pytest.raises(ValueError, match=f"attention='{how}'.*{why}.*allowed"):
    _form(how, 64, monkeypatch=monkeypatch, **fields)
  assert _form(how, 1, monkeypatch=monkeypatch, **fields) == 'reference'  # a token at a time


@pytest.mark.parametrize('family', ['qwen3', 'mistral', 'gemma2', 'gemma3_text'])
def test_a_model_in_blocks_is_the_model(family, monkeypatch):
  """Of families with windows and bounds; kinds of layers are told apart while the program runs."""
  monkeypatch.setattr(attention, 'block_size', lambda length: 8)
  config = family_config(family, ways_to_tie(family)[0])
  plain, blocked = (models.build(config, attention=how) for how in ('reference', 'blocks'))
  params = sharp_params(plain)
  tokens = jnp.asarray(np.random.RandomState(0).randint(0, plain.config.vocab_size, (2, 21)))
  valid = jnp.arange(21)[None] >= jnp.array([[0], [6]])
  positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)

  def read(model, params):
    hidden, _ = model.forward(params, tokens, positions, valid, None)
    hidden = jnp.where(valid[:, :, None], hidden, 0)
    return jnp.sum(jnp.sin(hidden)), hidden

  (want, got) = (jax.jit(jax.value_and_grad(functools.partial(read, m), has_aux=True))(params)
                 for m in (plain, blocked))
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    # Through two or three layers of sharp attention rounding grows tenfold.
    np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * max(1.0, np.abs(a).max()))


def _kept(length, **options):
  """The shapes of what a gradient keeps of the layers of a model, without the layers."""
  model = models.build(qwen3_config(), **options)
  tokens = jnp.zeros((2, length), jnp.int32)
  valid = jnp.ones((2, length), bool)

  def total(params):
    return jnp.sum(model.forward(params, tokens, tokens, valid, None)[0])

  jaxpr = jax.jit(jax.grad(total)).trace(params_lib.abstract_params(model.specs)).jaxpr
  forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan')
  shapes = [v.aval.shape[1:] for v in forward.outvars[forward.params['num_carry']:]]
  weights = [s.shape[1:] for s in model.specs['layers'].values()]
  return [s for s in shapes if s not in weights], str(jaxpr)


@pytest.mark.parametrize('devices', [1, 2])
@pytest.mark.parametrize(('options', 'scores', 'inputs_only'), [
    (dict(), True, False), (dict(remat='attention'), False, False),
    (dict(attention='blocks'), False, False), (dict(remat='layer'), False, True),
    (dict(remat='offload'), False, True)], ids=str)
def test_what_the_backward_pass_keeps(monkeypatch, options, scores, inputs_only, devices):
  monkeypatch.setattr(attention, 'block_size', lambda length: 16)
  length = 37  # as nothing else is
  mesh = jax.sharding.AbstractMesh((devices, 1, 1, 1, 1), layout.MESH_AXES)
  with jax.sharding.use_abstract_mesh(mesh):
    shapes, text = _kept(length, **options)
  assert any(shape.count(length) == 2 for shape in shapes) == scores
  # Nothing of every pair of blocks: the largest are queries, of three blocks.
  assert scores or max(map(math.prod, shapes)) <= 2 * 48 * 24
  width = qwen3_config()['hidden_size']
  assert ([s for s in shapes if length in s] == [(2, length, width)]) == inputs_only
  assert ('pinned_host' in text or '<host>' in text) == (options.get('remat') == 'offload')


@pytest.mark.parametrize('family', ['qwen3', 'gemma2', 'qwen3_moe'])
def test_a_prompt_reads_itself_and_no_slot_that_it_fills(family):
  prompt, room = 11, 26
  model = models.build(family_config(family, ways_to_tie(family)[0]))
  params = sharp_params(model)
  tokens = jnp.asarray(np.random.RandomState(0).randint(0, model.config.vocab_size, (2, prompt)))
  valid = jnp.arange(prompt)[None] >= jnp.array([[0], [4]])
  positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)

  def fill(params, cache):
    return model.forward(params, tokens, positions, valid, cache)

  def fresh(params):
    return fill(params, model.init_cache(2, prompt + room))

  text = str(jax.jit(fresh).trace(params).jaxpr)
  assert f'{prompt},{prompt}]' in text and f'{prompt},{prompt + room}]' not in text
  layers = model.config.num_hidden_layers
  assert f'[{layers},2,{model.config.num_key_value_heads},{prompt + room},' not in text
  # The same as where nothing is known of what the cache has, and slots are read that are empty.
  got, cache = jax.jit(fresh)(params)
  want, other = jax.jit(fill)(params, model.init_cache(2, prompt + room))
  read = np.asarray(valid)
  np.testing.assert_allclose(np.asarray(got)[read], np.asarray(want)[read], rtol=0, atol=2e-5)
  assert jnp.array_equal(cache['valid'], other['valid']) and cache['index'] == other['index']
  slots = np.asarray(cache['valid'])[:, None, :, None]
  for a, b in zip(jax.tree.leaves(cache['kv']), jax.tree.leaves(other['kv']), strict=True):
    np.testing.assert_allclose(np.where(slots, a, 0), np.where(slots, b, 0), rtol=0, atol=2e-5)
    assert not np.asarray(a)[:, :, prompt:].any()
