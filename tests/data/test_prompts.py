"""Stop tokens, chat templates and the ways in which a prompt becomes tokens."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import tiny

from opd_jax.data import prompts as prompts_lib
from opd_jax.data.prompts import Style
from opd_jax.files import huggingface

CHARACTERS = prompts_lib.character_tokenizer()
CHAT = tiny.chat_tokenizer()
END, BEGIN, TURN, OVER, QUIET = CHAT.convert_tokens_to_ids(
    ['<|end|>', '<|begin|>', '<|turn|>', '<|over|>', '<|quiet|>'])


def style(chat=CHAT, **fields):
  return Style(template='student', chat=chat, stop_tokens=(END, OVER), **fields)


class TestStopTokens:

  def write(self, path, content):
    (path / 'generation_config.json').write_text(json.dumps(content))
    return prompts_lib.stop_tokens(path, CHAT)

  def test_the_union_sorted(self, tmp_path):
    assert prompts_lib.stop_tokens(tmp_path, CHAT) == (END,)  # the file is optional
    assert self.write(tmp_path, {}) == self.write(tmp_path, {'eos_token_id': None}) == (END,)
    assert self.write(tmp_path, {'eos_token_id': OVER}) == (END, OVER)
    assert self.write(tmp_path, {'eos_token_id': [OVER, BEGIN, OVER, END]}) == (END, BEGIN, OVER)
    assert self.write(tmp_path, {'eos_token_id': 0}) == (0, END)  # an id like any other

  @pytest.mark.parametrize('bad', [10**6, [END, -1], ['<|end|>'], True, 1.0])
  def test_an_id_that_is_no_token(self, bad, tmp_path):
    with pytest.raises(ValueError, match='eos_token_id=.*no token.*allowed') as e:
      self.write(tmp_path, {'eos_token_id': bad})
    assert 'generation_config.json' in str(e.value) and str(len(CHAT)) in str(e.value)

  def test_a_checkpoint_is_loaded_with_them(self, tmp_path):
    loaded = huggingface.load(tiny.write_chat_model(tmp_path / 'model'), {})
    assert loaded.stop_tokens == (END, OVER)
    assert loaded.tokenizer.chat_template == tiny.CHAT
    # Added tokens lie above the learned ones, and the rest of the vocabulary is padding.
    assert (END, QUIET + 1) == (280, 285) and loaded.model.vocab_in_use == 285
    assert loaded.model.config.vocab_size == 320

  def test_files_are_utf_8_whatever_the_locale(self, tmp_path):
    path = tiny.write_chat_model(tmp_path / 'model', template=tiny.CHAT + '{# \u4e2d #}')
    (path / 'chat_template.jinja').unlink(missing_ok=True)  # it stands in tokenizer_config.json
    file = path / 'tokenizer_config.json'
    values = json.loads(file.read_text(encoding='utf-8')) | {'chat_template': tiny.CHAT + '\u4e2d'}
    file.write_text(json.dumps(values, ensure_ascii=False), encoding='utf-8')
    code = ('import pathlib; from opd_jax.data import prompts; '
            f'path = pathlib.Path({str(path)!r}); t = prompts.load(path); '
            'print(prompts.stop_tokens(path, t), ascii(t.chat_template[-1]))')
    out = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True,
                         env={**os.environ, 'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0',
                              'PYTHONUTF8': '0'}).stdout
    assert out == f"({END}, {OVER}) '\\u4e2d'\n"

  def test_a_tokenizer_of_another_model(self, tmp_path):
    # Its ids go beyond the rows of the embedding.
    path = tiny.write_chat_model(tmp_path / 'model')
    other = tiny.chat_tokenizer()
    other.add_tokens([f'word{i}' for i in range(36)])
    other.save_pretrained(path)
    with pytest.raises(ValueError, match=r'the tokenizer has the id 320, and vocab_size is 320'):
      huggingface.load(path, {})


class TestPlain:

  def test_the_text_as_it_is(self):
    texts = ['1+2=', '92-8-3=']
    assert prompts_lib.render_text(Style(), texts) == texts
    assert prompts_lib.render(CHARACTERS, Style(), texts) == [
        [CHARACTERS.get_vocab()[c] for c in text] for text in texts]
    assert prompts_lib.render(CHARACTERS, Style(), []) == []

  def test_no_special_tokens_unless_asked_for(self):
    chat = tiny.chat_tokenizer(bos=True)
    bare = chat.encode('What is one?', add_special_tokens=False)
    assert BEGIN not in bare
    assert prompts_lib.render(chat, Style(), ['What is one?']) == [bare]
    assert prompts_lib.render(chat, Style(special_tokens=True), ['What is one?', 'Or two?']) == [
        [BEGIN, *bare], [BEGIN, *chat.encode('Or two?', add_special_tokens=False)]]

  def test_special_tokens_of_a_tokenizer_that_adds_none(self):
    with pytest.raises(ValueError, match=r'prompt\.special_tokens=True has no effect.*allowed: F'):
      prompts_lib.render(CHAT, Style(special_tokens=True), ['one'])

  def test_special_tokens_after_the_text(self):
    import tokenizers
    chat = tiny.chat_tokenizer()
    chat.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='<|begin|> $A <|end|>', special_tokens=[('<|begin|>', BEGIN), ('<|end|>', END)])
    with pytest.raises(ValueError, match='after the text.*allowed: False'):
      prompts_lib.render(chat, Style(special_tokens=True), ['one'])

  def test_a_conversation_needs_a_template(self):
    with pytest.raises(ValueError, match=r"prompt\.template='none'.*conversation.*allowed"):
      prompts_lib.render(CHAT, Style(), [[{'role': 'user', 'content': 'one'}]])

  def test_a_given_completion_ends_with_eos(self):
    assert prompts_lib.turn_end(CHARACTERS, Style()) == [CHARACTERS.eos_token_id]


class TestTemplate:

  def test_text_and_tokens(self):
    # By hand from the template.
    text, = prompts_lib.render_text(style(), ['What is one?'])
    assert text == '<|turn|>user\nWhat is one?<|over|>\n<|turn|>assistant\n'
    ids, = prompts_lib.render(CHAT, style(), ['What is one?'])
    inner = [CHAT.encode(t) for t in ('user\nWhat is one?', '\n', 'assistant\n')]
    assert ids == [TURN, *inner[0], OVER, *inner[1], TURN, *inner[2]]

  def test_system_and_thinking(self):
    for thinking, tail in (('default', ''), ('on', ''), ('off', '<|quiet|>')):
      s = style(system='Be brief.', thinking=thinking)
      prompts_lib.check_style(s)
      assert prompts_lib.render_text(s, ['one?']) == [
          '<|turn|>system\nBe brief.<|over|>\n<|turn|>user\none?<|over|>\n<|turn|>assistant\n'
          + tail]

  def test_conversations(self):
    turns = [{'role': 'system', 'content': 'Sums.'}, {'role': 'user', 'content': 'one?'},
             {'role': 'assistant', 'content': 'two'}, {'role': 'user', 'content': 'and?'}]
    text = ''.join(f"<|turn|>{t['role']}\n{t['content']}<|over|>\n" for t in turns)
    assert prompts_lib.render_text(style(), [turns]) == [text + '<|turn|>assistant\n']
    with pytest.raises(ValueError, match=r"prompt\.system='Be brief\.'.*'Sums\.'.*allowed: ''"):
      prompts_lib.render_text(style(system='Be brief.'), [turns])
    own = prompts_lib.render_text(style(system='Sums.'), [turns[1:]])
    assert own == prompts_lib.render_text(style(), [turns])

  def test_no_special_token_is_added_twice(self):
    # A template writes BOS itself; the tokenizer, which would add its own, must not.
    chat = tiny.chat_tokenizer('{{ bos_token }}' + tiny.CHAT, bos=True)
    ids, = prompts_lib.render(chat, style(chat), ['one'])
    assert ids[0] == BEGIN and ids.count(BEGIN) == 1

  def test_the_teachers_template_with_the_students_tokens(self):
    student = tiny.chat_tokenizer(template=None)
    ids = prompts_lib.render(student, dataclasses.replace(style(), template='teacher'), ['one'])
    assert ids == prompts_lib.render(CHAT, style(), ['one'])

  def test_equals_what_transformers_does_in_one_go(self):
    for text in ('What is one?', '  two  lines\n', 'ünï 中'):
      want = CHAT.apply_chat_template([{'role': 'user', 'content': text}], enable_thinking=False,
                                      add_generation_prompt=True, return_dict=False)
      assert prompts_lib.render(CHAT, style(thinking='off'), [text]) == [want]

  def test_what_ends_a_turn(self):
    assert prompts_lib.turn_end(CHAT, style()) == [OVER]
    # Everything between the content and the first stop token belongs to the end.
    chat = tiny.chat_tokenizer(tiny.CHAT.replace("'<|over|>", "' done<|over|>"))
    assert CHAT.decode(prompts_lib.turn_end(chat, style(chat))) == ' done<|over|>'
    only_eos = dataclasses.replace(style(), stop_tokens=(END,))
    with pytest.raises(ValueError, match=r"'<\|over\|>\\n', in which there is no stop token "
                                         r"\(\['<\|end\|>'\]\); allowed.*generation_config"):
      prompts_lib.turn_end(CHAT, only_eos)


class TestRefused:

  def refused(self, s, *parts):
    with pytest.raises(ValueError, match='allowed') as e:
      prompts_lib.check_style(s)
    for part in parts:
      assert part in str(e.value), f'{part!r} is not in {e.value}'

  @pytest.mark.parametrize('template', ['student', 'teacher'])
  def test_no_template_where_one_is_needed(self, template, tmp_path):
    tiny.chat_tokenizer(template=None).save_pretrained(tmp_path)
    bare = prompts_lib.load(tmp_path)
    self.refused(Style(template=template, chat=bare), f'prompt.template={template!r}',
                 str(tmp_path), 'no chat template')

  def test_thinking_that_the_template_does_not_know(self):
    chat = tiny.chat_tokenizer(tiny.CHAT.replace('enable_thinking is defined', 'false'))
    prompts_lib.check_style(style(chat))
    for thinking in ('on', 'off'):
      self.refused(style(chat, thinking=thinking), f'prompt.thinking={thinking!r} has no effect',
                   "'default'")

  def test_a_system_message_that_is_left_out(self):
    chat = tiny.chat_tokenizer(tiny.CHAT.replace(
        'for m in messages', "for m in messages if m['role'] != 'system'"))
    self.refused(style(chat, system='Be brief.'), "prompt.system='Be brief.' has no effect")

  def test_a_system_message_that_is_refused(self):
    chat = tiny.chat_tokenizer(
        "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
        '{%- endif %}' + tiny.CHAT)
    prompts_lib.check_style(style(chat))
    self.refused(style(chat, system='Be brief.'), "prompt.system='Be brief.'", 'no system role')

  def test_todays_date(self):
    # It would be another prompt tomorrow, and a resumed run another run.
    chat = tiny.chat_tokenizer("{%- if 1 %}\n{%- set day = strftime_now('%d %b %Y') %}{%- endif %}"
                               "{%- for m in messages[:1] %}\n{{ day }}{%- endfor %}" + tiny.CHAT)
    self.refused(style(chat), "prompt.date=''", "writes today's date")
    fixed = style(chat, date='31 Jan 2026')
    prompts_lib.check_style(fixed)
    assert prompts_lib.render_text(fixed, ['one']) == [
        '31 Jan 2026' + prompts_lib.render_text(style(), ['one'])[0]]
    self.refused(style(date='31 Jan 2026'), "prompt.date='31 Jan 2026'", 'no effect')

  def test_a_template_without_the_users_words(self):
    self.refused(style(tiny.chat_tokenizer('hello')), 'leaves out what the user says')

  def test_a_template_that_is_none(self):
    self.refused(style(tiny.chat_tokenizer('{% for %}')), 'prompt.template')
