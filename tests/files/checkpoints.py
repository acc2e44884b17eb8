"""What tests of files share: a small model, its checkpoint and adapter, and files as bytes."""

from __future__ import annotations

import json
import pathlib
import shutil

from conftest import qwen3_config, sharp_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import models
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface
from opd_jax.models import lora, params

CONFIG = qwen3_config(vocab_size=64)
MODEL = models.build(CONFIG)
PARAMS = sharp_params(MODEL)
OPTIONS = {'dtype': jnp.float32}
COMMIT = 'ab' * 20
DTYPES = ['float32', 'bfloat16', 'float16']


def assert_same(got, want):
  """Two trees hold the same bits."""
  got, want = params.flatten(got), params.flatten(want)
  assert set(got) == set(want)
  for name in want:
    assert got[name].dtype == want[name].dtype, name
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def cast(tree, *dtypes):
  """From one dtype to the next."""
  for dtype in dtypes:
    tree = jax.tree.map(lambda x, d=dtype: np.asarray(x).astype(d), tree)
  return tree


def raw(path):
  """The tensors of a file as they are stored, by name: (dtype's name, shape, bytes)."""
  data = path.read_bytes()
  length = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:8 + length])
  header.pop('__metadata__', None)
  return {name: (t['dtype'], t['shape'], data[8 + length:][slice(*t['data_offsets'])])
          for name, t in header.items()}


def write_raw(path, stored):
  """The inverse of `raw`, which shares no code with the package."""
  header, end = {}, 0
  for name, (dtype, shape, data) in stored.items():
    header[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': [end, end + len(data)]}
    end += len(data)
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text
                   + b''.join(data for _, _, data in stored.values()))


def float32(x):
  """A tensor as `raw` gives it."""
  x = np.asarray(x, np.float32)
  return 'F32', list(x.shape), x.tobytes()


def write_originals(folder):
  """The same model in one file and in several, not to be changed."""
  for name, size in (('single', huggingface.MAX_SHARD_BYTES), ('sharded', 6000)):
    huggingface.write_checkpoint(folder / name, MODEL, PARAMS, prompts_lib.character_tokenizer(),
                                 max_shard_bytes=size)
  return folder


def copy_of(original, folder):
  """One of them, to be changed."""
  return pathlib.Path(shutil.copytree(original, folder / original.name))


def refusal(error, f, *args, **kwargs):
  """What the error says."""
  with pytest.raises(error) as e:
    f(*args, **kwargs)
  return str(e.value)


def change_json(file, **fields):
  """Sets fields of a file."""
  content = json.loads(file.read_text())
  file.write_text(json.dumps({**content, **fields}))


SETTINGS = lora.Settings(rank=2, alpha=3.0, targets='layers/(q|v)')


def adapters(settings, seed=1):
  """Adapters with nothing left at zero."""
  specs = lora.adapter_specs(MODEL.specs, settings)
  rng = np.random.RandomState(seed)
  return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), specs,
                      is_leaf=lambda s: isinstance(s, params.ParamSpec))
