"""Kernels of others: splash attention as an interpreter runs it on any machine, and what is asked
of cuDNN in a program for a GPU. On their own machines benchmarks/attention.py holds them to the
reference.
"""

from __future__ import annotations

import functools
import re

import attending
import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn_lib
import jax.numpy as jnp
import numpy as np
import pytest
import test_layout
import tiny

from opd_jax import build, config
from opd_jax.errors import ConfigError
from opd_jax.models import attention, kernels
from opd_jax.models.attention import Mask


@pytest.mark.parametrize(('window', 'softcap'), [(None, 1.5), (70, 0.0)])
def test_splash_is_the_reference(window, softcap):
  # Of 200 tokens, which are padded to a block of 256, and heads of 8, which are padded to 128.
  q, k, v, d, valid = (x[1:] for x in attending.rows_of(200, 2, 1))
  run = functools.partial(kernels.splash, valid=valid, window=window, scale=0.4, softcap=softcap,
                          interpret=True)
  attending.same(run, q, k, v, d, valid, window, 0.4, softcap)


def _cuda(f, *args):
  return jax.jit(f).trace(*args).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize('window', [None, 100])
def test_cudnn_is_asked_for_a_causal_window_of_rows_of_some_length(monkeypatch, window):
  monkeypatch.setattr(cudnn_lib, 'check_cudnn_version', lambda: 91300)
  monkeypatch.setattr(kernels, 'platform', lambda: 'gpu')
  q = jax.ShapeDtypeStruct((2, 600, 4, 128), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((2, 2, 600, 128), jnp.bfloat16)
  valid = jax.ShapeDtypeStruct((2, 600), bool)

  def total(q, k, v, valid):
    return jnp.sum(attention.attention(q, k, v, Mask(valid, (window,))).astype(jnp.float32))

  text = _cuda(jax.grad(total, (0, 1, 2)), q, k, k, valid).replace('\\22', "'")
  assert set(re.findall(r'__cudnn\$\w+', text)) == {
      '__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'}
  assert set(re.findall(r"'mask_type': '(\w+)'", text)) == {'PADDING_CAUSAL'}
  assert set(re.findall(r"'sliding_window_length': (\d+)", text)) == {str(window or 0)}
  assert not re.search(r'600x600x', text)  # no scores and no mask


def test_rows_go_to_cudnn_from_their_first_token_on(monkeypatch):
  """cuDNN in the place of what takes rows that begin at 0: those come, and go back in place."""
  asked = []

  def standing_in(q, k, v, *, scale, is_causal, query_seq_lengths, key_value_seq_lengths,
                  implementation, local_window_size):
    assert is_causal and implementation == 'cudnn'
    asked.append((query_seq_lengths, key_value_seq_lengths))
    read = jnp.arange(q.shape[1])[None] < key_value_seq_lengths[:, None]
    window = None if local_window_size is None else local_window_size[0] + 1
    out = attention.reference(q, k.swapaxes(1, 2), v.swapaxes(1, 2),
                              Mask(read, (window,)).allowed(q.shape[1]), scale)
    return jnp.where(read[:, :, None, None], out, jnp.nan)  # what is beyond may be anything

  monkeypatch.setattr(jax.nn, 'dot_product_attention', standing_in)
  for window in (None, 9):
    q, k, v, d, valid = attending.rows_of(40, 4, 2)
    attending.same(
        lambda *x, window=window: kernels.cudnn(*x, valid, window=window, scale=0.4),  # noqa: B023
        q, k, v, d, valid, window, 0.4, 0.0)
  assert len(asked) == 2


def test_a_row_rolls_and_its_gradient_rolls_back():
  x, by = jnp.asarray(np.random.RandomState(0).standard_normal((3, 7, 2))), jnp.array([0, 2, -3])
  got, back = jax.vjp(lambda x: kernels._roll(x, by), x)
  np.testing.assert_array_equal(got, np.stack([np.roll(a, b, 0) for a, b in zip(
      x, by, strict=True)]))
  np.testing.assert_array_equal(back(got)[0], x)


@pytest.mark.parametrize(('field', 'value'), [
    ('attention', 'cudnn'), ('attention', 'splash'), ('remat', 'offload')])
def test_what_these_devices_do_not_have_is_refused_before_anything_is_read(field, value):
  run = config.parse(tiny.config('sft', **{f'compute__{field}': value}))
  with pytest.raises(ConfigError, match=f"compute.{field}='{value}'.*allowed"):
    build.open_parts(run)


@pytest.fixture(scope='module')
def meshed():
  return test_layout.run_child('meshed_attention', 'differences', devices=4)


@pytest.mark.parametrize('form', ['blocks', 'splash'])
def test_on_a_mesh_every_device_attends_for_its_rows_and_heads(meshed, form):
  # The gradient of four rows, split in two, and of heads, split in two: nothing has to travel.
  assert meshed[form]['travels'] == []
  assert meshed[form]['off'] < 1e-5
