"""One token from logits: how it is drawn, cut to the likely ones, and what is said about it."""

from __future__ import annotations

import functools

from conftest import numpy_log_softmax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling import agrees, random_logits, tile, truncated, uniforms

from opd_jax.algorithm import sample

# --- draw ---


@pytest.mark.parametrize('vocab', [7, 256, 300, 700])  # one block; one full; two; three, 188 short
def test_draw_frequencies(vocab):
  logits = random_logits(vocab)
  tokens = jax.jit(sample.draw)(tile(logits), uniforms(1))
  assert agrees(tokens, np.exp(numpy_log_softmax(logits)))


def test_draw_never_picks_probability_zero():
  logits = np.full(1100, -np.inf, np.float32)  # five blocks, the last one padded
  # First and last token of a block, a whole block of zeros (256..511), one token alone in a block.
  allowed = [0, 1, 254, 512, 700, 767, 900, 1099]
  logits[allowed] = [0, -3, 1, 2, -8, 0, 1, -1]
  tokens = jax.jit(sample.draw)(tile(logits), uniforms(2))
  assert agrees(tokens, np.exp(numpy_log_softmax(logits)))
  assert set(np.unique(tokens)) <= set(allowed)


@pytest.mark.parametrize('uniform', [0.0, 1 - 2**-23])  # all that jax.random.uniform can return
def test_draw_at_the_ends_of_the_uniform(uniform):
  logits = np.full(600, -np.inf, np.float32)
  allowed = [258, 300, 510]
  logits[allowed] = [0.3, -1, 0.1]
  token = int(sample.draw(tile(logits, 1), jnp.full((1, 2), uniform))[0])
  assert token == (258 if uniform == 0.0 else 510)


def test_draw_where_rounding_makes_cumulative_sums_go_down_and_up(monkeypatch):
  # XLA sums long rows in a tree, so float32 cumulative sums are not monotone: one may rise at a
  # token of weight zero. With 151,936 tokens there are 594 blocks; here blocks of one token.
  monkeypatch.setattr(sample, '_BLOCK', 1)
  rng = np.random.RandomState(0)
  logits = (3 * rng.standard_normal((64, 600))).astype(np.float32)
  logits[rng.rand(64, 600) < 0.5] = -np.inf
  weights = jnp.exp(logits - logits.max(1, keepdims=True))
  sums = np.asarray(jnp.cumsum(weights, axis=-1))
  places = np.argwhere((np.asarray(weights)[:, 1:] == 0) & (np.diff(sums, axis=1) > 0))
  chosen, rows = [], []
  for row, i in places:  # a uniform whose target falls into the step at token i + 1
    total = sums[row, -1]
    uniform = np.float32(sums[row, i] / total)
    for u in (uniform, np.nextafter(uniform, np.float32(1)), np.nextafter(uniform, np.float32(0))):
      if sums[row, i] <= u * total < sums[row, i + 1]:
        chosen.append(u)
        rows.append(row)
        break
  if not rows:
    pytest.skip('cumulative sums are monotone on this machine')
  drawn = sample.draw(jnp.asarray(logits[rows]), jnp.tile(jnp.asarray(chosen)[:, None], (1, 2)))
  picked = jnp.take_along_axis(jnp.asarray(logits[rows]), drawn[:, None], axis=1)
  assert bool(jnp.all(jnp.isfinite(picked))), 'a token of probability zero was drawn'


def test_draw_where_no_cumulative_sum_reaches_the_target(monkeypatch):
  # Rounding again: the total may come out above the sum up to the last token of positive weight,
  # and the largest uniform then points behind it. One row in twenty here.
  monkeypatch.setattr(sample, '_BLOCK', 1)
  rng = np.random.RandomState(0)
  logits = (3 * rng.standard_normal((1000, 600))).astype(np.float32)
  logits[np.arange(600)[None] >= rng.randint(100, 580, (1000, 1))] = -np.inf
  drawn = np.asarray(sample.draw(jnp.asarray(logits), jnp.full((1000, 2), 1 - 2**-23)))
  assert np.all((drawn >= 0) & (drawn < 600))
  assert np.all(np.isfinite(logits[np.arange(1000), drawn])), 'a token of probability zero'


def test_uniforms_depend_on_row_and_token_alone():
  key, rows = jax.random.key(5), jnp.arange(6)
  all_rows = np.asarray(sample.row_uniforms(key, rows, 4, jnp.float32))
  some = sample.row_uniforms(key, rows[jnp.array([4, 1])], 3, jnp.float32)
  np.testing.assert_array_equal(some, all_rows[[4, 1], :3])
  folded = jax.random.fold_in(jax.random.fold_in(key, 5), 2)
  np.testing.assert_array_equal(all_rows[5, 2], jax.random.uniform(folded, (2,)))
  assert len(np.unique(all_rows)) == all_rows.size, 'a number is used twice'


# --- truncate, choose ---


KNOBS = [dict(temperature=1.0, top_k=0, top_p=1.0), dict(temperature=0.6, top_k=0, top_p=1.0),
         dict(temperature=1.5, top_k=9, top_p=1.0), dict(temperature=1.0, top_k=0, top_p=0.8),
         dict(temperature=0.8, top_k=40, top_p=0.9)]


@pytest.mark.parametrize('knobs', KNOBS, ids=str)
def test_choose_samples_the_truncated_distribution_and_reports_its_logprobs(knobs):
  logits = random_logits(300, seed=3)
  want, mass = truncated(logits, **knobs)
  tokens, logprobs, logmass = jax.jit(functools.partial(sample.choose, **knobs))(
      tile(logits), uniforms(4))
  assert agrees(tokens, want)
  # float32 log-probs down to -10: spacing 1e-6, plus the rounding of a sum of 300 terms.
  np.testing.assert_allclose(logprobs, np.log(want[np.asarray(tokens)]), atol=5e-6)
  np.testing.assert_allclose(logmass, np.log(mass), atol=2e-6)
  if mass == 1.0:
    assert not np.any(np.asarray(logmass)), 'nothing was cut: exactly zero'


def test_choose_at_temperature_zero_is_a_point_mass_on_the_argmax():
  logits = jnp.asarray(np.stack([random_logits(300, seed=s) for s in range(5)]))
  tokens, logprobs, mass = sample.choose(logits, uniforms(0, 5), temperature=0.0, top_p=1.0,
                                         top_k=0)
  np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
  assert not np.any(np.asarray(logprobs)) and not np.any(np.asarray(mass))


def test_truncate_keeps_ties_and_at_least_one_token():
  logits = jnp.log(jnp.array([[0.1, 0.3, 0.3, 0.2, 0.1], [0.05, 0.05, 0.7, 0.1, 0.1]]))

  def kept(top_k, top_p):
    return np.isfinite(sample.truncate(logits, top_k, top_p)).astype(int).tolist()

  assert kept(1, 1.0) == [[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]
  assert kept(0, 0.01) == [[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]
  assert kept(0, 0.65) == [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]
  assert kept(0, 0.75) == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
  assert kept(3, 1.0) == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
  assert kept(0, 1.0) == [[1] * 5] * 2
  # top_p acts on what top_k left, renormalized: 0.3/0.6 each in the first row.
  assert kept(2, 0.45) == [[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]
