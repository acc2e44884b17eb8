"""What every test runs under, and the helpers that several test files share.

The environment is set here, before anything imports JAX, and is inherited by the processes that
tests start: CPU only, nothing from a hub, compiled programs in a directory that lasts as long as
the session, and most optimizations of the CPU's code off: programs are as they are, compile three
times faster, and run slower. `XLA_FLAGS= pytest` has them on, as users have (`.ci/run` does), but
for what tests of formulas compile by `quick_jit`.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import sys
import tempfile

import quick

assert 'opd_jax' not in sys.modules, 'opd_jax was imported before its type checks could be hooked'
if 'XLA_FLAGS' not in os.environ:
  os.environ['XLA_FLAGS'] = quick.flags()
# One cache for the whole session: tests, and the processes that they start, compile a program once.
if 'PYTEST_XDIST_WORKER' in os.environ:  # that of the process which started the workers
  _CACHE = os.environ['JAX_COMPILATION_CACHE_DIR']
else:
  _CACHE = tempfile.mkdtemp(prefix='opd_jax_tests_')
  atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update({
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': _CACHE,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    'HF_DATASETS_CACHE': os.path.join(_CACHE, 'datasets'),
    'HF_HUB_OFFLINE': '1',
    'HF_DATASETS_OFFLINE': '1',
    'TRANSFORMERS_OFFLINE': '1',
    'TRANSFORMERS_VERBOSITY': 'error',  # it asks for torch, which is not needed
    'TOKENIZERS_PARALLELISM': 'false',
})

import jax  # noqa: E402, the environment comes first
from jaxtyping import install_import_hook  # noqa: E402

# [B, 1] + [B] would broadcast into [B, B] without a word: in this package it raises.
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Shapes and dtypes in the signatures of the pure modules are checked at every call. Not `types`:
# JAX rebuilds its dataclasses with shardings and shapes as leaves, which the check would refuse.
install_import_hook(
    [f'opd_jax.{name}' for name in
     ('models.params', 'models.nn', 'models.decoder', 'models.families', 'algorithm')],
    'beartype.beartype')

from collections.abc import Callable  # noqa: E402

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from opd_jax import models  # noqa: E402
from opd_jax.models import params as params_lib  # noqa: E402
from opd_jax.types import Model, Params, Prompts, Rollout  # noqa: E402

# Files that take minutes go first: the last process to end is then not alone for long.
LONG = ('test_hosts', 'test_train_objectives', 'test_train', 'test_mesh', 'test_resume',
        'test_every_family', 'test_oracle', 'test_oracle_presets', 'test_train_adapters',
        'test_expectations', 'test_cli', 'test_update', 'test_compare_estimators', 'test_pipeline')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Sorts the files of `LONG` to the front, in its order."""
  items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def _quick_options() -> dict[str, str | bool]:
  for candidate in quick.CANDIDATES:
    options = {name: value if isinstance(value, bool) else str(value)
               for name, value in candidate.items()}
    try:
      jax.jit(lambda x: x + 1, compiler_options=options)(1)
    except Exception:  # an XLA that does not know them all
      continue
    return options
  return {}  # slower tests, nothing else


_QUICK = _quick_options()


def quick_jit(f: Callable) -> Callable:
  """`jax.jit` with most optimizations off: compiles 5 times faster, and computes the same up to
  rounding. For tests of formulas and bookkeeping; not for those of rounding or of memory."""
  return jax.jit(f, compiler_options=_QUICK)


def qwen3_config(**changes) -> dict:
  """The config.json content of a tiny model. Head width times heads is not the model width, and
  there are three queries to a key head, so that no two axes can be mistaken for each other."""
  return dict(dict(
      model_type='qwen3', vocab_size=48, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
      num_attention_heads=6, num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-6, rope_theta=100.0,
      tie_word_embeddings=False, max_position_embeddings=64), **changes)


# What a tiny model of a family needs beyond the sizes that all have: few experts, and windows and
# bounds small enough to show. A family without an entry is made from transformers' defaults.
FAMILY_FIELDS = {
    'qwen3_moe': dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
                      norm_topk_prob=True),
    'mistral': dict(sliding_window=4),
    'gemma2': dict(sliding_window=4, query_pre_attn_scalar=12, attn_logit_softcapping=4.0,
                   final_logit_softcapping=6.0),
    'gemma3_text': dict(sliding_window=4, query_pre_attn_scalar=12, sliding_window_pattern=2),
}


@functools.cache
def _family_config(family: str, tied: bool) -> str:
  import transformers
  return json.dumps(transformers.AutoConfig.for_model(
      family, **dict(dict(
          vocab_size=64, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
          num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
          tie_word_embeddings=tied), **FAMILY_FIELDS.get(family, {}))).to_dict())


def family_config(family: str, tied: bool) -> dict:
  """A tiny config.json, as transformers itself writes it for this `model_type`."""
  return json.loads(_family_config(family, tied))


def ways_to_tie(family: str) -> list[bool]:
  """Whether the family has an untied head (False), a tied one (True), or both."""
  out = []
  for tied in (False, True):
    try:
      models.build(family_config(family, tied))
      out.append(tied)
    except ValueError as error:
      assert 'tie_word_embeddings' in str(error), error
  return out


def sharp_params(model: Model, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> Params:
  """Random parameters with nothing left at a neutral value: gains are not 1, and the distributions
  over the next token are neither flat nor one-hot. Made by NumPy, so nothing is compiled."""
  rng, params = np.random.RandomState(seed), {}
  for name, spec in params_lib.flatten(model.specs).items():
    x = rng.standard_normal(spec.shape)
    if len(spec.hf_shape) == 1:  # away from where it starts, 1 or 0
      x = (spec.init is not jax.nn.initializers.zeros) + 0.3 * x
    else:
      x = 1.5 * x * spec.hf_shape[-1]**-0.5
    params[name] = jnp.asarray(x, dtype)
  return params_lib.unflatten(params)


def left_padded(rows: list[list[int]], width: int, pad: int = 0) -> Prompts:
  """Prompts of different lengths, padded on the left to `width`."""
  tokens = np.full((len(rows), width), pad, np.int32)
  valid = np.zeros(tokens.shape, bool)
  for i, row in enumerate(rows):
    tokens[i, width - len(row):], valid[i, width - len(row):] = row, True
  return Prompts(tokens=jnp.asarray(tokens), valid=jnp.asarray(valid))


def make_rollout(prompts: list[list[int]], completions: list[list[int]], *, prompt_width: int,
                 room: int, pad: int = 0, dtype: jnp.dtype = jnp.float32) -> Rollout:
  """A rollout with these completions, entry by entry as `types.py` defines it; the sampler's
  log-probs are zero."""
  batch, total = len(prompts), prompt_width + room
  head = left_padded(prompts, prompt_width, pad)
  tokens, valid = np.full((batch, total), pad, np.int32), np.zeros((batch, total), bool)
  tokens[:, :prompt_width], valid[:, :prompt_width] = head.tokens, head.valid
  mask = np.zeros((batch, total - 1))
  for b, completion in enumerate(completions):
    for i, token in enumerate(completion):
      tokens[b, prompt_width + i], valid[b, prompt_width + i] = token, True
      mask[b, prompt_width + i - 1] = 1
  zeros = jnp.zeros((batch, total - 1), dtype)
  return Rollout(
      tokens=jnp.asarray(tokens), valid=jnp.asarray(valid), mask=jnp.asarray(mask, dtype),
      sampler_logprobs=zeros, policy_offset=zeros, ended=jnp.ones(batch, bool),
      prompt_length=prompt_width)


def numpy_logits(model: Model, params: Params, tokens: list[int]) -> np.ndarray:
  """Qwen3's logits [S, V] of one unpadded row, in float64 and in plain loops.

  Written from the equations, to share no code, layout trick or mask with the package.
  """
  c = model.config
  p = {name: np.asarray(x, np.float64) for name, x in params_lib.flatten(params).items()}
  n, k, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim

  def norm(x, gain):
    return x / np.sqrt((x**2).mean() + c.rms_norm_eps) * gain

  def rotate(x, position):  # pairs (x[i], x[i + h/2]) as complex numbers, turned by the position
    z = x[:h // 2] + 1j * x[h // 2:]
    z = z * np.exp(1j * position * c.rope_theta ** (-2 * np.arange(h // 2) / h))
    return np.concatenate([z.real, z.imag])

  xs = [p['embed'][t] for t in tokens]
  for i in range(c.num_hidden_layers):
    w = {name.removeprefix('layers/'): x[i] for name, x in p.items() if name.startswith('layers/')}
    normed = [norm(x, w['attention_norm']) for x in xs]
    keys = [[rotate(norm(x @ w['k'][:, j], w['k_norm']), s) for s, x in enumerate(normed)]
            for j in range(k)]
    values = [[x @ w['v'][:, j] for x in normed] for j in range(k)]
    for s, x in enumerate(normed):
      for head in range(n):
        group = head // (n // k)
        query = rotate(norm(x @ w['q'][:, head], w['q_norm']), s)
        scores = np.array([query @ keys[group][t] for t in range(s + 1)]) / np.sqrt(h)
        weights = np.exp(scores - scores.max())
        mixed = sum(a * values[group][t] for t, a in enumerate(weights / weights.sum()))
        xs[s] = xs[s] + mixed @ w['o'][head]
    for s, x in enumerate(xs):
      y = norm(x, w['mlp_norm'])
      gate = y @ w['gate']
      xs[s] = x + (gate / (1 + np.exp(-gate)) * (y @ w['up'])) @ w['down']
  head = p['embed'].T if c.tie_word_embeddings else p['head']
  return np.stack([norm(x, p['final_norm']) @ head for x in xs])


def numpy_log_softmax(logits: np.ndarray) -> np.ndarray:
  """Over the last axis, in float64."""
  shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def numpy_rows(model: Model, params: Params, rollout: Rollout, temperature: float) -> np.ndarray:
  """log p(. | prefix) of every prediction that the mask counts, float64 [B, T-1, V]; NaN elsewhere,
  so that a test which reads a masked place notices."""
  tokens, valid, mask = (np.asarray(x) for x in (rollout.tokens, rollout.valid, rollout.mask))
  out = np.full((*mask.shape, model.config.vocab_size), np.nan)
  for b in range(len(tokens)):
    real = np.flatnonzero(valid[b])
    logits = numpy_logits(model, params, list(tokens[b, real])) / temperature
    for t in np.flatnonzero(mask[b]):
      out[b, t] = numpy_log_softmax(logits[np.searchsorted(real, t)])
  return out


@pytest.fixture
def models_made(monkeypatch, tmp_path):
  """What an experiment wants made by a command first: the directories, which no field looks into.
  """
  def make(folder, names, command):
    for name in names:
      (tmp_path / name).mkdir(parents=True, exist_ok=True)
    return tmp_path
  monkeypatch.setattr('opd_jax.experiment.find_made', make)


@pytest.fixture
def x64():
  """float64 for one test: oracles compare there, where rounding is far below any real error."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='session')
def tiny_model() -> tuple[Model, Params]:
  """A model and its parameters in float32."""
  model = models.build(qwen3_config())
  return model, sharp_params(model)
