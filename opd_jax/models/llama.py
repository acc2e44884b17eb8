"""Llama 2 and 3 (Touvron et al. 2023, 2307.09288; Grattafiori et al. 2024, 2407.21783).

Pre-norm decoder: RMSNorm, rotary positions (plain, or stretched in the 'linear' or the 'llama3'
way), grouped-query attention, SwiGLU feed-forward, no biases, tied or untied head. Left out, and
refused by name when a config.json asks for it: biases, other ways to stretch RoPE, dropout.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from opd_jax import nn
from opd_jax.models import _config, _decoder
from opd_jax.types import Model


@dataclasses.dataclass(frozen=True)
class Config(_config.Decoder):
  """What every family has, and how the rotary positions are stretched."""

  rope_scaling: nn.RopeScaling | None


ROPE_TYPES = ('default', 'linear', 'llama3')
_ONLY = {'hidden_act': ('silu',), 'attention_bias': (False,), 'mlp_bias': (False,),
         'rope_interleaved': (False,)}
# How a matrix product was cut up in pre-training, and a note that some checkpoints carry.
_INERT = ('pretraining_tp', 'is_llama_config')


def parse(hf_config: dict[str, Any]) -> Config:
  """Reads config.json strictly.

  Raises:
    ValueError: a missing size, or a value of a field that this family does not implement.
  """
  _config.check_fields('llama', hf_config, _config.read_names(Config), _ONLY, _INERT)
  theta, scaling = _config.rope('llama', hf_config, ROPE_TYPES)
  return _config.make(Config, 'llama',
                      {**_config.with_head_dim(hf_config), **theta, 'rope_scaling': scaling})


def to_hf(c: Config) -> dict[str, Any]:
  """The inverse of `parse`: the content of a config.json that transformers opens."""
  return _config.to_hf(c, 'llama', 'LlamaForCausalLM', {
      'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False})


def param_specs(c: Any) -> dict[str, Any]:
  """The table."""
  return _decoder.table(c, {
      'attention_norm': _decoder.gain(c, 'input_layernorm', c.hidden_size),
      **_decoder.attention_table(c),
      'mlp_norm': _decoder.gain(c, 'post_attention_layernorm', c.hidden_size),
      **_decoder.mlp_table(c)})


def layer(c: Any, x: Any, w: dict[str, Any], rope: Any, allowed: Any, cache: Any
          ) -> tuple[Any, Any]:
  """One block, see `_decoder`."""
  h = nn.rms_norm(x, w['attention_norm'], c.rms_norm_eps)
  mixed, kv = _decoder.attend(*_decoder.project(h, w), w['o'], rope, allowed, cache)
  x = x + mixed
  h = nn.rms_norm(x, w['mlp_norm'], c.rms_norm_eps)
  return x + nn.swiglu(h, w['gate'], w['up'], w['down']), kv


def build(hf_config: dict[str, Any], *, dtype: Any = jnp.float32, remat: bool = False,
          layer_unroll: int = 1) -> Model:
  """See `models.build`. `layer_unroll` layers share one iteration of the scan."""
  c = parse(hf_config)
  decoder = _decoder.Decoder(
      c, functools.partial(layer, c), (_decoder.Kind(c.rope_theta, c.rope_scaling),), dtype=dtype,
      remat=remat, layer_unroll=layer_unroll)
  return _decoder.build(decoder, 'llama', param_specs(c), to_hf(c))
