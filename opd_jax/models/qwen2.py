"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2407.10671 and 2412.15115), dense models.

The Llama block with biases on queries, keys and values. Left out, and refused by name when a
config.json asks for it: sliding windows, scaled RoPE, multimodal positions, dropout.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import nn
from opd_jax.models import _config, _decoder
from opd_jax.params import ParamSpec
from opd_jax.types import Model


@dataclasses.dataclass(frozen=True)
class Config(_config.Decoder):
  """Nothing beyond what every family has."""


_ONLY = {'hidden_act': ('silu',), 'use_sliding_window': (False,), 'use_mrope': (False,)}
_INERT = ('sliding_window', 'max_window_layers')  # of what use_sliding_window turns off


def parse(hf_config: dict[str, Any]) -> Config:
  """Reads config.json strictly.

  Raises:
    ValueError: a missing size, or a value of a field that this family does not implement.
  """
  _config.check_fields('qwen2', hf_config, [*_config.read_names(Config), 'layer_types'], _ONLY,
                       _INERT)
  _config.only_full_attention('qwen2', hf_config)
  theta, _ = _config.rope('qwen2', hf_config)
  return _config.make(Config, 'qwen2', {**_config.with_head_dim(hf_config), **theta})


def to_hf(c: Config) -> dict[str, Any]:
  """The inverse of `parse`: the content of a config.json that transformers opens."""
  return _config.to_hf(c, 'qwen2', 'Qwen2ForCausalLM', {
      'hidden_act': 'silu', 'use_sliding_window': False,
      'layer_types': ['full_attention'] * c.num_hidden_layers})


def _bias(c: Config, name: str, heads: int, axis: str) -> ParamSpec:
  return ParamSpec((c.num_hidden_layers, heads, c.head_dim), ('layer', axis, None),
                   jax.nn.initializers.zeros, f'model.layers.{{layer}}.self_attn.{name}_proj.bias',
                   (heads * c.head_dim,))


def param_specs(c: Config) -> dict[str, Any]:
  """The table."""
  return _decoder.table(c, {
      'attention_norm': _decoder.gain(c, 'input_layernorm', c.hidden_size),
      **_decoder.attention_table(c),
      'q_bias': _bias(c, 'q', c.num_attention_heads, 'heads'),
      'k_bias': _bias(c, 'k', c.num_key_value_heads, 'kv_heads'),
      'v_bias': _bias(c, 'v', c.num_key_value_heads, 'kv_heads'),
      'mlp_norm': _decoder.gain(c, 'post_attention_layernorm', c.hidden_size),
      **_decoder.mlp_table(c)})


def _layer(c, x, w, rope, allowed, cache):
  h = nn.rms_norm(x, w['attention_norm'], c.rms_norm_eps)
  q, k, v = (y + w[name].astype(y.dtype)[None, None] for y, name in zip(
      _decoder.project(h, w), ('q_bias', 'k_bias', 'v_bias'), strict=True))
  mixed, kv = _decoder.attend(q, k, v, w['o'], rope, allowed, cache)
  x = x + mixed
  h = nn.rms_norm(x, w['mlp_norm'], c.rms_norm_eps)
  return x + nn.swiglu(h, w['gate'], w['up'], w['down']), kv


def build(hf_config: dict[str, Any], *, dtype: Any = jnp.float32, remat: bool = False,
          layer_unroll: int = 1) -> Model:
  """See `models.build`. `layer_unroll` layers share one iteration of the scan."""
  c = parse(hf_config)
  decoder = _decoder.Decoder(
      c, functools.partial(_layer, c), (_decoder.Kind(c.rope_theta),), dtype=dtype, remat=remat,
      layer_unroll=layer_unroll)
  return _decoder.build(decoder, 'qwen2', param_specs(c), to_hf(c))
