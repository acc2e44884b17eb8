"""Reads and writes low-rank adapters as directories in PEFT's format, strictly.

As in `huggingface.py`, opening one checks all that can be checked without reading a weight. Left
out: other methods than plain LoRA, and adapters of what is no linear layer of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import os
import pathlib
import re
from typing import Any
import warnings

from opd_jax.files import disk, huggingface
from opd_jax.files import safetensors as safetensors_lib
from opd_jax.files.safetensors import Stored
from opd_jax.models import lora
from opd_jax.models.params import flatten
from opd_jax.types import Model, Params

WEIGHTS, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
# Fields of adapter_config.json that change nothing about what the tensors mean: records of how the
# adapters were made, and what the tensors themselves tell.
_HARMLESS = {
    'auto_mapping', 'base_model_name_or_path', 'corda_config', 'ephemeral_gpu_offload',
    'eva_config', 'exclude_modules', 'inference_mode', 'layers_pattern', 'lora_alpha',
    'lora_dropout', 'megatron_core', 'peft_version', 'qalora_group_size', 'r', 'revision',
    'runtime_config', 'target_modules'}
_ALLOWED = {  # init_lora_weights: others change the base too
    'peft_type': ('LORA',), 'task_type': ('CAUSAL_LM', None), 'bias': ('none',),
    'init_lora_weights': (True, False, 'gaussian', 'eva', 'orthogonal')}


def write_adapter(path: str | os.PathLike[str], model: Model, adapters: Params,
                  settings: lora.Settings, tokenizer: Any, base_name: str,
                  origin: Mapping[str, Any] | None = None, base_revision: str = '') -> None:
  """Writes adapters as a PEFT directory, with the tokenizer.

  Args:
    path: the directory to make.
    model: the base.
    adapters: in the form of `lora.adapter_specs`.
    settings: theirs.
    tokenizer: a Hugging Face tokenizer.
    base_name: where the base is from, for adapter_config.json; '' for nowhere.
    origin: the content of `huggingface.ORIGIN`, with what the base contains; None for no such file.
    base_revision: the commit of the base, if that is on the hub.

  Raises:
    FileExistsError, ValueError, ExportError: see `huggingface.write_checkpoint`.
  """
  specs = lora.adapter_specs(model.specs, settings)
  plan = safetensors_lib.plan(specs, adapters, None)
  whole = settings.alpha == int(settings.alpha)
  config = {
      'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base_name or None,
      'revision': base_revision or None,
      'r': settings.rank, 'lora_alpha': int(settings.alpha) if whole else settings.alpha,
      'lora_dropout': 0.0, 'bias': 'none', 'fan_in_fan_out': False, 'use_rslora': False,
      'use_dora': False, 'inference_mode': True, 'init_lora_weights': True,
      'modules_to_save': None, 'target_modules': sorted(_modules(plan))}
  with disk.new_directory(path) as partial:
    disk.write_json(partial / CONFIG, config, sort_keys=True)
    if origin is not None:
      disk.write_json(partial / huggingface.ORIGIN, origin, sort_keys=True)
    safetensors_lib.write(partial / WEIGHTS, plan, safetensors_lib.stream(specs, adapters, plan))
    huggingface.save_tokenizer(partial, tokenizer)


def _modules(names: Any) -> set[str]:
  """The last names of the modules of adapter tensors, such as {'q_proj'}."""
  return {name.rpartition('.lora_')[0].rpartition('.')[2] for name in names}


def read_adapter(path: str | os.PathLike[str], model: Model, base_name: str = ''
                 ) -> tuple[lora.Settings, Callable[..., Params]]:
  """Opens a PEFT directory with adapters for this base.

  Args:
    path: the directory.
    model: the base.
    base_name: where the base is from. A warning says so if the adapter names another; names of the
      same base differ from place to place, so that this alone is no error.

  Returns:
    The settings, and a `read` like `huggingface.LoadedModel.read` for the tree of
    `lora.adapter_specs`. `lora_dropout` is not applied.

  Raises:
    FileNotFoundError: something is not there.
    ValueError: another method than plain LoRA, or tensors that do not fit the base.
  """
  path = pathlib.Path(path)
  config = huggingface.read_json(path / CONFIG)
  _check_plain(config, path / CONFIG)
  file = path / WEIGHTS
  if not file.exists():
    raise FileNotFoundError(f'{path} has no {WEIGHTS}')
  found = safetensors_lib.read_header(file)
  targets = _targets(found, model, config['r'])
  if not targets:
    raise ValueError(f'{file} is not for this {model.family}: it has the tensors {sorted(found)}, '
                     f'none of them for {sorted(lora.adaptable(model.specs))}')
  settings = lora.Settings(rank=config['r'], alpha=float(config['lora_alpha']), targets=targets)
  specs = lora.adapter_specs(model.specs, settings)
  safetensors_lib.check(
      found, specs, f'{file} does not match this {model.family} with r={settings.rank}')
  named = config.get('target_modules')
  if isinstance(named, list) and {n.rpartition('.')[2] for n in named} != _modules(found):
    raise ValueError(f'{path / CONFIG}: target_modules={sorted(named)}, and the tensors '
                     f'are for {sorted(_modules(found))}; allowed: the same')
  made_for = config.get('base_model_name_or_path') or ''
  if made_for and base_name and pathlib.PurePath(made_for).name != pathlib.PurePath(base_name).name:
    warnings.warn(f'the adapter in {path} was made for {made_for!r}, and is put on {base_name!r}',
                  stacklevel=2)
  return settings, functools.partial(safetensors_lib.read, specs, found)


def _check_plain(config: dict[str, Any], file: pathlib.Path) -> None:
  """Raises ValueError for anything but plain LoRA. A field that is not known here, as of a newer
  PEFT, has to be empty."""
  for name, allowed in _ALLOWED.items():
    if config.get(name, allowed[0]) not in allowed or 'peft_type' not in config:
      raise ValueError(f'{file}: {name}={config.get(name)!r}; allowed: {list(allowed)}')
  for name in sorted(set(config) - _HARMLESS - set(_ALLOWED)):
    if config[name]:
      raise ValueError(f'{file}: {name}={config[name]!r} is not implemented; allowed: that it is '
                       'absent, null, false or empty')
  for name in ('r', 'lora_alpha'):
    value = config.get(name)
    kinds = (int,) if name == 'r' else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 2**24:
      raise ValueError(f'{file}: {name}={value!r:.80}; allowed: a number above 0 (and below '
                       '2^24)')
  base, named = config.get('base_model_name_or_path'), config.get('target_modules')
  if not isinstance(base, str | None):
    raise ValueError(f'{file}: base_model_name_or_path={base!r}; allowed: a text, or null')
  if not isinstance(named, str | None) and not (
      isinstance(named, list) and all(isinstance(n, str) for n in named)):
    raise ValueError(f'{file}: target_modules={named!r}; allowed: a text, a list of texts, or null')


def _targets(found: dict[str, Stored], model: Model, rank: int) -> str:
  """`lora.Settings.targets` for the parameters that have tensors in the file; '' for none."""
  specs = flatten(lora.adapter_specs(model.specs, lora.Settings(rank, alpha=1.0)))
  names = dict.fromkeys(key.rpartition('/')[0] for key, spec in specs.items()
                        if any(name in found for _, name in safetensors_lib.places(spec)))
  for preset, pattern in lora.PRESETS.items():
    if names and set(names) == {n for n in lora.adaptable(model.specs) if re.fullmatch(pattern, n)}:
      return preset
  return '|'.join(map(re.escape, names))
