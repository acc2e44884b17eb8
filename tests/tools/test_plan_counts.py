"""What a plan counts: in texts of partitioned modules, in jaxprs, and of chips and their links."""

from __future__ import annotations

import types

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from opd_jax import config, models
from opd_jax.data import streams
from opd_jax.errors import ConfigError
from opd_jax.models import attention, kernels, params
from opd_jax.run import flops
from opd_jax.tools.plan import hardware, hlo, phases, products

MODULE = '''HloModule jit_f, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body.1_spmd (param: (s32[], bf16[16,32])) -> (s32[], bf16[16,32]) {
  %param = (s32[], bf16[16,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%param), index=0
  %x = bf16[16,32]{1,0} get-tuple-element(%param), index=1
  %w = bf16[32,8]{1,0:T(8,128)(2,1)} constant({...})
  %all-gather = bf16[32,32]{1,0} all-gather(%w), channel_id=1, replica_groups=GROUPS, dimensions={1}
  %dot = bf16[16,32]{1,0} dot(%x, %all-gather), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], bf16[16,32]{1,0}) tuple(%i, %dot)
}

%cond.1_spmd (param.1: (s32[], bf16[16,32])) -> pred[] {
  %param.1 = (s32[], bf16[16,32]{1,0}) parameter(0)
  %constant.1 = s32[] constant(6)
  %constant.2 = s32[] constant(1)
  %i.1 = s32[] get-tuple-element(%param.1), index=0
  ROOT %less = pred[] compare(%i.1, %constant.1), direction=LT
}

ENTRY %main_spmd (p: (s32[], bf16[16,32])) -> f32[] {
  %p = (s32[], bf16[16,32]{1,0}) parameter(0)
  %while = (s32[], bf16[16,32]{1,0}) while(%p), condition=%cond.1_spmd, body=%body.1_spmd
  %y = bf16[16,32]{1,0} get-tuple-element(%while), index=1
  %z = f32[4,16]{1,0} constant({...})
  %rs = f32[2,16]{1,0} reduce-scatter(%z), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %ar = f32[4,16]{1,0} all-reduce(%z), replica_groups={}, to_apply=%add
  %alone = f32[4,16]{1,0} all-reduce(%z), replica_groups={{0},{1}}, to_apply=%add
  %cp = f32[4,16]{1,0} collective-permute(%z), source_target_pairs={{0,0},{0,1},{1,0}}
  ROOT %end = f32[] constant(0)
}
'''


class TestModules:

  def test_loops_count_as_often_as_they_go_round(self):
    found = hlo.count(MODULE.replace('GROUPS', '[2,4]<=[8]'), (2, 4))
    assert found.flops == 6 * 2 * 16 * 32 * 32
    assert found.product_bytes == 6 * 2 * (16 * 32 + 32 * 32 + 16 * 32)
    gather, scatter, reduce, permute = found.collectives
    assert (gather.members, gather.times, gather.result_bytes) == ((0, 1, 2, 3), 6, 2 * 32 * 32)
    assert gather.sent_bytes == 6 * 2048 * 3 / 4
    assert (scatter.members, scatter.sent_bytes) == ((0, 4), 2 * 16 * 4)  # half of what it takes
    assert (reduce.members, reduce.sent_bytes) == (tuple(range(8)), 2 * 256 * 7 / 8)
    assert (permute.members, permute.sent_bytes) == ((0, 1), 256)

  def test_a_text_that_was_not_partitioned(self):
    def f(w, x):
      return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]

    text = jax.jit(f).lower(jnp.ones((8, 8)), jnp.ones((4, 8))).compiler_ir('hlo').as_hlo_text()
    assert hlo.count(text, (1,)).flops == 5 * 2 * 4 * 8 * 8

  def test_of_branches_the_largest_counts(self):
    def f(i, x, w):
      return jax.lax.switch(i, [lambda x: x, lambda x: x @ w, lambda x: x @ w @ w], x)

    args = jnp.int32(0), jnp.ones((4, 8)), jnp.ones((8, 8))
    lowered = jax.jit(f).lower(*args)
    found = hlo.count(lowered.compiler_ir('hlo').as_hlo_text(), (1,))
    assert found.flops == 2 * 2 * 4 * 8 * 8
    assert products.count(jax.jit(f).trace(*args).jaxpr, 1).flops == found.flops

  def test_a_trip_count_that_xla_knows(self):
    text = MODULE.replace('GROUPS', '{}').replace(
        'body=%body.1_spmd', 'body=%body.1_spmd, backend_config={"known_trip_count":{"n":"3"}}')
    assert hlo.count(text, (8,)).flops == 3 * 2 * 16 * 32 * 32

  @pytest.mark.parametrize(('written', 'members'), [
      ('{{0,2},{1,3}}', (0, 2)), ('{}', (0, 1, 2, 3, 4, 5, 6, 7)),
      ('[2,4]<=[8]', (0, 1, 2, 3)), ('[4,2]<=[2,4]T(1,0)', (0, 4)),
      ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)), ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
      ("mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
      ("mesh['a'=8] {'a':(1)2}", (0, 4)), ("mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
      ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6))])
  def test_groups_however_they_are_written(self, written, members):
    assert hlo.group(f'%x), replica_groups={written}, dimensions={{0}}', 'all-gather', 8) == members

  def test_groups_that_cannot_be_read_are_no_silence(self):
    with pytest.raises(ValueError, match='cannot be read'):
      hlo.group('%x), replica_groups=?', 'all-reduce', 8)


class TestProducts:

  def test_a_model_costs_what_the_formula_says(self):
    """The products of the program are those of run/flops.py, but for the square of attention, of
    which the method needs half."""
    config = conftest.qwen3_config(vocab_size=512, hidden_size=64, intermediate_size=192,
                                   num_attention_heads=6, num_key_value_heads=2, head_dim=16,
                                   num_hidden_layers=3)
    model, batch, length = models.build(config), 2, 24
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def logits(p, tokens):
      positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
      hidden, _ = model.forward(p, tokens, positions, jnp.ones(tokens.shape, bool), None)
      return model.head(p).logits(hidden)

    traced = jax.jit(logits).trace(params.abstract_params(model.specs), tokens)
    c = model.config
    masked = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * (
        batch * length * (length - 1) / 2)
    formula = flops.forward_flops(model, np.full(batch, length))
    assert products.count(traced.jaxpr, 1).flops == formula + masked
    # And those that XLA counts, which sees the body of the scan over layers once.
    once = traced.lower().cost_analysis()['flops']
    assert once < 0.6 * (formula + masked)

  def test_experts_cost_those_that_are_used(self):
    def f(x, w, sizes):
      return jnp.sum(jax.lax.ragged_dot(x, w, sizes) ** 2)

    x, w = jax.ShapeDtypeStruct((64, 8), jnp.float32), jax.ShapeDtypeStruct((4, 8, 16), jnp.float32)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    forward = jax.jit(f).trace(x, w, sizes)
    both = jax.jit(jax.grad(f, argnums=(0, 1))).trace(x, w, sizes)
    one = 2 * 64 * 8 * 16
    size = 4 * (64 * 8 + 4 * 8 * 16 + 64 * 16)
    assert products.count(forward.jaxpr, 1) == products.Products(
        one, one, size, frozenset([(4, 8, 16)]))
    found = products.count(both.jaxpr, 1)
    assert found.flops == found.other_flops == 3 * one
    # Those of XLA's CPU, which are of every group, are known by the shape of the matrices.
    text = both.lower().compiler_ir('hlo').as_hlo_text()
    assert hlo.count(text, (1,)).flops == 4 * 3 * one
    assert hlo.count(text, (1,), found.experts).flops == 0

  @pytest.mark.parametrize('window', [None, 600])
  def test_a_kernel_of_attention_costs_the_blocks_that_it_meets(self, window):
    heads, length, width = 2, 2048, 128
    q = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, heads, length, width), jnp.bfloat16)
    valid = jax.ShapeDtypeStruct((1, length), bool)
    met = len(attention.pairs(length, 512, window))
    assert met == (10 if window is None else 9)
    product = 2 * heads * width * 512**2

    def run(q, k, v, valid):
      return kernels.splash(q, k, v, valid, window=window, scale=1.0, softcap=0.0)

    def total(*x):
      return jnp.sum(run(*x).astype(jnp.float32))

    found = products.count(jax.jit(run).trace(q, k, k, valid).jaxpr, 1)
    assert found.flops == found.other_flops == 2 * met * product
    assert found.other_bytes > 4 * 2 * heads * length * width
    both = products.count(jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, k, valid).jaxpr, 1)
    # Backward it computes scores and their gradient twice; 1e-3: sums that it takes by products.
    assert both.flops == pytest.approx((2 + 7) * met * product, rel=1e-3)

  def test_a_loop_that_may_end_early_is_counted_to_its_end(self):
    def decode(x):
      return jax.lax.while_loop(lambda c: jnp.all(c < 9), lambda c: c @ c, x)

    traced = jax.jit(decode).trace(jax.ShapeDtypeStruct((4, 4), jnp.float32))
    assert products.count(traced.jaxpr, 10).flops == 10 * 2 * 4**3


class TestHardware:

  @pytest.mark.parametrize(('text', 'chips'), [
      ('v5p:4x4x4', 64), ('v4:2x2x1', 4), ('v6e:8x8', 64), ('v5e:4x4', 16), ('gpu:8xh100', 8),
      ('gpu:16xb200', 16), ('gpu:1xh200', 1)])
  def test_topologies(self, text, chips):
    assert hardware.parse(text).chips == chips

  @pytest.mark.parametrize('text', ['', 'v5p', 'v5p:4x4', 'v6e:8x8x8', 'v5p:0x2x2', 'gpu:h100',
                                    'gpu:8xv5p', 'h100:8', 'gpu:12xh100', 'v5p:2x2x1:',
                                    'v6e:32x16'])
  def test_what_is_none(self, text):
    with pytest.raises(ConfigError, match=f"--topology='{text}'.*allowed"):
      hardware.parse(text)

  def _devices(self, *shape):
    return [types.SimpleNamespace(coords=(*at, 0)[:3]) for at in np.ndindex(shape)]

  def test_links_of_a_torus(self):
    """A cube of 4x4x4 has rings, of which a part is a line; over all of them, three rings."""
    topology, devices = hardware.parse('v5p:4x4x4'), self._devices(4, 4, 4)
    rate = topology.chip.link_bytes_per_s
    assert topology.link((0, 1, 2, 3), devices) == ('ICI', 2 * rate)
    assert topology.link((0, 1), devices) == ('ICI', rate)
    assert topology.link(range(16), devices) == ('ICI', 4 * rate)
    assert topology.link((0, 1, 4, 5), devices) == ('ICI', 2 * rate)
    assert topology.link(range(64), devices) == ('ICI', 6 * rate)

  def test_links_of_less_than_a_cube(self):
    topology, devices = hardware.parse('v5p:2x4x4'), self._devices(2, 4, 4)
    rate = topology.chip.link_bytes_per_s
    assert topology.link((0, 1, 2, 3), devices) == ('ICI', rate)
    assert topology.link(range(32), devices) == ('ICI', 3 * rate)

  @pytest.mark.parametrize(('text', 'rings'), [
      ('v6e:8x8', (False, False)), ('v6e:8x16', (False, True)), ('v5e:16x16', (True, True)),
      ('v4:4x4x8', (True,) * 3), ('v4:4x4x6', (False,) * 3), ('v5p:2x2x4', (False,) * 3)])
  def test_which_ends_are_connected(self, text, rings):
    assert hardware.parse(text).rings == rings

  def test_links_of_gpus(self):
    topology = hardware.parse('gpu:16xh100')
    assert topology.link((0, 7), [None] * 16) == ('NVLink', 450e9)
    assert topology.link((0, 8), [None] * 16) == ('IB', 50e9)

  def test_every_chip_has_a_source(self):
    for chip in hardware.CHIPS.values():
      assert 'TFLOP' in chip.source and chip.hbm_bytes > 15 * hardware.GIB
      assert bool(chip.dims) == bool(chip.wraps) == bool(chip.most) == (
          'cloud.google' in chip.source)

  def test_without_libtpu_a_line_says_what_to_install(self, monkeypatch):
    monkeypatch.setattr(hardware.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=r"--topology='v5p:2x2x1'.*pip install 'opd_jax\[plan\]'"):
      hardware.devices(hardware.parse('v5p:2x2x1'))


def test_what_is_written_once_is_a_part_of_each_step():
  c = tiny.config('sft_teacher', data__teacher_answers='fixed', data__limit=10, steps=6,
                  data__prompts_per_step=4, teacher__path='stage:teacher')
  run = config.parse(c)
  made = types.SimpleNamespace(parts=types.SimpleNamespace(streams=streams.make(run)))
  assert phases._times(run, made, 'sample') == 3 / 6
  assert phases._times(run, made, 'update') == 1
