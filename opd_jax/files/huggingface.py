"""Reads Hugging Face checkpoints and writes them, strictly, through the spec table.

Opening a directory checks all that can be checked without reading a weight. Weights are then read
and written a tensor at a time: host memory holds one tensor beside what this process keeps. Left
out: pickled weights (*.bin), quantized weights, remote code. Adapters are in `peft.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from opd_jax import models
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import convert, disk, hub
from opd_jax.files import safetensors as safetensors_lib
from opd_jax.files.safetensors import Stored
from opd_jax.models.params import flatten
from opd_jax.parallel import hosts
from opd_jax.types import Model, Params, Wants

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
ORIGIN = 'origin.json'  # of what is written here: which run it is from (`workdir.origin`)
MAX_SHARD_BYTES = 5 * 2**30
OTHER_WEIGHTS = ('.bin', '.pt', '.pth', '.gguf', '.safetensors')
# Fields of generation_config.json that an export keeps: how whoever opens it will sample.
SAMPLING = dict(do_sample=(bool,), temperature=(int, float), top_p=(int, float), top_k=(int,))
# What is fetched of a repository: no pickles, no code, no second copy of the weights.
FETCHED = ('config.json', 'generation_config.json', 'model.safetensors*', 'model-*.safetensors',
           'tokenizer*', 'vocab*', 'merges.txt', 'added_tokens.json', 'special_tokens_map.json',
           'chat_template*')


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """What a checkpoint directory holds.

  Attributes:
    model: its functions and its table.
    tokenizer: a Hugging Face tokenizer.
    stop_tokens: ids that end a completion.
    read: (dtype=float32, shardings=None) -> parameters, which nothing reads before; with shardings
      on devices, and else on the host.
    gives: what can be asked of it as a teacher; of a model in this process, everything.
    sampling: what its generation_config.json says of SAMPLING, for the one that is exported.
  """

  model: Model
  tokenizer: Any
  stop_tokens: tuple[int, ...]
  read: Callable[..., Params]
  gives: Wants = Wants(logprobs=True, hidden=True)
  sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load(path: str | os.PathLike[str], options: dict[str, Any], revision: str = '') -> LoadedModel:
  """Opens a checkpoint: a local directory, or a repository of the hub at a commit.

  Args:
    path: the directory, or 'organization/name'.
    options: those of `models.build`.
    revision: the commit of the repository; '' for a directory.

  Raises:
    FileNotFoundError: something is not there.
    ValueError: something does not fit; see also `check_source` and `open_weights`.
  """
  path = fetch(path, revision)
  config = read_config(path)
  tokenizer = prompts_lib.load(path)
  in_use = max(tokenizer.get_vocab().values()) + 1
  try:
    model = models.build(config, vocab_in_use=in_use, **options)
  except ValueError as e:
    raise ValueError(f'{path}: {e}') from e
  weights = open_weights(path, model)
  return LoadedModel(model, tokenizer, prompts_lib.stop_tokens(path, tokenizer),
                     functools.partial(_read_model, model, weights),
                     sampling=read_sampling(path))


def check_source(path: str | os.PathLike[str], revision: str) -> None:
  """Checks that `path` and `revision` name one checkpoint that cannot change unnoticed.

  Raises:
    ValueError: neither a directory, nor a repository with a commit.
  """
  if pathlib.Path(path).is_dir():
    if revision:
      raise ValueError(f"revision={revision!r} has no effect with the directory path='{path}'; "
                       "allowed: ''")
  elif pathlib.Path(path).is_file():
    raise ValueError(f"path='{path}' is a file; allowed: a Hugging Face checkpoint directory"
                     + convert.how_to_convert(pathlib.Path(path)))
  elif not re.fullmatch(hub.NAMES['model'], str(path)):
    raise ValueError(f"path='{path}' is not a directory; allowed: a Hugging Face checkpoint "
                     "directory, or 'organization/name' of the hub")
  elif not hub.is_commit(revision):
    raise ValueError(f"revision={revision!r} of path='{path}', which is not a directory here; "
                     'allowed: the 40 hex digits of a commit of that repository, or for path a '
                     'Hugging Face checkpoint directory')


def fetch(path: str | os.PathLike[str], revision: str = '') -> pathlib.Path:
  """Finds the local directory of a checkpoint; downloads a repository, unless its commit is in the
  hub's cache already.

  Raises:
    ValueError: see `check_source`; or the hub does not give it.
  """
  check_source(path, revision)
  if not revision:
    disk.refuse_pipes(pathlib.Path(path), f"path='{path}'")
    return pathlib.Path(path)
  import huggingface_hub  # takes a while to import: only where it is used
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        str(path), revision=revision, allow_patterns=list(FETCHED)))
  except (OSError, ValueError) as e:  # what the hub raises are kinds of these
    raise ValueError(f"path='{path}' at revision={revision!r} cannot be fetched: "
                     f'{" ".join(str(e).split())}') from e


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads config.json.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is no JSON object, or describes quantized weights.
  """
  file = pathlib.Path(path) / 'config.json'
  if not file.exists() and (how := convert.how_to_convert(file.parent)):
    raise FileNotFoundError(f'{path} is not a Hugging Face checkpoint: {file} is missing; allowed: '
                            'one in safetensors' + how)
  config = read_json(file)
  quantized = config.get('quantization_config')
  if quantized:
    method = quantized.get('quant_method') if isinstance(quantized, dict) else quantized
    raise ValueError(f'{path}: config.json has quantization_config with quant_method={method!r}; '
                     'allowed: none, and weights in float32, bfloat16 or float16')
  return config


def read_sampling(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads the fields SAMPLING of generation_config.json, those that it has; {} without the file.

  Raises:
    ValueError: it is no JSON object, or one of them is of another type.
  """
  file = pathlib.Path(path) / 'generation_config.json'
  found = read_json(file) if file.exists() else {}
  out = {n: found[n] for n in SAMPLING if found.get(n) is not None}
  if wrong := [f'{n}={v!r}' for n, v in out.items() if type(v) not in SAMPLING[n]]:
    raise ValueError(f'{file}: {", ".join(wrong)}; allowed: values of the types {SAMPLING}')
  return out


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Reads one of the JSON files of a directory.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it is no JSON object.
  """
  if not file.exists():
    raise FileNotFoundError(f'{file.parent} is not a Hugging Face checkpoint: {file} is missing; '
                            'allowed: a directory with it')
  try:
    return disk.read_json(file)
  except (OSError, ValueError) as e:
    raise ValueError(f'{file} is no JSON object: {e}; allowed: one') from e


# --- which tensors there are ---


def find_tensors(path: str | os.PathLike[str]) -> dict[str, Stored]:
  """Lists the tensors of a model's directory, of one file or of those that the index names.

  Raises:
    FileNotFoundError: no weights, or a file that the index names is missing.
    ValueError: files truncated or damaged, or an index that is not what the files hold.
  """
  path = pathlib.Path(path)
  single, index = path / WEIGHTS, path / INDEX
  if single.exists() and index.exists():
    raise ValueError(f'{path} has both {WEIGHTS} and {INDEX}; allowed: one of them')
  if single.exists():
    return safetensors_lib.read_header(single)
  if not index.exists():
    others = sorted(p.name for p in path.glob('*') if p.suffix in OTHER_WEIGHTS)
    raise FileNotFoundError(f'{path} has neither {WEIGHTS} nor {INDEX}, and of other weights '
                            f'{others}; allowed: safetensors under those names'
                            + convert.how_to_convert(path))
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not all(
      isinstance(f, str) and pathlib.PurePath(f).name == f for f in weight_map.values()):
    raise ValueError(f"{index}: weight_map={str(weight_map)[:200]}; allowed: an object of tensor "
                     'names to names of files in the same directory')
  files = sorted(set(weight_map.values()))
  absent = [f for f in files if not (path / f).is_file()]
  if absent:
    raise FileNotFoundError(f'{index} names files that are missing: {absent}')
  found: dict[str, Stored] = {}
  double, unnamed = [], []
  for file in files:
    for name, stored in safetensors_lib.read_header(path / file).items():
      if name in found:
        double.append(name)
      elif weight_map.get(name) != file:
        unnamed.append(f'{name} in {file}')
      found.setdefault(name, stored)
  lost = sorted(set(weight_map) - set(found))
  if double or unnamed or lost:
    raise ValueError(f'{index} does not match its files: tensors stored in several files '
                     f'{sorted(double)}; tensors in a file where the index does not have them '
                     f'{sorted(unnamed)}; tensors that no file has {lost}')
  return found


def open_weights(path: str | os.PathLike[str], model: Model) -> dict[str, Stored]:
  """Checks the tensors of a model's directory against its table. Reads no weights.

  Raises:
    FileNotFoundError, ValueError: see `find_tensors`; or tensors unmatched, missing, mis-shaped,
      doubly matched or of a dtype that is not implemented, each listed by name.
  """
  found = find_tensors(path)
  # A tied head may be stored as a copy; `_read_model` compares the two.
  matched = {n: t for n, t in found.items() if n != _tied_head(model)}
  safetensors_lib.check(matched, model.specs, f'the weights in {path} do not match {model.family}')
  return found


def _tied_head(model: Model) -> str | None:
  """The name of the tensor that may be stored although the embedding is the head."""
  table = flatten(model.specs)
  return 'lm_head.weight' if 'embed' in table and 'head' not in table else None


# --- reading ---


def read_params(path: str | os.PathLike[str], model: Model, dtype: Any = jnp.float32,
                shardings: Any = None) -> Params:
  """Reads the weights of a directory as `LoadedModel.read` does.

  Raises:
    FileNotFoundError, ValueError: see `open_weights`; or NaN or infinity in a tensor, or a stored
      copy of a tied head that differs from the embedding.
  """
  return _read_model(model, open_weights(path, model), dtype, shardings)


def _read_model(model: Model, weights: dict[str, Stored], dtype: Any = jnp.float32,
                shardings: Any = None) -> Params:
  head = weights.get(_tied_head(model))
  if head is not None and hosts.is_primary():  # one process has to read the whole of both
    embed = weights[flatten(model.specs)['embed'].hf_name]
    if head.shape != embed.shape or head.dtype not in safetensors_lib.DTYPES or not _equal(
        safetensors_lib.view(head), safetensors_lib.view(embed)):
      raise ValueError(f'{head.file}: the head is tied (tie_word_embeddings), but lm_head.weight '
                       f"differs from {flatten(model.specs)['embed'].hf_name}; allowed: a copy")
  return safetensors_lib.read(model.specs, weights, dtype, shardings)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))  # row by row: no big mask


# --- writing ---


def write_checkpoint(path: str | os.PathLike[str], model: Model, params: Params, tokenizer: Any, *,
                     stop_tokens: tuple[int, ...] = (), dtype: Any = None,
                     sampling: Mapping[str, Any] | None = None,
                     origin: Mapping[str, Any] | None = None,
                     max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
  """Writes a model's directory: configs, weights, tokenizer with its chat template.

  The directory appears whole or not at all. Of several processes the first one writes; all have to
  call this, since each holds a part of what is written.

  Args:
    path: the directory to make.
    model: its functions and its table.
    params: arrays of the host or of devices. `lora.LoRA` leaves are merged, one tensor at a time.
    tokenizer: a Hugging Face tokenizer.
    stop_tokens: ids that end a completion, for generation_config.json, beside the tokenizer's own.
    dtype: of the file: float32, bfloat16 or float16; None keeps the parameters'.
    sampling: more of generation_config.json (`LoadedModel.sampling`).
    origin: the content of ORIGIN; None for no such file.
    max_shard_bytes: more weights than that go into several files with an index.

  Raises:
    FileExistsError: `path` exists.
    ValueError: another dtype, a size below 1, parameters that are not the model's, or that are not
      finite in that dtype.
    disk.ExportError: the file system refuses, such as for want of space.
  """
  if max_shard_bytes < 1:
    raise ValueError(f'max_shard_bytes={max_shard_bytes}; allowed: at least 1')
  plan = safetensors_lib.plan(model.specs, params, dtype)
  ids = {'bos_token_id': tokenizer.bos_token_id, 'eos_token_id': tokenizer.eos_token_id,
         'pad_token_id': tokenizer.pad_token_id}
  ids = {name: value for name, value in ids.items() if value is not None}
  ends = sorted({tokenizer.eos_token_id, *stop_tokens})
  first = next(iter(plan.values()))[0]
  configs = {'config.json': {**model.to_hf(), **ids, 'dtype': str(first)},
             'generation_config.json': {**(sampling or {}), **ids,
                                        'eos_token_id': ends if ends[1:] else ends[0]}}
  if origin is not None:
    configs[ORIGIN] = origin
  with disk.new_directory(path) as partial:
    for file, content in configs.items():
      disk.write_json(partial / file, content, sort_keys=True)
    save_tokenizer(partial, tokenizer)
    shards = safetensors_lib.split(plan, max_shard_bytes)
    arrays = safetensors_lib.stream(model.specs, params, plan)
    files = [WEIGHTS] if len(shards) == 1 else [
        f'model-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
      safetensors_lib.write(partial / file, shard, arrays)
    if len(shards) > 1:
      weight_map = {n: f for f, shard in zip(files, shards, strict=True) for n in shard}
      size = sum(map(safetensors_lib.nbytes, plan.values()))
      disk.write_json(partial / INDEX, {'metadata': {'total_size': size}, 'weight_map': weight_map},
                      sort_keys=True)


def save_tokenizer(folder: pathlib.Path, tokenizer: Any) -> None:
  """Writes the files of a tokenizer, such that transformers 4 and 5 read the same from them.

  Raises:
    OSError: whatever went wrong.
  """
  if not hosts.is_primary():
    return
  try:
    tokenizer.save_pretrained(str(folder))
  except Exception as e:  # the Rust side raises bare Exceptions, for a full disk too
    raise OSError(f'the tokenizer cannot be saved: {e}') from e
  file = folder / 'tokenizer_config.json'
  if (folder / 'tokenizer.json').exists():
    disk.write_json(file, _of_both_versions(read_json(file)), sort_keys=True)


def _of_both_versions(config: dict[str, Any]) -> dict[str, Any]:
  """A tokenizer_config.json of transformers 5 as version 4 knows it too: there is no class
  TokenizersBackend there, and the list of more special tokens has another name. The class is the
  one that takes tokenizer.json as it is; others have settings of their own, which overrule it."""
  out = {name: value for name, value in config.items() if name != 'backend'}
  if isinstance(extra := out.get('extra_special_tokens'), list):
    del out['extra_special_tokens']
    out['additional_special_tokens'] = extra
  return {**out, 'tokenizer_class': 'PreTrainedTokenizerFast'}
