"""Qwen3, mixtures of experts (Yang et al. 2025, arXiv 2505.09388).

Qwen3's attention; in place of the feed-forward layer, a router picks k of E small ones for every
token, and their outputs are added with the router's probabilities as weights. No token is dropped.
Left out, and refused by name when a config.json asks for it: what qwen3.py refuses, blocks without
experts, and the loss that balances the router.

On a mesh, every device sorts and computes the tokens of its own rows for the experts that it holds
(layout.py); rows are not split over the axes of experts, so that one sum is all that is exchanged.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from opd_jax.models import config_json, decoder, layout, nn
from opd_jax.models.families import qwen3
from opd_jax.models.params import ParamSpec


@dataclasses.dataclass(frozen=True)
class Config(config_json.BaseConfig):
  """What every family has, and the experts; `intermediate_size` is read and not used."""

  moe_intermediate_size: int
  num_experts: int
  num_experts_per_tok: int
  norm_topk_prob: bool

  def __post_init__(self):
    if not 1 <= self.num_experts_per_tok <= self.num_experts:
      raise ValueError(
          f'qwen3_moe config.json: num_experts_per_tok={self.num_experts_per_tok}; allowed: 1 to '
          f'num_experts={self.num_experts}')


def _read(hf_config):
  values = config_json.full_attention_only(hf_config)
  if 'num_local_experts' in values:  # transformers 5 has another name for it
    values = {'num_experts': values['num_local_experts'], **values}
  return values


def _table(c):
  layers, number = c.num_hidden_layers, c.num_experts
  d, f, normal = c.hidden_size, c.moe_intermediate_size, jax.nn.initializers.normal
  share = c.num_experts_per_tok / number

  def expert(name, shape, axes, std, hf_shape):
    return ParamSpec((layers, number, *shape), ('layer', 'experts', *axes), normal(std),
                     f'model.layers.{{layer}}.mlp.experts.{{expert}}.{name}.weight', hf_shape, True,
                     share)

  return {
      **qwen3.attention_table(c),
      'router': decoder.matrix(c, 'mlp.gate', (d, number), ('embed', None), (number, d)),
      'gate': expert('gate_proj', (d, f), ('embed', 'mlp'), d**-0.5, (f, d)),
      'up': expert('up_proj', (d, f), ('embed', 'mlp'), d**-0.5, (f, d)),
      'down': expert('down_proj', (f, d), ('mlp', 'embed'), (2 * layers * f)**-0.5, (d, f))}


def route(c: Config, x: Float[Array, 'B S D'], router: Array
          ) -> tuple[Float[Array, 'B S k'], Int[Array, 'B S k']]:
  """Picks each token's experts, and their weights from a softmax in float32 at least."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  logits = jnp.einsum('bsd,de->bse', x, router.astype(x.dtype), preferred_element_type=wide)
  weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), c.num_experts_per_tok)
  if c.norm_topk_prob:
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  return weights.astype(x.dtype), chosen


def _permute(rows, order):
  # A permutation, which XLA does not see: told so, its transpose writes every row once and needs no
  # atomic additions, so that gradients are the same bits in every run.
  return rows.at[order].get(unique_indices=True, mode='promise_in_bounds')


def experts(x: Float[Array, 'B S D'], weights: Float[Array, 'B S k'], chosen: Int[Array, 'B S k'],
            gate: Float[Array, 'E D F'], up: Float[Array, 'E D F'], down: Float[Array, 'E F D'],
            first: Int[Array, ''] | int) -> Float[Array, 'B S D']:
  """Adds weight_k expert_k(x) of those chosen experts k that are `first` ... first + E - 1.

  Each (token, expert) pair is a row; sorted by expert, they are multiplied by one `ragged_dot`. The
  rows of experts held elsewhere are sorted to the end and contribute zero.
  """
  (batch, length, width), k, held = x.shape, chosen.shape[-1], gate.shape[0]
  which = chosen.reshape(-1) - first
  mine = (which >= 0) & (which < held)
  which = jnp.where(mine, which, held)
  order = jnp.argsort(which)
  sizes = jnp.sum(which[None, :] == jnp.arange(held)[:, None], axis=-1, dtype=jnp.int32)
  # Rows beyond the last group are undefined in a ragged product, and so are their gradients.
  inside = _permute(mine, order)[:, None]
  rows = _permute(jnp.repeat(x.reshape(-1, width), k, axis=0), order)
  rows = jnp.where(inside, rows, 0)
  gate, up, down = (w.astype(x.dtype) for w in (gate, up, down))
  hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
  rows = jnp.where(inside, jax.lax.ragged_dot(jnp.where(inside, hidden, 0), down, sizes), 0)
  rows = _permute(rows, jnp.argsort(order)).reshape(batch, length, k, width)
  return jnp.einsum('bskd,bsk->bsd', rows, weights)


def mixture(c: Config, x: Float[Array, 'B S D'], w: dict[str, Any], rules: layout.Rules
            ) -> Float[Array, 'B S D']:
  """Computes the experts' layer, spread by the rules over the mesh in context if there is one."""
  weights, chosen = route(c, x, w['router'])
  mesh = jax.sharding.get_abstract_mesh()
  # Sorting would gather what is split by rows.
  by_row, by_expert = (tuple(n for n in rules[axis] if mesh.shape.get(n, 1) > 1)
                       for axis in ('batch', 'experts'))
  if not by_row + by_expert:
    return experts(x, weights, chosen, w['gate'], w['up'], w['down'], 0)

  def local(x, weights, chosen, gate, up, down):
    if not by_expert:
      return experts(x, weights, chosen, gate, up, down, 0)
    first = jax.lax.axis_index(by_expert) * gate.shape[0]
    # Said here that these will differ by device: jax 0.10 takes the result of a sort to be the same
    # everywhere, and would add up the gradient of x before it is put back in order.
    x, weights, chosen = jax.lax.pcast((x, weights, chosen), by_expert, to='varying')
    return jax.lax.psum(experts(x, weights, chosen, gate, up, down, first), by_expert)

  rows, held = P(by_row or None), P(by_expert or None)
  return jax.shard_map(local, in_specs=(rows,) * 3 + (held,) * 3, out_specs=rows,
                       axis_names={*by_row, *by_expert})(
                           x, weights, chosen, w['gate'], w['up'], w['down'])


def _layer(c, x, w, rope, mask, cache):
  x, kv = qwen3.attention(c, x, w, rope, mask, cache)
  rules = layout.DECODE if mask.decoding else layout.TRAIN
  return x + mixture(c, nn.rms_norm(x, w['mlp_norm'], c.rms_norm_eps), w, rules), kv


FAMILY = decoder.Family(
    'Qwen3MoeForCausalLM', _layer, _table, Config,
    only={**qwen3.FAMILY.only, 'decoder_sparse_step': (1,), 'mlp_only_layers': ([], None)},
    # The last two are of a loss that is not computed here.
    inert=(*qwen3.FAMILY.inert, 'router_aux_loss_coef', 'output_router_logits'),
    also_read=('layer_types', 'num_local_experts'), read=_read,
    written=lambda c: {'hidden_act': 'silu', 'attention_bias': False, 'use_sliding_window': False,
                       'decoder_sparse_step': 1, 'mlp_only_layers': []})
