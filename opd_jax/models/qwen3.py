"""Qwen3 (Yang et al. 2025, arXiv 2505.09388), dense models.

Pre-norm decoder: RMSNorm, rotary positions, grouped-query attention with RMSNorm on every query
and key head, SwiGLU feed-forward, no biases, tied or untied head. Left out, and refused by name
when a config.json asks for it: attention bias, sliding windows, scaled RoPE, dropout.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from opd_jax import nn
from opd_jax.models import _config, _decoder
from opd_jax.params import ParamSpec
from opd_jax.types import Model


@dataclasses.dataclass(frozen=True)
class Config(_config.Decoder):
  """Nothing beyond what every family has."""


_ONLY = {'hidden_act': ('silu',), 'attention_bias': (False,), 'use_sliding_window': (False,)}
_INERT = ('sliding_window', 'max_window_layers')  # of what use_sliding_window turns off


def parse(hf_config: dict[str, Any]) -> Config:
  """Reads config.json strictly.

  Raises:
    ValueError: a missing size, or a value of a field that this family does not implement.
  """
  _config.check_fields('qwen3', hf_config, [*_config.read_names(Config), 'layer_types'], _ONLY,
                       _INERT)
  _config.only_full_attention('qwen3', hf_config)
  theta, _ = _config.rope('qwen3', hf_config)
  return _config.make(Config, 'qwen3', {**hf_config, **theta})


def to_hf(c: Config) -> dict[str, Any]:
  """The inverse of `parse`: the content of a config.json that transformers opens."""
  return _config.to_hf(c, 'qwen3', 'Qwen3ForCausalLM', {
      'hidden_act': 'silu', 'attention_bias': False, 'use_sliding_window': False,
      'layer_types': ['full_attention'] * c.num_hidden_layers})


def attention_table(c: Any) -> dict[str, ParamSpec]:
  """Attention with its norms, in the order in which fresh parameters are drawn."""
  linear = _decoder.attention_table(c)
  return {
      'attention_norm': _decoder.gain(c, 'input_layernorm', c.hidden_size),
      'q': linear['q'], 'k': linear['k'], 'v': linear['v'],
      'q_norm': _decoder.gain(c, 'self_attn.q_norm', c.head_dim),
      'k_norm': _decoder.gain(c, 'self_attn.k_norm', c.head_dim),
      'o': linear['o'],
      'mlp_norm': _decoder.gain(c, 'post_attention_layernorm', c.hidden_size)}


def param_specs(c: Config) -> dict[str, Any]:
  """The table."""
  return _decoder.table(c, {**attention_table(c), **_decoder.mlp_table(c)})


def attention(c: Any, x: Any, w: dict[str, Any], rope: Any, allowed: Any, cache: Any
              ) -> tuple[Any, Any]:
  """x plus its attention, and (keys, values)."""
  h = nn.rms_norm(x, w['attention_norm'], c.rms_norm_eps)
  q, k, v = _decoder.project(h, w)
  q = nn.rms_norm(q, w['q_norm'], c.rms_norm_eps)
  k = nn.rms_norm(k, w['k_norm'], c.rms_norm_eps)
  mixed, kv = _decoder.attend(q, k, v, w['o'], rope, allowed, cache)
  return x + mixed, kv


def _layer(c, x, w, rope, allowed, cache):
  x, kv = attention(c, x, w, rope, allowed, cache)
  h = nn.rms_norm(x, w['mlp_norm'], c.rms_norm_eps)
  return x + nn.swiglu(h, w['gate'], w['up'], w['down']), kv


def build(hf_config: dict[str, Any], *, dtype: Any = jnp.float32, remat: bool = False,
          layer_unroll: int = 1) -> Model:
  """See `models.build`. `layer_unroll` layers share one iteration of the scan."""
  c = parse(hf_config)
  decoder = _decoder.Decoder(
      c, functools.partial(_layer, c), (_decoder.Kind(c.rope_theta),), dtype=dtype, remat=remat,
      layer_unroll=layer_unroll)
  return _decoder.build(decoder, 'qwen3', param_specs(c), to_hf(c))
