"""Tokenizers are Hugging Face fast-tokenizer directories, loaded through transformers; here too is
how a prompt becomes tokens: the text as it is, or a conversation in a chat template."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jinja2
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

TEMPLATES = ('none', 'student', 'teacher')
THINKING = ('default', 'on', 'off')
PROBE = 'opd-probe'  # stands for any text, where only what is around it matters
# Ends with an expression, after which Jinja leaves line breaks alone.
FIXED_DATE = '{%- macro strftime_now(format) %}{{ opd_date }}{% endmacro %}{{ "" }}'
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

  Raises:
    FileNotFoundError: no tokenizer there.
    ValueError: it cannot be read, or has no EOS token.
  """
  file = pathlib.Path(path) / 'tokenizer_config.json'
  if not file.exists():
    raise FileNotFoundError(f'no tokenizer in {path} (tokenizer_config.json is missing)')
  loader = _transformers().AutoTokenizer
  # For some model types (qwen2) transformers overrules the generic class that a file names by one
  # that adds tokens of its own.
  try:
    named = json.loads(file.read_text(encoding='utf-8')).get('tokenizer_class')
  except (AttributeError, ValueError) as e:
    raise ValueError(f'{file} is damaged ({e}); allowed: a JSON object') from e
  if named == 'TokenizersBackend':
    loader = _transformers().PreTrainedTokenizerFast
  try:
    tokenizer = loader.from_pretrained(str(path), local_files_only=True)
  except Exception as e:  # of a file that was cut off, transformers raises whatever comes
    raise ValueError(f'the tokenizer in {path} cannot be read ({type(e).__name__}: {e}); allowed: '
                     'what `save_pretrained` of a fast tokenizer writes') from e
  for how_it_was_loaded in ('local_files_only', 'is_local'):  # or save_pretrained would store it
    tokenizer.init_kwargs.pop(how_it_was_loaded, None)
  if tokenizer.eos_token_id is None:
    raise ValueError(f'the tokenizer in {path} has no eos_token, so no completion could end')
  return tokenizer


def pad_id(tokenizer: Any) -> int:
  """Finds the padding id; EOS pads where a tokenizer has no padding token (padding is masked
  anyway)."""
  return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def stop_tokens(path: str | os.PathLike[str], tokenizer: Any) -> tuple[int, ...]:
  """Lists the ids that end a completion, sorted: the tokenizer's EOS and those of
  generation_config.json (an id or a list; the file is optional) in the directory `path`.

  Raises:
    ValueError: a file that cannot be read, or an id that the tokenizer does not know.
  """
  file = pathlib.Path(path) / 'generation_config.json'
  try:
    content = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
    found = content.get('eos_token_id')
  except (AttributeError, ValueError) as e:
    raise ValueError(f'{file} is damaged ({e}); allowed: a JSON object, or no such file') from e
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
    stop_tokens: ids that end a turn of the assistant.
  """

  template: str = 'none'
  chat: Any = None
  system: str = ''
  thinking: str = 'default'
  date: str = ''
  special_tokens: bool = False
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
  probe = _render(style, [_conversation(style, PROBE)])[0]
  if PROBE not in probe:
    raise ValueError(f'{whose} has a chat template that leaves out what the user says ({probe!r}); '
                     'allowed: another template')
  if style.thinking != 'default':
    other = dataclasses.replace(style, thinking='off' if style.thinking == 'on' else 'on')
    if _render(other, [_conversation(style, PROBE)])[0] == probe:
      raise ValueError(f'prompt.thinking={style.thinking!r} has no effect: {whose} has a chat '
                       "template without such a switch; allowed: 'default'")
  dated = {_render(dataclasses.replace(style, date=day), [_conversation(style, PROBE)])[0]
           for day in ('one day', 'another day')}
  if bool(style.date) != (len(dated) > 1):
    raise ValueError(f'prompt.date={style.date!r}: ' + (
        f"it has no effect: {whose} has a chat template that writes no date; allowed: ''"
        if style.date else
        f"{whose} has a chat template that writes today's date, and tomorrow's prompts would be "
        "others; allowed: the text of the date to write"))
  if style.system and _render(style, [[{'role': 'user', 'content': PROBE}]])[0] == probe:
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


def _render(style, conversations, add_generation_prompt=True):
  switch = {} if style.thinking == 'default' else {'enable_thinking': style.thinking == 'on'}
  try:
    template = style.chat.get_chat_template()
    if style.date:  # in the place of the clock that transformers offers to templates
      switch['opd_date'] = style.date
      template = FIXED_DATE + template
    return style.chat.apply_chat_template(
        conversations, chat_template=template, tokenize=False,
        add_generation_prompt=add_generation_prompt, **switch)
  except (jinja2.TemplateError, TypeError, ValueError) as e:  # a template may refuse a role
    raise ValueError(
        f'prompt.template={style.template!r}: the chat template in {style.chat.name_or_path!r} '
        f'refuses a conversation with prompt.system={style.system!r}: {e}; allowed: what the '
        'template supports') from e


def render_text(style: Style, prompts: list[Any]) -> list[str]:
  """Writes the text that is encoded, for prompts that are strings or conversations (lists of
  {'role': ..., 'content': ...} that end with the user's turn).

  Raises:
    ValueError: a conversation without a template, or one that the template refuses.
  """
  if style.chat is not None:
    return _render(style, [_conversation(style, p) for p in prompts]) if prompts else []
  for p in prompts:
    if not isinstance(p, str):
      raise ValueError(f"prompt.template='none' with a prompt that is a conversation: {p!r}; "
                       "allowed: 'student' or 'teacher'")
  return prompts


def render(tokenizer: Any, style: Style, prompts: list[Any]) -> list[list[int]]:
  """Makes token ids of prompts as `render_text` writes them; special tokens stand in a template's
  text itself.

  Raises:
    ValueError: see `render_text`; or style.special_tokens has no effect, or puts tokens after the
      text, where the completion has to begin.
  """
  texts = render_text(style, prompts)
  if style.special_tokens and texts:
    bare, = encode(tokenizer, texts[:1])
    whole, = encode(tokenizer, texts[:1], special_tokens=True)
    if whole == bare:
      raise ValueError('prompt.special_tokens=True has no effect: the tokenizer adds none; '
                       'allowed: False')
    if whole[len(whole) - len(bare):] != bare:
      raise ValueError('prompt.special_tokens=True: the tokenizer adds tokens after the text, and '
                       f'{bare} becomes {whole}; allowed: False')
  return encode(tokenizer, texts, style.special_tokens)


def turn_end(tokenizer: Any, style: Style) -> list[int]:
  """Finds the ids that follow a given completion: EOS; with a chat template what it writes after an
  assistant's turn, up to and including the first stop token.

  Raises:
    ValueError: the template ends a turn without a stop token. EOS in its place would teach an end
      that is not the template's, and the template's own would not end a sample.
  """
  if style.chat is None:
    return [tokenizer.eos_token_id]
  turns = [{'role': 'user', 'content': PROBE}, {'role': 'assistant', 'content': PROBE}]
  tail = _render(style, [turns], add_generation_prompt=False)[0].rpartition(PROBE)[2]
  ids, = encode(tokenizer, [tail])
  ends = [i for i, token in enumerate(ids) if token in style.stop_tokens]
  if not ends:
    stops = tokenizer.convert_ids_to_tokens(list(style.stop_tokens))
    raise ValueError(
        f'prompt.template={style.template!r}: the template ends a turn of the assistant with '
        f'{tail!r}, in which there is no stop token ({stops}); allowed: a template whose turns end '
        'with one, or its id in the eos_token_id of generation_config.json')
  return ids[:ends[0] + 1]


def encode(tokenizer: Any, texts: list[str], special_tokens: bool = False) -> list[list[int]]:
  """Encodes texts, without the special tokens that the tokenizer may add by itself unless asked.
  """
  try:
    return tokenizer(texts, add_special_tokens=special_tokens, return_attention_mask=False,
                     return_token_type_ids=False, verbose=False)['input_ids'] if texts else []
  except Exception as e:  # the Rust side raises bare Exceptions
    raise ValueError(f'the tokenizer cannot encode one of {texts[:3]}...: {e}') from e


def same_vocabulary(a: Any, b: Any) -> bool:
  """Tells whether two tokenizers map the same strings to the same ids."""
  return a.get_vocab() == b.get_vocab()


def _transformers() -> Any:
  import transformers  # takes seconds to import: only when a tokenizer is really needed
  return transformers
