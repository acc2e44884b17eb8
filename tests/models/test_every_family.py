"""What every model family must satisfy: a new file of models/families/ is covered without an edit.
"""

import dataclasses
import functools
import json
import pathlib

from conftest import family_config, left_padded, quick_jit, sharp_params, ways_to_tie
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax import models
from opd_jax.algorithm import sample, score
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface
from opd_jax.models import layout
from opd_jax.models import params as params_lib


@dataclasses.dataclass(frozen=True)
class Family:
  """A tiny model of a family, its parameters, and a batch with left padding."""

  config: dict
  model: models.Model
  params: dict
  tokens: jax.Array
  valid: jax.Array

  def build(self, **options):
    return models.build(self.config, **options)

  def hidden(self, model=None, params=None, tokens=None, valid=None):
    """Final hidden states without a cache."""
    program = self._program if model is None else self._compile(model)
    return program(*(own if given is None else given for given, own in (
        (params, self.params), (tokens, self.tokens), (valid, self.valid))))

  @functools.cached_property
  def plain(self):
    """Those of the model, its parameters and the batch as they are."""
    return self.hidden()

  @functools.cached_property
  def _program(self):
    return self._compile(self.model)

  def _compile(self, model):
    return quick_jit(lambda p, t, v: model.forward(p, t, sample.positions_of(v), v, None)[0])


PROMPTS = [[5, 9, 1, 2, 8, 30, 31, 60, 7], [7, 3, 3, 8], [1, 2, 30, 41, 17, 17]]
WIDTH = 10


# Each family once, with an untied head where it has one; what a tied head changes is code that all
# share, and tried on one of them.
CASES = [(f, ways_to_tie(f)[0]) for f in models.names()] + [('qwen3', True)]


@pytest.fixture(scope='module', params=CASES,
                ids=lambda p: f'{p[0]}-{"tied" if p[1] else "untied"}')
def family(request):
  config = family_config(*request.param)
  model = models.build(config)
  batch = left_padded(PROMPTS, WIDTH)
  return Family(config, model, sharp_params(model), batch.tokens, batch.valid)


def _real(x, valid):
  return np.asarray(x, np.float32)[np.asarray(valid)]


# float32 rounding through two layers, hidden states of order 3, in programs that sum in another
# order. A wrong mask, position or layer changes hidden states by 0.1 and more.
FLOAT32 = dict(atol=3e-5)


def test_families_are_found_by_listing_the_folder():
  folder = pathlib.Path(models.__file__).parent / 'families'
  assert models.names() == sorted(f.stem for f in folder.glob('*.py') if f.stem[0] != '_')
  with pytest.raises(ValueError) as error:
    models.build({'model_type': 'gpt17'})
  assert "'gpt17'" in str(error.value) and str(models.names()) in str(error.value)


def test_init_follows_the_table(family):
  specs = params_lib.flatten(family.model.specs)
  init = quick_jit(functools.partial(params_lib.init_params, family.model.specs))
  one, same, other = (params_lib.flatten(init(jax.random.key(s))) for s in (0, 0, 1))
  abstract = params_lib.flatten(params_lib.abstract_params(family.model.specs))
  assert set(one) == set(abstract) == set(specs)
  hf_names, seen = [], []
  for name, spec in specs.items():
    assert one[name].shape == abstract[name].shape == spec.shape
    assert one[name].dtype == abstract[name].dtype == jnp.float32
    assert np.all(np.isfinite(one[name]))
    assert set(spec.axes) <= set(layout.TRAIN), f'{name}: layout.py has no rule for an axis'
    layout.partition_spec(spec.axes)  # and no two axes collide
    assert jnp.array_equal(one[name], same[name])
    if spec.matmul:  # random, of a size that keeps the scale of its input, and not drawn twice
      assert not jnp.array_equal(one[name], other[name])
      gain = float(jnp.std(one[name])) * np.sqrt(spec.hf_shape[-1])
      assert 0.2 < gain < 2, name
      values = np.ravel(one[name])[:8]
      assert not any(np.allclose(values / np.std(values), v) for v in seen), name
      seen.append(values / np.std(values))
    hf_names.append(spec.hf_name)
  assert len(set(hf_names)) == len(hf_names)
  count = sum(x.size for x in one.values())
  assert params_lib.count_params(family.model.specs) == count
  multiplied = params_lib.count_params(family.model.specs, matmul_only=True)
  # The head multiplies every token, tied or not; the look-up of an untied embedding does not.
  head = family.model.head(params_lib.unflatten(one))
  assert dict(zip(head.axes, head.matrix.shape, strict=True)) == {'embed': 16, 'vocab': 64}
  assert multiplied == sum(one[n].size * s.matmul for n, s in specs.items())
  assert multiplied >= 16 * 64


def test_left_padding_changes_nothing_at_real_positions(family):
  padded = family.plain
  for b, prompt in enumerate(PROMPTS):
    tokens = jnp.asarray([prompt], jnp.int32)
    alone = family.hidden(tokens=tokens, valid=jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(padded[b, WIDTH - len(prompt):], alone[0], **FLOAT32)
  # What stands in the padding does not matter either, not by one bit.
  other = jnp.where(family.valid, family.tokens, 63)
  again = family.hidden(tokens=other)
  np.testing.assert_array_equal(_real(again, family.valid), _real(padded, family.valid))


def test_a_position_sees_what_is_before_it_and_nothing_after(family):
  base = np.asarray(family.plain)
  place = 6
  changed = np.asarray(family.hidden(tokens=family.tokens.at[:, place].set(50)))
  before = np.asarray(family.valid)[:, :place]  # what a padding position holds is nobody's business
  np.testing.assert_array_equal(changed[:, :place][before], base[:, :place][before])
  assert np.all(np.abs(changed[:, place + 1:] - base[:, place + 1:]).max(axis=(1, 2)) > 1e-2)


@pytest.mark.parametrize('unrolled', [False, True])
def test_prefill_and_decode_with_a_cache_equal_the_full_forward(family, unrolled):
  model = family.model
  prefill = 7

  def cached(params, tokens, valid):
    if unrolled:
      params = model.unstack(params)
    positions = sample.positions_of(valid)
    cache, out = model.init_cache(len(PROMPTS), WIDTH + 2), []  # two slots stay empty
    for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, WIDTH))]:
      hidden, cache = model.forward(params, tokens[:, start:end], positions[:, start:end],
                                    valid[:, start:end], cache)
      out.append(hidden)
    return jnp.concatenate(out, axis=1)

  want = family.plain
  got = quick_jit(cached)(family.params, family.tokens, family.valid)
  np.testing.assert_allclose(_real(got, family.valid), _real(want, family.valid), **FLOAT32)


def test_scan_over_layers_equals_layers_one_by_one(family):
  scanned = family.plain
  unstacked = family.model.unstack(family.params)
  assert isinstance(unstacked['layers'], tuple) and len(unstacked['layers']) == 2
  np.testing.assert_allclose(_real(family.hidden(params=unstacked), family.valid),
                             _real(scanned, family.valid), **FLOAT32)


@pytest.mark.parametrize(
    'options', [dict(remat='layer'), dict(remat='attention'), dict(layer_unroll=2)], ids=str)
def test_how_layers_are_computed_changes_no_value_and_no_gradient(family, options):
  def loss(model):
    def run(params):
      hidden, _ = model.forward(params, family.tokens, sample.positions_of(family.valid),
                                family.valid, None)
      logprobs = jax.nn.log_softmax(model.head(params).logits(hidden))
      picked = jnp.take_along_axis(logprobs[:, :-1], family.tokens[:, 1:, None], axis=-1)[..., 0]
      return jnp.sum(jnp.where(family.valid[:, :-1], picked, 0.0))
    return quick_jit(jax.value_and_grad(run))(family.params)

  (value, grads), (same, again) = loss(family.model), loss(family.build(**options))
  assert float(value) == pytest.approx(float(same), rel=1e-6)
  scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
  assert scale > 0.1
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * scale)  # float32 sums in another order


def _dtypes(family, model):
  """Of the factors of all matrix products of a forward pass, and of everything in it."""
  factors, everything = set(), set()

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      dtypes = [str(v.aval.dtype) for v in equation.invars if hasattr(v.aval, 'dtype')]
      everything.update(dtypes)
      if equation.primitive.name in ('dot_general', 'ragged_dot_general'):
        factors.update(dtypes[:2])  # a ragged product has group sizes beside its factors
      for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, 'eqns')):
        inner = getattr(value, 'jaxpr', value)
        if hasattr(inner, 'eqns'):
          walk(inner)

  positions = sample.positions_of(family.valid)
  walk(jax.make_jaxpr(lambda params: model.forward(
      params, family.tokens, positions, family.valid, None))(family.params).jaxpr)
  return factors, everything


def test_float32_is_float32_everywhere_and_bfloat16_is_close(family):
  factors, everything = _dtypes(family, family.model)
  assert factors == {'float32'} and everything <= {'float32', 'int32', 'bool'}
  half = family.build(dtype=jnp.bfloat16)
  assert _dtypes(family, half)[0] == {'bfloat16'}  # every product is a bfloat16 product
  hidden = family.hidden(half)
  assert hidden.dtype == jnp.bfloat16
  want = family.plain

  def logprobs(hidden):
    return score.log_softmax(hidden.reshape(-1, 16), family.model.head(family.params), 1.0)

  got, exact = logprobs(hidden), logprobs(want)
  assert got.dtype == jnp.float32
  difference = np.abs(np.asarray(got - exact)).reshape(*family.tokens.shape, -1)[
      np.asarray(family.valid)]
  if 'layers/router' in params_lib.flatten(family.model.specs):
    # Where two experts are nearly equal for a token, rounding may pick the other one, and the
    # token's logits jump: two of the 19 tokens may.
    difference = difference[np.argsort(difference.max(axis=-1))[:-2]]
  # bfloat16 has 8 bits, 0.4 % a rounding; logits reach 10 here and pass two layers.
  assert difference.max() < 0.3 and difference.mean() < 0.05


def test_config_json_goes_both_ways(family):
  written = json.loads(json.dumps(family.model.to_hf()))
  assert models.build(written).config == family.model.config
  assert written['model_type'] == family.model.family == family.config['model_type']
  import transformers
  opened = transformers.AutoConfig.for_model(**written).to_dict()
  for name, value in family.config.items():
    if name in written and name not in ('architectures', 'dtype'):
      assert opened[name] == value, name
  # Nested, transformers before 5 would pass over theta without a word, and take its default.
  assert written['rope_theta'] == family.model.config.rope_theta
  assert 'rope_scaling' in written and 'rope_parameters' not in written
  assert opened['rope_parameters'] == family.config['rope_parameters']
  missing = {k: v for k, v in family.config.items() if k != 'hidden_size'}
  with pytest.raises(ValueError, match='hidden_size'):
    models.build(missing)


@pytest.fixture
def saved(family, tmp_path):
  huggingface.write_checkpoint(tmp_path / 'model', family.model, family.params,
                               prompts_lib.character_tokenizer())
  return tmp_path / 'model'


def test_checkpoint_round_trip_is_exact(family, saved):
  loaded = huggingface.load(saved, {'dtype': jnp.float32})
  assert loaded.model.config == family.model.config
  assert prompts_lib.same_vocabulary(loaded.tokenizer, prompts_lib.character_tokenizer())
  want = params_lib.flatten(family.params)
  got = params_lib.flatten(loaded.read())
  assert list(got) == list(want)
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)
  with pytest.raises(FileExistsError, match='model'):
    huggingface.write_checkpoint(saved, family.model, family.params, loaded.tokenizer)


def test_tensors_that_do_not_match_raise_by_name(family, saved):
  file = saved / huggingface.WEIGHTS
  tensors = load_file(file)
  first, last = min(tensors), max(tensors)

  def refusal(changed):
    save_file(changed, file)
    with pytest.raises(ValueError) as error:
      huggingface.read_params(saved, family.model)
    return str(error.value)

  message = refusal({k: v for k, v in tensors.items() if k != first})
  assert f"missing tensors ['{first}']" in message and 'unmatched tensors []' in message
  message = refusal({**tensors, 'model.bogus.weight': np.zeros(3, np.float32)})
  assert "unmatched tensors ['model.bogus.weight']" in message and 'missing tensors []' in message
  message = refusal({**tensors, last: np.zeros((3, 5), np.float32)})
  assert f'{last}: (3, 5) in the file, {tensors[last].shape} expected' in message
  # A transposed square matrix cannot be told, but another order of the same size can.
  two = next(k for k, v in tensors.items() if v.ndim == 2 and v.shape[0] != v.shape[1])
  assert two in refusal({**tensors, two: np.ascontiguousarray(tensors[two].T)})
  file.unlink()
  with pytest.raises(FileNotFoundError, match=huggingface.WEIGHTS):
    huggingface.read_params(saved, family.model)


def test_a_bfloat16_checkpoint_is_read_exactly(family, saved):
  from safetensors.flax import load_file as load_jax
  from safetensors.flax import save_file as save_jax
  half = {k: v.astype(jnp.bfloat16) for k, v in load_jax(saved / huggingface.WEIGHTS).items()}
  save_jax(half, saved / huggingface.WEIGHTS)
  got = huggingface.read_params(saved, family.model)
  want = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16), np.float32), family.params)
  same = jax.tree.map(lambda a, b: a.dtype == np.float32 and np.array_equal(a, b), got, want)
  assert all(jax.tree.leaves(same))


def test_a_stored_copy_of_a_tied_head_is_accepted_and_anything_else_is_not(family, saved):
  if not family.config['tie_word_embeddings']:
    pytest.skip('the head is not tied')
  tensors = load_file(saved / huggingface.WEIGHTS)
  embedding = tensors['model.embed_tokens.weight']
  save_file({**tensors, 'lm_head.weight': embedding.copy()}, saved / huggingface.WEIGHTS)
  huggingface.read_params(saved, family.model)
  save_file({**tensors, 'lm_head.weight': embedding + 1}, saved / huggingface.WEIGHTS)
  with pytest.raises(ValueError, match=r'lm_head\.weight differs'):
    huggingface.read_params(saved, family.model)
