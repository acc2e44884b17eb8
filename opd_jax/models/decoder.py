"""What the families share. A `Family` value says what is special about one, and `make_model` makes
its models of it, with all that is the same for all: the reading of config.json, the parameter
table, embedding, masks, rotary tables, the run over the layers, the key/value cache and the head.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opd_jax.models import attention, config_json, layout, nn, placement
from opd_jax.models.attention import Mask
from opd_jax.models.lora import LoRA
from opd_jax.models.params import ParamSpec
from opd_jax.types import Head, Model, Params


@dataclasses.dataclass(frozen=True)
class Kind:
  """What the layers of one kind share.

  Attributes:
    theta, scaling: of the rotary positions.
    window: how many keys a query sees, itself and those before it; None for all of them.
  """

  theta: float
  scaling: nn.RopeScaling | None = None
  window: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """What is special about the models of one `model_type`; `c` is their `config`.

  Attributes:
    architecture: the name of transformers' class, for config.json.
    layer: (c, x [B,S,D], weights of one layer, (cos, sin), `attention.Mask`, cache) -> x and the
      layer's (keys, values) [B,K,T,H]. The cache is None, or (keys, values, index) with the new
      positions to be written at `index`.
    table: (c) -> the layers' entries of the parameter table, in the order in which fresh ones are
      drawn.
    config: the frozen dataclass of the fields of config.json that matter.
    only: field of config.json -> the only values that are implemented; the field may be absent.
    inert: fields of config.json without an effect on the forward pass, beyond those of `_config`.
    also_read: fields of config.json that `read` looks at, beyond those of `config`.
    read: (config.json) -> config.json with what it leaves to the family. Raises ValueError.
    read_rope: (config.json) -> the fields of `config` that are about rotary positions. Raises
      ValueError for a way to stretch them that is not implemented.
    written: (c) -> what transformers needs in config.json beside the fields of `config`.
    kind: (c, number of a layer) -> its kind. Layers of equal kinds share tables and masks.
    norm: (x, gain, eps) -> x, of the final hidden states.
    gain_init: initializer of that gain.
    embed_scale: (c) -> what embeddings are multiplied with, rounded to the activations' dtype.
    softcap: (c) -> the bound of the final logits; 0 for none.
  """

  architecture: str
  layer: Callable[..., tuple[Any, Any]]
  table: Callable[[Any], dict[str, ParamSpec]]
  config: type = config_json.BaseConfig
  only: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
  inert: tuple[str, ...] = ()
  also_read: tuple[str, ...] = ()
  read: Callable[[dict[str, Any]], dict[str, Any]] = lambda hf_config: hf_config
  read_rope: Callable[[dict[str, Any]], dict[str, Any]] = config_json.read_rope
  written: Callable[[Any], dict[str, Any]] = lambda c: {}
  kind: Callable[[Any, int], Kind] = lambda c, i: Kind(c.rope_theta)
  norm: Callable[..., Any] = nn.rms_norm
  gain_init: Callable[..., Array] = jax.nn.initializers.ones
  embed_scale: Callable[[Any], float] = lambda c: 1.0
  softcap: Callable[[Any], float] = lambda c: 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
  """One model of a family, as `forward` runs it.

  Attributes:
    family, config: what it computes.
    kinds: the kinds of layers there are.
    kind_of_layer: for each layer, which of `kinds` it is.
    table: of the parameters of the layers.
    dtype, attention, remat, layer_unroll: how; see `models.build`.
  """

  family: Family
  config: Any
  kinds: tuple[Kind, ...]
  kind_of_layer: tuple[int, ...]
  table: dict[str, ParamSpec]
  dtype: Any
  attention: str
  remat: str
  layer_unroll: int


# --- inside a layer ---


def project(h: Float[Array, 'B S D'], w: dict[str, Any]
            ) -> tuple[Float[Array, 'B S N H'], Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
  """Computes queries, keys and values, without biases."""
  return (nn.einsum('bsd,dnh->bsnh', h, w['q']), nn.einsum('bsd,dkh->bskh', h, w['k']),
          nn.einsum('bsd,dkh->bskh', h, w['v']))


def attend(q: Float[Array, 'B S N H'], k: Float[Array, 'B S K H'], v: Float[Array, 'B S K H'],
           o: Array | LoRA, rope: tuple[Array, Array], mask: Mask, cache: Any, *,
           scale: float | None = None, softcap: float = 0.0
           ) -> tuple[Float[Array, 'B S D'], tuple[Array, Array]]:
  """Rotates, caches, attends and projects back; also returns the layer's (keys, values)."""
  q, k = nn.apply_rope(q, *rope), nn.apply_rope(k, *rope)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  if cache is not None:
    old_k, old_v, index = cache
    k = jax.lax.dynamic_update_slice_in_dim(old_k, k, index, axis=2)
    v = jax.lax.dynamic_update_slice_in_dim(old_v, v, index, axis=2)
  mixed = attention.attention(q, k, v, mask, scale, softcap)
  return nn.einsum('bsnh,nhd->bsd', mixed, o), (k, v)


# --- the table ---


def matrix(c: Any, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...],
           hf_shape: tuple[int, int], *, residual: bool = False) -> ParamSpec:
  """Describes a linear layer of every block, [in..., out...] here and [out, in] in the checkpoint.

  A projection keeps the scale of its input; one back into the `residual` stream is damped with
  depth (GPT-2), so that fresh models of any depth start alike.
  """
  std = hf_shape[1]**-0.5 * ((2 * c.num_hidden_layers)**-0.5 if residual else 1.0)
  return ParamSpec((c.num_hidden_layers, *shape), ('layer', *axes),
                   jax.nn.initializers.normal(std), f'model.layers.{{layer}}.{name}.weight',
                   hf_shape, True, 1.0)


def gain(c: Any, name: str, width: int, init: Callable[..., Array] = jax.nn.initializers.ones
         ) -> ParamSpec:
  """Describes the gain of a norm of every block."""
  return ParamSpec((c.num_hidden_layers, width), ('layer', None), init,
                   f'model.layers.{{layer}}.{name}.weight', (width,))


def attention_matrices(c: Any) -> dict[str, ParamSpec]:
  """Describes the linear layers of attention: q, k, v, o."""
  d, n, k, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
  return {
      'q': matrix(c, 'self_attn.q_proj', (d, n, h), ('embed', 'heads', None), (n * h, d)),
      'k': matrix(c, 'self_attn.k_proj', (d, k, h), ('embed', 'kv_heads', None), (k * h, d)),
      'v': matrix(c, 'self_attn.v_proj', (d, k, h), ('embed', 'kv_heads', None), (k * h, d)),
      'o': matrix(c, 'self_attn.o_proj', (n, h, d), ('heads', None, 'embed'), (d, n * h),
                  residual=True)}


def mlp_matrices(c: Any) -> dict[str, ParamSpec]:
  """Describes the linear layers of a gated feed-forward block: gate, up, down."""
  d, f = c.hidden_size, c.intermediate_size
  return {
      'gate': matrix(c, 'mlp.gate_proj', (d, f), ('embed', 'mlp'), (f, d)),
      'up': matrix(c, 'mlp.up_proj', (d, f), ('embed', 'mlp'), (f, d)),
      'down': matrix(c, 'mlp.down_proj', (f, d), ('mlp', 'embed'), (d, f), residual=True)}


def param_specs(family: Family, c: Any) -> dict[str, Any]:
  """Describes all parameters: embedding, layers, the last norm, and the head unless it is tied.

  Axis names: layer, vocab, embed, heads, kv_heads, mlp, experts.
  """
  d, v, normal = c.hidden_size, c.vocab_size, jax.nn.initializers.normal
  specs = {
      'embed': ParamSpec((v, d), ('vocab', 'embed'), normal(d**-0.5), 'model.embed_tokens.weight',
                         (v, d), matmul=float(c.tie_word_embeddings)),
      'layers': family.table(c),
      'final_norm': ParamSpec((d,), (None,), family.gain_init, 'model.norm.weight', (d,)),
  }
  if not c.tie_word_embeddings:
    specs['head'] = ParamSpec((d, v), ('embed', 'vocab'), normal(d**-0.5), 'lm_head.weight',
                              (v, d), True, 1.0)
  return specs


# --- around the layers ---


def _of_kind(kind: Any, options: list[Any]) -> Any:
  """options[kind], of a kind known now or only when the program runs."""
  if isinstance(kind, int):
    return options[kind]
  return jax.tree.map(lambda *leaves: jax.lax.select_n(kind, *leaves), *options)


def _embed(d: Decoder, table: Array, tokens: Array, decoding: bool) -> Array:
  """Looks tokens up. In training the table stays split along the width: every device looks its
  columns up for the rows of its group, and columns are exchanged for rows."""
  if not decoding:
    tokens = layout.constrain(tokens, ('group', None))
  x = table[tokens]
  if not decoding:
    x = layout.constrain(x, ('group', None, 'embed'))
  return x.astype(d.dtype)  # in this order, or gradients add up in bf16


# What the backward pass computes again: nothing; the scores of all keys, where attention makes them
# at once (its other forms always do); layers, of which only what goes in is kept, on the device or
# in the memory of its host.
REMATS = ('none', 'attention', 'layer', 'offload')
_INPUT = 'layer_input'


def _remat(d: Decoder, block: Callable[..., Any], static: tuple[int, ...]) -> Callable[..., Any]:
  """Wraps a layer, so that the backward pass has what `remat` says. The scores are attention's."""
  policy = {
      'layer': jax.checkpoint_policies.nothing_saveable,
      'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
          names_which_can_be_saved=[], names_which_can_be_offloaded=[_INPUT], offload_src='device',
          offload_dst='pinned_host'),
  }.get(d.remat, None if layout.mesh_of_several() is None else _all_but_gathered)
  return block if policy is None else jax.checkpoint(block, policy=policy, static_argnums=static)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
  """Without `remat` everything is kept for the backward pass but the weights that were gathered,
  which would be the whole model on every device."""
  # Within shard_map a weight becomes what may differ by device, which would be kept as well.
  return primitive.name not in ('sharding_constraint', 'pvary', 'pcast')


def _layers(d: Decoder, weights: Any, block: Callable[..., Any], x: Array, old: Any, keep: bool
            ) -> tuple[Array, Any]:
  """Runs block(x, weights, kind, keys and values that there are) over the layers; also returns the
  keys and values of each, if they are to `keep`."""
  alike = len(d.kinds) == 1
  block = _remat(d, block, (2,) if alike else ())
  if isinstance(weights, tuple):
    kv = []
    for i, w in enumerate(weights):
      x, new = block(x, w, d.kind_of_layer[i], None if old is None else old[i])
      kv.append(new)
    return x, tuple(kv) if keep else None
  stacked = None if old is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *old)

  def body(x, xs):
    w, old, kind = xs
    x, new = block(x, w, 0 if kind is None else kind, old)
    return x, new if keep else None

  scanned = None if alike else jnp.array(d.kind_of_layer, jnp.int32)
  x, new = jax.lax.scan(body, x, (weights, stacked, scanned), unroll=d.layer_unroll)
  return x, tuple(jax.tree.map(lambda a, i=i: a[i], new)
                  for i in range(len(d.kind_of_layer))) if keep else None


def forward(d: Decoder, params: Params, tokens: Int[Array, 'B S'], positions: Int[Array, 'B S'],
            valid: Bool[Array, 'B S'], cache: dict[str, Any] | None = None
            ) -> tuple[Float[Array, 'B S D'], Any]:
  """Computes the final hidden states (after the last norm) and the updated cache.

  `params['layers']` stacked: one `lax.scan`. As a tuple (see `unstack`): a Python loop, whose
  cache is never copied through a scan, which is what decoding wants on CPU and GPU. With a cache
  the parameters are those that `for_decoding` laid out. Into a fresh one, of `init_cache` and still
  with the plain 0 in it, goes a prompt: its tokens read each other and no slot, and the scan has
  their keys and values alone.
  """
  family, c, length = d.family, d.config, tokens.shape[1]
  rules = layout.TRAIN if cache is None else layout.DECODE
  x = layout.rows(_embed(d, params['embed'], tokens, cache is not None), rules)
  if family.embed_scale(c) != 1.0:
    x = x * jnp.asarray(family.embed_scale(c), d.dtype)
  ropes = [nn.rope_tables(positions, c.head_dim, k.theta, d.dtype, k.scaling) for k in d.kinds]
  index, seen = 0, valid
  fresh = cache is not None and isinstance(cache['index'], int)
  if cache is not None:  # a ring: rows in slots go round (algorithm/slots.py)
    index = cache['index'] % cache['valid'].shape[1]
    seen = jax.lax.dynamic_update_slice_in_dim(cache['valid'], valid, index, axis=1)
    seen = layout.rows(seen, rules)
  mask = Mask(valid if fresh else seen, tuple(kind.window for kind in d.kinds), 0, index,
              d.attention, cache is not None, d.remat == 'attention')
  old = None if cache is None or fresh else cache['kv']

  def block(x, w, kind, old):  # picks by kind in here, so that remat does not keep what is picked
    x = checkpoint_name(x, _INPUT)
    if cache is None:
      w = placement.used(w, d.table, d.dtype)
    x, new = family.layer(c, x, w, _of_kind(kind, ropes), dataclasses.replace(mask, kind=kind),
                          None if old is None else (*old, index))
    return layout.rows(x, rules), new

  x, kv = _layers(d, params['layers'], block, x, old, cache is not None)
  if fresh:
    kv = jax.tree.map(lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, 0, axis=2),
                      cache['kv'], kv)
  x = family.norm(x, params['final_norm'], c.rms_norm_eps)
  if cache is not None:
    cache = {'kv': kv, 'valid': seen, 'index': jnp.asarray(cache['index'] + length, jnp.int32)}
  return x, cache


def refill(cache: dict[str, Any], new: dict[str, Any], source: Int[Array, 'B']) -> dict[str, Any]:
  """Puts fresh prompts into the places of some rows of a cache: row i has that at source[i] of the
  `new` cache, so that it ends before the place that is written next; what it has, where that is -1.
  """
  places, length = cache['valid'].shape[1], new['valid'].shape[1]

  def lay(old, x):
    axis = x.ndim - 2 if x.ndim == 4 else 1
    wide = jnp.pad(x, [(0, places - length if i == axis else 0) for i in range(x.ndim)])
    wide = jnp.roll(wide, cache['index'] - length, axis)

    def own(old, wide, source):
      chosen = (source >= 0).reshape(-1, *(1,) * (old.ndim - 1))
      return jnp.where(chosen, wide[jnp.maximum(source, 0)], old)

    return layout.on_own_rows(own, old, wide, source, rules=layout.DECODE)

  return {'kv': jax.tree.map(lay, cache['kv'], new['kv']),
          'valid': lay(cache['valid'], new['valid']), 'index': cache['index']}


def grow(cache: dict[str, Any], places: int) -> dict[str, Any]:
  """Gives a cache more places: what was written last stays just before the place that is next."""
  old = cache['valid'].shape[1]

  def wider(x):
    axis = x.ndim - 2 if x.ndim == 4 else 1
    oldest_first = jnp.roll(x, -cache['index'], axis)
    wide = jnp.pad(oldest_first, [(0, places - old if i == axis else 0) for i in range(x.ndim)])
    return jnp.roll(wide, cache['index'] - old, axis)

  return {'kv': jax.tree.map(wider, cache['kv']), 'valid': wider(cache['valid']),
          'index': cache['index']}


def parse(family: Family, hf_config: dict[str, Any]) -> Any:
  """Reads config.json strictly.

  Raises:
    ValueError: a missing size, or a value of a field that this family does not implement.
  """
  config_json.check_fields(hf_config, [*config_json.field_names(family.config), *family.also_read],
                       family.only, family.inert)
  values = family.read(config_json.check_types(hf_config, family.config))
  return config_json.make_config(family.config, {**values, **family.read_rope(values)})


def make_model(family: Family, hf_config: dict[str, Any], dtype: Any, attention: str, remat: str,
               layer_unroll: int) -> Model:
  """Makes the contract of `types.Model` of what config.json describes.

  Raises:
    ValueError: see `parse`.
  """
  c, dtype = parse(family, hf_config), jnp.dtype(dtype)
  layers = range(c.num_hidden_layers)
  each = [family.kind(c, i) for i in layers]
  kinds = tuple(dict.fromkeys(each))
  specs = param_specs(family, c)
  decoder = Decoder(family, c, kinds, tuple(map(kinds.index, each)), specs['layers'], dtype,
                    attention, remat, layer_unroll)
  name = hf_config['model_type']
  written = config_json.to_hf(c, name, family.architecture, family.written(c))

  def head(params):
    tied = c.tie_word_embeddings
    return Head(params['embed' if tied else 'head'], c.vocab_size, family.softcap(c), tied)

  def init_cache(batch, length):
    shape = (batch, c.num_key_value_heads, length, c.head_dim)
    def empty():
      return layout.constrain(jnp.zeros(shape, dtype), ('batch', 'kv_heads', None, None),
                              layout.DECODE)

    kv = tuple((empty(), empty()) for _ in layers)
    valid = layout.rows(jnp.zeros((batch, length), bool), layout.DECODE)
    return {'kv': kv, 'valid': valid, 'index': 0}

  def unstack(params):
    pick = tuple(jax.tree.map(lambda a, i=i: a[i], params['layers']) for i in layers)
    return {**params, 'layers': pick}

  return Model(family=name, config=c, vocab_in_use=c.vocab_size, specs=specs,
               forward=functools.partial(forward, decoder), head=head, init_cache=init_cache,
               for_decoding=lambda params: placement.decoding(params, specs, dtype),
               unstack=unstack, refill=refill, grow=grow, to_hf=lambda: dict(written),
               attention_windows=tuple(kind.window for kind in each))
