"""Gemma 3, the text model (2025, arXiv 2503.19786).

Gemma 2's block with norms of queries and keys in place of bounded scores, and with rotary positions
of their own for local and for global layers, of which only the global ones may be stretched (the
'linear' way). Left out, and refused by name when a config.json asks for it: what gemma2.py refuses,
and bounded attention scores, which transformers reads and then does not apply.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import nn
from opd_jax.models import _config, _decoder, gemma2
from opd_jax.types import Model


@dataclasses.dataclass(frozen=True)
class Config(_config.Decoder):
  """What every family has, and Gemma's own; `rope_theta` is that of the global layers."""

  rope_scaling: nn.RopeScaling | None
  rope_local_base_freq: float
  query_pre_attn_scalar: int | float
  sliding_window: int
  layer_types: tuple[str, ...]
  final_logit_softcapping: float | None


_ONLY = {**gemma2.ONLY, 'attn_logit_softcapping': (None,)}


def _rope(hf_config: dict[str, Any]) -> dict[str, Any]:
  """rope_theta, rope_scaling and rope_local_base_freq, of either way to write them."""
  nested = hf_config.get('rope_parameters') or {}
  if not nested:
    theta, scaling = _config.rope('gemma3_text', hf_config, ('default', 'linear'))
    return {**theta, 'rope_scaling': scaling}
  outside = [name for name in ('rope_scaling', 'rope_theta', 'rope_local_base_freq')
             if hf_config.get(name) is not None]
  wrong = set(nested) ^ {gemma2.LOCAL, gemma2.GLOBAL}
  if outside or wrong:
    raise ValueError(
        f'gemma3_text config.json: rope_parameters={nested} beside {outside}; allowed: '
        f'rope_parameters of {gemma2.LOCAL!r} and {gemma2.GLOBAL!r}, or the fields rope_theta, '
        'rope_local_base_freq and rope_scaling')
  one = functools.partial(_config.rope_scaling, 'gemma3_text')
  one(nested[gemma2.LOCAL], f'rope_parameters.{gemma2.LOCAL}', ('default',))
  scaling = one(nested[gemma2.GLOBAL], f'rope_parameters.{gemma2.GLOBAL}', ('default', 'linear'))
  found = {'rope_theta': nested[gemma2.GLOBAL].get('rope_theta'),
           'rope_local_base_freq': nested[gemma2.LOCAL].get('rope_theta')}
  return {**{k: v for k, v in found.items() if v is not None}, 'rope_scaling': scaling}


def parse(hf_config: dict[str, Any]) -> Config:
  """Reads config.json strictly.

  Raises:
    ValueError: a missing size, or a value of a field that this family does not implement.
  """
  read = [*_config.read_names(Config), 'sliding_window_pattern']
  _config.check_fields('gemma3_text', hf_config, read, _ONLY)
  pattern = hf_config.get('sliding_window_pattern')
  values = gemma2.with_layer_types('gemma3_text', hf_config, pattern or 6)
  if pattern and values != gemma2.with_layer_types(
      'gemma3_text', {**hf_config, 'layer_types': None}, pattern):
    raise ValueError(f'gemma3_text config.json: sliding_window_pattern={pattern} and layer_types='
                     f'{list(values["layer_types"])}; allowed: that they say the same')
  return _config.make(Config, 'gemma3_text', {**values, **_rope(hf_config)})


def to_hf(c: Config) -> dict[str, Any]:
  """The inverse of `parse`: the content of a config.json that transformers opens."""
  return _config.to_hf(c, 'gemma3_text', 'Gemma3ForCausalLM', {
      'hidden_activation': 'gelu_pytorch_tanh', 'attention_bias': False,
      'layer_types': list(c.layer_types)})


def param_specs(c: Config) -> dict[str, Any]:
  """The table."""
  zeros = jax.nn.initializers.zeros
  return gemma2.param_specs(c, {
      'q_norm': _decoder.gain(c, 'self_attn.q_norm', c.head_dim, zeros),
      'k_norm': _decoder.gain(c, 'self_attn.k_norm', c.head_dim, zeros)})


def build(hf_config: dict[str, Any], *, dtype: Any = jnp.float32, remat: bool = False,
          layer_unroll: int = 1) -> Model:
  """See `models.build`. `layer_unroll` layers share one iteration of the scan."""
  c = parse(hf_config)
  local = _decoder.Kind(c.rope_local_base_freq, window=c.sliding_window)
  model = gemma2.decoder(c, 0.0, local, _decoder.Kind(c.rope_theta, c.rope_scaling), dtype,
                         remat, layer_unroll)
  return _decoder.build(model, 'gemma3_text', param_specs(c), to_hf(c))
