"""Qwen3 (Yang et al. 2025, arXiv 2505.09388), dense models.

Pre-norm decoder: RMSNorm, rotary positions, grouped-query attention with RMSNorm on every query
and key head, SwiGLU feed-forward, no biases, tied or untied head. Left out, and refused by name
when a config.json asks for it: attention bias, sliding windows, scaled RoPE, dropout.
"""

from __future__ import annotations

from typing import Any

from opd_jax.models import config_json, decoder, nn
from opd_jax.models.params import ParamSpec


def attention_table(c: Any) -> dict[str, ParamSpec]:
  """Describes the parameters of attention, with its norms."""
  linear = decoder.attention_matrices(c)
  return {
      'attention_norm': decoder.gain(c, 'input_layernorm', c.hidden_size),
      'q': linear['q'], 'k': linear['k'], 'v': linear['v'],
      'q_norm': decoder.gain(c, 'self_attn.q_norm', c.head_dim),
      'k_norm': decoder.gain(c, 'self_attn.k_norm', c.head_dim),
      'o': linear['o'],
      'mlp_norm': decoder.gain(c, 'post_attention_layernorm', c.hidden_size)}


def _table(c):
  return {**attention_table(c), **decoder.mlp_matrices(c)}


def attention(c: Any, x: Any, w: dict[str, Any], rope: Any, mask: Any, cache: Any
              ) -> tuple[Any, Any]:
  """Computes x plus its attention, and (keys, values)."""
  h = nn.rms_norm(x, w['attention_norm'], c.rms_norm_eps)
  q, k, v = decoder.project(h, w)
  q = nn.rms_norm(q, w['q_norm'], c.rms_norm_eps)
  k = nn.rms_norm(k, w['k_norm'], c.rms_norm_eps)
  mixed, kv = decoder.attend(q, k, v, w['o'], rope, mask, cache)
  return x + mixed, kv


def _layer(c, x, w, rope, mask, cache):
  x, kv = attention(c, x, w, rope, mask, cache)
  h = nn.rms_norm(x, w['mlp_norm'], c.rms_norm_eps)
  return x + nn.swiglu(h, w['gate'], w['up'], w['down']), kv


FAMILY = decoder.Family(
    'Qwen3ForCausalLM', _layer, _table,
    only={'hidden_act': ('silu',), 'attention_bias': (False,), 'use_sliding_window': (False,)},
    inert=('sliding_window', 'max_window_layers'),  # of what use_sliding_window turns off
    also_read=('layer_types',), read=config_json.full_attention_only,
    written=lambda c: {'hidden_act': 'silu', 'attention_bias': False, 'use_sliding_window': False,
                       'layer_types': ['full_attention'] * c.num_hidden_layers})
