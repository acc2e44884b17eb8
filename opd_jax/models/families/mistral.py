"""Mistral (Jiang et al. 2023, arXiv 2310.06825): the Llama block, where every layer may look back
over a sliding window only. Refused by name when a config.json asks for it: dropout, and ways to
stretch RoPE that llama.py does not know.
"""

from __future__ import annotations

import dataclasses

from opd_jax.models import config_json, decoder, nn
from opd_jax.models.families import llama


@dataclasses.dataclass(frozen=True)
class Config(config_json.BaseConfig):
  """What every family has, and the reach of attention (None: everything)."""

  rope_scaling: nn.RopeScaling | None
  sliding_window: int | None


FAMILY = decoder.Family(
    'MistralForCausalLM', llama.layer, llama.table, Config,
    only={'hidden_act': ('silu',)},
    read=config_json.with_head_dim, read_rope=llama.read_rope,
    written=lambda c: {'hidden_act': 'silu'},
    kind=lambda c, i: decoder.Kind(c.rope_theta, c.rope_scaling, c.sliding_window))
