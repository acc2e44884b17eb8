"""`sample_fn`: prompts to completions, with the log-probability of what was truly sampled from."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from opd_jax.algorithm import slots as slots_lib
from opd_jax.models import layout, placement
from opd_jax.models.nn import positions_of
from opd_jax.types import Model, Params, Prompts, Rollout

_BLOCK = layout.BLOCK  # of the two-level draw: near sqrt(V) for the vocabularies in use


def truncate(logits: Float[Array, 'B V'], top_k: int, top_p: float) -> Float[Array, 'B V']:
  """Sets to -inf what top-k and then nucleus sampling (Holtzman et al. 2019) exclude.

  The nucleus is the smallest set of most likely tokens whose mass reaches `top_p`. Tokens that tie
  with the last one kept are kept too.
  """
  if top_k:
    kth = layout.on_own_rows(lambda x: jax.lax.top_k(x, top_k)[0][:, -1:], logits)
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1.0:
    ordered = -jnp.sort(-jax.nn.softmax(logits, axis=-1), axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
    threshold = jnp.take_along_axis(ordered, last, axis=-1)
    logits = jnp.where(jax.nn.softmax(logits, axis=-1) < threshold, -jnp.inf, logits)
  return logits


def row_uniforms(key: PRNGKeyArray, rows: Int[Array, 'B'], steps: int, dtype: Any
                 ) -> Float[Array, 'B n 2']:
  """Draws the uniforms for the first tokens of each row, those of token t from
  fold_in(fold_in(key, row), t): they depend on no other row, nor on which are written together.
  """
  def one(row, step):
    return jax.random.uniform(
        jax.random.fold_in(jax.random.fold_in(key, row), step), (2,), dtype=dtype)

  return jax.vmap(lambda row: jax.vmap(lambda t: one(row, t))(jnp.arange(steps)))(rows)


def draw(logits: Float[Array, 'B V'], uniforms: Float[Array, 'B 2']) -> Int[Array, 'B']:
  """Draws once a row from softmax(logits), by inverting the cumulative distribution twice.

  First a block of tokens is drawn by its mass, then a token within it, each with a uniform in
  [0, 1) of its own. On CPU this is several times faster than Gumbel-argmax over a large vocabulary
  (one uniform a block instead of one a token, and no argmax), and two levels keep the cumulative
  sums short, hence exact to float32 rounding. A token of probability zero is never drawn.
  """
  batch, vocab = logits.shape
  block = min(_BLOCK, vocab)
  padded = jnp.pad(logits, ((0, 0), (0, -vocab % block)), constant_values=-jnp.inf)
  weights = jnp.exp(padded - jnp.max(padded, axis=-1, keepdims=True)).reshape(batch, -1, block)

  def invert(weights, uniform):
    # The first token of positive weight whose cumulative weight passes the target. Rounding may let
    # the parallel cumulative sum fall a little on its way, hence 'first', and hence a fallback.
    cumulative = jnp.cumsum(weights, axis=-1)
    index = jnp.broadcast_to(jnp.arange(weights.shape[-1])[None, :], weights.shape)
    passed = cumulative > uniform[:, None] * cumulative[:, -1:]
    first = jnp.min(jnp.where(passed & (weights > 0), index, weights.shape[-1]), axis=-1)
    return jnp.minimum(first, jnp.max(jnp.where(weights > 0, index, 0), axis=-1))

  which = invert(jnp.sum(weights, axis=-1), uniforms[:, 0])
  within = jnp.take_along_axis(weights, which[:, None, None], axis=1)[:, 0]
  return (which * block + invert(within, uniforms[:, 1])).astype(jnp.int32)


def choose(logits: Float[Array, 'B V'], uniforms: Float[Array, 'B 2'], *, temperature: float,
           top_p: float, top_k: int
           ) -> tuple[Int[Array, 'B'], Float[Array, 'B'], Float[Array, 'B']]:
  """Samples a token a row; greedy choice reads no `uniforms`.

  Returns:
    tokens; their log-probability under the distribution sampled from, which is
    softmax(truncate(logits / temperature)); and the log of the mass that truncation kept, so that
    log-probability + log-mass is the untruncated log-probability. Temperature 0 is greedy: a point
    mass, with log-probability 0.
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  if temperature == 0.0:
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    zeros = jnp.zeros(tokens.shape, logits.dtype)
    return tokens, zeros, zeros
  if top_k or top_p < 1.0:  # truncation looks at whole rows: each device at some of them
    logits = layout.rows(logits)
  full = logits / temperature
  kept = truncate(full, top_k, top_p)
  tokens = draw(kept, uniforms)
  kept_total = jax.nn.logsumexp(kept, axis=-1)
  chosen = jnp.take_along_axis(kept, tokens[:, None], axis=-1)[:, 0]
  mass = jnp.zeros_like(chosen)
  if top_k or top_p < 1.0:
    mass = kept_total - jax.nn.logsumexp(full, axis=-1)
  return tokens, chosen - kept_total, mass


def choose_mixed(own: Float[Array, 'B V'], others: Float[Array, 'B W'],
                 uniforms: Float[Array, 'B 2'], *, temperature: float, mix_temperature: float,
                 mix_share: float) -> tuple[Int[Array, 'B'], Float[Array, 'B'], Float[Array, 'B']]:
  """Samples a token a row from p_mix = mix_share p_T + (1 - mix_share) p_S.

  Args:
    own: logits of the student, p_S = softmax(own / temperature).
    others: logits of the teacher, p_T = softmax(others / mix_temperature). The narrower vocabulary
      has every token; what the wider has beyond it has probability zero (`Head`).
    uniforms: for the draw.
    temperature, mix_temperature, mix_share: as in `sample_fn`.

  Returns:
    tokens; log p_mix of them; and log p_S - log p_mix, which is at most -log(1 - mix_share).
  """
  width = min(own.shape[1], others.shape[1])
  student = jax.nn.log_softmax(own / temperature, axis=-1)[:, :width]
  teacher = jax.nn.log_softmax(others / mix_temperature, axis=-1)[:, :width]
  mixed = jnp.logaddexp(math.log(mix_share) + teacher, math.log1p(-mix_share) + student)
  tokens = draw(mixed, uniforms)
  chosen, chosen_own = (jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
                        for logprobs in (mixed, student))
  return tokens, chosen, chosen_own - chosen


def check_mixing(model: Model, mix_params: Params | None, mix_model: Model | None, *,
                 mix_share: float, mix_temperature: float, temperature: float, top_p: float,
                 top_k: int) -> None:
  """Refuses what cannot be mixed; the arguments are those of `sample_fn`.

  Raises:
    ValueError: with the argument, its value and what is allowed.
  """
  if not 0.0 <= mix_share < 1.0:
    raise ValueError(f'mix_share={mix_share}; allowed: from 0, no teacher, to below 1')
  if mix_share == 0.0:
    return
  given = f'mix_share={mix_share} with '
  if mix_params is None or mix_model is None:
    missing = 'mix_params' if mix_params is None else 'mix_model'
    raise ValueError(f'{given}{missing}=None; allowed: the parameters and the model of a teacher')
  if not 0.0 < mix_temperature < math.inf:
    raise ValueError(f'{given}mix_temperature={mix_temperature}; allowed: above 0, and finite')
  if temperature == 0.0:
    raise ValueError(f'{given}temperature={temperature}: greedy choice leaves no distribution to '
                     'mix; allowed: above 0')
  if top_k or top_p < 1.0:
    raise ValueError(f'{given}top_p={top_p} and top_k={top_k}: whole distributions are mixed; '
                     'allowed: top_p=1.0 and top_k=0')
  if mix_model.vocab_in_use != model.vocab_in_use:
    raise ValueError(f'{given}a mix_model of {mix_model.vocab_in_use} tokens; allowed: the '
                     f'{model.vocab_in_use} of the model')


def sample_fn(params: Params, prompts: Prompts, key: PRNGKeyArray, *, model: Model,
              max_new_tokens: int, temperature: float, top_p: float, top_k: int,
              stop_tokens: tuple[int, ...], pad_token: int, mix_params: Params | None = None,
              mix_model: Model | None = None, mix_share: float = 0.0,
              mix_temperature: float = 1.0, slots: int = 0, cache_lengths: int = 0) -> Rollout:
  """Samples one completion a row: a prefill, then a decode loop that stops when all rows ended.

  Args:
    params: of `model`; or `placement.LaidOut`, where that was done before.
    prompts: tokens [B, P], left-padded; of a part of a batch, with the rows that they are.
    key: token t of row r is drawn with fold_in(fold_in(key, r), t), whatever else is written.
    model: static.
    max_new_tokens: C, the room for the completion.
    temperature, top_p, top_k: of the sampling distribution; 1.0, 1.0, 0 is the model itself.
    stop_tokens: ids that end a row; the stop token belongs to the completion and to the mask.
    pad_token: what fills a row after its end.
    mix_params, mix_model: a teacher that reads along, with a cache of its own; the model static.
    mix_share: static. Every token is drawn from mix_share p_T + (1 - mix_share) p_S (Gu et al.
      2023, MiniLLM, arXiv 2306.08543, section 2.2); with 0 the teacher is not run, and the other
      `mix` arguments are not read.
    mix_temperature: of p_T; `temperature` is that of p_S.
    slots: static. So many rows are written at a time, the next as one ends (`slots.write`); 0 for
      all at once, as it is for fewer rows than that, and for rows that a mesh does not divide as it
      does the slots. Tokens are the same, but for rounding in batches of another size.
    cache_lengths: static. How many of `slots.lengths` the cache has, the last of them; 0 for all.

  Returns:
    A `Rollout` with T = P + C.

  Raises:
    ValueError: slots of a model that has no `refill`; see also `check_mixing`.
  """
  check_mixing(model, mix_params, mix_model, mix_share=mix_share, mix_temperature=mix_temperature,
               temperature=temperature, top_p=top_p, top_k=top_k)
  if slots and any(m.refill is None for m in (model, *[mix_model] * bool(mix_share))):
    raise ValueError(f'slots={slots} with a model of the family {model.family!r}, or one mixed in, '
                     'whose cache takes no fresh prompts; allowed: 0')
  batch = len(prompts.tokens)
  numbers = jnp.arange(batch) if prompts.rows is None else prompts.rows
  prompts, numbers = layout.rows((prompts, numbers), layout.DECODE)
  writers = [(m, placement.laid_out(m, p)) for m, p in
             [(model, params)] + [(mix_model, mix_params)] * bool(mix_share)]
  heads = [m.head(p) for m, p in writers]

  def forward(weights, tokens, positions, valid, caches):
    outs = [m.forward(w, tokens, positions, valid, cache)
            for (m, _), w, cache in zip(writers, weights, caches, strict=True)]
    logits = [layout.token_logits(h, x[:, -1]) for h, (x, _) in zip(heads, outs, strict=True)]
    return logits, [cache for _, cache in outs]

  def prefill(tokens, valid, length):
    return forward([p for _, p in writers], tokens, positions_of(valid), valid,
                   [m.init_cache(len(tokens), length) for m, _ in writers])

  def refill(caches, new, source):
    return [m.refill(c, n, source) for (m, _), c, n in zip(writers, caches, new, strict=True)]

  def choose_from(logits, uniforms):
    if mix_share:
      chosen = choose_mixed(*logits, uniforms, temperature=temperature, mix_share=mix_share,
                            mix_temperature=mix_temperature)
    else:
      chosen = choose(*logits, uniforms, temperature=temperature, top_p=top_p, top_k=top_k)
    return layout.rows(chosen, layout.DECODE)

  def grow(caches, places):
    return [m.grow(c, places) for (m, _), c in zip(writers, caches, strict=True)]

  # Unrolled layers: a scan would copy the whole cache in and out at every token.
  decode = functools.partial(forward, [m.unstack(p) for m, p in writers])
  # All draws at once: within the loop, each would cost more than the token that it draws.
  dtype = jnp.result_type(float)  # float64 in tests that are about it
  uniforms = layout.rows(row_uniforms(key, numbers, max_new_tokens, dtype), layout.DECODE)
  last = cache_lengths if all(m.grow for m, _ in writers) else 1
  how = dict(prompts=prompts, uniforms=uniforms, room=max_new_tokens, pad_token=pad_token,
             prefill=prefill, decode=decode, choose=choose_from, grow=grow,
             lengths=slots_lib.lengths(max_new_tokens, last),
             is_stop=lambda tokens: jnp.isin(tokens, jnp.array(stop_tokens, jnp.int32)))
  divided = layout.row_parts(batch, layout.DECODE) == layout.row_parts(slots, layout.DECODE)
  if 0 < slots <= batch and divided:
    out, done, _ = slots_lib.Writer(**how, slots=slots, refill=refill).write()
  else:
    out, done = _at_once(**how)
  return _as_rollout(prompts, out, done)


def _at_once(prompts, uniforms, room, pad_token, prefill, decode, choose, grow, lengths, is_stop):
  """Writes all rows until the last has ended; arguments and results as of `slots.Writer`."""
  batch, prompt_length = prompts.tokens.shape
  sizes = jnp.sum(prompts.valid.astype(jnp.int32), axis=-1)
  logits, caches = prefill(prompts.tokens, prompts.valid, prompt_length + lengths[0])
  token, logprob, offset = choose(logits, uniforms[:, 0])

  def fill(first, value):
    return jnp.full((batch, room), value, first.dtype).at[:, 0].set(first)

  out = dict(tokens=fill(token, pad_token), alive=fill(jnp.ones(batch, bool), False),
             logprobs=fill(logprob, 0), offset=fill(offset, 0))

  def body(carry, first):
    i, token, done, caches, out = carry
    step = first + i
    logits, caches = decode(token[:, None], (sizes + step - 1)[:, None], ~done[:, None], caches)
    token, logprob, offset = choose(logits, jax.lax.dynamic_index_in_dim(
        uniforms, step, axis=1, keepdims=False))
    done, token = layout.rows((done, jnp.where(done, pad_token, token)), layout.DECODE)
    new = dict(tokens=token, alive=~done, logprobs=jnp.where(done, 0, logprob),
               offset=jnp.where(done, 0, offset))
    out = {name: jax.lax.dynamic_update_slice_in_dim(out[name], new[name][:, None], step, axis=1)
           for name in out}
    return i + 1, token, done | is_stop(token), caches, out

  done, first = is_stop(token), 1
  for length in lengths:
    caches = caches if length == lengths[0] else grow(caches, prompt_length + length)
    trips = min(length, room - 1) + 1 - first  # said in the program, for who counts what it does
    _, token, done, caches, out = jax.lax.while_loop(
        lambda c, trips=trips: (c[0] < trips) & ~jnp.all(c[2]),
        functools.partial(body, first=first), (jnp.int32(0), token, done, caches, out))
    first += trips
  return out, done


def _as_rollout(prompts: Prompts, out: dict[str, Array], done: Array) -> Rollout:
  prompt_length = prompts.tokens.shape[1]

  def per_token(completion):  # [B, C] -> [B, T-1]: entry t belongs to tokens[:, t + 1]
    return jnp.pad(completion, ((0, 0), (prompt_length - 1, 0)))

  return Rollout(
      tokens=jnp.concatenate([prompts.tokens, out['tokens']], axis=1),
      valid=jnp.concatenate([prompts.valid, out['alive']], axis=1),
      mask=per_token(out['alive'].astype(jnp.float32)),
      sampler_logprobs=per_token(out['logprobs']),
      policy_offset=per_token(out['offset']),
      ended=done, prompt_length=prompt_length)
