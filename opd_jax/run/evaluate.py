"""Evaluation on held-out problems: avg@k, pass@k, greedy accuracy, reverse KL to the teacher."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import scipy.stats

from opd_jax.algorithm import buckets, divergences, metrics, score, vocabulary
from opd_jax.data import examples as examples_lib
from opd_jax.models import layout
from opd_jax.parallel import hosts, sharding
from opd_jax.parallel.apart import Apart
from opd_jax.run import texts as texts_lib
from opd_jax.types import Head, Model, Params, Rollout

OVERLAP = ('overlap_count', 'overlap_mass', 'mass_outside')
BY_TEACHER = ('reverse_kl', 'teacher_logprob', *OVERLAP)  # what a teacher says of the samples


def pass_at_k(rewards: np.ndarray, k: int) -> np.ndarray:
  """Estimates, without bias, P(at least one of k samples is right), per problem.

  1 - C(n - c, k) / C(n, k) with c of n samples right (Chen et al. 2021, arXiv 2107.03374, eq. 1).

  Args:
    rewards: [problems, n], 1 for right.
    k: at most n.

  Raises:
    ValueError: k outside 1..n.
  """
  n = rewards.shape[1]
  if not 1 <= k <= n:
    raise ValueError(f'pass@k with k={k}; allowed: 1 to {n}, the samples per problem')
  wrong = n - (rewards >= 1.0).sum(axis=1)
  # The product form of the ratio of binomials: exact, and no overflow.
  ratio = np.ones(len(rewards))
  for i in range(k):
    ratio *= np.maximum(wrong - i, 0) / (n - i)
  return 1.0 - ratio


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
  """Bootstraps a percentile interval of the mean over problems (the unit that was drawn)."""
  if np.ptp(values) == 0.0:  # nothing to resample: scipy would warn and return NaN
    return float(values[0]), float(values[0])
  result = scipy.stats.bootstrap((values,), np.mean, confidence_level=level, method='percentile',
                                 n_resamples=2000, rng=np.random.default_rng(0))
  return float(result.confidence_interval.low), float(result.confidence_interval.high)


def pass_curve(rewards: np.ndarray) -> dict[str, float]:
  """Estimates pass@k for k = 1, 2, 4, ... up to the samples per problem, means over problems."""
  ks = [2**i for i in range(rewards.shape[1].bit_length())]
  return {str(k): float(pass_at_k(rewards, k).mean()) for k in ks}


def by_group(groups: list[str], rewards: np.ndarray) -> dict[str, float]:
  """Averages by part of the problems, with intervals as of the whole.

  Args:
    groups: of each problem, '' for none.
    rewards: [problems, samples].

  Returns:
    Of each group its mean, as NAME, NAME_low and NAME_high, and NAME_problems, how many it has.
  """
  out, means = {}, rewards.mean(axis=1).astype(np.float64)
  for name in sorted(set(groups) - {''}):
    values = means[[group == name for group in groups]]
    low, high = interval(values)
    out |= {name: float(values.mean()), f'{name}_low': low, f'{name}_high': high,
            f'{name}_problems': len(values)}
  return out


@struct.dataclass
class Seen:
  """What a teacher on devices of its own says of a rollout, in place of its parameters."""

  hidden: jax.Array  # [B, C, D]
  head: Head


@dataclasses.dataclass(frozen=True)
class See:
  """Lets a teacher on devices of its own look at a rollout of the student.

  Attributes:
    apart: the way there and back.
    program: compiled (params, rollout) -> scores with hidden states.
    model: the teacher's.
  """

  apart: Apart
  program: Callable[..., Any]
  model: Model

  def __call__(self, params: Params, rollout: Rollout) -> Seen:
    """Returns what `compare` takes, on the student's devices."""
    hidden = self.apart.call(self.program, params, rollout).hidden
    return Seen(hidden, self.apart.bring(self.model.head(params)))


def compare(params: Params, teacher_params: Params | Seen | None, rollout: Rollout, *,
            model: Model, teacher: Model | None, temperature: float, teacher_temperature: float,
            chunk_tokens: int, overlap_top_ks: tuple[int, ...] = ()) -> dict[str, Array]:
  """Looks at a rollout as student and teacher see it, token by token, float32 [B, T-1]: logprobs,
  entropy, teacher_logprobs, teacher_entropy, kl = sum_v p_S (log p_S - log p_T), and for each k
  asked for what `metrics.overlap` says, as overlap_count_K and so on. Without a teacher only the
  first two."""
  mine, theirs = score.completion_hidden(model, params, rollout), None
  head = layout.whole_head(model.head(params), mine.dtype)
  if isinstance(teacher_params, Seen):
    theirs = teacher_params.hidden
    teacher_head = layout.whole_head(teacher_params.head, theirs.dtype)
  elif teacher is not None:
    theirs = score.completion_hidden(teacher, teacher_params, rollout)
    teacher_head = layout.whole_head(teacher.head(teacher_params), theirs.dtype)

  def chunk(mine, targets, theirs):
    own = score.log_softmax(mine, head, temperature)
    out = {'logprobs': score.pick(own, targets), 'entropy': score.entropy_of(own)}
    if theirs is not None:
      other = score.log_softmax(theirs, teacher_head, teacher_temperature)
      out |= {'teacher_logprobs': score.pick(other, targets),
              'teacher_entropy': score.entropy_of(other),
              'kl': jnp.sum(divergences.reverse_kl(*score.same_width(own, other)), axis=-1)}
      for k in overlap_top_ks:
        both = metrics.overlap(*score.same_width(own, other), k)
        out |= {f'{name}_{k}': value for name, value in both.items()}
    return out

  out = vocabulary.map_over_chunks(chunk, chunk_tokens, mine, rollout.completion_targets, theirs)
  return {name: score.to_rows(x, rollout) for name, x in out.items()}


def row_sums(params: Params, teacher_params: Params | Seen, rollout: Rollout, *,
             microbatch_rows: int, overlap_top_k: int, **how: Any) -> dict[str, Array]:
  """Sums over the mask by row, float32 [B]: reverse_kl, the exact one; teacher_logprob, log p_T of
  the tokens; overlap_count, overlap_mass and mass_outside (`metrics.overlap`) unless overlap_top_k
  is 0; and tokens, of the mask.

  `how` is that of `compare`, and `microbatch_rows` the rows of a forward pass, 0 for all.
  """
  names = {'kl': 'reverse_kl', 'teacher_logprobs': 'teacher_logprob'}
  if overlap_top_k:
    names |= {f'{name}_{overlap_top_k}': name for name in OVERLAP}

  apart = isinstance(teacher_params, Seen)

  def sums(xs):
    rows, hidden = xs
    theirs = teacher_params.replace(hidden=hidden) if apart else teacher_params
    seen = compare(params, theirs, rows, **how,
                   overlap_top_ks=(overlap_top_k,) if overlap_top_k else ())
    return {name: jnp.sum(seen[key], axis=1) for key, name in names.items()}

  xs = (rollout, teacher_params.hidden if apart else None)
  out = buckets.join_rows(jax.lax.map(sums, buckets.split_rows(xs, microbatch_rows)))
  return out | {'tokens': jnp.sum(rollout.mask, axis=1)}


def clamp_top_k(k: int, model: Model) -> int:
  """Limits k to half of the vocabulary: of all tokens, the k most likely are any model's."""
  return min(k, model.vocab_in_use // 2)


class Evaluator:
  """Compiled evaluation of one model on one fixed set of problems.

  The same problems and the same random key every time, so that differences between steps are the
  model's.

  Attributes:
    sample, greedy, compare: the compiled functions.
    graded: whether the task grades these examples.
  """

  def __init__(self, *, sample: Callable[..., Rollout], greedy: Callable[..., Rollout],
               compare: Callable[..., dict[str, Array]] | None, samples_per_problem: int,
               pass_k: int, task: Any, examples: examples_lib.Examples, tokenizer: Any,
               mesh: jax.sharding.Mesh, key: jax.Array,
               see: See | None = None):
    """Takes what evaluates.

    Args:
      sample, greedy: compiled (params, prompts, key) -> rollout; the second takes the most likely
        tokens.
      compare: compiled (params, teacher_params, rollout) -> `row_sums`; None without a teacher.
      samples_per_problem, pass_k: how many are drawn, and the k of pass@k.
      task, examples: what is asked and how it is graded.
      tokenizer: of the answers.
      mesh: where prompts go.
      key: of all draws.
      see: (teacher_params, rollout) -> what takes their place for `compare`; of a teacher on other
        devices.
    """
    self.sample, self.greedy, self.compare = sample, greedy, compare
    self._count, self._pass_k, self._task, self._tokenizer = (
        samples_per_problem, pass_k, task, tokenizer)
    self._key, self.see = key, see
    self.rows, self._text = examples.rows, examples.text
    self.graded = examples_lib.has_verifier(task, examples)
    self._prompts, self._mesh = examples.prompts(np.arange(len(examples))), mesh

  def __call__(self, params: Params, teacher_params: Params | None, transcripts: int
               ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns (metrics, some transcripts).

    Metrics: sampled_accuracy (avg@k), pass@k, greedy_accuracy, each with `_low`, `_high`
    (none of them where the task does not grade these examples); pass_at, the curve of pass@k, where
    there are at least 4 samples; by_group and measures, where the task has them; with a teacher,
    on the student's own samples, reverse_kl (exact, nats a token), teacher_logprob (log p_T of the
    tokens), overlap_count, overlap_mass and mass_outside (`metrics.overlap`), all token means;
    text/compression, text/distinct_4, text/shared_4 (run/texts); mean length; truncation rate.
    """
    rollout = jax.block_until_ready(self.sample(params, self._put(self._count), self._key))
    graded = [row for row in self.rows for _ in range(self._count)]
    seen = hosts.fetch(rollout)
    rewards, texts = examples_lib.grade(self._task, graded, seen, self._tokenizer)
    rewards = rewards.reshape(len(self.rows), self._count)
    out = self._accuracies(params, rewards) if self.graded else {}
    if self.compare is not None and teacher_params is not None:
      theirs = self.see(teacher_params, rollout) if self.see else teacher_params
      sums = hosts.fetch(self.compare(params, theirs, rollout))
      count = sums.pop('tokens').sum()
      out |= {name: float(sums[name].sum() / count) for name in BY_TEACHER
              if name in sums}
    if measures := examples_lib.measure(self._task, graded, seen, texts, self._tokenizer):
      out['measures'] = measures
    out['text'] = {'compression': texts_lib.compression(texts), **texts_lib.text_metrics(
        seen.tokens[:, 1:], seen.mask, self._count)}
    out['length'] = float(seen.mask.sum(axis=1).mean())
    out['truncation_rate'] = float(1.0 - seen.ended.mean())
    shown = [{'prompt': self._text(i // self._count), 'completion': texts[i],
              'reward': float(rewards.reshape(-1)[i]) if self.graded else None}
             for i in range(0, min(transcripts, len(self.rows)) * self._count,
                            self._count)]
    return out, shown

  def _put(self, times):
    """Every problem so many times, on the devices."""
    return sharding.put(jax.tree.map(lambda x: np.repeat(x, times, axis=0), self._prompts),
                        sharding.by_rows(self._mesh))

  def _accuracies(self, params, rewards):
    greedy = jax.block_until_ready(self.greedy(params, self._put(1), self._key))
    greedy_rewards, _ = examples_lib.grade(self._task, self.rows, greedy, self._tokenizer)
    out, k = {}, self._pass_k
    for name, values in (('sampled_accuracy', rewards.mean(axis=1)),
                         (f'pass_at_{k}', pass_at_k(rewards, k)),
                         ('greedy_accuracy', greedy_rewards)):
      values = values.astype(np.float64)
      out[name] = float(values.mean())
      out[f'{name}_low'], out[f'{name}_high'] = interval(values)
    if self._count >= 4:
      out['pass_at'] = pass_curve(rewards)
    if hasattr(self._task, 'group') and any(groups := list(map(self._task.group, self.rows))):
      out['by_group'] = by_group(groups, rewards)
    return out

  def compile_count(self) -> int:
    """Counts the programs that this evaluator has compiled."""
    programs = (self.sample, self.greedy, self.compare)
    return sum(program._cache_size() for program in programs if program is not None)
