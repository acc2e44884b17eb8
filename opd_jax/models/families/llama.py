"""Llama 2 and 3 (Touvron et al. 2023, 2307.09288; Grattafiori et al. 2024, 2407.21783).

Pre-norm decoder: RMSNorm, rotary positions (plain, or stretched in the 'linear' or the 'llama3'
way), grouped-query attention, SwiGLU feed-forward, no biases, tied or untied head. Left out, and
refused by name when a config.json asks for it: biases, other ways to stretch RoPE, dropout.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from opd_jax.models import config_json, decoder, nn
from opd_jax.models.params import ParamSpec


@dataclasses.dataclass(frozen=True)
class Config(config_json.BaseConfig):
  """What every family has, and how the rotary positions are stretched."""

  rope_scaling: nn.RopeScaling | None


def read_rope(hf_config: dict[str, Any]) -> dict[str, Any]:
  """Reads the rotary positions, which may be stretched."""
  return config_json.read_rope(hf_config, ('default', 'linear', 'llama3'))


def table(c: Any) -> dict[str, ParamSpec]:
  """Describes the parameters of the layers."""
  return {
      'attention_norm': decoder.gain(c, 'input_layernorm', c.hidden_size),
      **decoder.attention_matrices(c),
      'mlp_norm': decoder.gain(c, 'post_attention_layernorm', c.hidden_size),
      **decoder.mlp_matrices(c)}


def layer(c: Any, x: Any, w: dict[str, Any], rope: Any, mask: Any, cache: Any
          ) -> tuple[Any, Any]:
  """Computes one block, see `Family.layer`."""
  h = nn.rms_norm(x, w['attention_norm'], c.rms_norm_eps)
  mixed, kv = decoder.attend(*decoder.project(h, w), w['o'], rope, mask, cache)
  x = x + mixed
  h = nn.rms_norm(x, w['mlp_norm'], c.rms_norm_eps)
  return x + nn.swiglu(h, w['gate'], w['up'], w['down']), kv


FAMILY = decoder.Family(
    'LlamaForCausalLM', layer, table, Config,
    only={'hidden_act': ('silu',), 'attention_bias': (False,), 'mlp_bias': (False,),
          'rope_interleaved': (False,)},
    # How a matrix product was cut up in pre-training, and a note that some checkpoints carry.
    inert=('pretraining_tp', 'is_llama_config'),
    read=config_json.with_head_dim, read_rope=read_rope,
    written=lambda c: {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False},
    kind=lambda c, i: decoder.Kind(c.rope_theta, c.rope_scaling))
