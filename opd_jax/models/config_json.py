"""Strict reading of config.json, shared by the families.

A field is read by the family, or known to say nothing about the forward pass, or restricted to the
values that the family implements. Any other field is refused unless it is off (None or False): what
nobody here knows may change what the network computes.
"""

from __future__ import annotations

from collections.abc import Collection
import dataclasses
from typing import Any

from opd_jax.models.nn import RopeScaling


@dataclasses.dataclass(frozen=True)
class BaseConfig:
  """The fields of config.json that every family has, under their Hugging Face names."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float
  rope_theta: float
  tie_word_embeddings: bool
  max_position_embeddings: int


# Names, files and ids; defaults of other tasks and of fresh weights.
_INERT = frozenset((
    'model_type', 'architectures', 'transformers_version', 'transformers.js_config', 'dtype',
    'torch_dtype', 'name_or_path', 'tokenizer_class', 'bos_token_id', 'eos_token_id',
    'pad_token_id', 'unk_token_id', 'sep_token_id', 'cls_token_id', 'mask_token_id',
    'decoder_start_token_id', 'use_cache', 'cache_implementation', 'initializer_range',
    'return_dict', 'output_hidden_states', 'output_attentions', 'id2label', 'label2id',
    'problem_type', 'finetuning_task', 'task_specific_params', 'prefix', 'torchscript',
    'rope_scaling', 'rope_parameters', 'rope_theta'))  # the last three are read by `read_rope`
# How texts are generated, which versions of transformers before 5 wrote here too.
_GENERATION = frozenset((
    'max_length', 'min_length', 'max_new_tokens', 'min_new_tokens', 'do_sample', 'early_stopping',
    'num_beams', 'num_beam_groups', 'diversity_penalty', 'temperature', 'top_k', 'top_p', 'min_p',
    'typical_p', 'epsilon_cutoff', 'eta_cutoff', 'penalty_alpha', 'repetition_penalty',
    'encoder_repetition_penalty', 'length_penalty', 'exponential_decay_length_penalty',
    'no_repeat_ngram_size', 'encoder_no_repeat_ngram_size', 'bad_words_ids', 'force_words_ids',
    'renormalize_logits', 'forced_bos_token_id', 'forced_eos_token_id', 'remove_invalid_values',
    'suppress_tokens', 'begin_suppress_tokens', 'forced_decoder_ids', 'num_return_sequences',
    'output_scores', 'return_dict_in_generate', 'guidance_scale'))
# What any family allows of fields that do change something.
_ONLY = {'attention_dropout': (0, 0.0), 'chunk_size_feed_forward': (0,),
         'partial_rotary_factor': (1, 1.0), 'pruned_heads': ({}, None)}
# What is read and is no field of a config, or is another type there.
_READ = {'rope_scaling': 'object | None', 'rope_parameters': 'object | None',
         'layer_types': 'list[str] | None', 'sliding_window_pattern': 'int | None',
         'num_local_experts': 'int | None'}
# Where a size is counted up to, a mistaken one must not take for ever.
_MOST = {'num_hidden_layers': 1000, 'num_experts': 4096, 'num_local_experts': 4096}
_LARGEST = 2**24
_ROPE = {'default': (), 'linear': ('factor',),
         'llama3': ('factor', 'low_freq_factor', 'high_freq_factor',
                    'original_max_position_embeddings')}


def check_fields(hf_config: dict[str, Any], read: Collection[str],
                 only: dict[str, tuple[Any, ...]], inert: Collection[str] = ()) -> None:
  """Refuses what the family does not implement.

  Args:
    hf_config: the content of config.json; the errors name its `model_type`.
    read: fields that the family reads.
    only: field -> the only values that the family implements; the field may be absent.
    inert: fields without an effect on the forward pass, beyond those that never have one. Names
      with a leading underscore are transformers' private notes.

  Raises:
    ValueError: another value, or an unknown field that is not off.
  """
  family, only = hf_config['model_type'], {**_ONLY, **only}
  for name, value in hf_config.items():
    if name in only:
      if value not in only[name]:
        raise ValueError(f'{family} config.json: {name}={value!r} is not implemented; '
                         f'allowed: {list(only[name])}')
    elif not (value is None or value is False or name in read or name in inert or name in _INERT
              or name in _GENERATION or name.startswith('_')):
      raise ValueError(f'{family} config.json: {name}={value!r} is an unknown field, which may '
                       f'change the computation; allowed: {sorted({*read, *only})}')


def check_types(hf_config: dict[str, Any], config: type) -> dict[str, Any]:
  """Reads the types of what a family reads, once, before anything computes with them.

  Args:
    hf_config: the content of config.json.
    config: the family's frozen dataclass, whose annotations are the types.

  Returns:
    The same with numbers as numbers of the right kind. What is null may be for the family to say.

  Raises:
    ValueError: a value of another type.
  """
  kinds = {f.name: f.type for f in dataclasses.fields(config)} | _READ
  return {name: _checked(hf_config['model_type'], name, kinds[name], value)
          if name in kinds and value is not None else value for name, value in hf_config.items()}


def read_rope_scaling(family: str, given: dict[str, Any], where: str, types: tuple[str, ...]
                      ) -> RopeScaling | None:
  """Reads one dictionary of RoPE parameters, theta aside.

  Raises:
    ValueError: a type not in `types`, a parameter that it does not have, or one that it lacks.
  """
  if not isinstance(given, dict):
    raise ValueError(f'{family} config.json: {where}={given!r}; allowed: an object')
  kind = given.get('rope_type', given.get('type', 'default'))
  if kind not in types:
    raise ValueError(f'{family} config.json: {where}.rope_type={kind!r} is not implemented; '
                     f'allowed: {list(types)}')
  parameters = _ROPE[kind]
  for name, value in given.items():
    known = name in ('rope_type', 'type', 'rope_theta', *parameters)
    if not (known or (name == 'partial_rotary_factor' and value in (None, 1))):
      raise ValueError(f'{family} config.json: {where}.{name}={value!r} is not implemented for '
                       f'rope_type={kind!r}; allowed: {["rope_theta", *parameters]}')
  missing = [name for name in parameters if given.get(name) is None]
  if missing:
    raise ValueError(f'{family} config.json: {where} of rope_type={kind!r} lacks {missing}; '
                     f'allowed: {list(parameters)}')
  if kind == 'default':
    return None
  values = [_checked(family, f'{where}.{f.name}', f.type, given[f.name])
            for f in dataclasses.fields(RopeScaling) if f.name in parameters]
  scaling = RopeScaling(kind, *values)
  if scaling.factor < 1 or (kind == 'llama3' and not (
      scaling.high_freq_factor > scaling.low_freq_factor)):
    raise ValueError(f'{family} config.json: {where}={given}; allowed: a factor of at least 1, and '
                     'high_freq_factor above low_freq_factor')
  return scaling


def read_rope(hf_config: dict[str, Any], types: tuple[str, ...] = ('default',)) -> dict[str, Any]:
  """Reads the rotary positions: `rope_scaling`, and `rope_theta` of a config.json that has one.

  transformers 5 keeps all of it in `rope_parameters`; checkpoints written before have `rope_theta`
  outside and the rest in `rope_scaling`.

  Raises:
    ValueError: both ways at once and not the same, or what `read_rope_scaling` refuses.
  """
  family = hf_config['model_type']
  old, new = (hf_config.get(name) or {} for name in ('rope_scaling', 'rope_parameters'))
  if old and new:
    raise ValueError(f'{family} config.json: rope_scaling={old} and rope_parameters={new}; '
                     'allowed: one of them')
  where, given = ('rope_scaling', old) if old else ('rope_parameters', new)
  thetas = [d['rope_theta'] for d in (hf_config, given) if d.get('rope_theta') is not None]
  if thetas and thetas[-1] != thetas[0]:
    raise ValueError(f'{family} config.json: rope_theta={thetas[0]} and {where}.rope_theta='
                     f'{thetas[1]}; allowed: one value')
  theta = {'rope_theta': thetas[0]} if thetas else {}
  return {**theta, 'rope_scaling': read_rope_scaling(family, given, where, types)}


def full_attention_only(hf_config: dict[str, Any]) -> dict[str, Any]:
  """Returns the same, unless `layer_types` has others than full attention.

  Raises:
    ValueError: it has.
  """
  kinds = set(hf_config.get('layer_types') or ['full_attention'])
  if kinds != {'full_attention'}:
    raise ValueError(f'{hf_config["model_type"]} config.json: layer_types={sorted(kinds)} is not '
                     "implemented; allowed: ['full_attention']")
  return hf_config


def with_head_dim(hf_config: dict[str, Any]) -> dict[str, Any]:
  """Adds `head_dim`, which some families leave to hidden_size / num_attention_heads."""
  width, heads = (hf_config.get(name) for name in ('hidden_size', 'num_attention_heads'))
  if hf_config.get('head_dim') is not None or width is None or heads is None:
    return hf_config
  return {**hf_config, 'head_dim': width // heads}


def _checked(family: str, name: str, types: str, value: Any) -> Any:
  """A field's value, checked by its types; files write 1000000 for 1000000.0."""
  kinds = types.split(' | ')
  if 'None' in kinds and value is None:
    return None
  most = _MOST.get(name, _LARGEST)
  if 'bool' in kinds:
    fits, allowed = type(value) is bool, 'true or false'
  elif 'object' in kinds:
    fits, allowed = isinstance(value, dict), 'an object'
  elif 'list[str]' in kinds:
    fits = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
    allowed = 'a list of strings'
  elif 'float' in kinds:
    fits = type(value) in (int, float) and 0 < value <= 1e30
    allowed = 'a number above 0'
  elif 'int' in kinds:
    fits = type(value) is int and 1 <= value <= most
    allowed = 'a whole number of at least 1' + (
        f' and at most {most}' if type(value) is int and value > most else '')
  else:  # what the family has made itself
    return value
  if not fits:
    shown = repr(value) if type(value) is not int or abs(value) < 10**18 else 'a longer number'
    raise ValueError(f'{family} config.json: {name}={shown[:200]}; allowed: {allowed}'
                     + (', or null' if 'None' in kinds else ''))
  return float(value) if 'float' in kinds and 'int' not in kinds else value


def make_config(config: type, values: dict[str, Any]) -> Any:
  """Makes the family's frozen `config` of config.json's values.

  Raises:
    ValueError: fields that are missing or of another type, or sizes that do not fit each other.
  """
  family, names = values['model_type'], field_names(config)
  missing = [name for name in names if name not in values]
  if missing:
    raise ValueError(f'{family} config.json lacks {missing}; allowed: one with all of {names}')
  values = {f.name: _checked(family, f.name, f.type, values[f.name])
            for f in dataclasses.fields(config)}
  c = config(**values)
  if c.head_dim % 2:
    raise ValueError(f'{family} config.json: head_dim={c.head_dim}; allowed: an even number, since '
                     'RoPE turns pairs')
  if c.num_attention_heads % c.num_key_value_heads:
    raise ValueError(f'{family} config.json: num_attention_heads={c.num_attention_heads}; allowed: '
                     f'a multiple of num_key_value_heads={c.num_key_value_heads}')
  return c


def field_names(config: type) -> list[str]:
  """Lists the fields of config.json that a family's `config` is made of."""
  return [f.name for f in dataclasses.fields(config)]


def to_hf(c: BaseConfig, family: str, architecture: str, more: dict[str, Any]) -> dict[str, Any]:
  """Writes the config.json of a family: the fields of its config, and `more` beside them.

  Rotary positions are written in the way of the checkpoints on the hub, which every version of
  transformers reads: versions before 5, which vLLM may come with, pass over `rope_parameters`
  without a word, and would compute with a default theta.
  """
  values = dataclasses.asdict(c)
  scaling = values.get('rope_scaling')
  values['rope_scaling'] = scaling and {k: v for k, v in scaling.items() if v is not None}
  if 'layer_types' in values:  # a list, as one that is read from a file
    values['layer_types'] = list(values['layer_types'])
  return {'architectures': [architecture], 'model_type': family, **values,
          'attention_dropout': 0.0, 'initializer_range': 0.02, 'use_cache': True,
          'dtype': 'float32', **more}
