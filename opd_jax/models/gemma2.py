"""Gemma 2 (2024, arXiv 2408.00118).

Local and global layers in turns, RMSNorm with gain 1 + w before and after each half of a block,
GeGLU feed-forward, embeddings scaled by sqrt(D), scores and logits bounded by tanh, tied head.
Left out, and refused by name when a config.json asks for it: attention bias, scaled RoPE, attention
in both directions, an untied head, dropout.
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

LOCAL, GLOBAL = 'sliding_attention', 'full_attention'


@dataclasses.dataclass(frozen=True)
class Config(_config.Decoder):
  """What every family has, and Gemma's own. A bound of None is none."""

  query_pre_attn_scalar: int | float
  sliding_window: int
  layer_types: tuple[str, ...]
  attn_logit_softcapping: float | None
  final_logit_softcapping: float | None


ONLY = {'hidden_activation': ('gelu_pytorch_tanh',), 'hidden_act': ('gelu_pytorch_tanh',),
        'attention_bias': (False,), 'use_bidirectional_attention': (None, False),
        'tie_word_embeddings': (True,)}


def with_layer_types(family: str, hf_config: dict[str, Any], pattern: int) -> dict[str, Any]:
  """The same with `layer_types`; without it, each `pattern`-th layer is global.

  Raises:
    ValueError: unknown types, or not one for every layer.
  """
  layers = hf_config.get('num_hidden_layers')
  if type(layers) is not int or layers < 1:
    return {**hf_config, 'layer_types': ()}  # `make` says what is wrong
  types = hf_config.get('layer_types') or [
      LOCAL if (i + 1) % pattern else GLOBAL for i in range(layers)]
  if set(types) - {LOCAL, GLOBAL} or len(types) != layers:
    raise ValueError(f'{family} config.json: layer_types={types}; allowed: for each of the '
                     f'{layers} layers {LOCAL!r} or {GLOBAL!r}')
  # A gemma whose config.json says nothing of the head has a tied one.
  return {'tie_word_embeddings': True, **hf_config, 'layer_types': tuple(types)}


def parse(hf_config: dict[str, Any]) -> Config:
  """Reads config.json strictly.

  Raises:
    ValueError: a missing size, or a value of a field that this family does not implement.
  """
  _config.check_fields('gemma2', hf_config, _config.read_names(Config), ONLY)
  theta, _ = _config.rope('gemma2', hf_config)
  return _config.make(Config, 'gemma2', {**with_layer_types('gemma2', hf_config, 2), **theta})


def to_hf(c: Config) -> dict[str, Any]:
  """The inverse of `parse`: the content of a config.json that transformers opens."""
  return _config.to_hf(c, 'gemma2', 'Gemma2ForCausalLM', {
      'hidden_activation': 'gelu_pytorch_tanh', 'attention_bias': False,
      'layer_types': list(c.layer_types)})


def param_specs(c: Any, attention_norms: dict[str, ParamSpec] | None = None) -> dict[str, Any]:
  """The table, with `attention_norms` beside q, k, v, o."""
  d, zeros = c.hidden_size, jax.nn.initializers.zeros
  return _decoder.table(c, {
      'attention_norm': _decoder.gain(c, 'input_layernorm', d, zeros),
      **_decoder.attention_table(c),
      **(attention_norms or {}),
      'attention_out_norm': _decoder.gain(c, 'post_attention_layernorm', d, zeros),
      'mlp_norm': _decoder.gain(c, 'pre_feedforward_layernorm', d, zeros),
      **_decoder.mlp_table(c),
      'mlp_out_norm': _decoder.gain(c, 'post_feedforward_layernorm', d, zeros)}, zeros)


def layer(c: Any, softcap: float, x: Any, w: dict[str, Any], rope: Any, allowed: Any, cache: Any
          ) -> tuple[Any, Any]:
  """One block, see `_decoder`; with norms of queries and keys where there are some."""
  def norm(x, name):
    return nn.offset_rms_norm(x, w[name], c.rms_norm_eps)

  q, k, v = _decoder.project(norm(x, 'attention_norm'), w)
  if 'q_norm' in w:
    q, k = norm(q, 'q_norm'), norm(k, 'k_norm')
  mixed, kv = _decoder.attend(q, k, v, w['o'], rope, allowed, cache,
                              scale=c.query_pre_attn_scalar**-0.5, softcap=softcap)
  x = x + norm(mixed, 'attention_out_norm')
  h = nn.geglu(norm(x, 'mlp_norm'), w['gate'], w['up'], w['down'])
  return x + norm(h, 'mlp_out_norm'), kv


def decoder(c: Any, softcap: float, local: _decoder.Kind, other: _decoder.Kind,
            dtype: Any, remat: bool, layer_unroll: int) -> _decoder.Decoder:
  """The model of a gemma: its layers are of the kinds `local` and `other` (the global one)."""
  return _decoder.Decoder(
      c, functools.partial(layer, c, softcap), (local, other),
      tuple(int(t == GLOBAL) for t in c.layer_types), norm=nn.offset_rms_norm,
      embed_scale=c.hidden_size**0.5, softcap=c.final_logit_softcapping or 0.0, dtype=dtype,
      remat=remat, layer_unroll=layer_unroll)


def build(hf_config: dict[str, Any], *, dtype: Any = jnp.float32, remat: bool = False,
          layer_unroll: int = 1) -> Model:
  """See `models.build`. `layer_unroll` layers share one iteration of the scan."""
  c = parse(hf_config)
  local = _decoder.Kind(c.rope_theta, window=c.sliding_window)
  model = decoder(c, c.attn_logit_softcapping or 0.0, local, _decoder.Kind(c.rope_theta),
                  dtype, remat, layer_unroll)
  return _decoder.build(model, 'gemma2', param_specs(c), to_hf(c))
