"""What is measured on a few completions that the student writes: the checks, which have both models
grade them, and how far an export is from the model that was evaluated."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import models
from opd_jax.algorithm import score
from opd_jax.build import Parts
from opd_jax.data import prompts as prompts_lib
from opd_jax.data.examples import Examples
from opd_jax.data.streams import OWN
from opd_jax.doctor import lowered
from opd_jax.doctor.finding import FAIL, OK, SKIPPED, WARN, Finding
from opd_jax.files.huggingface import LoadedModel
from opd_jax.models import flax_module, lora
from opd_jax.parallel import hosts, sharding
from opd_jax.run import evaluate, evaluator
from opd_jax.settings import Doctor, Run
from opd_jax.types import Params, Wants

DTYPES = ('float32', 'bfloat16')  # of an export
LOOK = 128  # tokens of a completion in a look on a CPU: they are most of its time
FAR = 3.0  # nats a token; a student at 3.1 did not collapse, one at 5.4 did (docs/results.md)
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


def take_probe(run: Run, parts: Parts, student: Params, teacher: Params | None,
               look: bool = False) -> Probe:
  """Lets the student write `doctor.rollouts` completions and both models grade them; on a CPU, to
  `look` only, shorter ones (`_room`), with a sampler that is compiled without optimizing."""
  quick = look and jax.default_backend() == 'cpu'
  by_rows = sharding.by_rows(parts.mesh)
  room = _room(run, quick)
  sample = evaluator.make_sampler(run, parts.student.model, parts.stop_tokens, parts.pad_token,
                                  max_new_tokens=room)

  def write(student, prompts, key):
    return sample(student, prompts, key)

  model = parts.teacher and parts.teacher.model
  compare = jax.jit(functools.partial(
      evaluate.compare, model=parts.student.model, teacher=model,
      temperature=run.sample.temperature, teacher_temperature=run.objective.teacher_temperature,
      chunk_tokens=parts.chunk_tokens), out_shardings=by_rows)
  prompts = _prompts(run, parts.examples[OWN], parts.mesh)
  with jax.set_mesh(parts.mesh):
    program = jax.jit(write, out_shardings=by_rows,
                      compiler_options=lowered.look_options() if quick else None)
    rollout = jax.block_until_ready(program(student, prompts, jax.random.key(run.seed)))
    if parts.apart:
      score_it = jax.jit(functools.partial(
          score.teacher_logprob_fn, model=model, temperature=1.0, wants=Wants(hidden=True),
          chunk_tokens=parts.apart.chunk_tokens, microbatch_rows=0),
          out_shardings=sharding.by_rows(parts.apart.mesh))
      teacher = evaluate.See(parts.apart, score_it, model)(teacher, rollout)
    rollout, scores = hosts.fetch((rollout, compare(student, teacher, rollout)))
  scores = {name: np.asarray(x, np.float64) for name, x in scores.items()}
  own = scores['logprobs']
  return Probe(
      mask=np.asarray(rollout.mask, np.float64),
      gap=np.asarray(rollout.sampler_logprobs + rollout.policy_offset, np.float64) - own,
      logratio=scores['teacher_logprobs'] - own if teacher is not None else None,
      teacher_entropy=scores.get('teacher_entropy'), ended=np.asarray(rollout.ended),
      tokens=np.asarray(rollout.tokens), room=room)


def _room(run, quick):
  """How many tokens a completion may have: a quick look takes fewer where the run allows more than
  would be looked at anyway, unless somebody said how many."""
  asked, usual = run.doctor.max_new_tokens, Doctor().max_new_tokens
  allowed = run.data.max_new_tokens
  return LOOK if quick and asked == usual < allowed else min(asked, allowed)


def _prompts(run, examples, mesh):
  """The first `doctor.rollouts` prompts, or a few more where the mesh splits rows; as wide as the
  longest of them."""
  shards = sharding.row_shards(mesh)
  count = -(-run.doctor.rollouts // shards) * shards
  prompts = examples.prompts(np.arange(count) % len(examples))
  longest = int(prompts.valid.sum(axis=1).max())
  return sharding.put(jax.tree.map(lambda x: x[:, -longest:], prompts), sharding.by_rows(mesh))


def measure_export(run: Run, student: LoadedModel, stop_tokens: tuple[int, ...],
                   examples: Examples, mesh: jax.sharding.Mesh, params: Params,
                   dtypes: tuple[str, ...] = DTYPES) -> dict[str, float]:
  """Measures the KL of a model to what an export holds of it, exactly, in nats a token of
  `doctor.rollouts` completions that the model writes.

  Both compute in float32: what is left is what merging and rounding did to the weights.

  Args:
    run, student, stop_tokens, examples, mesh: of the run whose model it is.
    params: of the model as it was evaluated, adapters beside the base.
    dtypes: of the exports to compare with.

  Returns:
    By dtype: the mean of sum_v p (log p - log p_export).
  """
  wide = student.model
  if wide.family != flax_module.FAMILY:  # a module computes as its own code says
    wide = models.build(wide.to_hf(), vocab_in_use=wide.vocab_in_use, dtype=jnp.float32)
  sample = evaluator.make_sampler(
      run, student.model, stop_tokens, prompts_lib.pad_id(student.tokenizer),
      max_new_tokens=min(run.data.max_new_tokens, run.doctor.max_new_tokens))

  how = dict(model=wide, teacher=wide, temperature=run.sample.temperature,
             teacher_temperature=run.sample.temperature,
             chunk_tokens=run.compute.chunk_tokens * sharding.row_shards(mesh))

  def look(params, prompts, key):
    rollout = sample(params, prompts, key)
    with jax.default_matmul_precision('float32'):
      return rollout.mask, {dtype: evaluate.compare(
          params, lora.written_as(params, dtype), rollout, **how)['kl'] for dtype in dtypes}

  with jax.set_mesh(mesh):
    program = jax.jit(look, out_shardings=sharding.by_rows(mesh))
    mask, kl = hosts.fetch(program(params, _prompts(run, examples, mesh),
                                   jax.random.key(run.seed)))
  return {dtype: float(np.sum(x * mask, dtype=np.float64) / max(mask.sum(), 1.0))
          for dtype, x in kl.items()}


def describe_export(name: str, dtype: str, kl: dict[str, float]) -> str:
  """Says what `measure_export` found of a run's export in `dtype`, and of others."""
  others = ''.join(f', in {other} {value:.1e}' for other, value in kl.items() if other != dtype)
  return (f'{name} export in {dtype}: KL {kl[dtype]:.1e} nats a token from the student that was '
          f'evaluated, on its own completions{others}')


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
  far = kl > min(limit / 2, FAR)  # a limit that was raised does not bring the teacher nearer
  detail += '; the first token stands out: compare templates' if odd else ''
  if far and run.objective.needs_teacher and run.data.on_policy_fraction == 1 and (
      not run.data.warm_steps):
    detail += ("; from so far the student is likely to end in a few tokens that it repeats, with a "
               "falling loss: begin with the teacher's text and the forward KL (preset "
               "'warm_start': data.warm_steps with data.off_policy_source='teacher')")
  return Finding('support', WARN if odd or far else OK, detail)


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
  if p.room < room and not p.ended.any():
    return Finding('truncation', WARN, f'{detail}; the run allows {room}, and whether they end '
                   'there cannot be said', 'doctor.max_new_tokens')
  if p.room < room:
    return Finding('truncation', OK, f'{detail}; the run allows {room}')
  return Finding('truncation', WARN if share > 0.25 else OK, detail, 'data.max_new_tokens')
