"""The checks on a few completions that the student writes and both models grade."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from opd_jax import build
from opd_jax.build import Parts
from opd_jax.data.streams import OWN
from opd_jax.doctor.finding import FAIL, OK, SKIPPED, WARN, Finding
from opd_jax.parallel import sharding
from opd_jax.run import evaluate
from opd_jax.settings import Run
from opd_jax.types import Params

# By compute.dtype: the most of KL(sampler, scorer); and of the largest difference at a token, what
# is worth a look and what is no rounding. A real model of 30 layers is at 4e-5, and in bfloat16 at
# 0.2 to 0.6.
SELF_KL = {'float32': (1e-3, 1e-3, 1e-2), 'bfloat16': (5e-2, 0.25, 1.0)}


@dataclasses.dataclass(frozen=True)
class Probe:
  """A few rollouts as both models see them; arrays float64 [B, T-1] on the host.

  Attributes:
    mask: 1 on the tokens that the student chose.
    gap: log-prob by the sampler minus log-prob by the scorer, of the same student.
    logratio: log p_T - log p_S of the chosen tokens; None without a teacher, as what follows.
    teacher_entropy: in nats.
    ended: bool [B].
    tokens: int [B, T].
    room: tokens that a completion could have.
  """

  mask: np.ndarray
  gap: np.ndarray
  logratio: np.ndarray | None
  teacher_entropy: np.ndarray | None
  ended: np.ndarray
  tokens: np.ndarray
  room: int

  def mean(self, values: np.ndarray) -> float:
    """Averages over the chosen tokens."""
    return float((values * self.mask).sum() / max(self.mask.sum(), 1.0))


def take_probe(run: Run, parts: Parts, student: Params, teacher: Params | None) -> Probe:
  """Lets the student write `doctor.rollouts` completions and both models grade them."""
  shards = sharding.row_shards(parts.mesh)
  count = -(-run.doctor.rollouts // shards) * shards
  room = min(run.data.max_new_tokens, run.doctor.max_new_tokens)
  sample = build.make_sampler(run, parts.student.model, parts.stop_tokens, parts.pad_token,
                              max_new_tokens=room)

  def look(student, teacher, prompts, key):
    rollout = sample(student, prompts, key)
    return rollout, evaluate.compare(
        student, teacher, rollout, model=parts.student.model,
        teacher=parts.teacher and parts.teacher.model, temperature=run.sample.temperature,
        teacher_temperature=run.objective.teacher_temperature,
        chunk_tokens=run.compute.chunk_tokens)

  indices = np.arange(count) % len(parts.examples[OWN])
  prompts = sharding.put(parts.examples[OWN].prompts(indices), sharding.by_rows(parts.mesh))
  with jax.set_mesh(parts.mesh):
    program = jax.jit(look, out_shardings=sharding.by_rows(parts.mesh))
    rollout, scores = jax.device_get(program(student, teacher, prompts, jax.random.key(run.seed)))
  scores = {name: np.asarray(x, np.float64) for name, x in scores.items()}
  own = scores['logprobs']
  return Probe(
      mask=np.asarray(rollout.mask, np.float64),
      gap=np.asarray(rollout.sampler_logprobs + rollout.policy_offset, np.float64) - own,
      logratio=scores['teacher_logprobs'] - own if teacher is not None else None,
      teacher_entropy=scores.get('teacher_entropy'), ended=np.asarray(rollout.ended),
      tokens=np.asarray(rollout.tokens), room=room)


def check_self_kl(run: Run, parts: Parts, p: Probe) -> Finding:
  """Checks the student as its own teacher: sampler and scorer must be one distribution, at every
  token."""
  gap = np.where(p.mask > 0, p.gap, 0.0)
  kl, worst = p.mean(gap), float(np.abs(gap).max())
  dtype = run.compute.dtype
  limit, look, most = SELF_KL[dtype]
  detail = f'KL(sampler, scorer) of the student {kl:.1e}, largest difference {worst:.1e} nats'
  if not (abs(kl) < limit and worst < most):  # NaN fails too
    return Finding('self_kl', FAIL, f'{detail}; allowed in {dtype}: below {limit}, and below '
                   f'{most} at any token', 'compute.dtype')
  if worst > look:
    return Finding('self_kl', WARN, f'{detail}, a ratio of {math.exp(worst):.2f}, more than the '
                   f'{look} to expect of {dtype}', 'compute.dtype')
  return Finding('self_kl', OK, detail)


def check_uniform_teacher(run: Run, parts: Parts, p: Probe) -> Finding:
  """Checks for a teacher that lost its weights: it is uniform, and the loss looks healthy."""
  if p.teacher_entropy is None:
    return Finding('uniform_teacher', SKIPPED, 'no teacher')
  entropy, most = p.mean(p.teacher_entropy), math.log(parts.teacher.model.vocab_in_use)
  detail = f'teacher entropy {entropy:.3f} of at most ln V = {most:.3f} nats'
  if not entropy < 0.95 * most:
    return Finding('uniform_teacher', FAIL, f'{detail}; allowed: below 95 % of it', 'teacher.path')
  return Finding('uniform_teacher', OK, detail)


def check_support(run: Run, parts: Parts, p: Probe) -> Finding:
  """Checks how likely the teacher finds what the student writes."""
  if p.logratio is None or run.data.source != 'student':
    return Finding('support', SKIPPED, 'nothing that the student wrote is graded by a teacher')
  kl, first = -p.mean(p.logratio), p.mask.argmax(axis=1)
  at_first = -p.logratio[np.arange(len(first)), first]
  detail = (f'log p_S - log p_T: {kl:.3f} nats a token, {at_first.mean():.3f} at the first one, of '
            f'which the median is {np.median(at_first):.3f} (from {int(p.mask.sum())} tokens)')
  limit = run.doctor.max_reverse_kl
  if not kl < limit:
    return Finding('support', FAIL, detail + f'; allowed: below doctor.max_reverse_kl={limit}; the '
                   "teacher hardly knows the student's text: compare templates, train the student "
                   'on teacher samples first, or choose a closer teacher', 'teacher.path')
  # Another template shows in nearly every first token; without one it may be the student's habit.
  odd = run.prompt.template != 'none' and np.median(at_first) > max(1.0, 3 * kl)
  return Finding('support', WARN if odd or kl > limit / 2 else OK, detail
                 + ('; the first token stands out: compare templates' if odd else ''))


def check_special_tokens(run: Run, parts: Parts, p: Probe) -> Finding:
  """Checks for special tokens within completions, other than those that end them."""
  special = (set(parts.student.tokenizer.all_special_ids) - set(parts.stop_tokens)
             - {parts.pad_token})
  chosen = p.tokens[:, 1:][p.mask > 0]
  seen = sorted(special & set(chosen.tolist()))
  if seen:
    share = float(np.isin(chosen, seen).mean())
    names = parts.student.tokenizer.convert_ids_to_tokens(seen[:5])
    return Finding('special_tokens', WARN, f'{share:.1%} of the tokens written are {names}',
                   'sample.stop')
  return Finding('special_tokens', OK, f'none within {len(p.ended)} completions')


def check_truncation(run: Run, parts: Parts, p: Probe) -> Finding:
  """Checks how many completions will not end in their room."""
  share, room = 1.0 - float(p.ended.mean()), run.data.max_new_tokens
  detail = f'{share:.0%} of {len(p.ended)} completions do not end within {p.room} tokens'
  if p.room < room:
    return Finding('truncation', OK, f'{detail}; the run allows {room}')
  return Finding('truncation', WARN if share > 0.25 else OK, detail, 'data.max_new_tokens')
