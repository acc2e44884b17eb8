"""Makes a student or a teacher of a Flax module (Linen or NNX).

The core uses no module system: a model is three functions and a table (`types.Model`). This file
makes them of a module that is called as module(tokens [B, S], positions [B, S], valid [B, S]), with
`positions` from `nn.positions_of` and `valid` False on padding, and that returns either

  - final hidden states [B, S, D], where the caller also gives `head`, the matrix [D, V]; or
  - logits [B, S, V]. Then the logits are the hidden states, and the [B, T, V] array that the rest
    of this code never holds exists after all. Prefer hidden states and a head.

The module has to be causal, deterministic and without state: no dropout, no running averages.
`check` tries what can be tried of this. Left out: reading a directory as a stream of tensors (the
parameters pass through host memory), and `compute.remat` and `compute.layer_unroll`, which are the
module's own business (`nn.remat`, `nn.scan`, `nnx.remat`).
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models import layout, placement
from opd_jax.models.nn import positions_of
from opd_jax.models.params import AXES, ParamSpec, flatten, unflatten
from opd_jax.types import Head, Model, Params

FAMILY = 'flax'
INPUTS = tuple(jax.ShapeDtypeStruct((2, 3), d) for d in (jnp.int32, jnp.int32, jnp.bool_))


@dataclasses.dataclass(frozen=True)
class Config:
  """What a module does not say about itself.

  Attributes:
    vocab_size: V.
    max_position_embeddings: the longest row that the module takes.
    num_hidden_layers, num_attention_heads, head_dim: for the FLOPs of attention only; where they
      are left at 0 the attention is not counted (`flops.forward_flops`).
    source: what computes; set by `from_linen`, `from_nnx` and `files.factory.load`. Models with
      equal configs are run by one compiled program.
  """

  vocab_size: int
  max_position_embeddings: int
  num_hidden_layers: int = 0
  num_attention_heads: int = 0
  head_dim: int = 0
  source: Any = None

  def __post_init__(self):
    for name in ('vocab_size', 'max_position_embeddings'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}; allowed: at least 1')


@dataclasses.dataclass(frozen=True)
class Decoding:
  """A module's own way to decode with a cache of fixed shapes, in place of running it again.

  Attributes:
    init_cache: (batch, length) -> an empty cache for `length` tokens.
    forward: (params, tokens, positions, valid, cache) -> what the module returns for these tokens,
      and the cache with them; first for the prompts, then for one token at a time.
  """

  init_cache: Callable[[int, int], Any]
  forward: Callable[..., tuple[jax.Array, Any]]


def from_linen(module: linen.Module, variables: dict[str, Any], config: Config, *,
               head: Callable[[Params], jax.Array] | None = None,
               apply: Callable[..., jax.Array] | None = None, decoding: Decoding | None = None
               ) -> tuple[Model, Params]:
  """Makes a model of a Linen module.

  Args:
    module: not bound.
    variables: what `module.init` returned. Axis names of `nn.with_partitioning` that
      `layout.TRAIN` knows shard a parameter; under any other name an axis is replicated.
    config: the sizes.
    head: (params) -> [D, V], where the module returns hidden states.
    apply: (params, tokens, positions, valid) -> output, for a module with another signature; by
      default module.apply({'params': params}, tokens, positions, valid).
    decoding: by default each new token runs the module on the whole row again: exact, and T times
      the work of one pass for a row of T tokens.

  Returns:
    The model and its parameters, the nested dict `variables['params']`.

  Raises:
    ValueError: collections other than 'params', parameters that are not floating-point, or a module
      that cannot be called as above or returns another shape.
  """
  if set(variables) != {'params'}:
    raise ValueError(f"the module's collections are {sorted(variables)}; allowed: ['params'] only "
                     '(nothing that changes from call to call, such as batch_stats)')
  boxed = _flatten_boxed(variables['params'])
  params = unflatten({name: linen.meta.unbox(leaf) for name, leaf in boxed.items()})
  axes = {name: leaf.names if isinstance(leaf, linen.Partitioned) else None
          for name, leaf in boxed.items()}

  call = apply or (lambda params, *inputs: module.apply({'params': params}, *inputs))
  config = dataclasses.replace(config, source=(module, head, apply, decoding))
  return _model(config, params, axes, call, head, decoding), params


def from_nnx(module: nnx.Module, config: Config, *,
             head: Callable[[nnx.Module], jax.Array] | None = None,
             apply: Callable[..., jax.Array] | None = None, decoding: Decoding | None = None
             ) -> tuple[Model, Params]:
  """Makes a model of an NNX module.

  Args:
    module: it is left as it is; the model works on copies made from the parameters.
    config: the sizes.
    head: (module) -> [D, V], where the module returns hidden states.
    apply: (module, tokens, positions, valid) -> output, for a module with another signature.
    decoding: see `from_linen`; its functions take the parameters, not the module.

  Returns:
    The model and its parameters: nested dicts of arrays named by the path of their `nnx.Param`
    (the elements of a list by '0', '1', ...). Axis names (`nnx.with_partitioning`) as in
    `from_linen`.

  Raises:
    ValueError: variables other than `nnx.Param` (the random state of dropout, batch statistics), or
      as in `from_linen`.
  """
  graph, state = nnx.split(module)
  variables = {'/'.join(map(str, path)): v for path, v in nnx.to_flat_state(state)}
  others = [f'{name} ({type(v).__name__})' for name, v in variables.items()
            if not isinstance(v, nnx.Param)]
  if others:
    raise ValueError(f'the module holds {others}; allowed: nnx.Param only (dropout made with '
                     'deterministic=True and without rngs, no batch statistics)')
  leaves, structure = jax.tree_util.tree_flatten_with_path(state)
  names = [_name(path[:-1]) for path, _ in leaves]  # the last step is into the variable
  if sorted(names) != sorted(variables):
    raise ValueError(f'the module has parameters {sorted(variables)} of which some hold several '
                     'arrays or share a name; allowed: one array each, under different names')
  params = unflatten({name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)})
  axes = {name: v.get_metadata().get('out_sharding') for name, v in variables.items()}

  def merge(params):
    flat = flatten(params)
    return nnx.merge(graph, jax.tree.unflatten(structure, [flat[name] for name in names]))

  def call(params, *inputs):
    return apply(merge(params), *inputs) if apply else merge(params)(*inputs)

  matrix = None if head is None else lambda params: head(merge(params))
  config = dataclasses.replace(config, source=(graph, head, apply, decoding))
  return _model(config, params, axes, call, matrix, decoding), params


def _flatten_boxed(tree):
  """`params.flatten` of a tree whose leaves may carry axis names (`nn.Partitioned`)."""
  leaves = jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=lambda x: isinstance(x, linen.meta.AxisMetadata))
  return {_name(path): leaf for path, leaf in leaves}


def _name(path):
  return '/'.join(str(getattr(step, 'key', getattr(step, 'idx', step))) for step in path)


def _model(config: Config, params: Params, axes: dict[str, Any], apply: Callable[..., jax.Array],
           head: Callable[[Params], jax.Array] | None, decoding: Decoding | None) -> Model:
  _check_call(config, params, apply, head)
  decoding = decoding or _run_again(apply)

  written = {
      'model_type': FAMILY, 'vocab_size': config.vocab_size,
      'max_position_embeddings': config.max_position_embeddings,
      'note': 'The weights of a Flax module, named by their path in it. It takes the code that '
              'made the module to load them: see student.factory of opd_jax.'}

  specs = _specs(params, axes, head)

  def forward(params, tokens, positions, valid, cache):
    if cache is None:  # what lies where within the module is the partitioner's to say
      params, inputs = placement.gathered(params, specs), layout.rows((tokens, positions, valid))
      return layout.rows(apply(params, *inputs)), None
    return decoding.forward(params, tokens, positions, valid, cache)

  return Model(family=FAMILY, config=config, vocab_in_use=config.vocab_size,
               specs=specs, forward=forward,
               head=lambda params: Head(head(params) if head else None, config.vocab_size),
               init_cache=decoding.init_cache, unstack=lambda params: params, to_hf=written.copy,
               for_decoding=lambda params: placement.decoding(params, specs, None))


def _check_call(config, params, apply, head):
  """Traces the module once, without computing anything."""
  try:
    out = jax.eval_shape(apply, params, *INPUTS)
    shape = tuple(out.shape)
  except Exception as e:  # whatever the module raises, or that it returns no array
    first_line = (str(e).splitlines() or [''])[0]
    raise ValueError(
        f'the module failed when called ({type(e).__name__}: {first_line}); allowed: '
        'module(tokens [B, S], positions [B, S], valid [B, S]) -> array, deterministic, without '
        'random keys and state; `apply` may adapt another signature') from e
  allowed, width = '(2, 3, D), hidden states', shape[-1:]
  if head is None:
    width = config.vocab_size,
    allowed = f'(2, 3, {config.vocab_size}), the logits, or hidden states and a `head`'
  if shape != (2, 3, *width) or not jnp.issubdtype(out.dtype, jnp.floating):
    raise ValueError(f'the module returns {out.dtype} {shape} for tokens (2, 3); allowed: '
                     f'floating-point {allowed}')
  if head is not None:
    matrix, wanted = tuple(jax.eval_shape(head, params).shape), (*width, config.vocab_size)
    if matrix != wanted:
      raise ValueError(f'head returns {matrix}; allowed: {wanted}, the hidden width and vocab_size')


def _specs(params, axes, head):
  """The table. Initial values are the module's own: whoever makes it has them."""
  of_head = _read_by(head, params) if head else set()
  specs = {}
  for name, leaf in flatten(params).items():
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(f'parameter {name} is {leaf.dtype}; allowed: floating-point parameters')
    names = tuple(axes[name] or ()) + (None,) * leaf.ndim
    known = tuple(a if isinstance(a, str) and a in AXES else None
                  for a in names[:leaf.ndim])
    # What multiplies every token, judged by Flax's names: kernels, not tables that are looked up
    # (unless the head multiplies by one) and not the biases of several heads.
    other = any(word in name.split('/')[-1] for word in ('embed', 'bias', 'scale'))
    matmul = name in of_head or (leaf.ndim > 1 and not other)
    specs[name] = ParamSpec(tuple(leaf.shape), known, _no_init, name, tuple(leaf.shape) or (1,),
                            matmul=float(matmul))
  return unflatten(specs)


def _no_init(key, shape, dtype):
  raise ValueError('a Flax module initializes its parameters itself; allowed: the parameters that '
                   'from_linen or from_nnx returned')


def _read_by(f, params):
  """The names of the parameters that f(params) depends on."""
  jaxpr = jax.make_jaxpr(f)(params).jaxpr
  read = {id(v) for v in jaxpr.outvars}
  read |= {id(v) for equation in jaxpr.eqns for v in equation.invars}
  names = jax.tree.leaves(unflatten({name: name for name in flatten(params)}))
  return {name for name, v in zip(names, jaxpr.invars, strict=True) if id(v) in read}


def _run_again(apply):
  """Decoding without a cache of the module's own: the cache is the row so far. The slots behind it
  are not valid, and a causal module does not look at them."""

  def init_cache(batch, length):
    zeros = jnp.zeros((batch, length), jnp.int32)
    return {'rows': (zeros, zeros, zeros.astype(bool)), 'index': jnp.int32(0)}

  def forward(params, tokens, positions, valid, cache):
    index = cache['index']
    rows = tuple(jax.lax.dynamic_update_slice_in_dim(row, x.astype(row.dtype), index, axis=1)
                 for row, x in zip(cache['rows'], (tokens, positions, valid), strict=True))
    out = jax.lax.dynamic_slice_in_dim(apply(params, *rows), index, tokens.shape[1], axis=1)
    return out, {'rows': rows, 'index': index + tokens.shape[1]}

  return Decoding(init_cache, forward)


def check(model: Model, params: Params) -> None:
  """Runs the model on a few short rows: left padding and later tokens must change nothing.

  The comparison allows for rounding: 0.1 % of the largest logit where the model computes in
  float32, 10 % in a shorter format. On padding the logits may be anything, NaN too: the loss does
  not look at them.

  Raises:
    ValueError: the logits are not finite, see the padding on the left, or see the future.
  """
  first = np.arange(4) % model.vocab_in_use
  # Padding is told by `valid` alone: the slots hold a token like any other.
  rows = np.full((3, 6), 4 % model.vocab_in_use, np.int32)
  rows[0, :4], rows[1, 2:], rows[2, :4], rows[2, 4:] = first, first, first, first[-1]
  valid = jnp.arange(6)[None] >= jnp.array([[0], [2], [0]])
  hidden, _ = model.forward(params, jnp.asarray(rows), positions_of(valid), valid, None)
  tolerance = 1e-3 if jnp.finfo(hidden.dtype).bits >= 32 else 0.1
  logits = np.asarray(model.head(params).logits(hidden)[..., :model.vocab_in_use], np.float64)
  if not np.isfinite(logits[np.asarray(valid)]).all():
    raise ValueError('the logits of the module are not finite; allowed: finite logits for every '
                     'token that is valid')
  wanted, scale = logits[0, :4], np.abs(logits[0, :4]).max()
  for what, got in (('the tokens behind', logits[2, :4]), ('padding on the left', logits[1, 2:])):
    worst = np.abs(got - wanted).max()
    if worst > tolerance * scale:
      raise ValueError(
          f"{what} changes the module's logits by {worst:.2g}, of at most {scale:.2g}; allowed: a "
          'causal module that attends to valid tokens only and counts `positions`, not slots')


def check_gradient(model: Model, params: Params) -> None:
  """Differentiates the logits of two short rows as training does; for a model that is trained.

  What is NaN on padding within the module is met by a zero on the way back, and zero times NaN is
  NaN: nothing outside of the module can mend that.

  Raises:
    ValueError: the gradient is not finite; names parameters.
  """
  tokens = jnp.arange(8).reshape(2, 4) % model.vocab_in_use
  valid = jnp.arange(4)[None] >= jnp.array([[0], [2]])

  def total(params):
    hidden, _ = model.forward(params, tokens, positions_of(valid), valid, None)
    hidden = jnp.where(valid[:, :, None], hidden, 0.0)
    return jnp.sum(model.head(params).logits(hidden)[..., :model.vocab_in_use])

  grads = flatten(jax.grad(total)(params))
  bad = sorted(name for name, x in grads.items() if not bool(jnp.isfinite(x).all()))
  if bad:
    raise ValueError(
        f'the gradient of the valid logits by {bad[:3]} is not finite; allowed: a module that '
        'computes nothing infinite or NaN on padding (jnp.finfo(dtype).min in place of -inf in an '
        'attention mask leaves a query without a key a finite average)')
