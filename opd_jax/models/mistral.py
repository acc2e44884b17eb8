"""Mistral (Jiang et al. 2023, arXiv 2310.06825): the Llama block, where every layer may look back
over a sliding window only. Refused by name when a config.json asks for it: dropout, and ways to
stretch RoPE that llama.py does not know.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from opd_jax import nn
from opd_jax.models import _config, _decoder, llama
from opd_jax.types import Model


@dataclasses.dataclass(frozen=True)
class Config(_config.Decoder):
  """What every family has, and the reach of attention (None: everything)."""

  rope_scaling: nn.RopeScaling | None
  sliding_window: int | None


def parse(hf_config: dict[str, Any]) -> Config:
  """Reads config.json strictly.

  Raises:
    ValueError: a missing size, or a value of a field that this family does not implement.
  """
  _config.check_fields('mistral', hf_config, _config.read_names(Config), {'hidden_act': ('silu',)})
  theta, scaling = _config.rope('mistral', hf_config, llama.ROPE_TYPES)
  return _config.make(Config, 'mistral',
                      {**_config.with_head_dim(hf_config), **theta, 'rope_scaling': scaling})


def to_hf(c: Config) -> dict[str, Any]:
  """The inverse of `parse`: the content of a config.json that transformers opens."""
  return _config.to_hf(c, 'mistral', 'MistralForCausalLM', {'hidden_act': 'silu'})


def build(hf_config: dict[str, Any], *, dtype: Any = jnp.float32, remat: bool = False,
          layer_unroll: int = 1) -> Model:
  """See `models.build`. `layer_unroll` layers share one iteration of the scan."""
  c = parse(hf_config)
  kind = _decoder.Kind(c.rope_theta, c.rope_scaling, c.sliding_window)
  decoder = _decoder.Decoder(c, functools.partial(llama.layer, c), (kind,), dtype=dtype,
                             remat=remat, layer_unroll=layer_unroll)
  return _decoder.build(decoder, 'mistral', llama.param_specs(c), to_hf(c))
