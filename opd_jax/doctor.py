"""Whether a student, a teacher and a config belong together: `opd doctor`, and every start.

Runs that cannot be reproduced fail first of all on templates, end-of-text tokens and vocabularies,
and a wrong pairing trains without a complaint: here it is found before the first step. Every check
has a switch in `config.doctor`: 'on', or 'off: REASON', which goes to the log.

The checks named in STATIC look at configs, tokenizers and shapes; those in ROLLOUTS at a few
completions that the student writes and both models grade.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import json
import math
import os
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from rich.console import Console
from rich.table import Table

from opd_jax import build, checks, evaluate, lora, params, sharding, tokenizer
from opd_jax import config as config_lib
from opd_jax.types import Params

OK, WARN, FAIL, OFF, SKIPPED = 'ok', 'warn', 'FAIL', 'off', 'skipped'
GIB = 2**30
RESULT = 'doctor.json'


@dataclasses.dataclass(frozen=True)
class Finding:
  """What a check found.

  Attributes:
    check: its name, which is that of its switch in `config.doctor`.
    status: OK, WARN (worth a look), FAIL (no run starts), OFF (by its switch), SKIPPED (nothing to
      compare).
    detail: what was seen.
    field: the config field to change.
  """

  check: str
  status: str
  detail: str
  field: str = ''


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
    """Over the chosen tokens."""
    return float((values * self.mask).sum() / max(self.mask.sum(), 1.0))


# --- What can be seen without running a model ---


def check_templates(c: ConfigDict, s: build.Setup) -> Finding:
  """Both models must see the same prompt, in the form that each was trained on."""
  if s.teacher is None:
    return Finding('templates', SKIPPED, 'no teacher')
  prompts = [s.task.prompt(row) for row in s.examples.rows[:16]]
  # With prompt.template='teacher' both are given what the teacher knows.
  bad = WARN if c.prompt.template == 'teacher' else FAIL
  if s.style.chat is not None and not s.teacher.tokenizer.chat_template:
    return Finding('templates', WARN, 'the teacher has no chat template, and grades prompts in the '
                   "student's", 'prompt.template')
  texts, ids = {}, {}
  for who, m in (('student', s.student), ('teacher', s.teacher)):
    style = s.style
    if style.chat is not None and m.tokenizer.chat_template:
      # Each in its own template. A student without one learns the teacher's.
      style = dataclasses.replace(style, chat=m.tokenizer)
    try:
      texts[who] = tokenizer.render_text(style, prompts)
      ids[who] = tokenizer.render(m.tokenizer, s.style, prompts)  # what the run really feeds
    except ValueError as e:
      return Finding('templates', bad, f'the {who} cannot be given the prompts: {e}',
                     'prompt.template')
  for what, seen, field in (('token ids of the same prompt', ids, 'teacher.path'),
                            ('prompts', texts, 'prompt.template')):
    for mine, theirs in zip(seen['student'], seen['teacher'], strict=True):
      if mine != theirs:
        detail = f'{what} for the student and for the teacher differ {_difference(mine, theirs)}'
        if bad == WARN and seen is texts:
          return Finding('templates', WARN, detail + '; both get the second', 'prompt.template')
        allowed = "the same one, or prompt.template='teacher'" if seen is texts else (
            'a tokenizer that encodes alike')
        return Finding('templates', FAIL, f'{detail}; allowed: a teacher with {allowed}', field)
  return Finding('templates', OK, f'{len(prompts)} prompts rendered alike: {texts["student"][0]!r}')


def _difference(mine: Any, theirs: Any) -> str:
  """Where two texts or lists of ids begin to differ, with what is around it."""
  place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
               min(len(mine), len(theirs)))
  start = max(place - 20, 0)
  return f'from place {place} on: {mine[start:place + 20]!r} and {theirs[start:place + 20]!r}'


def check_token_ids(c: ConfigDict, s: build.Setup) -> Finding:
  """The same string must have the same id, or the teacher reads another text."""
  if s.teacher is None:
    return Finding('token_ids', SKIPPED, 'no teacher')
  mine, theirs = s.student.tokenizer.get_vocab(), s.teacher.tokenizer.get_vocab()
  differ = sorted((i, t) for t, i in mine.items() if theirs.get(t, i) != i)
  only_mine, only_theirs = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
  if not (differ or only_mine or only_theirs):
    return Finding('token_ids', OK, f'{len(mine)} tokens, the same ids')
  return Finding(
      'token_ids', FAIL,
      f"its vocabulary ({len(theirs)} tokens) is not the student's ({len(mine)} tokens): "
      f'{len(differ)} with other ids {[t for _, t in differ[:3]]}, only the student has '
      f'{only_mine[:3]}, only the teacher {only_theirs[:3]}; allowed: a teacher that maps the same '
      'strings to the same token ids', 'teacher.path')


def check_stop_tokens(c: ConfigDict, s: build.Setup) -> Finding:
  """A run must end where its teacher ends, or the teacher grades what it would never write."""
  if s.teacher is None:
    return Finding('stop_tokens', SKIPPED, 'no teacher')

  def named(ids):
    return {int(i): s.student.tokenizer.convert_ids_to_tokens(int(i)) for i in sorted(ids)}

  used, theirs = set(s.stop_tokens), set(s.teacher.stop_tokens)
  if used == theirs:
    return Finding('stop_tokens', OK, f'both end with {named(used)}')
  detail = f'the run ends with {named(used)} and the teacher with {named(theirs)}'
  if theirs - used:
    return Finding('stop_tokens', FAIL, detail + ", so the student is graded past the teacher's "
                   "end; allowed: sample.stop='union' or 'teacher', or a teacher with the same "
                   'eos_token_id', 'sample.stop')
  return Finding('stop_tokens', WARN, detail + '; the teacher grades the others as unlikely',
                 'sample.stop')


def check_vocabulary(c: ConfigDict, s: build.Setup) -> Finding:
  """Heads may be padded to different widths, but must have every token."""
  def sizes(m):
    return f'{m.model.config.vocab_size} wide with {m.model.vocab_in_use} in use'

  detail = f'student {sizes(s.student)}'
  if s.teacher is None:
    return Finding('vocabulary', OK, detail)
  detail += f', teacher {sizes(s.teacher)}'
  if s.student.model.vocab_in_use != s.teacher.model.vocab_in_use:
    return Finding('vocabulary', FAIL, detail + '; allowed: the same number in use', 'teacher.path')
  return Finding('vocabulary', OK, detail + '; what is not in use has probability zero')


def check_memory(c: ConfigDict, s: build.Setup) -> Finding:
  """Bytes a device, by what holds them, against what it has."""
  parts = memory_estimate(c, s)
  total, limit = sum(parts.values()), device_bytes()
  fitted = parts['activations'] + parts['scores']  # no reason to refuse a run that may just fit
  detail = ' + '.join(f'{name} {size / GIB:.2f}' for name, size in parts.items())
  detail = f'{detail} = {total / GIB:.2f} GiB a device ({c.compute.dtype})'
  if limit is None:
    return Finding('memory', WARN, detail + '; the device does not say how much it has')
  detail += f' of {limit / GIB:.1f}'
  if total - fitted / 2 > limit:
    return Finding('memory', FAIL, detail + '; allowed: less, by compute.microbatch_rows, '
                   'compute.chunk_tokens, compute.remat, compute.frozen_dtype, compute.mesh or '
                   'student.lora', 'compute.microbatch_rows')
  return Finding('memory', OK if total < 0.9 * limit else WARN, detail, 'compute.microbatch_rows')


def check_unused_options(c: ConfigDict, s: build.Setup) -> Finding:
  """Options that were set and that nothing reads."""
  unused = checks.unused_options(c)
  if c.compute.mesh.expert > 1 and not any(
      'experts' in spec.axes for m in filter(None, (s.student, s.teacher, s.reference))
      for spec in params.flatten(m.model.specs).values()):
    unused.append(f'compute.mesh.expert={c.compute.mesh.expert} (no model here has experts)')
  if unused:
    return Finding('unused_options', FAIL, f"nothing reads {'; '.join(unused)}; allowed: their "
                   'defaults', unused[0].partition('=')[0])
  return Finding('unused_options', OK, 'every option that was set is read')


def memory_estimate(c: ConfigDict, s: build.Setup) -> dict[str, float]:
  """Bytes on one device: weights and moments exactly, the rest from shapes.

  Activations, for the rows of one pass: what each layer keeps for its backward pass, about 16
  widths a token (2 with compute.remat), in the compute dtype. Scores: attention's float32 [rows,
  heads, T, T], 3 a layer for the backward pass (none with compute.remat) and 5 in the layer at
  work. Both are fits to what XLA allocated, good to about a fifth.
  """
  def weights(specs, bytes_each):
    shardings = params.flatten(sharding.param_shardings(specs, s.mesh))
    return bytes_each * sum(math.prod(shardings[name].shard_shape(spec.shape))
                            for name, spec in params.flatten(specs).items())

  moments = {'adamw': 8, 'sgd': 4 if c.optimizer.b1 else 0}[c.optimizer.name]
  out = {'trained (weights, gradient, moments)': weights(s.trained_specs, 8 + moments)}
  if s.adapter is not None:
    out['base'] = weights(s.student.model.specs, s.frozen_dtype.itemsize)
  shares_base = s.teacher is s.student and s.adapter is not None
  if s.teacher is not None and not shares_base:
    size = 4 if s.teacher is s.student else s.frozen_dtype.itemsize
    out['teacher'] = weights(s.teacher.model.specs, size)
  if s.reference is not None and not (s.reference is s.student and s.adapter is not None):
    size = 4 if s.reference is s.student else s.frozen_dtype.itemsize
    out['reference'] = weights(s.reference.model.specs, size)
  shards = sharding.row_shards(s.mesh)
  rows = c.data.prompts_per_step * c.data.samples_per_prompt
  length = c.data.max_prompt_tokens + c.data.max_new_tokens
  author = s.teacher if c.data.source == 'teacher' else s.student

  def cache(model, rows):
    shapes = jax.eval_shape(lambda: model.init_cache(rows, length))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes)) / shards

  # Never at the same time: the run's rows, and those of an evaluation.
  out['cache'] = max(cache(s.student.model, c.eval.problems * c.eval.samples_per_problem),
                     (cache(author.model, rows) if c.data.source != 'dataset' else 0.0)
                     + (cache(s.teacher.model, rows) if c.sample.teacher_mix else 0.0))
  width = 4 * s.student.model.config.vocab_size / s.mesh.shape['tensor']
  out['logits'] = 4 * min(c.compute.chunk_tokens, rows * length) * width
  a_pass = (c.compute.microbatch_rows or rows) * length / shards
  specs = params.flatten(s.student.model.specs)
  layers = s.student.model.config.num_hidden_layers
  hidden = max((spec.shape[-1] for name, spec in specs.items() if name.endswith('norm')), default=0)
  keep = 2 if c.compute.remat else 16
  out['activations'] = a_pass * hidden * layers * keep * np.dtype(c.compute.dtype).itemsize
  heads = getattr(s.student.model.config, 'num_attention_heads', 1) / s.mesh.shape['tensor']
  out['scores'] = 4 * a_pass * length * heads * (5 if c.compute.remat else 5 + 3 * layers)
  return out


def device_bytes() -> float | None:
  """The memory of one device; on CPUs, the machine's, shared by all fake devices."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() if device.platform != 'cpu' else None
  if stats and 'bytes_limit' in stats:
    return float(stats['bytes_limit'])
  if device.platform == 'cpu':
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / jax.local_device_count()
  return None


# --- What a few rollouts show ---


def take_probe(c: ConfigDict, s: build.Setup, student: Params, teacher: Params | None) -> Probe:
  """Lets the student write `doctor.rollouts` completions and both models grade them."""
  shards = sharding.row_shards(s.mesh)
  count = -(-c.doctor.rollouts // shards) * shards
  room = min(c.data.max_new_tokens, c.doctor.max_new_tokens)
  run = evaluate.make_probe(
      model=s.student.model, teacher=s.teacher and s.teacher.model, mesh=s.mesh,
      max_new_tokens=room, temperature=c.sample.temperature, top_p=c.sample.top_p,
      top_k=c.sample.top_k, stop_tokens=s.stop_tokens, pad_token=s.pad_token,
      teacher_temperature=c.objective.teacher_temperature, chunk_tokens=c.compute.chunk_tokens)
  indices = np.arange(count) % len(s.examples)
  prompts = sharding.put(s.examples.prompts(indices), sharding.by_rows(s.mesh))
  with jax.set_mesh(s.mesh):
    rollout, scores = jax.device_get(run(student, teacher, prompts, jax.random.key(c.seed)))
  scores = {name: np.asarray(x, np.float64) for name, x in scores.items()}
  own = scores['logprobs']
  return Probe(
      mask=np.asarray(rollout.mask, np.float64),
      gap=np.asarray(rollout.sampler_logprobs + rollout.policy_offset, np.float64) - own,
      logratio=scores['teacher_logprobs'] - own if teacher is not None else None,
      teacher_entropy=scores.get('teacher_entropy'), ended=np.asarray(rollout.ended),
      tokens=np.asarray(rollout.tokens), room=room)


def check_self_kl(c: ConfigDict, s: build.Setup, p: Probe) -> Finding:
  """The student as its own teacher: sampler and scorer must be one distribution."""
  kl, worst = p.mean(p.gap), float(np.abs(p.gap * p.mask).max())
  limit = 1e-3 if c.compute.dtype == 'float32' else 5e-2  # rounding is 1e-5 and 1e-2
  detail = f'KL(sampler, scorer) of the student {kl:.1e}, largest difference {worst:.1e} nats'
  if not abs(kl) < limit:  # NaN fails too
    return Finding('self_kl', FAIL, f'{detail}; allowed: below {limit}', 'compute.dtype')
  return Finding('self_kl', OK, detail)


def check_uniform_teacher(c: ConfigDict, s: build.Setup, p: Probe) -> Finding:
  """A teacher that lost its weights is uniform, and the loss looks healthy."""
  if p.teacher_entropy is None:
    return Finding('uniform_teacher', SKIPPED, 'no teacher')
  entropy, most = p.mean(p.teacher_entropy), math.log(s.teacher.model.vocab_in_use)
  detail = f'teacher entropy {entropy:.3f} of at most ln V = {most:.3f} nats'
  if not entropy < 0.95 * most:
    return Finding('uniform_teacher', FAIL, f'{detail}; allowed: below 95 % of it', 'teacher.path')
  return Finding('uniform_teacher', OK, detail)


def check_support(c: ConfigDict, s: build.Setup, p: Probe) -> Finding:
  """How likely the teacher finds what the student writes."""
  if p.logratio is None or c.data.source != 'student':
    return Finding('support', SKIPPED, 'nothing that the student wrote is graded by a teacher')
  kl, first = -p.mean(p.logratio), p.mask.argmax(axis=1)
  at_first = -p.logratio[np.arange(len(first)), first]
  detail = (f'log p_S - log p_T: {kl:.3f} nats a token, {at_first.mean():.3f} at the first one, of '
            f'which the median is {np.median(at_first):.3f} (from {int(p.mask.sum())} tokens)')
  limit = c.doctor.max_reverse_kl
  if not kl < limit:
    return Finding('support', FAIL, detail + f'; allowed: below doctor.max_reverse_kl={limit}; the '
                   "teacher hardly knows the student's text: compare templates, train the student "
                   'on teacher samples first, or choose a closer teacher', 'teacher.path')
  # Another template shows in nearly every first token; without one it may be the student's habit.
  odd = c.prompt.template != 'none' and np.median(at_first) > max(1.0, 3 * kl)
  return Finding('support', WARN if odd or kl > limit / 2 else OK, detail
                 + ('; the first token stands out: compare templates' if odd else ''))


def check_special_tokens(c: ConfigDict, s: build.Setup, p: Probe) -> Finding:
  """Special tokens within completions, other than those that end them."""
  special = set(s.student.tokenizer.all_special_ids) - set(s.stop_tokens) - {s.pad_token}
  chosen = p.tokens[:, 1:][p.mask > 0]
  seen = sorted(special & set(chosen.tolist()))
  if seen:
    share = float(np.isin(chosen, seen).mean())
    names = s.student.tokenizer.convert_ids_to_tokens(seen[:5])
    return Finding('special_tokens', WARN, f'{share:.1%} of the tokens written are {names}',
                   'sample.stop')
  return Finding('special_tokens', OK, f'none within {len(p.ended)} completions')


def check_truncation(c: ConfigDict, s: build.Setup, p: Probe) -> Finding:
  """How many completions will not end in their room."""
  share, room = 1.0 - float(p.ended.mean()), c.data.max_new_tokens
  detail = f'{share:.0%} of {len(p.ended)} completions do not end within {p.room} tokens'
  if p.room < room:
    return Finding('truncation', OK, f'{detail}; the run allows {room}')
  return Finding('truncation', WARN if share > 0.25 else OK, detail, 'data.max_new_tokens')


STATIC = {f.__name__.removeprefix('check_'): f for f in (
    check_templates, check_token_ids, check_stop_tokens, check_vocabulary, check_memory,
    check_unused_options)}
ROLLOUTS = {f.__name__.removeprefix('check_'): f for f in (
    check_self_kl, check_uniform_teacher, check_support, check_special_tokens, check_truncation)}


def examine(c: ConfigDict, s: build.Setup) -> list[Finding]:
  """The checks that run no model."""
  return _run(c, STATIC, c, s)


def examine_rollouts(c: ConfigDict, s: build.Setup, student: Params, teacher: Params | None
                     ) -> list[Finding]:
  """The checks on a few rollouts of the student; nothing is run if all of them are off."""
  if all(_reason(c, name) for name in ROLLOUTS):
    return _run(c, ROLLOUTS)
  return _run(c, ROLLOUTS, c, s, take_probe(c, s, student, teacher))


def _reason(c: ConfigDict, name: str) -> str:
  """Why a check is off; '' if it is on."""
  return '' if c.doctor[name] == 'on' else c.doctor[name].partition(':')[2].strip()


def _run(c: ConfigDict, which: dict[str, Callable[..., Finding]], *args: Any) -> list[Finding]:
  return [Finding(name, OFF, reason, f'doctor.{name}') if (reason := _reason(c, name))
          else check(*args) for name, check in which.items()]


def settle(c: ConfigDict, findings: list[Finding], workdir: pathlib.Path,
           say: Callable[[str], None]) -> None:
  """Writes doctor.json, says what is off or worth a look, and lets no run start on a failure.

  Raises:
    ConfigError: some check failed; names the fields to change.
  """
  partial = workdir / f'.{RESULT}.partial'
  partial.write_text(json.dumps([dataclasses.asdict(f) for f in findings], indent=2) + '\n')
  partial.rename(workdir / RESULT)
  for f in findings:
    if f.status in (WARN, OFF):
      say(f'doctor: {f.check} {f.status}: {f.detail}' + (f' ({f.field})' if f.field else ''))
  require(c, findings)


def require(c: ConfigDict, findings: list[Finding]) -> None:
  """Raises if a check failed.

  Raises:
    ConfigError: names the fields to change.
  """
  failed = [f for f in findings if f.status == FAIL]
  if failed:
    values = [functools.reduce(lambda group, name: group[name], f.field.split('.'), c)
              for f in failed]
    raise config_lib.ConfigError('; '.join(
        f"{f.field}={value!r}: the check '{f.check}' failed: {f.detail}"
        for f, value in zip(failed, values, strict=True))
        + f" (or doctor.{failed[0].check}='off: REASON')")


def table(title: str, findings: list[Finding]) -> Table:
  """For the terminal."""
  out = Table('check', 'result', 'what was seen', 'field', title=title)
  style = {OK: 'green', WARN: 'yellow', FAIL: 'bold red'}
  for f in findings:
    out.add_row(f.check, f.status, f.detail, f.field if f.status in (WARN, FAIL, OFF) else '',
                style=style.get(f.status))
  return out


def diagnose(c: ConfigDict, name: str, console: Console) -> bool:
  """`opd doctor` for one run: every check, as a table.

  Returns:
    Whether none failed.

  Raises:
    ConfigError: the config cannot be built at all.
  """
  checks.validate(c)
  s = build.build(c)
  findings = examine(c, s)
  frozen = build.read_frozen(s)
  student = lora.join(frozen, build.read_trained(s))
  findings += examine_rollouts(c, s, student, build.read_teacher(s, frozen))
  console.print(table(name, findings))
  return all(f.status != FAIL for f in findings)
