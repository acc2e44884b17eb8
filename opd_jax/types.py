"""The letters, the containers and the one convention that every module shares.

Letters used in shapes and einsum strings, everywhere with the same meaning:

  B  rows (one row is one prompt and one completion)
  P  prompt length after left padding            C  room for the completion
  T  = P + C, the whole row                      S  positions of one forward call
  D  model width    V  vocabulary    F  feed-forward width    L  layers
  N  query heads    K  key/value heads    G = N / K queries per key head    H  head width

**The [B, T-1] convention.** Every per-token array has shape [B, T-1], and entry t belongs to the
prediction of `tokens[:, t + 1]` from `tokens[:, :t + 1]`. Nothing in this code base shifts a second
time. Masks are 1 on tokens that the policy chose: EOS is in; prompt and padding are out.

The fields of the containers are commented, not annotated with jaxtyping: JAX rebuilds these
dataclasses with sharding or shape objects as leaves, which a run-time check would refuse.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

Params = Any  # nested dicts of arrays

UNUSED_LOGIT = -1e30  # exp is 0; finite, so that 0 * log 0 is 0 and not NaN


@struct.dataclass
class Prompts:
  """Prompts of one batch, padded on the left to a common length."""

  tokens: jax.Array  # int32 [B, P]
  valid: jax.Array  # bool [B, P], False on the padding
  rows: jax.Array | None = None  # int32 [B], their places in the batch of which they are a part


@struct.dataclass
class Rollout:
  """Prompts and completions, with what the sampler knows about its own choices."""

  tokens: jax.Array  # int32 [B, T]
  valid: jax.Array  # bool [B, T], True on prompt and completion (EOS included)
  mask: jax.Array  # float32 [B, T-1], 1 where tokens[:, t+1] was chosen by the policy
  sampler_logprobs: jax.Array  # float32 [B, T-1], of the distribution truly sampled from
  # float32 [B, T-1], log p of the model that wrote, untruncated and unmixed, less sampler_logprobs:
  # the log of the mass that top-p/top-k kept, and log p_S - log p_mix with a mixed-in teacher; 0
  # without either. So sampler_logprobs + policy_offset is always the writer's own log-probability.
  policy_offset: jax.Array
  ended: jax.Array  # bool [B], True if a stop token was produced within the room C
  prompt_length: int = struct.field(pytree_node=False)  # P

  @property
  def completion_targets(self) -> jax.Array:
    """The tokens in the completion slots, int32 [B, C]."""
    return self.tokens[:, self.prompt_length:]


@struct.dataclass
class TopTokens:
  """A model's most likely tokens at each place of the completion."""

  tokens: jax.Array  # int32 [B, C, k]
  logprobs: jax.Array  # float32 [B, C, k]
  rest: jax.Array  # float32 [B, C], the log of the mass of all others


@struct.dataclass
class Scores:
  """What one model says about a rollout. Absent outputs are None, never zeros."""

  logprobs: jax.Array | None  # float32 [B, T-1], log-probability of tokens[:, t+1]
  entropy: jax.Array | None  # float32 [B, T-1], in nats
  hidden: jax.Array | None  # [B, C, D], the final hidden states that predict the completion
  top: TopTokens | None = None  # in their place, of a teacher that is elsewhere


@dataclasses.dataclass(frozen=True)
class Wants:
  """What must be known of a model's view of a rollout before the loss; false where nothing.

  Attributes:
    logprobs: of the sampled tokens, and the entropy, which comes with them.
    hidden: the final hidden states that predict the completion.
    top_k: so many of its most likely tokens; 0 for none.
  """

  logprobs: bool = False
  hidden: bool = False
  top_k: int = 0

  def __or__(self, other: Wants) -> Wants:
    return Wants(self.logprobs or other.logprobs, self.hidden or other.hidden,
                 max(self.top_k, other.top_k))

  def __bool__(self) -> bool:
    return self.logprobs or self.hidden or self.top_k > 0


@struct.dataclass
class Batch:
  """A rollout and what is known about it. What an objective does not ask for is None."""

  rollout: Rollout
  teacher: Scores | None = None
  student: Scores | None = None  # by the very program that scored the teacher
  reference: Scores | None = None
  rewards: jax.Array | None = None  # float32 [B], of the verifier


@struct.dataclass
class Weighted:
  """Rows with what the loss takes for each token; what it does not read is None.

  The hidden states of the student are those of the program that scored the teacher, for the exact
  baseline, which is then exactly zero for a teacher equal to the student.
  """

  rollout: Rollout
  weights: jax.Array  # float32 [B, T-1], zero wherever the mask is
  advantage: jax.Array | None = None  # float32 [B, T-1]
  local_weights: jax.Array | None = None  # float32 [B, T-1]
  teacher_logprobs: jax.Array | None = None  # float32 [B, T-1]
  reference_logprobs: jax.Array | None = None  # float32 [B, T-1]
  teacher_hidden: jax.Array | None = None  # [B, C, D]
  teacher_top: TopTokens | None = None
  student_hidden: jax.Array | None = None
  reference_hidden: jax.Array | None = None


@struct.dataclass
class TrainState:
  """Everything that training changes, and so everything that a checkpoint holds."""

  step: jax.Array  # int32 [], gradient steps taken
  params: Params
  opt_state: Any


@struct.dataclass
class Head:
  """From final hidden states to logits, softcap * tanh(h W / softcap).

  A checkpoint's vocabulary is often padded to a round size: rows that no token has. Their logits
  are `UNUSED_LOGIT`, so they have probability zero and no gradient.
  """

  # [D, V], or [V, D] where it is the embedding, which would be copied if it were transposed. None
  # where a model's hidden states are its logits already.
  matrix: jax.Array | None
  vocab_in_use: int = struct.field(pytree_node=False)  # ids below this are tokens
  softcap: float = struct.field(pytree_node=False, default=0.0)  # Gemma 2 (2408.00118); 0: none
  tied: bool = struct.field(pytree_node=False, default=False)

  @property
  def axes(self) -> tuple[str, str]:
    """Names the axes of the matrix."""
    return ('vocab', 'embed') if self.tied else ('embed', 'vocab')

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Maps [..., D] to [..., V]: a product in the dtype of `hidden`, summed in float32 at least."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = hidden.astype(wide)
    if self.matrix is not None:
      logits = jnp.einsum('...d,vd->...v' if self.tied else '...d,dv->...v', hidden,
                          self.matrix.astype(hidden.dtype), preferred_element_type=wide)
    if self.softcap:
      logits = self.softcap * jnp.tanh(logits / self.softcap)
    if self.vocab_in_use < logits.shape[-1]:
      token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
      logits = jnp.where(token < self.vocab_in_use, logits, UNUSED_LOGIT)
    return logits


@struct.dataclass
class Heads:
  """The heads of the models whose hidden states a loss takes; None where it takes none."""

  teacher: Head | None = None
  reference: Head | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A causal language model as three pure functions and a table.

  Attributes:
    family: the Hugging Face `model_type`, which is also the name of the file in `models/families/`.
    config: the family's frozen configuration; `config.vocab_size` is V.
    vocab_in_use: ids below this are tokens, the rest is padding of the vocabulary.
    specs: nested dict of `params.ParamSpec`, the one table of shapes, axes, init and file names.
    forward: (params, tokens [B,S], positions [B,S], valid [B,S], cache | None)
      -> (hidden [B,S,D], cache | None).
    head: (params) -> `Head`.
    init_cache: (batch, length) -> an empty key/value cache with `length` slots.
    for_decoding: (params) -> the parameters that `forward` takes together with a cache: the same,
      in the dtype and (on a mesh) in the layout in which decoding reads them.
    unstack: (params) -> the same parameters with the layers as a tuple, for unrolled decoding.
    to_hf: () -> the dict of a Hugging Face config.json.
    refill: (cache, the cache of fresh prompts, source [B]) -> the cache, in which some rows gave
      their places to those (`decoder.refill`); None where that cannot be done.
    grow: (cache, places) -> the cache with so many places (`decoder.grow`); None likewise.
    attention_windows: of each layer, how many keys a query sees at most, None for all; () where no
      layer has a bound. For counting operations.
  """

  family: str
  config: Any
  vocab_in_use: int
  specs: dict[str, Any]
  forward: Callable[..., tuple[jax.Array, Any]]
  head: Callable[[Params], Head]
  init_cache: Callable[[int, int], Any]
  unstack: Callable[[Params], Params]
  to_hf: Callable[[], dict[str, Any]]
  refill: Callable[[Any, Any, jax.Array], Any] | None = None
  grow: Callable[[Any, int], Any] | None = None
  attention_windows: tuple[int | None, ...] = ()
  for_decoding: Callable[[Params], Params] = lambda params: params
