"""What tests of the sampler share: whether tokens are drawn as they should be, a scripted model,
and sampler and scorer of a real one."""

from __future__ import annotations

import functools
import types

from conftest import numpy_log_softmax, quick_jit
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from opd_jax.algorithm import sample, score
from opd_jax.types import Head, Model, Wants

# Keys are fixed, so a chi-square test gives the same p-value every time. A right sampler fails a
# threshold of 1e-3 for one key in a thousand (then choose another key); a wrong probability of a
# few per cent, seen 20,000 times, gives p-values far below it.
P_VALUE = 1e-3
DRAWS = 20_000


def agrees(tokens, probabilities):
  """Chi-square of the drawn tokens; tokens expected less than 5 times are counted together."""
  counts = np.bincount(np.asarray(tokens), minlength=len(probabilities)).astype(float)
  assert len(counts) == len(probabilities), 'a token outside the vocabulary'
  assert not counts[probabilities == 0].any(), 'a token of probability zero'
  expected = probabilities * counts.sum()
  rare = expected < 5
  if expected[rare].sum() >= 5:
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
  else:
    counts, expected = counts[~rare], expected[~rare]
  return scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > P_VALUE


def random_logits(vocab, seed=0):
  """One row."""
  return (2 * np.random.RandomState(seed).standard_normal(vocab)).astype(np.float32)


def tile(logits, rows=DRAWS):
  """The same row many times."""
  return jnp.asarray(np.tile(np.asarray(logits, np.float32), (rows, 1)))


def uniforms(seed, rows=DRAWS, step=0):
  """Those of a token of many rows."""
  return sample.row_uniforms(jax.random.key(seed), jnp.arange(rows), step + 1, jnp.float32)[:, step]


def truncated(logits, temperature, top_k, top_p):
  """The renormalized distribution of one row and the mass kept, float64: tokens enter the nucleus
  from the most likely down until its mass reaches top_p."""
  p = np.exp(numpy_log_softmax(np.asarray(logits, np.float64) / temperature))
  kept = np.ones(len(p), bool)
  if top_k:
    kept = p >= np.sort(p)[-top_k]
  inside = np.where(kept, p, 0) / p[kept].sum()
  nucleus, mass = np.zeros(len(p), bool), 0.0
  for token in np.argsort(-inside):
    if mass >= top_p:
      break
    nucleus[token], mass = True, mass + inside[token]
  kept &= nucleus
  return np.where(kept, p, 0) / p[kept].sum(), p[kept].sum()


# --- a scripted model ---

SCRIPT_VOCAB, SCRIPT_EOS, SCRIPT_PAD = 8, 7, 0


def scripted(on_forward=lambda: None, logits=None) -> Model:
  """A `Model` whose next-token logits are a function of the last token: by default token k is
  followed by k + 1 (so a prompt that ends in k reaches EOS = 7 after 7 - k tokens), or by the
  table `logits` [V, V]."""
  table = np.asarray(60 * np.eye(SCRIPT_VOCAB)[(np.arange(SCRIPT_VOCAB) + 1) % SCRIPT_VOCAB]
                     if logits is None else logits, np.float32)

  def forward(params, tokens, positions, valid, cache):
    jax.debug.callback(on_forward)
    return jnp.asarray(table)[tokens], cache

  return Model(family='scripted', config=types.SimpleNamespace(vocab_size=SCRIPT_VOCAB),
               vocab_in_use=SCRIPT_VOCAB, specs={}, forward=forward,
               head=lambda params: Head(None, SCRIPT_VOCAB),
               init_cache=lambda batch, length: {}, unstack=lambda params: params, to_hf=dict,
               refill=lambda cache, new, source: cache)


def sampler_of(model, **changes):
  """The compiled sampler of a scripted model."""
  knobs = dict(max_new_tokens=5, temperature=1.0, top_p=1.0, top_k=0, stop_tokens=(SCRIPT_EOS,),
               pad_token=SCRIPT_PAD)
  return quick_jit(functools.partial(sample.sample_fn, model=model, **{**knobs, **changes}))


WIDTH, ROOM = 4, 5
PROMPT = st.lists(st.integers(1, SCRIPT_VOCAB - 1), min_size=1, max_size=WIDTH)


def check_bookkeeping(rollout, prompts):
  """Everything that must hold for any rollout, in plain loops over `types.py`'s convention."""
  r = jax.tree.map(np.asarray, rollout)
  tokens, mask = r.tokens, r.mask
  total = WIDTH + ROOM
  assert r.prompt_length == WIDTH and tokens.shape == (len(prompts), total)
  assert mask.shape == (len(prompts), total - 1)
  assert r.sampler_logprobs.shape == r.policy_offset.shape == mask.shape
  for b, prompt in enumerate(prompts):
    assert tokens[b, :WIDTH].tolist() == [SCRIPT_PAD] * (WIDTH - len(prompt)) + prompt
    completion = tokens[b, WIDTH:].tolist()
    ends = SCRIPT_EOS in completion
    length = completion.index(SCRIPT_EOS) + 1 if ends else ROOM
    assert bool(r.ended[b]) == ends
    assert completion[length:] == [SCRIPT_PAD] * (ROOM - length), 'something after EOS'
    for t in range(total):
      real = WIDTH - len(prompt) <= t < WIDTH + length
      assert bool(r.valid[b, t]) == real
    for t in range(total - 1):
      chosen = WIDTH <= t + 1 < WIDTH + length  # entry t belongs to tokens[t + 1]
      assert mask[b, t] == float(chosen)
      if not chosen:
        assert r.sampler_logprobs[b, t] == 0 and r.policy_offset[b, t] == 0


# --- a real model ---

PROMPTS = [[5, 9, 11, 2], [7], [3, 3, 8], [1, 2]]
EOS = 4


@functools.lru_cache  # one program for all tests with the same settings
def real_sampler(model, jit=quick_jit, **changes):
  """The compiled sampler."""
  knobs = dict(max_new_tokens=8, temperature=1.0, top_p=1.0, top_k=0, stop_tokens=(EOS,),
               pad_token=0)
  return jit(functools.partial(sample.sample_fn, model=model, **{**knobs, **changes}))


@functools.lru_cache
def real_scorer(model, temperature, jit=quick_jit):
  """The compiled scorer, for log-probs."""
  return jit(functools.partial(
      score.teacher_logprob_fn, model=model, temperature=temperature, wants=Wants(logprobs=True),
      chunk_tokens=1000, microbatch_rows=0))
