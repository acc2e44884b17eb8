"""Models that code makes which a config names: Flax modules as students and teachers."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import models
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface
from opd_jax.files.huggingface import LoadedModel
from opd_jax.models import flax_module
from opd_jax.models.params import abstract_params
from opd_jax.parallel import hosts, sharding
from opd_jax.types import Model


def load(factory: str, path: str, dtype: Any, key: jax.Array) -> LoadedModel:
  """Opens a model of code that is named in a config, with weights from a directory.

  The name is the user's, and is never read from a directory: a downloaded file cannot run code.

  Args:
    factory: 'package.module:function' of a function (key, dtype) -> (model, params), the result of
      `flax_module.from_linen` or `from_nnx` for a module that computes in `dtype`.
    path: a directory that `huggingface.write_checkpoint` wrote; or '' for the parameters that the
      factory returns, with a character tokenizer.
    dtype: of the activations.
    key: for the factory, where there is no `path`.

  Raises:
    ValueError: no such function, a result or a directory that does not fit. `read` raises it for
      parameters that fail `check`.
    FileNotFoundError: `path` lacks config.json, weights or tokenizer.
  """
  make, compute = _find(factory), jnp.dtype(dtype)
  model = _describe(make, compute)
  kind = huggingface.read_config(path).get('model_type') if path else flax_module.FAMILY
  if kind != flax_module.FAMILY:
    raise ValueError(f'model_type={kind!r} in config.json; allowed: {flax_module.FAMILY!r}, or no '
                     'factory')
  tokenizer = prompts_lib.load(path) if path else prompts_lib.character_tokenizer()
  stop_tokens = prompts_lib.stop_tokens(path, tokenizer) if path else (tokenizer.eos_token_id,)
  model = models.limit_vocabulary(model, max(tokenizer.get_vocab().values()) + 1)

  def read(dtype=jnp.float32, shardings=None):
    params = huggingface.read_params(path, model, dtype) if path else make(key, compute)[1]
    params = jax.tree.map(lambda x: np.asarray(x, dtype), hosts.fetch(params))
    flax_module.check(model, params)
    return params if shardings is None else sharding.put(params, shardings)

  return LoadedModel(model, tokenizer, stop_tokens, read,
                     sampling=huggingface.read_sampling(path) if path else {})


def _find(factory):
  name, _, function = factory.partition(':')
  try:
    module = importlib.import_module(name)
  except Exception as e:  # importing runs the user's code, which may raise anything
    raise ValueError(f'{name!r} cannot be imported ({type(e).__name__}: {e}); allowed: '
                     "'package.module:function', installed or on PYTHONPATH") from e
  if not callable(getattr(module, function, None)):
    own = sorted(n for n, v in vars(module).items()
                 if callable(v) and getattr(v, '__module__', None) == name)
    raise ValueError(f'{name!r} has no function {function!r}; allowed: one of {own}')
  return getattr(module, function)


def _describe(make, dtype):
  """Makes the factory's model and checks its dtype; parameters are traced, not computed."""
  made = []

  def run(key):
    result = make(key, dtype)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Model)
            and result[0].family == flax_module.FAMILY):
      raise ValueError(f'the factory returned {type(result).__name__}; allowed: (model, params), '
                       'the result of from_linen or from_nnx')
    made.append(result[0])
    return result[1]

  try:
    jax.eval_shape(run, jax.random.key(0))
  except TypeError as e:
    raise ValueError(f'the factory failed ({e}); allowed: a function (key, dtype)') from e
  model, = made
  params = abstract_params(model.specs)
  out, _ = jax.eval_shape(model.forward, params, *flax_module.INPUTS, None)
  # Modules that return logits widen them, which is right.
  has_head = jax.eval_shape(model.head, params).matrix is not None
  allowed = {dtype} if has_head else {dtype, jnp.dtype(jnp.float32)}
  if out.dtype not in allowed:
    raise ValueError(f'the module returns {out.dtype} with compute.dtype={str(dtype)!r}; allowed: '
                     f'{sorted(map(str, allowed))}, by the dtype that the factory is given')
  return dataclasses.replace(model, config=dataclasses.replace(model.config, source=make))
