"""Gemma 3, the text model (2025, arXiv 2503.19786).

Gemma 2's block with norms of queries and keys in place of bounded scores, and with rotary positions
of their own for local and for global layers, of which only the global ones may be stretched (the
'linear' way). Left out, and refused by name when a config.json asks for it: what gemma2.py refuses,
and bounded attention scores, which transformers reads and then does not apply.
"""

from __future__ import annotations

import dataclasses
import functools

import jax

from opd_jax.models import config_json, decoder, nn
from opd_jax.models.families import gemma2


@dataclasses.dataclass(frozen=True)
class Config(config_json.BaseConfig):
  """What every family has, and Gemma's own; `rope_theta` is that of the global layers."""

  rope_scaling: nn.RopeScaling | None
  rope_local_base_freq: float
  query_pre_attn_scalar: int | float
  sliding_window: int
  layer_types: tuple[str, ...]
  final_logit_softcapping: float | None


def _read_rope(hf_config):
  """Reads rope_theta, rope_scaling and rope_local_base_freq, of either way to write them."""
  nested = hf_config.get('rope_parameters') or {}
  if not nested:
    return config_json.read_rope(hf_config, ('default', 'linear'))
  outside = [name for name in ('rope_scaling', 'rope_theta', 'rope_local_base_freq')
             if hf_config.get(name) is not None]
  wrong = set(nested) ^ {gemma2.LOCAL, gemma2.GLOBAL}
  if outside or wrong:
    raise ValueError(
        f'gemma3_text config.json: rope_parameters={nested} beside {outside}; allowed: '
        f'rope_parameters of {gemma2.LOCAL!r} and {gemma2.GLOBAL!r}, or the fields rope_theta, '
        'rope_local_base_freq and rope_scaling')
  one = functools.partial(config_json.read_rope_scaling, 'gemma3_text')
  one(nested[gemma2.LOCAL], f'rope_parameters.{gemma2.LOCAL}', ('default',))
  scaling = one(nested[gemma2.GLOBAL], f'rope_parameters.{gemma2.GLOBAL}', ('default', 'linear'))
  found = {'rope_theta': nested[gemma2.GLOBAL].get('rope_theta'),
           'rope_local_base_freq': nested[gemma2.LOCAL].get('rope_theta')}
  return {**{k: v for k, v in found.items() if v is not None}, 'rope_scaling': scaling}


def _read(hf_config):
  pattern = hf_config.get('sliding_window_pattern')
  values = gemma2.with_layer_types(hf_config, pattern or 6)
  if pattern and values != gemma2.with_layer_types({**hf_config, 'layer_types': None}, pattern):
    raise ValueError(f'gemma3_text config.json: sliding_window_pattern={pattern} and layer_types='
                     f'{list(values["layer_types"])}; allowed: that they say the same')
  return values


def _table(c):
  zeros = jax.nn.initializers.zeros
  return gemma2.table(c, {
      'q_norm': decoder.gain(c, 'self_attn.q_norm', c.head_dim, zeros),
      'k_norm': decoder.gain(c, 'self_attn.k_norm', c.head_dim, zeros)})


def _layer(c, *inputs):
  return gemma2.block(c, 0.0, *inputs)


def _kind(c, i):
  if c.layer_types[i] == gemma2.LOCAL:
    return decoder.Kind(c.rope_local_base_freq, window=c.sliding_window)
  return decoder.Kind(c.rope_theta, c.rope_scaling)


FAMILY = dataclasses.replace(
    gemma2.FAMILY, architecture='Gemma3ForCausalLM', layer=_layer, table=_table, config=Config,
    only={**gemma2.FAMILY.only, 'attn_logit_softcapping': (None,)},
    also_read=('sliding_window_pattern',), read=_read, read_rope=_read_rope, kind=_kind)
