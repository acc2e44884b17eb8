"""The shared layers against their equations in float64 NumPy."""

from __future__ import annotations

from conftest import qwen3_config, sharp_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import models
from opd_jax.models import nn

# float32 has 6e-8 relative rounding; sums here are over at most 32 terms of order one, so 2e-6
# leaves room for them and is far below what a wrong formula would show.
CLOSE = dict(rtol=2e-6, atol=2e-6)
FLOAT32 = jnp.dtype(jnp.float32)


def _normal(*shape, seed=0):
  return np.random.RandomState(seed).standard_normal(shape)


@pytest.mark.parametrize('eps', [1e-6, 0.5])  # 0.5: an eps outside the root would show
@pytest.mark.parametrize('shape', [(7, 16), (2, 3, 5, 16)])
def test_rms_norm(shape, eps):
  x, gain = 3 * _normal(*shape), _normal(16, seed=1)
  want = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain
  got = nn.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(gain, jnp.float32), eps)
  np.testing.assert_allclose(got, want, **CLOSE)


def test_rms_norm_in_bfloat16_reduces_in_float32_and_rounds_before_the_gain():
  x = jnp.asarray(100 * _normal(4, 512), jnp.bfloat16)
  gain = jnp.asarray(_normal(512, seed=1), jnp.float32)
  exact = np.asarray(x, np.float64)
  normed = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
  want = (jnp.asarray(normed, jnp.float32).astype(jnp.bfloat16)
          * gain.astype(jnp.bfloat16)[None, :])
  got = nn.rms_norm(x, gain, 1e-6)
  assert got.dtype == jnp.bfloat16
  # Bit for bit but for the few entries whose float32 value sits on the edge between two bfloat16.
  assert np.mean(np.asarray(got, np.float32) == np.asarray(want, np.float32)) > 0.99


def test_offset_rms_norm_has_the_gain_one_plus_weight_and_rounds_after_it():
  x, weight = 3 * _normal(2, 5, 512), _normal(512, seed=1)
  want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + weight)
  got = nn.offset_rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), 1e-6)
  np.testing.assert_allclose(got, want, **CLOSE)
  half = jnp.asarray(x, jnp.bfloat16)
  exact = np.asarray(half, np.float64)
  want = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * (1 + weight)
  got = nn.offset_rms_norm(half, jnp.asarray(weight, jnp.float32), 1e-6)
  assert got.dtype == jnp.bfloat16
  # One rounding in all: bit for bit but for values on the edge between two bfloat16.
  want = jnp.asarray(want, jnp.float32).astype(jnp.bfloat16)
  assert np.mean(np.asarray(got, np.float32) == np.asarray(want, np.float32)) > 0.99


def test_stretched_rope():
  theta, width, positions = 100.0, 16, np.array([[0, 1, 7, 40]])
  plain = theta ** (-2 * np.arange(width // 2) / width)  # wavelengths from 6 to 353

  def angles(scaling):
    cos, sin = nn.rope_tables(jnp.asarray(positions), width, theta, FLOAT32, scaling)
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
    return np.arctan2(sin, cos)[0, :, 0]

  def expected(frequency):
    turn = positions[0][:, None] * frequency[None]
    return np.arctan2(np.sin(turn), np.cos(turn))

  # Angles reach 40 radians, whose float32 spacing is 4e-6.
  np.testing.assert_allclose(angles(nn.RopeScaling('linear', 4.0)), expected(plain / 4), atol=2e-5)
  wanted = []
  for f in plain:  # the cases of the definition, one at a time
    wavelength = 2 * np.pi / f
    if wavelength < 64 / 4:
      wanted.append(f)
    elif wavelength > 64 / 1:
      wanted.append(f / 8)
    else:
      smooth = (64 / wavelength - 1) / (4 - 1)
      wanted.append((1 - smooth) * f / 8 + smooth * f)
  blended = [w for w, f in zip(wanted, plain, strict=True) if not (w == f or w == f / 8)]
  assert 0 < len(blended) < len(wanted)
  np.testing.assert_allclose(angles(nn.RopeScaling('llama3', 8.0, 1.0, 4.0, 64)),
                             expected(np.array(wanted)), atol=2e-5)


@pytest.mark.parametrize('theta', [100.0, 1e6])
def test_rope_turns_complex_pairs_by_position_times_frequency(theta):
  width, positions = 8, np.array([[0, 0, 1, 2, 3], [0, 1, 2, 30, 31]])
  x = _normal(2, 5, 3, width)
  z = x[..., :width // 2] + 1j * x[..., width // 2:]
  angle = positions[:, :, None, None] * theta ** (-2 * np.arange(width // 2) / width)
  z = z * np.exp(1j * angle)
  cos, sin = nn.rope_tables(jnp.asarray(positions), width, theta, FLOAT32)
  got = nn.apply_rope(jnp.asarray(x, jnp.float32), cos, sin)
  # Angles reach 31 radians, whose float32 spacing is 2e-6.
  np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=1e-5)


def test_rope_scores_depend_on_distance_only():
  q, k = (jnp.asarray(_normal(1, 1, 1, 8, seed=s), jnp.float32) for s in (0, 1))

  @jax.jit
  def score(*positions):
    at = [nn.rope_tables(p.reshape(1, 1), 8, 100.0, FLOAT32)
          for p in map(jnp.asarray, positions)]
    return jnp.sum(nn.apply_rope(q, *at[0]) * nn.apply_rope(k, *at[1]))

  # 1e-5: float32 rounding of the angles.
  assert abs(score(5, 2) - score(23, 20)) < 1e-5
  assert abs(score(5, 2) - score(2, 5)) > 1e-2


def test_geglu():
  x, gate, up, down = _normal(2, 3, 8), _normal(8, 12), _normal(8, 12, seed=1), _normal(12, 8)
  pre = x @ gate
  gelu = 0.5 * pre * (1 + np.tanh(np.sqrt(2 / np.pi) * (pre + 0.044715 * pre**3)))
  got = nn.geglu(*(jnp.asarray(a, jnp.float32) for a in (x, gate, up, down)))
  np.testing.assert_allclose(got, (gelu * (x @ up)) @ down, rtol=2e-5, atol=1e-4)


def test_swiglu():
  x, gate, up, down = _normal(2, 3, 8), _normal(8, 12), _normal(8, 12, seed=1), _normal(12, 8)
  pre = x @ gate
  want = (pre / (1 + np.exp(-pre)) * (x @ up)) @ down
  got = nn.swiglu(*(jnp.asarray(a, jnp.float32) for a in (x, gate, up, down)))
  # Values of order 100 from sums of 12 products of sums of 8.
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-4)


def test_einsum_computes_in_the_dtype_of_the_activations():
  x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.float32)
  assert nn.einsum('bd,df->bf', x, w).dtype == jnp.bfloat16


def test_embedding_gradients_of_a_bfloat16_model_add_up_in_float32():
  # 8192 tokens share 4 rows of the embedding. Added up in bfloat16, where 256 + 1 = 256, the
  # gradient is wrong by tens of per cent; one rounding of each token's share costs under 2 %.
  tokens = jnp.asarray(np.random.RandomState(0).randint(0, 4, (256, 32)))
  positions = jnp.broadcast_to(jnp.arange(32)[None, :], tokens.shape)
  grads = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    model = models.build(qwen3_config(num_hidden_layers=1), dtype=dtype)

    def loss(params, model=model):
      hidden, _ = model.forward(params, tokens, positions, jnp.ones(tokens.shape, bool), None)
      return jnp.sum(hidden.astype(jnp.float32)[..., 0])

    grads[dtype] = np.asarray(jax.jit(jax.grad(loss))(sharp_params(model))['embed'])
  error = np.linalg.norm(grads[jnp.bfloat16] - grads[jnp.float32])
  assert error < 0.05 * np.linalg.norm(grads[jnp.float32])
