"""A sum over chunks of tokens is the sum over all tokens, and so is its gradient; and a map."""

from __future__ import annotations

import functools

from conftest import quick_jit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.algorithm import score, vocabulary
from opd_jax.algorithm.objective import Objective
from opd_jax.types import Head

B, C, D, V = 5, 6, 4, 11  # 30 tokens; 5 rows, which no chunk of 2 or 4 rows divides
# Chunks of some positions of all rows (even, ragged), of some of the rows (ragged), of one token.
SIZES = [30, 15, 20, 4, 2, 1, 99]


def _inputs(dtype=jnp.float64):
  rng = np.random.RandomState(0)
  return dict(
      head=Head(jnp.asarray(rng.standard_normal((D, V)), dtype), V - 2, 3.0),
      constants=Head(jnp.asarray(rng.standard_normal((3, V)), dtype), V - 2),
      hidden=jnp.asarray(rng.standard_normal((B, C, D)), dtype),
      targets=jnp.asarray(rng.randint(0, V - 2, (B, C))),
      weights=jnp.asarray(rng.uniform(0.5, 1.5, (B, C)), dtype),
      other={'states': jnp.asarray(rng.standard_normal((B, C, 3)), dtype), 'absent': None})


def _fn(head, constants, hidden, targets, weights, other):
  """A weighted cross entropy and a reverse KL."""
  logprobs = jax.nn.log_softmax(head.logits(hidden))
  teacher = jax.nn.log_softmax(constants.logits(other['states']))
  assert other['absent'] is None
  chosen = jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]
  kl = jnp.sum(jnp.exp(logprobs) * (logprobs - teacher), axis=-1)
  return weights * (kl - chosen), {'kl': kl, 'chosen': chosen, 'targets': targets}


def _unchunked(head, constants, hidden, *arrays):
  flat = jax.tree.map(lambda a: a.reshape(B * C, *a.shape[2:]), (hidden, *arrays))
  losses, out = _fn(head, constants, *flat)
  return jnp.sum(losses), {name: a.reshape(B, C) for name, a in out.items()}


def _close(got, want, tolerance):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('chunk_tokens', SIZES)
def test_value_and_gradient_are_those_of_all_tokens_at_once(chunk_tokens):
  with jax.enable_x64(True):
    inputs = _inputs()

    def grad(f):  # of the square, so that the cotangent is not 1
      def loss(head, hidden):
        total, out = f(head, inputs['constants'], hidden, *list(inputs.values())[3:])
        return total**2, out
      return quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
          inputs['head'], inputs['hidden'])

    want = grad(_unchunked)
    got = grad(functools.partial(vocabulary.sum_over_chunks, _fn, chunk_tokens))
    _close(got, want, 1e-12)  # float64, sums of 30 terms of order 100
    # Without a gradient: the same numbers, in the same places.
    (value, out), _ = got
    total, same = quick_jit(functools.partial(vocabulary.sum_over_chunks, _fn, chunk_tokens))(
        *inputs.values())
    _close((total**2, same), (value, out), 1e-12)
    np.testing.assert_array_equal(out['targets'], inputs['targets'])


def test_tokens_keep_their_places_and_no_chunk_is_larger_than_asked():
  seen = []

  def fn(head, constants, hidden, place):
    seen.append(hidden.shape[0])
    return hidden[:, 0], {'place': place, 'hidden': hidden[:, 1]}

  for batch, length, chunk_tokens in ((3, 5, 7), (3, 5, 2), (1, 7, 4), (7, 1, 3), (4, 4, 99)):
    place = np.arange(batch * length).reshape(batch, length)
    hidden = np.stack([np.ones(place.shape), place + 0.5], axis=-1)
    seen.clear()
    total, out = quick_jit(lambda hidden, place, n=chunk_tokens: vocabulary.sum_over_chunks(
        fn, n, Head(None, V), None, hidden, place))(hidden, place)
    assert set(seen) <= set(range(1, chunk_tokens + 1))
    assert total == batch * length  # each once, padding not at all
    np.testing.assert_array_equal(out['place'], place)
    np.testing.assert_array_equal(out['hidden'], hidden[..., 1])


def test_a_map_is_that_of_all_tokens_at_once():
  x, seen = jnp.arange(35.0).reshape(5, 7), []

  def fn(x, absent, wide):
    assert absent is None
    seen.append(x.shape[0])
    return {'one': x + 1, 'two': wide[:, 0] * wide[:, 1]}

  for chunk_tokens in (1, 2, 4, 10, 35, 99):
    seen.clear()
    out = quick_jit(lambda *arrays, n=chunk_tokens: vocabulary.map_over_chunks(fn, n, *arrays))(
        x, None, jnp.stack([x, x], axis=-1))
    assert max(seen) <= chunk_tokens
    np.testing.assert_array_equal(out['one'], x + 1)
    np.testing.assert_array_equal(out['two'], x**2)


def test_padding_reaches_nothing_though_zeros_there_would_be_infinite():
  # The loss and its gradient are infinite at zero, where padding with zeros would evaluate them,
  # and zero times infinity is NaN.
  def fn(head, constants, hidden, x):
    return x * jnp.log(jnp.abs(head.logits(hidden))).sum(-1) + jnp.log(x), {}

  rng = np.random.RandomState(0)
  head, hidden = Head(jnp.asarray(rng.uniform(1, 2, (D, V))), V), rng.uniform(1, 2, (B, C, D))
  x = jnp.asarray(rng.uniform(1, 2, (B, C)))

  def grad(chunk_tokens):
    return quick_jit(jax.value_and_grad(lambda head, hidden: vocabulary.sum_over_chunks(
        fn, chunk_tokens, head, None, hidden, x)[0], (0, 1)))(head, jnp.asarray(hidden))

  want = grad(B * C)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(want))
  for chunk_tokens in (20, 4, 2):  # positions are padded, rows are, both are
    # float32 sums of 330 terms of order 1.
    for a, b in zip(*map(jax.tree.leaves, (grad(chunk_tokens), want)), strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-5)


def test_a_head_that_is_the_embedding_is_the_other_one_transposed():
  inputs = _inputs(jnp.float32)

  def grads(head):
    return quick_jit(jax.value_and_grad(lambda head, hidden: vocabulary.sum_over_chunks(
        _fn, 15, head, inputs['constants'], hidden, inputs['targets'], inputs['weights'],
        inputs['other'])[0], (0, 1)))(head, inputs['hidden'])

  head = inputs['head']
  value, (of_head, of_hidden) = grads(head)
  tied, (of_tied, same) = grads(head.replace(matrix=head.matrix.T, tied=True))
  assert of_tied.matrix.shape == (V, D) and (of_tied.tied, of_tied.axes) == (
      True, ('vocab', 'embed'))
  # The order of sums is another: float32, and terms of order 10.
  for a, b in ((tied, value), (of_tied.matrix.T, of_head.matrix), (same, of_hidden)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# --- a tree of hidden states, and no gradient that is lost in silence ---


def _two_states(head, constants, hidden, targets, weights):
  """A cross entropy of the last hidden states, and what matches those of a layer to a fixed map."""
  logprobs = jax.nn.log_softmax(head['vocabulary'].logits(hidden['last']))
  chosen = jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]
  assert hidden['absent'] is None
  matched = jnp.sum((hidden['layer'] @ head['map'] - constants)**2, axis=-1)
  return weights * (jnp.tanh(matched) * chosen), {'matched': matched}


@pytest.mark.parametrize('chunk_tokens', SIZES)
def test_gradient_by_a_tree_of_hidden_states(x64, chunk_tokens):
  inputs, rng = _inputs(), np.random.RandomState(1)
  head = {'vocabulary': inputs['head'], 'map': jnp.asarray(rng.standard_normal((3, 2)))}
  hidden = {'last': inputs['hidden'], 'layer': inputs['other']['states'], 'absent': None}
  constants = jnp.asarray(rng.standard_normal((1, 2)))

  def unchunked(head, constants, hidden, *arrays):
    flat = jax.tree.map(lambda a: a.reshape(B * C, *a.shape[2:]), (hidden, *arrays))
    losses, out = _two_states(head, constants, *flat)
    return jnp.sum(losses), {'matched': out['matched'].reshape(B, C)}

  def grad(f):
    return quick_jit(jax.value_and_grad(lambda head, hidden: f(
        head, constants, hidden, inputs['targets'], inputs['weights']), (0, 1), has_aux=True))(
            head, hidden)

  want = grad(unchunked)
  assert all(np.linalg.norm(g) > 0.1 for g in jax.tree.leaves(want[1]))
  # float64, sums of 30 terms of order 10.
  got = grad(functools.partial(vocabulary.sum_over_chunks, _two_states, chunk_tokens))
  _close(got, want, 1e-12)


def _loss(head, constants, hidden, weights, other):
  inputs = _inputs(jnp.float32)
  return vocabulary.sum_over_chunks(
      _fn, 4, head, constants, hidden, inputs['targets'], weights, other)


# What surrounds a loss: programs, recomputation, microbatches, a batch of batches.
AROUND = {
    'alone': lambda f: f, 'jit': jax.jit, 'checkpoint': jax.checkpoint,
    'scan': lambda f: lambda *x: jax.lax.scan(
        lambda total, _: (total + f(*x), None), 0.0, jnp.arange(2))[0],
    'vmap': lambda f: lambda *x: jnp.sum(jax.vmap(lambda scale: scale * f(*x))(jnp.ones(2)))}


@pytest.mark.parametrize('around', AROUND)
def test_a_gradient_that_would_be_lost_is_refused(around):
  inputs = _inputs(jnp.float32)
  names = ('head', 'constants', 'hidden', 'weights', 'other')

  def grad(by, of=lambda value, out: value, of_inputs=lambda x: x):
    loss = AROUND[around](lambda *x: of(*_loss(*of_inputs(x))))
    return jax.eval_shape(jax.grad(loss, by), *(inputs[name] for name in names))

  grad((0, 2))
  for by, place in ((1, 'constants.matrix'), (3, r'arrays\.1'), (4, 'arrays.2.states')):
    for more in ((by,), (0, by)):
      with pytest.raises(ValueError, match=f'{place}, .*allowed: .*stop_gradient'):
        grad(more)
    grad((0, by), of_inputs=lambda x, by=by: (*x[:by], jax.lax.stop_gradient(x[by]), *x[by + 1:]))
  with pytest.raises(ValueError, match='kl, .*allowed: .*stop_gradient'):
    grad((0, 2), of=lambda value, out: value + jnp.sum(out['kl']))
  grad((0, 2), of=lambda value, out: value + jax.lax.stop_gradient(jnp.sum(out['kl'])))


def test_a_model_whose_hidden_states_are_its_logits():
  inputs = _inputs(jnp.float32)
  logits = inputs['head'].replace(vocab_in_use=V).logits(inputs['hidden'])

  def loss(logits, chunk_tokens):
    return vocabulary.sum_over_chunks(
        _fn, chunk_tokens, Head(None, V), inputs['constants'], logits, inputs['targets'],
        inputs['weights'], inputs['other'])[0]

  got, want = (quick_jit(jax.grad(functools.partial(loss, chunk_tokens=n)))(logits)
               for n in (4, 30))
  np.testing.assert_allclose(got, want, atol=1e-6)  # a token's gradient, of order 1, is its own


@pytest.mark.parametrize('parameters', [jnp.float32, jnp.bfloat16])
def test_gradients_of_a_bfloat16_head_are_summed_in_float32(parameters):
  # 1 + 256 tokens one at a time. In bfloat16 a sum would stop at 256, where adding 1 is lost.
  hidden = jnp.ones((1, 300, D), jnp.bfloat16)
  head = Head(jnp.ones((D, V), parameters), V)

  def fn(head, constants, hidden):
    return head.logits(hidden).sum(-1), {}

  value, grad = quick_jit(jax.value_and_grad(
      lambda head: vocabulary.sum_over_chunks(fn, 1, head, None, hidden)[0]))(head)
  assert value.dtype == jnp.float32 and value == 300 * D * V
  assert grad.matrix.dtype == parameters
  np.testing.assert_array_equal(np.asarray(grad.matrix, np.float32), 300)  # a bfloat16 number


def test_the_logits_of_a_token_are_computed_once():
  # Forward, by the hidden states, by the head: three products as wide as the vocabulary. One where
  # nothing is differentiated, two where the head is frozen (adapters).
  n, wide, vocab = 16, 64, 256
  shapes = (Head(jax.ShapeDtypeStruct((wide, vocab), jnp.float32), vocab),
            jax.ShapeDtypeStruct((2, n, wide), jnp.float32))

  def total(head, hidden):
    return vocabulary.sum_over_chunks(
        lambda head, _, hidden: (jax.nn.log_softmax(head.logits(hidden))[:, 0], {}),
        n, head, None, hidden)[0]

  products = []
  for f in (total, jax.grad(total, 1), jax.grad(total, (0, 1))):
    cost = jax.jit(f).lower(*shapes).compile().cost_analysis()  # counts a loop's body once
    products.append(cost['flops'] / (2 * n * wide * vocab))
  np.testing.assert_allclose(products, [1, 2, 3], rtol=0.1)  # what is not a product is a few %


# --- memory, at the size of a real vocabulary: programs are compiled and not run ---

TOKENS, QWEN, PADDED, WIDE = (16, 1104), 151936, 152064, 64
LOGITS_BYTES = 16 * 1104 * PADDED * 4  # one float32 array of all logits, 10 GiB


def _temporary_bytes(support, chunk_tokens):
  """What the gradient of a reverse KL needs, with a teacher of a narrower padding."""
  def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

  def fn(head, teacher_head, hidden, teacher_hidden):
    student, teacher = score.same_width(score.log_softmax(hidden, head, 1.0),
                                        score.log_softmax(teacher_hidden, teacher_head, 1.0))
    how = support if support == 'full' else f'{support}(32, "bucket")'
    return Objective(support=how).over_support(student, teacher), {}

  def loss(head, hidden, teacher_head, teacher_hidden):
    return vocabulary.sum_over_chunks(
        fn, chunk_tokens, head, teacher_head, hidden, teacher_hidden)[0]

  used = 151669  # tokens; what is beyond is padding, and each model has its own
  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(
      Head(shape(WIDE, PADDED), used), shape(*TOKENS, WIDE), Head(shape(WIDE, QWEN), used),
      shape(*TOKENS, WIDE)).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('support', ['full', 'teacher_top_k', 'union_top_k'])
def test_no_array_of_all_tokens_and_the_vocabulary(support):
  # 64 of 17664 tokens at a time: half a dozen arrays of a chunk, and the gradient of the head (all
  # of 37 MiB) twice, of the chunk and of all.
  assert _temporary_bytes(support, 64) < 0.03 * LOGITS_BYTES


def test_the_measure_of_memory_has_teeth():
  # All tokens in one chunk need what the other test says is not there.
  assert _temporary_bytes('full', 16 * 1104) > LOGITS_BYTES
