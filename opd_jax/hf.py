"""Hugging Face checkpoint directories to parameters and back, strictly, through the spec table."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import json
import os
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.flax import save_file

from opd_jax import models, sharding
from opd_jax import tokenizer as tokenizer_lib
from opd_jax.params import ParamSpec, flatten, unflatten
from opd_jax.types import Model, Params

WEIGHTS = 'model.safetensors'


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """What a checkpoint directory holds.

  Attributes:
    model: its functions and its table.
    tokenizer: a Hugging Face tokenizer.
    stop_tokens: ids that end a completion.
    read: (dtype=float32, shardings=None) -> parameters. On the host, or with shardings on devices;
      nothing is read before, so that everything else can be checked first.
  """

  model: Model
  tokenizer: Any
  stop_tokens: tuple[int, ...]
  read: Callable[..., Params]


def load(path: str | os.PathLike[str], options: dict[str, Any]) -> LoadedModel:
  """Opens a checkpoint directory; `options` are those of `models.build`."""
  tokenizer = tokenizer_lib.load(path)
  in_use = max(tokenizer.get_vocab().values()) + 1
  model = models.build(read_config(path), vocab_in_use=in_use, **options)
  return LoadedModel(model, tokenizer, tokenizer_lib.stop_tokens(path, tokenizer),
                     functools.partial(read_params, path, model))


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The content of config.json.

  Raises:
    FileNotFoundError: there is none.
  """
  file = pathlib.Path(path) / 'config.json'
  if not file.exists():
    raise FileNotFoundError(f'{path} is not a Hugging Face checkpoint: {file} is missing')
  return json.loads(file.read_text())


def _tensor_names(spec: ParamSpec) -> list[str]:
  if not spec.stacked:
    return [spec.hf_name]
  return [spec.hf_name.format(layer=i) for i in range(spec.shape[0])]


def _to_array(spec: ParamSpec, tensors: list[np.ndarray]) -> np.ndarray:
  layout = [t.T if spec.hf_transpose else t for t in tensors]
  return np.stack(layout).reshape(spec.shape)


def _to_tensors(spec: ParamSpec, array: np.ndarray) -> list[np.ndarray]:
  shape = spec.hf_shape[::-1] if spec.hf_transpose else spec.hf_shape
  layers = array if spec.stacked else array[None]
  return [np.ascontiguousarray(a.reshape(shape).T if spec.hf_transpose else a.reshape(shape))
          for a in layers]


def read_params(path: str | os.PathLike[str], model: Model, dtype: Any = jnp.float32,
                shardings: Any = None) -> Params:
  """Reads model.safetensors into host arrays of `dtype`.

  Raises:
    FileNotFoundError: no weights file.
    ValueError: tensors unmatched, missing or of another shape, each listed by name; or a tied head
      that is stored and differs from the embedding.
  """
  file = pathlib.Path(path) / WEIGHTS
  if not file.exists():
    raise FileNotFoundError(f'{path} has no {WEIGHTS}')
  flat = flatten(model.specs)
  wanted = {name: spec for spec in flat.values() for name in _tensor_names(spec)}
  with safetensors.safe_open(str(file), framework='flax') as f:
    found = set(f.keys())
    extra = found - set(wanted)
    if 'lm_head.weight' in extra and 'head' not in flat:
      # A tied head may be stored as a copy; anything but a copy would be lost silently.
      if not np.array_equal(f.get_tensor('lm_head.weight'), f.get_tensor(flat['embed'].hf_name)):
        raise ValueError(f'{file}: tie_word_embeddings is true, but lm_head.weight differs from '
                         f"{flat['embed'].hf_name}")
      extra.remove('lm_head.weight')
    shapes = {n: tuple(f.get_slice(n).get_shape()) for n in found & set(wanted)}
    misshaped = [f'{n}: {shapes[n]} in the file, {wanted[n].hf_shape} expected'
                 for n in sorted(shapes) if shapes[n] != wanted[n].hf_shape]
    missing = sorted(set(wanted) - found)
    if extra or missing or misshaped:
      raise ValueError(f'{file} does not match {model.family}: unmatched tensors {sorted(extra)}; '
                       f'missing tensors {missing}; mis-shaped tensors {misshaped}')
    params = unflatten({
        name: _to_array(spec, [np.asarray(f.get_tensor(n)) for n in _tensor_names(spec)])
              .astype(dtype)
        for name, spec in flat.items()})
  return params if shardings is None else sharding.put(params, shardings)


def write_checkpoint(path: str | os.PathLike[str], model: Model, params: Params, tokenizer: Any
                     ) -> None:
  """Writes config.json, generation_config.json, model.safetensors and the tokenizer.

  The directory appears whole or not at all.

  Raises:
    FileExistsError: `path` exists.
  """
  path = pathlib.Path(path)
  if path.exists():
    raise FileExistsError(f'{path} exists already; choose another directory or remove it')
  partial = path.with_name(f'.{path.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  arrays, tensors = flatten(params), {}
  for name, spec in flatten(model.specs).items():
    parts = _to_tensors(spec, np.asarray(arrays[name]))
    tensors.update(zip(_tensor_names(spec), map(jnp.asarray, parts), strict=True))
  ids = {'eos_token_id': tokenizer.eos_token_id, 'pad_token_id': tokenizer.pad_token_id}
  dtype = {'dtype': str(next(iter(tensors.values())).dtype)}
  for file, content in (('config.json', {**model.to_hf(), **ids, **dtype}),
                        ('generation_config.json', ids)):
    (partial / file).write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')
  save_file(tensors, str(partial / WEIGHTS), metadata={'format': 'pt'})
  (partial / WEIGHTS).chmod((partial / 'generation_config.json').stat().st_mode)  # made private
  tokenizer.save_pretrained(str(partial))
  os.replace(partial, path)
