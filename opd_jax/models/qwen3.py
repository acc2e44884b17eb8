"""Qwen3 (Yang et al. 2025, arXiv 2505.09388), dense models.

Pre-norm decoder: RMSNorm, rotary positions, grouped-query attention with RMSNorm on every query
and key head, SwiGLU feed-forward, no biases, tied or untied head. Left out, and refused by name
when a config.json asks for it: attention bias, sliding windows, scaled RoPE, dropout.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opd_jax import nn
from opd_jax.params import ParamSpec
from opd_jax.types import Head, Model, Params


@dataclasses.dataclass(frozen=True)
class Config:
  """The fields of config.json that shape the network, under their Hugging Face names."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float
  rope_theta: float
  tie_word_embeddings: bool
  max_position_embeddings: int


_SUPPORTED = {  # field -> the only values this file implements
    'hidden_act': ('silu',), 'attention_bias': (False,), 'use_sliding_window': (False,),
    'attention_dropout': (0, 0.0), 'rope_scaling': (None,),
}


def parse(hf_config: dict[str, Any]) -> Config:
  """Reads config.json strictly.

  Raises:
    ValueError: a missing size, or a value of a field that this family does not implement.
  """
  for name, allowed in _SUPPORTED.items():
    if name in hf_config and hf_config[name] not in allowed:
      raise ValueError(f'qwen3 config.json: {name}={hf_config[name]!r} is not implemented; '
                       f'allowed: {list(allowed)}')
  kinds = set(hf_config.get('layer_types') or ['full_attention'])
  if kinds != {'full_attention'}:
    raise ValueError(f'qwen3 config.json: layer_types={sorted(kinds)} is not implemented; '
                     "allowed: ['full_attention']")
  rope = hf_config.get('rope_parameters') or {}
  for name, value in rope.items():
    if name != 'rope_theta' and not (name in ('rope_type', 'type') and value == 'default'):
      raise ValueError(f'qwen3 config.json: rope_parameters.{name}={value!r} is not implemented; '
                       "allowed: rope_theta, and rope_type='default'")
  if hf_config.get('rope_theta', rope.get('rope_theta')) != rope.get(
      'rope_theta', hf_config.get('rope_theta')):
    raise ValueError(f"qwen3 config.json: rope_theta={hf_config['rope_theta']} and rope_parameters."
                     f"rope_theta={rope['rope_theta']}; allowed: one value")
  # transformers 5 nests theta under rope_parameters; checkpoints written before keep it outside.
  values = {'rope_theta': rope['rope_theta']} if 'rope_theta' in rope else {}
  values = {**hf_config, **values}
  missing = [f.name for f in dataclasses.fields(Config) if f.name not in values]
  if missing:
    raise ValueError(f'qwen3 config.json lacks {missing}')
  config = Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)})
  if config.head_dim % 2:
    raise ValueError(f'qwen3 config.json: head_dim={config.head_dim}; allowed: an even number, '
                     'since RoPE turns pairs')
  if config.num_attention_heads % config.num_key_value_heads:
    raise ValueError(
        f'qwen3 config.json: num_attention_heads={config.num_attention_heads} is not a multiple '
        f'of num_key_value_heads={config.num_key_value_heads}')
  return config


def to_hf(c: Config) -> dict[str, Any]:
  """The inverse of `parse`: the content of a config.json that transformers opens."""
  values = dataclasses.asdict(c)
  theta = values.pop('rope_theta')
  return {
      'architectures': ['Qwen3ForCausalLM'], 'model_type': 'qwen3', **values,
      'rope_parameters': {'rope_theta': theta, 'rope_type': 'default'},
      'hidden_act': 'silu', 'attention_bias': False, 'attention_dropout': 0.0,
      'use_sliding_window': False, 'initializer_range': 0.02, 'use_cache': True,
      'layer_types': ['full_attention'] * c.num_hidden_layers, 'dtype': 'float32'}


def param_specs(c: Config) -> dict[str, Any]:
  """The table. Axis names: layer, vocab, embed, heads, kv_heads, mlp."""
  normal, ones = jax.nn.initializers.normal, jax.nn.initializers.ones
  layers, d, f, v = c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.vocab_size
  n, k, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim
  # Projections keep the scale of their input; those back into the residual stream are damped with
  # depth (GPT-2), so that fresh models of any depth start alike.
  residual = (2 * layers)**-0.5

  def matrix(name, shape, axes, std, hf_shape):
    return ParamSpec((layers, *shape), ('layer', *axes), normal(std),
                     f'model.layers.{{layer}}.{name}.weight', hf_shape, True, True)

  def gain(name, width):
    return ParamSpec((layers, width), ('layer', None), ones,
                     f'model.layers.{{layer}}.{name}.weight', (width,))

  specs = {
      'embed': ParamSpec((v, d), ('vocab', 'embed'), normal(d**-0.5), 'model.embed_tokens.weight',
                         (v, d), matmul=c.tie_word_embeddings),
      'layers': {
          'attention_norm': gain('input_layernorm', d),
          'q': matrix('self_attn.q_proj', (d, n, h), ('embed', 'heads', None), d**-0.5, (n * h, d)),
          'k': matrix('self_attn.k_proj', (d, k, h), ('embed', 'kv_heads', None), d**-0.5,
                      (k * h, d)),
          'v': matrix('self_attn.v_proj', (d, k, h), ('embed', 'kv_heads', None), d**-0.5,
                      (k * h, d)),
          'q_norm': gain('self_attn.q_norm', h),
          'k_norm': gain('self_attn.k_norm', h),
          'o': matrix('self_attn.o_proj', (n, h, d), ('heads', None, 'embed'),
                      residual * (n * h)**-0.5, (d, n * h)),
          'mlp_norm': gain('post_attention_layernorm', d),
          'gate': matrix('mlp.gate_proj', (d, f), ('embed', 'mlp'), d**-0.5, (f, d)),
          'up': matrix('mlp.up_proj', (d, f), ('embed', 'mlp'), d**-0.5, (f, d)),
          'down': matrix('mlp.down_proj', (f, d), ('mlp', 'embed'), residual * f**-0.5, (d, f)),
      },
      'final_norm': ParamSpec((d,), (None,), ones, 'model.norm.weight', (d,)),
  }
  if not c.tie_word_embeddings:
    specs['head'] = ParamSpec((d, v), ('embed', 'vocab'), normal(d**-0.5), 'lm_head.weight',
                              (v, d), True, True)
  return specs


def _layer(c: Config, x, w, rope, allowed, cache):
  """One block; `cache` is None or (k, v, index) with k, v [B, K, T, H]. Returns x and (k, v)."""
  h = nn.rms_norm(x, w['attention_norm'], c.rms_norm_eps)
  q = nn.rms_norm(nn.einsum('bsd,dnh->bsnh', h, w['q']), w['q_norm'], c.rms_norm_eps)
  k = nn.rms_norm(nn.einsum('bsd,dkh->bskh', h, w['k']), w['k_norm'], c.rms_norm_eps)
  v = nn.einsum('bsd,dkh->bskh', h, w['v'])
  q, k = nn.apply_rope(q, *rope), nn.apply_rope(k, *rope)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  if cache is not None:
    old_k, old_v, index = cache
    k = jax.lax.dynamic_update_slice_in_dim(old_k, k, index, axis=2)
    v = jax.lax.dynamic_update_slice_in_dim(old_v, v, index, axis=2)
  x = x + nn.einsum('bsnh,nhd->bsd', nn.attention(q, k, v, allowed), w['o'])
  h = nn.rms_norm(x, w['mlp_norm'], c.rms_norm_eps)
  return x + nn.swiglu(h, w['gate'], w['up'], w['down']), (k, v)


def forward(c: Config, dtype: jnp.dtype, remat: bool, layer_unroll: int, params: Params,
            tokens: Int[Array, 'B S'], positions: Int[Array, 'B S'], valid: Bool[Array, 'B S'],
            cache: dict[str, Any] | None = None) -> tuple[Float[Array, 'B S D'], Any]:
  """Final hidden states (after the last norm) and the updated cache.

  `params['layers']` stacked: one `lax.scan`. As a tuple (see `unstack`): a Python loop, whose
  cache is never copied through a scan, which is what decoding wants on CPU and GPU.
  """
  layer = functools.partial(_layer, c)
  if remat:
    layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)
  x = params['embed'][tokens].astype(dtype)  # in this order, or gradients add up in bf16
  rope = nn.rope_tables(positions, c.head_dim, c.rope_theta, dtype)
  length = tokens.shape[1]
  if cache is None:
    causal = jnp.arange(length)[None, :] <= jnp.arange(length)[:, None]
    allowed, index = causal[None] & valid[:, None, :], None
  else:
    index = cache['index']
    seen = jax.lax.dynamic_update_slice_in_dim(cache['valid'], valid, index, axis=1)
    slots = jnp.arange(seen.shape[1])[None, :]
    causal = slots <= index + jnp.arange(length)[:, None]
    allowed = causal[None] & seen[:, None, :]

  if isinstance(params['layers'], tuple):
    kv = []
    for i, w in enumerate(params['layers']):
      x, new = layer(x, w, rope, allowed, None if cache is None else (*cache['kv'][i], index))
      kv.append(new)
    kv = tuple(kv)
  else:
    stacked = None
    if cache is not None:
      stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cache['kv'])

    def body(x, xs):
      w, old = xs
      x, new = layer(x, w, rope, allowed, None if old is None else (*old, index))
      return x, None if old is None else new

    x, new = jax.lax.scan(body, x, (params['layers'], stacked), unroll=layer_unroll)
    kv = None
    if cache is not None:
      kv = tuple(jax.tree.map(lambda a, i=i: a[i], new) for i in range(c.num_hidden_layers))

  x = nn.rms_norm(x, params['final_norm'], c.rms_norm_eps)
  if cache is not None:
    cache = {'kv': kv, 'valid': seen, 'index': index + length}
  return x, cache


def build(hf_config: dict[str, Any], *, dtype: Any = jnp.float32, remat: bool = False,
          layer_unroll: int = 1) -> Model:
  """See `models.build`. `layer_unroll` layers share one iteration of the scan."""
  c, dtype = parse(hf_config), jnp.dtype(dtype)

  def head(params):
    matrix = params['embed'].T if c.tie_word_embeddings else params['head']
    return Head(matrix, c.vocab_size)

  def init_cache(batch, length):
    shape = (batch, c.num_key_value_heads, length, c.head_dim)
    kv = tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
               for _ in range(c.num_hidden_layers))
    return {'kv': kv, 'valid': jnp.zeros((batch, length), bool), 'index': jnp.int32(0)}

  def unstack(params):
    layers = tuple(jax.tree.map(lambda a, i=i: a[i], params['layers'])
                   for i in range(c.num_hidden_layers))
    return {**params, 'layers': layers}

  return Model(family='qwen3', config=c, vocab_in_use=c.vocab_size, specs=param_specs(c),
               forward=functools.partial(forward, c, dtype, remat, layer_unroll),
               head=head, init_cache=init_cache, unstack=unstack,
               to_hf=functools.partial(to_hf, c))
