"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2407.10671 and 2412.15115), dense models.

The Llama block with biases on queries, keys and values. Left out, and refused by name when a
config.json asks for it: sliding windows, scaled RoPE, multimodal positions, dropout.
"""

from __future__ import annotations

import jax

from opd_jax.models import config_json, decoder, nn
from opd_jax.models.params import ParamSpec


def _bias(c, name, heads, axis):
  return ParamSpec((c.num_hidden_layers, heads, c.head_dim), ('layer', axis, None),
                   jax.nn.initializers.zeros, f'model.layers.{{layer}}.self_attn.{name}_proj.bias',
                   (heads * c.head_dim,))


def _table(c):
  return {
      'attention_norm': decoder.gain(c, 'input_layernorm', c.hidden_size),
      **decoder.attention_matrices(c),
      'q_bias': _bias(c, 'q', c.num_attention_heads, 'heads'),
      'k_bias': _bias(c, 'k', c.num_key_value_heads, 'kv_heads'),
      'v_bias': _bias(c, 'v', c.num_key_value_heads, 'kv_heads'),
      'mlp_norm': decoder.gain(c, 'post_attention_layernorm', c.hidden_size),
      **decoder.mlp_matrices(c)}


def _layer(c, x, w, rope, mask, cache):
  h = nn.rms_norm(x, w['attention_norm'], c.rms_norm_eps)
  q, k, v = (y + w[name].astype(y.dtype)[None, None] for y, name in zip(
      decoder.project(h, w), ('q_bias', 'k_bias', 'v_bias'), strict=True))
  mixed, kv = decoder.attend(q, k, v, w['o'], rope, mask, cache)
  x = x + mixed
  h = nn.rms_norm(x, w['mlp_norm'], c.rms_norm_eps)
  return x + nn.swiglu(h, w['gate'], w['up'], w['down']), kv


FAMILY = decoder.Family(
    'Qwen2ForCausalLM', _layer, _table,
    only={'hidden_act': ('silu',), 'use_sliding_window': (False,), 'use_mrope': (False,)},
    inert=('sliding_window', 'max_window_layers'),  # of what use_sliding_window turns off
    also_read=('layer_types',),
    read=lambda hf_config: config_json.with_head_dim(config_json.full_attention_only(hf_config)),
    written=lambda c: {'hidden_act': 'silu', 'use_sliding_window': False,
                       'layer_types': ['full_attention'] * c.num_hidden_layers})
