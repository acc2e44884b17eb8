"""Tokenizers are Hugging Face fast-tokenizer directories, loaded through transformers; here too is
how a prompt becomes tokens: the text as it is, or a conversation in a chat template."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from opd_jax.data import control, templates
from opd_jax.parallel import hosts

TEMPLATES = ('none', 'student', 'teacher')
THINKING = ('default', 'on', 'off')
# With spaces, digits, line breaks and what is not ASCII: where ways to split texts differ.
SAMPLES = ('What is 123 plus 45?', ' two  spaces', 'a\n\n b\t1,234.5e-9', 'ünï naïve 中文 🙂',
           "It's 50% of x_1=y")
SHOWN = 200  # characters of a text that an error quotes
PROBE = 'opd-probe'  # stands for any text, where only what is around it matters
PAD, EOS = '<pad>', '<eos>'
# 64 symbols with PAD and EOS, a round number so that every mesh divides the vocabulary.
ALPHABET = '0123456789abcdefghijklmnopqrstuvwxyz' + '+-*/=;#:?!.,<>()[]_|\'"@&%' + ' '


def character_tokenizer(alphabet: str = ALPHABET) -> Any:
  """Makes a tokenizer with one token a character, a `PreTrainedTokenizerFast`: what
  `save_pretrained` writes is an ordinary Hugging Face directory. A character outside the alphabet
  raises when encoded."""
  transformers = _transformers()
  vocab = {token: i for i, token in enumerate([PAD, EOS, *alphabet])}
  inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='<unknown>'))
  # Every character by itself, the newline included (which '.' would leave out).
  inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
  inner.decoder = decoders.Fuse()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False)


def load(path: str | os.PathLike[str]) -> Any:
  """Loads the tokenizer in a local directory.

  What counts is tokenizer.json. For some model types and classes that a tokenizer_config.json may
  name, transformers puts another way to split texts in its place, and spaces or digits are lost: it
  is loaded without regard to them, and compared with the file.

  Raises:
    FileNotFoundError: no tokenizer there.
    ValueError: it cannot be read, has no EOS token, or does not do what tokenizer.json says.
  """
  file = pathlib.Path(path) / 'tokenizer_config.json'
  if not file.is_file():
    raise FileNotFoundError(f'no tokenizer in {path} (tokenizer_config.json is missing)')
  _read_json(file)
  inner = pathlib.Path(path) / 'tokenizer.json'
  transformers = _transformers()
  loader = (transformers.PreTrainedTokenizerFast if inner.is_file() else
            transformers.AutoTokenizer)  # which makes one of older files
  try:
    tokenizer = loader.from_pretrained(str(path), local_files_only=True)
    plain = tokenizers.Tokenizer.from_file(str(inner)) if inner.is_file() else None
  except Exception as e:  # of a file that was cut off, transformers raises whatever comes
    raise ValueError(f'the tokenizer in {path} cannot be read ({type(e).__name__}: {e}); allowed: '
                     'what `save_pretrained` of a fast tokenizer writes') from e
  for how_it_was_loaded in ('local_files_only', 'is_local'):  # or save_pretrained would store it
    tokenizer.init_kwargs.pop(how_it_was_loaded, None)
  if tokenizer.eos_token_id is None:
    raise ValueError(f'the tokenizer in {path} has no eos_token, so no completion could end')
  if plain is not None:
    _compare(tokenizer, plain, path)
  return tokenizer


def _compare(tokenizer, plain, path):
  """Refuses a tokenizer that splits texts otherwise than tokenizer.json does."""
  for text in SAMPLES:
    try:
      want = plain.encode(text, add_special_tokens=False).ids
    except Exception:  # not every tokenizer has every character
      continue
    ids, = encode(tokenizer, [text])
    if ids != want:
      raise ValueError(
          f'the tokenizer in {path}: as transformers loads it, {text!r} becomes '
          f'{tokenizer.convert_ids_to_tokens(ids)}, and by tokenizer.json '
          f'{tokenizer.convert_ids_to_tokens(want)}; allowed: a tokenizer_config.json that does '
          'not change how texts are split')


def _read_json(file):
  try:
    content = json.loads(file.read_text(encoding='utf-8'))
    if not isinstance(content, dict):
      raise ValueError(f'it holds a {type(content).__name__}')
  except (OSError, ValueError, RecursionError) as e:
    raise ValueError(f'{file} is damaged ({e}); allowed: a JSON object') from e
  return content


def pad_id(tokenizer: Any) -> int:
  """Finds the padding id; EOS pads where a tokenizer has no padding token (padding is masked
  anyway)."""
  return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def stop_tokens(path: str | os.PathLike[str], tokenizer: Any) -> tuple[int, ...]:
  """Lists the ids that end a completion, sorted: the tokenizer's EOS and the eos_token_id (an id or
  a list) of generation_config.json in the directory `path`, or of config.json where there is no
  such file: transformers does so too.

  Raises:
    ValueError: a file that cannot be read, or an id that the tokenizer does not know.
  """
  files = [pathlib.Path(path) / f'{name}.json' for name in ('generation_config', 'config')]
  file = next((f for f in files if f.is_file()), None)
  found = _read_json(file).get('eos_token_id') if file else None
  found = [] if found is None else found if isinstance(found, list) else [found]
  known = set(tokenizer.get_vocab().values())
  unknown = [t for t in found if type(t) is not int or t not in known]
  if unknown:
    raise ValueError(f'{file}: eos_token_id={found}: the tokenizer has no token {unknown}; '
                     f'allowed: ids of its {len(known)} tokens')
  return tuple(sorted({tokenizer.eos_token_id, *found}))


@dataclasses.dataclass(frozen=True)
class Style:
  """How prompts become tokens (config.prompt).

  Attributes:
    template: 'none' for the text as it is; 'student' or 'teacher': whose chat template is used.
    chat: the tokenizer that has the template; None with template='none'.
    system: the system message, '' for none.
    thinking: 'on' or 'off' is handed to the template as `enable_thinking`; with 'default' it is not
      told anything.
    date: what a template that writes today's date writes in its place, such as '31 Jan 2026':
      prompts must not change overnight.
    special_tokens: with template='none', whether the tokenizer puts its own tokens (BOS) first.
    control_tokens: what becomes of those that a text writes out, one of `control.CHOICES`.
    stop_tokens: ids that end a turn of the assistant.
  """

  template: str = 'none'
  chat: Any = None
  system: str = ''
  thinking: str = 'default'
  date: str = ''
  special_tokens: bool = False
  control_tokens: str = 'refuse'
  stop_tokens: tuple[int, ...] = ()


def check_style(style: Style) -> None:
  """Checks that there is a template where one is needed, and that no setting is without effect.

  Raises:
    ValueError: names the field, the value and what is allowed.
  """
  if style.chat is None:
    return
  where = repr(style.chat.name_or_path or 'a fresh model')
  whose = f'prompt.template={style.template!r}: the tokenizer in {where}'
  if not style.chat.chat_template:
    raise ValueError(f"{whose} has no chat template; allowed: 'none', or a tokenizer with a chat "
                     'template')
  probe = templates.render(style, [_conversation(style, PROBE)])[0]
  if PROBE not in probe:
    raise ValueError(f'{whose} has a chat template that leaves out what the user says ({probe!r}); '
                     'allowed: another template')
  if style.thinking != 'default':
    other = dataclasses.replace(style, thinking='off' if style.thinking == 'on' else 'on')
    if templates.render(other, [_conversation(style, PROBE)])[0] == probe:
      raise ValueError(f'prompt.thinking={style.thinking!r} has no effect: {whose} has a chat '
                       "template without such a switch; allowed: 'default'")
  dated = {templates.render(dataclasses.replace(style, date=day), [_conversation(style, PROBE)])[0]
           for day in ('one day', 'another day')}
  if bool(style.date) != (len(dated) > 1):
    raise ValueError(f'prompt.date={style.date!r}: ' + (
        f"it has no effect: {whose} has a chat template that writes no date; allowed: ''"
        if style.date else
        f"{whose} has a chat template that writes today's date, and tomorrow's prompts would be "
        "others; allowed: the text of the date to write"))
  if style.system and templates.render(style, [[{'role': 'user', 'content': PROBE}]])[0] == probe:
    raise ValueError(f'prompt.system={style.system!r} has no effect: {whose} has a chat template '
                     "that leaves system messages out; allowed: ''")


def _conversation(style, prompt):
  messages = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
  if not style.system:
    return messages
  if messages[0]['role'] == 'system':
    raise ValueError(f'prompt.system={style.system!r}, but a conversation has a system message of '
                     f"its own, {messages[0]['content']!r}; allowed: ''")
  return [{'role': 'system', 'content': style.system}, *messages]


def render_text(style: Style, prompts: list[Any]) -> list[str]:
  """Writes the text that is encoded, for prompts that are strings or conversations (lists of
  {'role': ..., 'content': ...} that end with the user's turn).

  Raises:
    ValueError: a conversation without a template, or one that the template refuses.
  """
  if style.chat is not None:
    turns = [_conversation(style, p) for p in prompts]
    return templates.render(style, turns, unknown=True) if prompts else []
  for p in prompts:
    if not isinstance(p, str):
      raise ValueError(f"prompt.template='none' with a prompt that is a conversation: {p!r}; "
                       "allowed: 'student' or 'teacher'")
  return prompts


def render(tokenizer: Any, style: Style, prompts: list[Any]) -> list[list[int]]:
  """Makes token ids of prompts as `render_text` writes them; special tokens stand in a template's
  text itself.

  Raises:
    ValueError: see `render_text`; control tokens within a prompt (`control.Guard`); or
      style.special_tokens has no effect, or puts tokens after the text, where the completion has to
      begin.
  """
  guard, style = _guarded(tokenizer, style)
  return _encode(guard, style, render_text(style, guard.hide(prompts, 'prompts')))


def render_answers(tokenizer: Any, style: Style, prompts: list[Any], answers: list[str]
                   ) -> tuple[list[list[int]], list[list[int]]]:
  """Makes token ids of prompts and of the answers that are given to them.

  Each conversation is written and encoded as a whole and cut where its answer begins: what is
  learned is what the template makes of an answer, up to and including the first stop token after
  it; without a template, the text and EOS.

  Raises:
    ValueError: see `render`; or the whole does not begin with the prompt as it is written and
      encoded by itself, which is what a model is given, or leaves out some of the answer.
  """
  guard, style = _guarded(tokenizer, style)
  prompts, answers = guard.hide(prompts, 'prompts'), guard.hide(answers, 'completions')
  starts = render_text(style, prompts)
  if style.chat is None:
    wholes, end = [p + a for p, a in zip(starts, answers, strict=True)], []
  else:
    turns = [[*_conversation(style, p), {'role': 'assistant', 'content': a}]
             for p, a in zip(prompts, answers, strict=True)]
    wholes = templates.render(style, turns, add_generation_prompt=False, unknown=True)
    end, first = _turn_end(tokenizer, style)
    end = end[first:]
  for i, (start, whole, answer) in enumerate(zip(starts, wholes, answers, strict=True)):
    where = f'prompt.template={style.template!r}, prompt.thinking={style.thinking!r}: example {i}: '
    if not whole.startswith(start):
      raise ValueError(where + guard.show(
          'the chat template writes the prompt with its answer and by itself otherwise, '
          f'{difference(whole, start)}; allowed: completions, a prompt.thinking and a template '
          'with which the whole conversation begins with the prompt'))
    # Its words, since templates trim and break lines; they may begin within the prompt's '<think>'.
    words, before, after = (''.join(text.split()) for text in (answer, start, whole))
    if words and style.chat and after.count(words) == before.count(words):
      raise ValueError(where + guard.show(
          f'the chat template leaves out some of the completion {answer[:SHOWN]!r} and writes '
          f'{whole[len(start):][:SHOWN]!r}; allowed: completions that it writes whole'))
  asked, ids = _encode(guard, style, starts), _encode(guard, style, wholes)
  learned = []
  for i, (start, whole) in enumerate(zip(asked, ids, strict=True)):
    if whole[:len(start)] != start:
      mine, theirs = map(tokenizer.convert_ids_to_tokens, (whole, start))
      raise ValueError(
          f'prompt.template={style.template!r}: example {i}: the prompt has other tokens with its '
          f'completion than by itself, {difference(mine, theirs)}; allowed: prompts that do not '
          'end within what becomes one token, such as in a space')
    if whole[len(whole) - len(end):] != end:
      raise ValueError(
          f'prompt.template={style.template!r}: example {i}: the chat template ends this turn with '
          f'{tokenizer.decode(whole[-len(end):])!r} and others with {tokenizer.decode(end)!r}; '
          'allowed: a template that ends all turns alike')
    stop = end[:1] or [tokenizer.eos_token_id]
    learned.append(whole[len(start):len(whole) - len(end)] + stop)
  return asked, learned


def difference(mine: Any, theirs: Any) -> str:
  """Says where two texts or lists of ids begin to differ, with what is around it."""
  place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
               min(len(mine), len(theirs)))
  start = max(place - 20, 0)
  return f'from place {place} on: {mine[start:place + 20]!r} and {theirs[start:place + 20]!r}'


def count_control_tokens(tokenizer: Any, style: Style, prompts: list[Any]) -> int:
  """Counts the control tokens that stand in texts or conversations."""
  return _guarded(tokenizer, style)[0].count(prompts)


def _guarded(tokenizer, style):
  """(guard, style with a system message in which there are no control tokens either)."""
  turn = [[{'role': 'user', 'content': PROBE}]]
  written = '' if style.chat is None else templates.render(style, turn)[0]
  guard = control.make_guard(tokenizer, style.stop_tokens, written, style.control_tokens)
  system, = guard.hide([style.system], 'system messages (prompt.system)')
  return guard, dataclasses.replace(style, system=system)


def _encode(guard, style, texts):
  tokenizer = guard.tokenizer
  if style.special_tokens and texts:
    bare, = encode(tokenizer, texts[:1])
    whole, = encode(tokenizer, texts[:1], special_tokens=True)
    if whole == bare:
      raise ValueError('prompt.special_tokens=True has no effect: the tokenizer adds none; '
                       'allowed: False')
    if whole[len(whole) - len(bare):] != bare:
      raise ValueError('prompt.special_tokens=True: the tokenizer adds tokens after the text, and '
                       f'{bare} becomes {whole}; allowed: False')
  plain = guard.choice != 'text' or not any(control.MARK in t for t in texts)
  how = functools.partial(encode, tokenizer) if plain else guard.encode
  return hosts.divide(texts, lambda part: how(part, style.special_tokens), hosts.FEW)


def turn_end(tokenizer: Any, style: Style) -> list[int]:
  """Finds the ids that end an answer: EOS; with a chat template what it writes after an assistant's
  turn, up to and including the first stop token.

  Raises:
    ValueError: the template ends a turn without a stop token. EOS in its place would teach an end
      that is not the template's, and the template's own would not end a sample.
  """
  if style.chat is None:
    return [tokenizer.eos_token_id]
  ids, first = _turn_end(tokenizer, style)
  return ids[:first + 1]


def _turn_end(tokenizer, style):
  """(all ids that a template writes after a turn, the place of the first stop token)."""
  turns = [{'role': 'user', 'content': PROBE}, {'role': 'assistant', 'content': PROBE}]
  tail = templates.render(style, [turns], add_generation_prompt=False)[0].rpartition(PROBE)[2]
  ids, = encode(tokenizer, [tail])
  ends = [i for i, token in enumerate(ids) if token in style.stop_tokens]
  if not ends:
    stops = tokenizer.convert_ids_to_tokens(list(style.stop_tokens))
    raise ValueError(
        f'prompt.template={style.template!r}: the template ends a turn of the assistant with '
        f'{tail!r}, in which there is no stop token ({stops}); allowed: a template whose turns end '
        'with one, or its id in the eos_token_id of generation_config.json')
  return ids, ends[0]


def encode(tokenizer: Any, texts: list[str], special_tokens: bool = False) -> list[list[int]]:
  """Encodes texts, without the special tokens that the tokenizer may add by itself unless asked.
  """
  try:
    return tokenizer(texts, add_special_tokens=special_tokens, return_attention_mask=False,
                     return_token_type_ids=False, verbose=False)['input_ids'] if texts else []
  except Exception as e:  # the Rust side raises bare Exceptions
    raise ValueError(f'the tokenizer cannot encode one of {[t[:SHOWN] for t in texts[:3]]}...: '
                     f'{e}; allowed: texts of characters that it knows') from e


def same_vocabulary(a: Any, b: Any) -> bool:
  """Tells whether two tokenizers map the same strings to the same ids."""
  return a.get_vocab() == b.get_vocab()


def _transformers() -> Any:
  # At its first import it would print that PyTorch was not found, which nobody needs here.
  quiet = 'TRANSFORMERS_NO_ADVISORY_WARNINGS'
  before = os.environ.get(quiet)
  os.environ[quiet] = '1'
  try:
    import transformers  # takes seconds to import: only when a tokenizer is really needed
  finally:
    os.environ.pop(quiet)
    if before is not None:
      os.environ[quiet] = before
  return transformers
