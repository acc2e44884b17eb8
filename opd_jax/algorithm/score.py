"""From hidden states to log-probabilities, in chunks of tokens, and `teacher_logprob_fn`.

A vocabulary-sized row exists only for `chunk_tokens` tokens at a time: nothing here ever holds a
[B, T, V] array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opd_jax.algorithm import buckets, support, vocabulary
from opd_jax.models import layout
from opd_jax.models.nn import positions_of
from opd_jax.types import Batch, Head, Model, Params, Rollout, Scores, TopTokens, Wants


def log_softmax(hidden: Float[Array, 'n D'], head: Head, temperature: float
                ) -> Float[Array, 'n V']:
  """Computes log softmax(head(hidden) / temperature), in float32 at least."""
  logits = layout.constrain(head.logits(hidden), ('batch', 'vocab'))
  return jax.nn.log_softmax(logits / temperature, axis=-1)


def same_width(*logprobs: Float[Array, 'n _']) -> tuple[Float[Array, 'n _'], ...]:
  """Cuts log-probs of several models over one vocabulary that is padded to different widths.

  The narrowest has every token; what the others have beyond it has probability zero (`Head`).
  """
  width = min(x.shape[1] for x in logprobs)
  return tuple(x[:, :width] for x in logprobs)


def entropy_of(logprobs: Float[Array, 'n V']) -> Float[Array, 'n']:
  """Computes -sum_v p log p, in nats."""
  return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def pick(logprobs: Float[Array, 'n V'], targets: Int[Array, 'n']) -> Float[Array, 'n']:
  """Picks logprobs[i, targets[i]]."""
  return jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0]


def completion_hidden(model: Model, params: Params, rollout: Rollout) -> Float[Array, 'B C D']:
  """Computes the final hidden states that predict the completion, teacher-forced on the rollout."""
  # The last token predicts nothing that is scored, and the prompt's predictions are not either.
  tokens, valid = rollout.tokens[:, :-1], rollout.valid[:, :-1]
  hidden, _ = model.forward(params, tokens, positions_of(valid), valid, None)
  return layout.rows(hidden[:, rollout.prompt_length - 1:])


def to_rows(completion: Float[Array, 'B C'], rollout: Rollout) -> Float[Array, 'B t']:
  """Brings [B, C] to the [B, T-1] convention, zero where the mask is."""
  padded = jnp.pad(completion, ((0, 0), (rollout.prompt_length - 1, 0)))
  return jnp.where(rollout.mask > 0, padded, 0.0)


def to_completion(per_token: Float[Array, 'B t'], rollout: Rollout) -> Float[Array, 'B C']:
  """Inverts `to_rows`: takes the [B, T-1] entries that belong to the completion."""
  return per_token[:, rollout.prompt_length - 1:]


def chosen_only(batch: Batch) -> Batch:
  """Puts zero into every log-prob and entropy of a batch where the mask is zero.

  A caller's may be anything there, NaN too, and zero times NaN is NaN. Hidden states, which are
  large, are replaced in the loss, a few tokens at a time.
  """
  def clean(x):
    return None if x is None else jnp.where(batch.rollout.mask > 0, x, 0.0)

  rollout = batch.rollout.replace(sampler_logprobs=clean(batch.rollout.sampler_logprobs),
                                  policy_offset=clean(batch.rollout.policy_offset))
  return batch.replace(rollout=rollout, **{
      name: scores.replace(logprobs=clean(scores.logprobs), entropy=clean(scores.entropy))
      for name in ('teacher', 'student', 'reference')
      if (scores := getattr(batch, name)) is not None})


def teacher_logprob_fn(params: Params, rollout: Rollout, *, model: Model, temperature: float,
                       wants: Wants, chunk_tokens: int, microbatch_rows: int,
                       length_buckets: int = 1) -> Scores:
  """Grades a rollout with one forward pass of a model that did not (need to) write it.

  The same function, and so the same compiled program, scores the student when a policy-gradient
  advantage needs log p_S: only then is log p_T - log p_S exactly zero for a teacher equal to the
  student.

  Args:
    params: of `model`.
    rollout: B rows.
    model: static.
    temperature: of the scored distribution.
    wants: what to return; with hidden states alone (for a divergence over the vocabulary) the head
      is left to the update.
    chunk_tokens: tokens whose vocabulary rows exist at a time.
    microbatch_rows: rows per forward pass, 0 for all.
    length_buckets: to how many lengths microbatches are cut (`buckets.lengths_of`).

  Raises:
    ValueError: nothing is wanted.
  """
  if not wants:
    raise ValueError(f'{wants}: nothing to score for; allowed: logprobs, hidden or both')

  def score(rows: Rollout) -> Scores:
    hidden = completion_hidden(model, params, rows)
    kept = hidden if wants.hidden else None
    if not wants.logprobs and not wants.top_k:
      return Scores(logprobs=None, entropy=None, hidden=kept)
    head = layout.whole_head(model.head(params), hidden.dtype)

    def chunk(hidden, targets):
      logprobs = log_softmax(hidden, head, temperature)
      out = {'logprobs': pick(logprobs, targets), 'entropy': entropy_of(logprobs)}
      if wants.top_k:
        values, tokens = support.top_k(logprobs, wants.top_k)
        out['top'] = TopTokens(tokens, values, support.rest_of(logprobs, tokens))
      return out

    out = vocabulary.map_over_chunks(chunk, chunk_tokens, hidden, rows.completion_targets)
    return Scores(logprobs=to_rows(out['logprobs'], rows), entropy=to_rows(out['entropy'], rows),
                  hidden=kept, top=out.get('top'))

  return buckets.scan_rows(lambda _, rows: (None, score(rows)), None, rollout, rollout,
                           microbatch_rows=microbatch_rows, buckets=length_buckets)[1]


def only(scores: Scores, wants: Wants) -> Scores:
  """Drops what is not wanted: a program that models share gives what any of them is asked for."""
  if not wants.logprobs:
    scores = scores.replace(logprobs=None, entropy=None)
  if not wants.top_k:
    scores = scores.replace(top=None)
  return scores if wants.hidden else scores.replace(hidden=None)
