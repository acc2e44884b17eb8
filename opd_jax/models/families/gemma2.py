"""Gemma 2 (2024, arXiv 2408.00118).

Local and global layers in turns, RMSNorm with gain 1 + w before and after each half of a block,
GeGLU feed-forward, embeddings scaled by sqrt(D), scores and logits bounded by tanh, tied head.
Left out, and refused by name when a config.json asks for it: attention bias, scaled RoPE, attention
in both directions, an untied head, dropout.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from opd_jax.models import config_json, decoder, nn
from opd_jax.models.params import ParamSpec

LOCAL, GLOBAL = 'sliding_attention', 'full_attention'


@dataclasses.dataclass(frozen=True)
class Config(config_json.BaseConfig):
  """What every family has, and Gemma's own. A bound of None is none."""

  query_pre_attn_scalar: int | float
  sliding_window: int
  layer_types: tuple[str, ...]
  attn_logit_softcapping: float | None
  final_logit_softcapping: float | None


def with_layer_types(hf_config: dict[str, Any], pattern: int = 2) -> dict[str, Any]:
  """Adds `layer_types` to a config.json without it: each `pattern`-th layer is global.

  Raises:
    ValueError: unknown types, or not one for every layer.
  """
  layers = hf_config.get('num_hidden_layers')
  if layers is None:
    return {**hf_config, 'layer_types': ()}  # `make_config` says what is missing
  types = hf_config.get('layer_types') or [
      LOCAL if (i + 1) % pattern else GLOBAL for i in range(layers)]
  if set(types) - {LOCAL, GLOBAL} or len(types) != layers:
    raise ValueError(f'{hf_config["model_type"]} config.json: layer_types={types}; allowed: for '
                     f'each of the {layers} layers {LOCAL!r} or {GLOBAL!r}')
  # A gemma whose config.json says nothing of the head has a tied one.
  return {'tie_word_embeddings': True, **hf_config, 'layer_types': tuple(types)}


def table(c: Any, attention_norms: dict[str, ParamSpec] | None = None) -> dict[str, ParamSpec]:
  """Describes the parameters of the layers, with `attention_norms` beside q, k, v, o."""
  d, zeros = c.hidden_size, jax.nn.initializers.zeros
  return {
      'attention_norm': decoder.gain(c, 'input_layernorm', d, zeros),
      **decoder.attention_matrices(c),
      **(attention_norms or {}),
      'attention_out_norm': decoder.gain(c, 'post_attention_layernorm', d, zeros),
      'mlp_norm': decoder.gain(c, 'pre_feedforward_layernorm', d, zeros),
      **decoder.mlp_matrices(c),
      'mlp_out_norm': decoder.gain(c, 'post_feedforward_layernorm', d, zeros)}


def block(c: Any, softcap: float, x: Any, w: dict[str, Any], rope: Any, mask: Any, cache: Any
          ) -> tuple[Any, Any]:
  """Computes one block, its scores bounded by `softcap`; with norms of queries and keys where there
  are some."""
  def norm(x, name):
    return nn.offset_rms_norm(x, w[name], c.rms_norm_eps)

  q, k, v = decoder.project(norm(x, 'attention_norm'), w)
  if 'q_norm' in w:
    q, k = norm(q, 'q_norm'), norm(k, 'k_norm')
  mixed, kv = decoder.attend(q, k, v, w['o'], rope, mask, cache,
                              scale=c.query_pre_attn_scalar**-0.5, softcap=softcap)
  x = x + norm(mixed, 'attention_out_norm')
  h = nn.geglu(norm(x, 'mlp_norm'), w['gate'], w['up'], w['down'])
  return x + norm(h, 'mlp_out_norm'), kv


def _layer(c, *inputs):
  return block(c, c.attn_logit_softcapping or 0.0, *inputs)


def _kind(c, i):
  return decoder.Kind(c.rope_theta, window=c.sliding_window if c.layer_types[i] == LOCAL else None)


FAMILY = decoder.Family(
    'Gemma2ForCausalLM', _layer, table, Config,
    only={'hidden_activation': ('gelu_pytorch_tanh',), 'hidden_act': ('gelu_pytorch_tanh',),
          'attention_bias': (False,), 'use_bidirectional_attention': (None, False),
          'tie_word_embeddings': (True,)},
    read=with_layer_types,
    written=lambda c: {'hidden_activation': 'gelu_pytorch_tanh', 'attention_bias': False},
    kind=_kind, norm=nn.offset_rms_norm, gain_init=jax.nn.initializers.zeros,
    embed_scale=lambda c: c.hidden_size**0.5,
    softcap=lambda c: c.final_logit_softcapping or 0.0)
