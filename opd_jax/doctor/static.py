"""The checks that run no model: configs, tokenizers, shapes."""

from __future__ import annotations

import dataclasses

from opd_jax.build import Parts
from opd_jax.data import prompts as prompts_lib
from opd_jax.data.streams import OWN
from opd_jax.doctor.finding import FAIL, OK, SKIPPED, WARN, Finding
from opd_jax.models import params as params_lib
from opd_jax.rules import run as rules
from opd_jax.settings import Run


def check_templates(run: Run, parts: Parts) -> Finding:
  """Checks that both models see the same prompt, in the form that each was trained on."""
  if parts.teacher is None:
    return Finding('templates', SKIPPED, 'no teacher')
  prompts = [parts.task.prompt(row) for row in parts.examples[OWN].rows[:16]]
  # With prompt.template='teacher' both are given what the teacher knows.
  bad = WARN if run.prompt.template == 'teacher' else FAIL
  if parts.style.chat is not None and not parts.teacher.tokenizer.chat_template:
    return Finding('templates', WARN, 'the teacher has no chat template, and grades prompts in the '
                   "student's", 'prompt.template')
  texts, ids = {}, {}
  for who, m in (('student', parts.student), ('teacher', parts.teacher)):
    style = parts.style
    if style.chat is not None and m.tokenizer.chat_template:
      # Each in its own template. A student without one learns the teacher's.
      style = dataclasses.replace(style, chat=m.tokenizer)
    try:
      texts[who] = prompts_lib.render_text(style, prompts)
      ids[who] = prompts_lib.render(m.tokenizer, parts.style, prompts)  # what the run really feeds
    except ValueError as e:
      return Finding('templates', bad, f'the {who} cannot be given the prompts: {e}',
                     'prompt.template')
  for what, seen, field in (('token ids of the same prompt', ids, 'teacher.path'),
                            ('prompts', texts, 'prompt.template')):
    for mine, theirs in zip(seen['student'], seen['teacher'], strict=True):
      if mine != theirs:
        detail = (f'{what} for the student and for the teacher differ '
                  + prompts_lib.difference(mine, theirs))
        if bad == WARN and seen is texts:
          return Finding('templates', WARN, detail + '; both get the second', 'prompt.template')
        allowed = "the same one, or prompt.template='teacher'" if seen is texts else (
            'a tokenizer that encodes alike')
        return Finding('templates', FAIL, f'{detail}; allowed: a teacher with {allowed}', field)
  return Finding('templates', OK, f'{len(prompts)} prompts rendered alike: {texts["student"][0]!r}')


def check_token_ids(run: Run, parts: Parts) -> Finding:
  """Checks that the same string has the same id, or the teacher reads another text."""
  if parts.teacher is None:
    return Finding('token_ids', SKIPPED, 'no teacher')
  mine, theirs = parts.student.tokenizer.get_vocab(), parts.teacher.tokenizer.get_vocab()
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


def check_stop_tokens(run: Run, parts: Parts) -> Finding:
  """Checks that a run ends where the template ends a turn, and where its teacher ends, which else
  grades what it would never write."""
  try:
    prompts_lib.turn_end(parts.student.tokenizer, parts.style)
  except ValueError as e:  # completions would go on beyond the turn, up to their room
    return Finding('stop_tokens', FAIL, f"{e}, or sample.stop='union' with a teacher that "
                   'ends with it', 'sample.stop')
  if parts.teacher is None:
    return Finding('stop_tokens', SKIPPED, 'no teacher')

  def named(ids):
    return {int(i): parts.student.tokenizer.convert_ids_to_tokens(int(i)) for i in sorted(ids)}

  used, theirs = set(parts.stop_tokens), set(parts.teacher.stop_tokens)
  if used == theirs:
    return Finding('stop_tokens', OK, f'both end with {named(used)}')
  detail = f'the run ends with {named(used)} and the teacher with {named(theirs)}'
  if theirs - used:
    return Finding('stop_tokens', FAIL, detail + ", so the student is graded past the teacher's "
                   "end; allowed: sample.stop='union' or 'teacher', or a teacher with the same "
                   'eos_token_id', 'sample.stop')
  return Finding('stop_tokens', WARN, detail + '; the teacher grades the others as unlikely',
                 'sample.stop')


def check_vocabulary(run: Run, parts: Parts) -> Finding:
  """Checks that heads, which may be padded to different widths, have every token."""
  def sizes(m):
    return f'{m.model.config.vocab_size} wide with {m.model.vocab_in_use} in use'

  detail = f'student {sizes(parts.student)}'
  if parts.teacher is None:
    return Finding('vocabulary', OK, detail)
  detail += f', teacher {sizes(parts.teacher)}'
  if parts.student.model.vocab_in_use != parts.teacher.model.vocab_in_use:
    return Finding('vocabulary', FAIL, detail + '; allowed: the same number in use', 'teacher.path')
  return Finding('vocabulary', OK, detail + '; what is not in use has probability zero')


def check_unused_options(run: Run, parts: Parts) -> Finding:
  """Checks for options that were set and that nothing reads."""
  unused = rules.unused_options(run)
  if run.compute.mesh.expert > 1 and not any(
      'experts' in spec.axes for m in filter(None, (parts.student, parts.teacher, parts.reference))
      for spec in params_lib.flatten(m.model.specs).values()):
    unused.append(f'compute.mesh.expert={run.compute.mesh.expert} (no model here has experts)')
  if unused:
    return Finding('unused_options', FAIL, f"nothing reads {'; '.join(unused)}; allowed: their "
                   'defaults', unused[0].partition('=')[0])
  return Finding('unused_options', OK, 'every option that was set is read')
