"""A Linen transformer and an NNX one as student and teacher: as calls, as a run, and refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from conftest import left_padded, quick_jit, qwen3_config, sharp_params
from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
import tiny

from opd_jax import build, experiment, load, models, train
from opd_jax import config as config_lib
from opd_jax.algorithm import objective as objective_lib
from opd_jax.algorithm import sample, score, update
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface
from opd_jax.files import workdir as workdir_lib
from opd_jax.models import flax_module
from opd_jax.models import params as params_lib
from opd_jax.parallel import sharding
from opd_jax.run import flops
from opd_jax.tools import evaluate_model
from opd_jax.tools import export as export_lib
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


def _arguments(rows=ROWS, width=6):
  prompts = left_padded(rows, width)
  return prompts.tokens, sample.positions_of(prompts.valid), prompts.valid


def tied(params: Params) -> jax.Array:
  return params['embed']['embedding'].T


def _linen(**options) -> tuple[Model, Params]:
  module = LinenLM(**options)
  variables = quick_jit(module.init)(jax.random.key(0), *_arguments())
  return flax_module.from_linen(module, variables, CONFIG, head=None if module.logits else tied)


def _nnx(seed=0, vocab=VOCAB, dtype=jnp.float32, layers=1) -> tuple[Model, Params]:
  return flax_module.from_nnx(
      NNXLM(nnx.Rngs(seed), vocab, dtype, layers), dataclasses.replace(CONFIG, vocab_size=vocab),
      head=lambda m: m.out.kernel[...], apply=lambda m, *args: m.hidden(*args))


def _nnx_logits() -> tuple[Model, Params]:
  return flax_module.from_nnx(NNXLM(nnx.Rngs(0)), CONFIG)


KINDS = {name: functools.cache(make) for name, make in (
    ('linen', _linen), ('linen_logits', functools.partial(_linen, logits=True)), ('nnx', _nnx),
    ('nnx_logits', _nnx_logits))}
each_kind = pytest.mark.parametrize('kind', KINDS)


def _logits(model, params, *arguments):
  def run(params, *arguments):
    hidden, cache = model.forward(params, *arguments, None)
    assert cache is None
    return model.head(params).logits(hidden)
  return quick_jit(run)(params, *arguments)


@each_kind
def test_logits_are_the_modules_own(kind):
  model, params = KINDS[kind]()
  if kind.startswith('linen'):
    want = quick_jit(LinenLM(logits=True).apply)({'params': params}, *_arguments())
  else:
    want = nnx.jit(NNXLM.__call__)(NNXLM(nnx.Rngs(0)), *_arguments())
  got = _logits(model, params, *_arguments())
  assert got.shape == (3, 6, VOCAB) and float(jnp.std(got)) > 0.3
  np.testing.assert_allclose(got, want, **FLOAT32)
  # The table describes exactly the parameters, by names that a file can have.
  specs, arrays = params_lib.flatten(model.specs), params_lib.flatten(params)
  assert list(specs) == list(arrays)
  assert all(specs[n].shape == a.shape and specs[n].hf_name == n for n, a in arrays.items())
  assert (model.head(params).matrix is None) == kind.endswith('logits')


@each_kind
def test_the_sampler_and_the_scorer_agree_whatever_the_padding(kind):
  model, params = KINDS[kind]()
  rollout = quick_jit(functools.partial(
      sample.sample_fn, model=model, max_new_tokens=7, temperature=1.0, top_p=1.0, top_k=0,
      stop_tokens=(1,), pad_token=0))(params, left_padded(ROWS, 6), jax.random.key(0))
  scores = quick_jit(functools.partial(
      score.teacher_logprob_fn, model=model, temperature=1.0, wants=Wants(logprobs=True),
      chunk_tokens=8, microbatch_rows=0))(params, rollout)
  assert float(rollout.mask.sum()) > 10
  np.testing.assert_allclose(scores.logprobs, rollout.sampler_logprobs, atol=1e-5)
  # The same rows without the padding on the left (behind a row, a causal model sees nothing).
  real = [np.asarray(t)[np.asarray(v)] for t, v in zip(rollout.tokens, rollout.valid, strict=True)]
  tokens = np.stack([np.pad(r, (0, 13 - len(r))) for r in real])
  logits = _logits(model, params, tokens, np.tile(np.arange(13), (3, 1)), tokens >= 0)
  logprobs = np.asarray(jax.nn.log_softmax(logits))
  for row, prompt in enumerate(ROWS):
    want = [logprobs[row, i, t] for i, t in enumerate(real[row][1:])][len(prompt) - 1:]
    np.testing.assert_allclose(scores.logprobs[row, 5:5 + len(want)], want, atol=1e-5)


def _trained(model, params, objective, teacher=None, steps=8):
  """Losses of some steps on one rollout, and the parameters after them."""
  optimizer = optax.adam(1e-2)
  rollout = quick_jit(functools.partial(
      sample.sample_fn, model=model, max_new_tokens=7, temperature=1.0, top_p=1.0, top_k=0,
      stop_tokens=(1,), pad_token=0))(params, left_padded(ROWS * 2, 6), jax.random.key(0))
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


def test_exact_distillation_from_a_qwen3_teacher(tiny_model):
  model, params = KINDS['linen']()
  assert tiny_model[0].config.vocab_size == VOCAB
  objective = objective_lib.Objective(route='direct', support='full', importance='none')
  losses, after, rollout = _trained(model, params, objective, tiny_model)
  assert losses[-1] < 0.8 * losses[0]
  # The first loss is the reverse KL, here from whole rows of logits.
  arguments = rollout.tokens, sample.positions_of(rollout.valid), rollout.valid
  own, theirs = (jax.nn.log_softmax(_logits(m, p, *arguments))
                 for m, p in ((model, params), tiny_model))
  kl = jnp.sum(jnp.exp(own) * (own - theirs), axis=-1)[:, :-1]
  want = float(jnp.sum(kl * rollout.mask) / jnp.sum(rollout.mask))
  assert losses[0] == pytest.approx(want, rel=1e-5)
  # Every parameter of the module learns, and nothing else is in the state.
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, after)
  still = {name for name, m in params_lib.flatten(moved).items() if not m}
  # Softmax does not see what a key's bias adds to all of them.
  assert still <= {n for n in params_lib.flatten(params) if n.endswith('key/bias')}


def test_a_foreign_teacher_of_a_qwen3_student(tiny_model):
  model, params = tiny_model
  objective = objective_lib.Objective(route='direct', support='full', importance='none')
  losses, _, _ = _trained(model, params, objective, KINDS['nnx_logits']())
  assert losses[-1] < 0.9 * losses[0]


class RunningMean(linen.Module):
  """The mean of the embeddings so far: its cache is a sum and a count."""

  def setup(self):
    self.embed = linen.Embed(VOCAB, VOCAB)

  def __call__(self, tokens, positions, valid):
    return jnp.cumsum(self.embed(tokens) * valid[..., None], axis=1) / (positions + 1)[..., None]

  def step(self, tokens, positions, valid, total):
    sums = total[:, None] + jnp.cumsum(self.embed(tokens) * valid[..., None], axis=1)
    return sums / (positions + 1)[..., None], sums[:, -1]


def test_a_modules_own_cache_is_used():
  module = RunningMean()
  variables = quick_jit(module.init)(jax.random.key(0), *_arguments())
  traced = []

  def step(params, *arguments):
    traced.append(arguments[0].shape)
    return module.apply({'params': params}, *arguments, method='step')

  decoding = flax_module.Decoding(lambda batch, length: jnp.zeros((batch, VOCAB)), step)
  out = {}
  for name, d in (('cache', decoding), ('again', None)):
    model, params = flax_module.from_linen(module, variables, CONFIG, decoding=d)
    out[name] = quick_jit(functools.partial(
        sample.sample_fn, model=model, max_new_tokens=5, temperature=1.0, top_p=1.0, top_k=0,
        stop_tokens=(1,), pad_token=0))(params, left_padded(ROWS, 6), jax.random.key(0))
  assert traced and set(traced) == {(3, 6), (3, 1)}  # the prompts, then token by token
  np.testing.assert_array_equal(out['cache'].tokens, out['again'].tokens)
  np.testing.assert_allclose(out['cache'].sampler_logprobs, out['again'].sampler_logprobs,
                             atol=1e-6)


def test_axis_names_and_flops():
  model, params = _linen(layers=2)
  specs = params_lib.flatten(model.specs)
  assert specs['embed/embedding'].axes == ('vocab', 'embed')
  assert specs['up_0/kernel'].axes == ('embed', None)  # a name that sharding.RULES has not
  assert specs['up_0/bias'].axes == (None,)
  assert params_lib.flatten(_nnx(layers=2)[0].specs)['blocks/1/up/kernel'].axes == ('embed', 'mlp')
  sharding.param_shardings(model.specs, sharding.make_mesh(dict(data=1, fsdp=1, tensor=1,
                                                               expert=1)))
  # 2 a matrix entry and token: kernels, and the embedding since it is the head too.
  matrices = 48 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 24)
  assert flops.forward_flops(model, np.array([3, 5])) == 2 * matrices * 8
  known = dataclasses.replace(model, config=dataclasses.replace(
      model.config, num_hidden_layers=2, num_attention_heads=2, head_dim=8))
  assert flops.forward_flops(known, np.array([3])) == 2 * matrices * 3 + 4 * 2 * 2 * 8 * 6
  with pytest.raises(ValueError, match='initializes its parameters itself'):
    params_lib.init_params(model.specs, jax.random.key(0))
  assert params['embed']['embedding'].shape == (48, 16)


# --- modules that do not do ---


class TwoArguments(linen.Module):
  @linen.compact
  def __call__(self, tokens, valid):
    return linen.Embed(VOCAB, VOCAB)(tokens)


class Averages(linen.Module):
  @linen.compact
  def __call__(self, tokens, positions, valid):
    x = linen.Embed(VOCAB, VOCAB)(tokens)
    return linen.BatchNorm(use_running_average=True)(x)


class NNXDropout(nnx.Module):
  def __init__(self):
    self.embed = nnx.Embed(VOCAB, VOCAB, rngs=nnx.Rngs(0))
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

  def __call__(self, tokens, positions, valid):
    return self.dropout(self.embed(tokens))


def _as_model(module, **options):
  arguments = _arguments()
  if isinstance(module, TwoArguments):
    arguments = arguments[:2]
  variables = quick_jit(module.init)(
      {'params': jax.random.key(0), 'dropout': jax.random.key(1)}, *arguments)
  return flax_module.from_linen(module, variables, CONFIG, **options)


@pytest.mark.parametrize('make, parts', [
    (lambda: _as_model(TwoArguments()), ('module(tokens [B, S], positions', 'TypeError')),
    (lambda: _as_model(LinenLM(dropout=0.5), head=tied), ('InvalidRngError', 'deterministic')),
    (lambda: _as_model(Averages()), ("'batch_stats'", "allowed: ['params']")),
    (lambda: _as_model(LinenLM(), head=None), ('(2, 3, 16)', 'allowed', '(2, 3, 48)', 'head')),
    (lambda: _as_model(LinenLM(), head=lambda p: p['embed']['embedding']),
     ('head returns (48, 16)', 'allowed: (16, 48)')),
    (lambda: _as_model(LinenLM(), head=tied, apply=lambda p, *args: args[0]),
     ('int32 (2, 3)', 'hidden states')),
    (lambda: flax_module.from_nnx(NNXDropout(), CONFIG),
     ('dropout/rngs/count', 'RngCount', 'Param')),
    (lambda: flax_module.from_nnx(NNXLM(nnx.Rngs(0), 50), CONFIG), ('(2, 3, 50)', '(2, 3, 48)')),
    (lambda: flax_module.Config(0, 8), ('vocab_size=0', 'allowed')),
], ids=['positions', 'dropout', 'batch_stats', 'hidden', 'head', 'integers', 'nnx_dropout',
        'vocabulary', 'config'])
def test_a_module_that_does_not_fit_is_refused(make, parts):
  with pytest.raises(ValueError) as error:
    make()
  for part in parts:
    assert part in str(error.value)


@pytest.mark.parametrize('wrong, message', [
    (lambda call, t, p, v: call(t, p, jnp.ones_like(v)), 'padding on the left'),
    (lambda call, t, p, v: call(t, jnp.broadcast_to(jnp.arange(t.shape[1])[None], t.shape), v),
     'padding on the left'),
    (lambda call, t, p, v: call(t, p, v) + jnp.mean(call(t, p, v), axis=1, keepdims=True),
     'the tokens behind'),
    (lambda call, t, p, v: call(t, p, v) * jnp.nan, 'not finite')],
    ids=['valid', 'positions', 'causal', 'nan'])
def test_a_module_that_reads_what_it_must_not_is_refused(wrong, message):
  module = LinenLM(logits=True)
  variables = quick_jit(module.init)(jax.random.key(0), *_arguments())
  model, params = flax_module.from_linen(
      module, variables, CONFIG, apply=lambda p, *arguments: wrong(
          functools.partial(module.apply, {'params': p}), *arguments))
  with pytest.raises(ValueError, match=message):
    flax_module.check(model, params)


# --- NaN on padding ---


def test_what_models_return_on_padding_reaches_no_gradient():
  module = LinenLM()
  variables = quick_jit(module.init)(jax.random.key(0), *_arguments())

  def apply(params, tokens, positions, valid):
    out = module.apply({'params': params}, tokens, positions, valid)
    return jnp.where(valid[:, :, None], out, params['padding'])

  variables['params']['padding'] = jnp.float32(0.0)  # a parameter, so that it is one program
  model, teacher = flax_module.from_linen(module, variables, CONFIG, head=tied, apply=apply)
  student = jax.tree.map(lambda x: 0.7 * x, teacher)
  objective, steps = objective_lib.Objective(route='direct', support='full', importance='none'), []
  for value in (0.0, jnp.nan):
    own, theirs = (dict(params, padding=jnp.float32(value)) for params in (student, teacher))
    losses, after, rollout = _trained(model, own, objective, (model, theirs), steps=1)
    assert not np.asarray(rollout.valid)[:, 6:].all()  # some row has ended
    steps.append((losses, {name: x for name, x in after.items() if name != 'padding'}))
  flax_module.check(model, own)
  flax_module.check_gradient(model, own)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(steps))
  jax.tree.map(np.testing.assert_array_equal, *steps)


def make_nan_within(key: jax.Array, dtype: Any) -> tuple[Model, Params]:
  """Its last step divides by a norm without an epsilon, and is zero on padding before that."""
  module = LinenLM(vocab=64, dtype=dtype)

  def apply(params, tokens, positions, valid):
    x = module.apply({'params': params}, tokens, positions, valid) * valid[:, :, None]
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  return flax_module.from_linen(module, module.init(key, *_arguments()),
                                flax_module.Config(64, LENGTH), head=tied, apply=apply)


def test_a_student_that_is_nan_within_is_refused_and_a_teacher_is_not(tmp_path):
  model, params = make_nan_within(jax.random.key(0), jnp.float32)
  flax_module.check(model, params)  # no logit that anybody reads is NaN
  with pytest.raises(ValueError, match=r'the gradient of the valid logits by .* is not finite'):
    flax_module.check_gradient(model, params)
  factory = 'test_flax_module:make_nan_within'
  path = str(_directory(tmp_path / 'model', make_nan_within))
  run = config_lib.parse(tiny.config(
      'opd_exact', student__factory=factory, student__path=path, teacher__factory=factory,
      teacher__path=path))
  with pytest.raises(ValueError, match=r'student\.factory=.*gradient.*not finite'):
    load.open_flax(run, 'student').read()
  load.open_flax(run, 'teacher').read()


# --- from a config ---


def make_linen(key: jax.Array, dtype: Any) -> tuple[Model, Params]:
  module = LinenLM(vocab=64, dtype=dtype)
  return flax_module.from_linen(module, module.init(key, *_arguments()),
                                flax_module.Config(64, LENGTH), head=tied)


def make_nnx(key: jax.Array, dtype: Any) -> tuple[Model, Params]:
  return _nnx(key, 64, dtype)


def make_narrow(key: jax.Array, dtype: Any) -> tuple[Model, Params]:
  return _nnx(key, 60, dtype)


def make_float32(key: jax.Array, dtype: Any) -> tuple[Model, Params]:
  return _nnx(key, 64)


def make_acausal(key: jax.Array, dtype: Any) -> tuple[Model, Params]:
  return flax_module.from_nnx(
      NNXLM(nnx.Rngs(key), 64), flax_module.Config(64, LENGTH),
      apply=lambda m, *a: m(*a) + jnp.mean(m(*a), axis=1, keepdims=True))


def make_nothing(key: jax.Array, dtype: Any) -> None:
  del key, dtype


def make_without_dtype(key: jax.Array) -> tuple[Model, Params]:
  return _nnx(key, 64)


def _directory(path, make, seed=0, alphabet=prompts_lib.ALPHABET):
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


def test_a_run_with_foreign_models_exports_what_loads_again(tmp_path):
  teacher = _directory(tmp_path / 'teacher', make_linen)
  c = tiny.config('opd_exact', steps=2, student__factory='test_flax_module:make_nnx',
                  teacher__factory='test_flax_module:make_linen', teacher__path=str(teacher))
  result = train.train(c, tmp_path / 'run')
  assert result['after']['reverse_kl'] < result['before']['reverse_kl']
  assert result['flops']['student'] > 0
  for row in tiny.rows(tmp_path / 'run', 'train'):
    assert row['gap_max'] < 1e-4
    assert row['perf']['compiles'] == 3  # sample, score, update: once each
  export = tmp_path / 'run' / workdir_lib.EXPORT
  written = json.loads((export / 'config.json').read_text())
  assert written['model_type'] == 'flax' and written['vocab_size'] == 64
  assert 'factory' in written['note'] and 'test_flax_module' not in str(written)
  # So does `opd export`, from the run's checkpoint.
  assert export_lib.export(tmp_path / 'run', tmp_path / 'exported', 'full', -1) == 2
  weights = [(folder / huggingface.WEIGHTS).read_bytes() for folder in (
      tmp_path / 'exported', export)]
  assert weights[0] == weights[1]
  # Loading the directory again gives the tensors in it, in the module's tree.
  c = tiny.config('sft', student__path=str(export), student__factory='test_flax_module:make_nnx')
  again = load.open_student(config_lib.parse(c))
  got, tensors = params_lib.flatten(again.read()), load_file(export / huggingface.WEIGHTS)
  assert got.keys() == tensors.keys() and 'blocks/0/up/kernel' in got
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(got[name], tensor, err_msg=name)
  run = config_lib.parse(tiny.override(c, student__path=''))
  fresh = load.open_student(run).read()
  assert not np.array_equal(fresh['out']['kernel'], got['out/kernel'])  # the run moved it
  # And `opd evaluate` opens it by the config's factory, a Qwen3 directory beside it without.
  assert evaluate_model.open_directory(run, 'student', str(export)).model.family == 'flax'
  assert evaluate_model.open_directory(run, 'student', str(QWEN3)).model.family == 'qwen3'


def test_self_distillation_of_a_foreign_model_is_graded_by_one_program(tmp_path):
  path = str(_directory(tmp_path / 'model', make_nnx))
  same = tiny.config('opd_sampled', student__factory='test_flax_module:make_nnx',
                     teacher__factory='test_flax_module:make_nnx', student__path=path,
                     teacher__path=path)
  parts = build.open_parts(config_lib.parse(same))
  assert parts.teacher is not parts.student and parts.runs_students_programs(parts.teacher)
  other = load.open_student(config_lib.parse(tiny.override(
      same, student__factory='test_flax_module:make_linen', student__path='')))
  assert not parts.runs_students_programs(other)


def test_the_factory_computes_in_the_runs_dtype_from_the_runs_seed():
  c = tiny.config('opd_sampled', student__factory='test_flax_module:make_nnx',
                  teacher__kind='initial_student', compute__dtype='bfloat16')
  loaded = load.open_student(config_lib.parse(c))
  params = loaded.read()  # with what rounding does to the checks of padding and order
  assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype('float32')}
  hidden, _ = loaded.model.forward(params, *_arguments(), None)
  assert hidden.dtype == jnp.bfloat16
  other = load.open_student(config_lib.parse(tiny.override(c, seed=1))).read()
  assert not np.array_equal(params['embed']['embedding'], other['embed']['embedding'])


@pytest.mark.parametrize('fields, parts', [
    (dict(student__factory='no colon'), ("student.factory='no colon'", 'package.module:function')),
    (dict(student__factory='no_such_package:f'), ("'no_such_package' cannot be imported",)),
    (dict(student__factory='test_flax_module:make_nix'), ("no function 'make_nix'", 'make_nnx')),
    (dict(student__factory='test_flax_module:make_nothing'), ('NoneType', '(model, params)')),
    (dict(student__factory='test_flax_module:make_without_dtype'), ('(key, dtype)',)),
    (dict(student__factory='test_flax_module:make_narrow'), ('the id 63', 'vocab_size is 60')),
    (dict(student__factory='test_flax_module:make_float32', compute__dtype='bfloat16'),
     ('float32', "compute.dtype='bfloat16'", "['bfloat16']")),
    (dict(student__factory='test_flax_module:make_nnx', compute__remat=True),
     ('compute.remat=True', 'no effect', 'allowed: False')),
    (dict(student__factory='test_flax_module:make_nnx', compute__layer_unroll=2),
     ('compute.layer_unroll=2', 'no effect', 'allowed: 1')),
    (dict(student__factory='test_flax_module:make_nnx', student__lora__rank=4),
     ('student.lora.rank=4', 'adapters are for', 'allowed: 0')),
    (dict(student__factory='test_flax_module:make_nnx', student__path='qwen3'),
     ("model_type='qwen3'", "allowed: 'flax'")),
    (dict(student__factory='test_flax_module:make_linen', student__path='nnx'),
     ('blocks/0/up/kernel', 'unmatched')),
    (dict(student__path='nnx'), ("model_type 'flax'", 'student.factory')),
    (dict(teacher__factory='test_flax_module:make_nnx'),
     ('teacher.factory', "path=''", 'allowed')),
    (dict(teacher__factory='test_flax_module:make_nnx', teacher__path='nnx',
          teacher__kind='initial_student'),
     ('teacher.factory', "kind='initial_student'", 'checkpoint')),
    (dict(teacher__factory='test_flax_module:make_nnx', teacher__path='other'),
     ('teacher', 'vocabulary', "not the student's")),
    (dict(student__factory='test_flax_module:make_acausal'), ('the tokens behind', 'causal')),
], ids=lambda x: '' if isinstance(x, tuple) else ' '.join(map(str, x.values())))
def test_bad_configs_are_refused(tmp_path, fields, parts):
  fields = dict(fields)
  for name in [n for n in fields if n.endswith('path')]:
    kind = fields[name]
    alphabet = prompts_lib.ALPHABET[::-1] if kind == 'other' else prompts_lib.ALPHABET
    fields[name] = str(QWEN3 if kind == 'qwen3' else _directory(
        tmp_path / kind, make_nnx, alphabet=alphabet))
  base = {} if any(n.startswith('teacher') for n in fields) else {'teacher__kind':
                                                                   'initial_student'}
  c = tiny.config('opd_sampled', **{**base, **fields})
  with pytest.raises(config_lib.ConfigError) as error:
    train.train(c, tmp_path / 'run')
  for part in parts:
    assert part in str(error.value)


def test_a_stage_takes_a_foreign_stage_by_the_same_factory():
  c = experiment.default_pipeline()
  first = tiny.config('sft', student__factory='test_flax_module:make_nnx')
  second = tiny.config('opd_sampled', student__path='stage:first', teacher__path='stage:first',
                       student__factory='test_flax_module:make_nnx')
  c.order, c.report.methods, c.report.labels = ('first', 'second'), ('second',), ('second',)
  c.stages.first, c.stages.second = first, second
  with pytest.raises(config_lib.ConfigError) as error:
    experiment.parse_pipeline(c)
  assert "stages.second.teacher.factory=''" in str(error.value)
  assert "allowed: 'test_flax_module:make_nnx'" in str(error.value)
  c.stages.second.teacher.factory = 'test_flax_module:make_nnx'
  experiment.parse_pipeline(c)


def test_models_build_names_the_factory():
  with pytest.raises(ValueError, match=r'model_type .flax.*student\.factory'):
    models.build({'model_type': 'flax'})
  assert 'flax' not in models.names()
  assert models.build(qwen3_config(), vocab_in_use=40).vocab_in_use == 40
  with pytest.raises(ValueError, match='the id 48, and vocab_size is 48'):
    models.limit_vocabulary(models.build(qwen3_config()), 49)
  assert sharp_params(_linen()[0])['embed']['embedding'].shape == (48, 16)
