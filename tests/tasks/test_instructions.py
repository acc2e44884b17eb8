"""The instructions of IFEval: texts that follow each of them, and texts that do not."""

import importlib.util
import json
import sys
import types

import pytest
import tiny

from opd_jax import tasks
from opd_jax.tasks import _instructions as instructions
from opd_jax.tasks._instructions import _detect

LEAST, LESS = {'relation': 'at least'}, {'relation': 'less than'}
NEEDS_DETECTION = pytest.mark.skipif(importlib.util.find_spec('langdetect') is None,
                                     reason="pip install -e '.[ifeval]'")

# Of each instruction with some settings: texts that follow it, and texts that do not.
CASES = (
    ('keywords:existence', {'keywords': ['Cat', 'C++']},
     ['a cat, c++', 'Concatenate in C++'], ['a cat', 'c++', 'a cat, c+']),
    ('keywords:frequency', {'keyword': 'cat', 'frequency': 2, **LEAST},
     ['Cat cat', 'cats concatenate', 'cat cat cat'], ['cat', 'dog']),
    ('keywords:frequency', {'keyword': 'cat', 'frequency': 2, **LESS}, ['cat', 'dog'], ['cat CAT']),
    ('keywords:forbidden_words', {'forbidden_words': ['cat', 'C++']},
     ['concatenate', 'cats', 'C+'], ['A Cat.', 'cat', 'in C++ now']),
    ('keywords:letter_frequency', {'letter': 'q', 'let_frequency': 2, 'let_relation': 'at least'},
     ['Qq', 'quick quack'], ['quick', 'x']),
    ('keywords:letter_frequency', {'letter': '#', 'let_frequency': 1, 'let_relation': 'less than'},
     ['a'], ['#a']),
    ('length_constraints:number_words', {'num_words': 3, **LEAST},
     ['one two three', 'one_ two-three', "it's me"], ['one two', 'one, two!']),
    ('length_constraints:number_words', {'num_words': 3, **LESS}, ['one two'], ['a b c']),
    ('length_constraints:number_sentences', {'num_sentences': 2, **LEAST},
     ['One. Two.', 'What? No', '"Go!" he said. So he went.', 'I paid 3.50. It was dear.',
      'Dr. Who came. He left.', 'Wait... what? Yes.', 'It is 5 p.m. now. Go.'],
     ['One', 'Mr. Smith came.', 'See e.g. the U.S. law.', 'J. R. R. Tolkien wrote it.', '...',
      'It costs 3.50 today.']),
    ('length_constraints:number_sentences', {'num_sentences': 2, **LESS}, ['One.'], ['One. Two.']),
    ('length_constraints:number_paragraphs', {'num_paragraphs': 2},
     ['one\n***\ntwo', 'one *** two', '***one***two***', 'one***two\n***\n'],
     ['one', 'one\n\ntwo', 'one***two***three', 'one\n***\n***\ntwo', 'one******two']),
    ('length_constraints:nth_paragraph_first_word',
     {'num_paragraphs': 2, 'nth_paragraph': 2, 'first_word': 'Then'},
     ['One.\n\nThen two.', 'One\n\n"then, two"', "One\n\n'Then' two", 'One\n\nthen\n'],
     ['Then one.\n\nTwo.', 'One.\nThen two.', 'One\n\nThen\n\nthree', 'One\n\nThens', 'Then',
      'One\n\n\n\nThen']),
    ('detectable_content:number_placeholders', {'num_placeholders': 2},
     ['[name] of [city]', '[][x][y]'], ['[name]', '[na\nme] [x]', 'name']),
    ('detectable_content:postscript', {'postscript_marker': 'P.S.'},
     ['Bye.\nP.S. more', 'p. s. more', 'Bye. P.S.'], ['PS more', 'P.S more', 'Bye']),
    ('detectable_content:postscript', {'postscript_marker': 'P.P.S'},
     ['Bye\nP.P.S more', 'p. p. s'], ['P.S. more', 'PPS']),
    ('detectable_content:postscript', {'postscript_marker': 'NB*'}, ['nb* more'], ['nb more']),
    ('detectable_format:number_bullet_lists', {'num_bullets': 2},
     ['* one\n* two', '- one\n  - two', 'So:\n* one\n- two\nend'],
     ['* one', '* one\n* two\n* three', '** one\n** two', '1. one\n2. two']),
    ('detectable_format:constrained_response', {},
     ['My answer is yes.', 'Well: My answer is maybe. '], ['my answer is yes.', 'My answer is no']),
    ('detectable_format:number_highlighted_sections', {'num_highlights': 2},
     ['*one* and *two*', '**one** and *two*', '*a* **b** **c**'],
     ['*one*', '**one**', '* one\n* two', '** ** **']),
    ('detectable_format:multiple_sections', {'section_spliter': 'Section', 'num_sections': 2},
     ['Section 1\na\nSection 2\nb', 'Section1 Section 10'],
     ['Section 1\na', 'SECTION 1 SECTION 2', 'Section A Section B']),
    ('detectable_format:json_format', {},
     ['{"a": [1]}', '```json\n{"a": 1}\n```', '```\n[]\n```', ' 3 '],
     ["{'a': 1}", 'Here: {"a": 1}', '{"a": 1', '```json\n{"a": 1}\n``` there', '[' * 100000]),
    ('detectable_format:title', {},
     ['<<Joy>>\nOnce', 'On <<a b>>'], ['<Joy>', '<< >>', '<<Jo\ny>>', 'Joy']),
    ('combination:two_responses', {},
     ['one\n******\ntwo', '******one******two'],
     ['one', 'one******one', 'one******', 'a******b******c', 'a************b', 'one***two']),
    ('combination:repeat_prompt', {'prompt_to_repeat': 'Say it. '},
     ['Say it. Yes', '  SAY IT. \nYes'], ['Yes. Say it.', 'Say it, yes']),
    ('startend:end_checker', {'end_phrase': 'The end. '},
     ['So: the end.', '"The END."  '], ['The end. Bye', 'The end']),
    ('startend:quotation', {}, ['"yes"', ' "a" or "b"\n'], ['yes', '"yes', '"', "'yes'"]),
    ('change_case:capital_word_frequency',
     {'capital_frequency': 2, 'capital_relation': 'at least'},
     ['GO NOW', 'I said NO', 'WELL-KNOWN U.S.'], ['Go Now', 'GO now', 'WELL-KNOWN', '12 34']),
    ('change_case:capital_word_frequency',
     {'capital_frequency': 2, 'capital_relation': 'less than'}, ['GO now'], ['GO NOW']),
    ('punctuation:no_comma', {}, ['yes; no'], ['yes, no']))
ENGLISH = 'this is a plain sentence in the english language, and it goes on for a while.'
GERMAN = 'dies ist ein einfacher satz in deutscher sprache, und er geht noch ein wenig weiter.'
DETECTED = (
    ('language:response_language', {'language': 'de'}, [GERMAN, '12 34'], [ENGLISH]),
    ('change_case:english_capital', {}, [ENGLISH.upper()],
     [ENGLISH, GERMAN.upper(), ENGLISH.upper() + ' a']),
    ('change_case:english_lowercase', {}, [ENGLISH], [ENGLISH.upper(), GERMAN, 'A' + ENGLISH]))


def follows(name, settings, text):
  return instructions.follow(instructions.parse([name], [settings]), text) == [True]


@pytest.mark.parametrize('name, settings, right, wrong', CASES)
def test_each(name, settings, right, wrong):
  assert [t for t in right if not follows(name, settings, t)] == []
  assert [t for t in wrong if follows(name, settings, t)] == []
  assert not follows(name, settings, ' \n')


@NEEDS_DETECTION
@pytest.mark.parametrize('name, settings, right, wrong', DETECTED)
def test_each_that_detects_a_language(name, settings, right, wrong):
  test_each(name, settings, right, wrong)


def test_case_and_language_must_both_be_right(monkeypatch):
  monkeypatch.setattr(_detect, 'is_in', lambda text, language: (language, 'x') == ('en', text[-1]))
  monkeypatch.setattr(_detect, 'require', lambda name: None)
  assert follows('change_case:english_lowercase', {}, 'ab x')
  assert not follows('change_case:english_lowercase', {}, 'Ab x')
  assert not follows('change_case:english_lowercase', {}, 'ab y')
  assert not follows('language:response_language', {'language': 'de'}, 'ab x')


def test_there_are_25_and_each_has_texts():
  assert {case[0] for case in (*CASES, *DETECTED)} == set(instructions.names())
  assert len(instructions.names()) == 25


def test_loose_looks_at_less_of_the_text():
  def loose(text, *names):
    return instructions.measures(instructions.parse(list(names), [{}] * len(names)), text)

  quote, comma = 'startend:quotation', 'punctuation:no_comma'
  for text in ('Sure:\n"yes"', '"yes"\nBye', 'Sure,\n"yes"\nBye', '**"yes"**', 'Here:\n*"yes"*'):
    assert loose(text, quote)['prompt_loose'] == [1.0], text
    assert loose(text, quote)['instruction_strict'] == [0.0]
  assert loose('a\nb\n"yes"', quote)['prompt_loose'] == [0.0]
  assert loose('a, b', comma)['prompt_loose'] == [0.0]  # cut to nothing is no answer
  # Each instruction may be followed by another part, as in the published evaluation.
  got = loose('Sure,\n"yes"', quote, comma)
  assert got == {'prompt_loose': [1.0], 'instruction_strict': [0.0, 0.0],
                 'instruction_loose': [1.0, 1.0], 'startend_strict': [0.0],
                 'punctuation_strict': [0.0]}


@pytest.mark.parametrize('ids, settings, part', [
    (['keywords:none'], [{}], "'keywords:none'; allowed: ['change_case"),
    ([], [], 'instruction_id_list=[]'),
    ('punctuation:no_comma', [{}], 'instruction_id_list='),
    (['punctuation:no_comma'], [], 'a list of 1 objects'),
    (['punctuation:no_comma'], ['x'], 'an object of its settings'),
    (['punctuation:no_comma'], [{'n': 1}], "['n']; allowed: exactly []"),
    (['keywords:existence'], [{}], "exactly ['keywords']"),
    (['keywords:existence'], [{'keywords': 'cat'}], "keywords='cat'; allowed: a list of words"),
    (['length_constraints:number_words'], [{'num_words': 2.5, **LEAST}], 'num_words=2.5'),
    (['length_constraints:number_words'], [{'num_words': -1, **LEAST}], 'num_words=-1'),
    (['length_constraints:number_words'], [{'num_words': True, **LEAST}], 'num_words=True'),
    (['length_constraints:number_words'], [{'num_words': 2, 'relation': 'most'}], "'at least'")])
def test_what_is_no_instruction(ids, settings, part):
  with pytest.raises(ValueError, match='allowed') as e:
    instructions.parse(ids, settings)
  assert part in str(e.value)


def test_without_the_library(monkeypatch):
  monkeypatch.setattr(_detect.importlib.util, 'find_spec', lambda name: None)
  for name, settings, *_ in DETECTED:
    with pytest.raises(ValueError, match=rf"{name}, which needs langdetect.*\[ifeval\]"):
      instructions.parse([name], [settings])
  instructions.parse(['change_case:capital_word_frequency'],
                     [{'capital_frequency': 1, 'capital_relation': 'at least'}])


def test_a_library_that_cannot_tell(monkeypatch):
  class UnsureError(Exception):
    pass

  def detect(text):
    raise UnsureError

  monkeypatch.setitem(sys.modules, 'langdetect', types.SimpleNamespace(
      detect=detect, LangDetectException=UnsureError,
      DetectorFactory=types.SimpleNamespace(seed=None)))
  assert _detect.is_in('12', 'de')


class TestTask:

  ROWS = [{'key': i, 'prompt': f'Name {i} rivers without commas.',
           'instruction_id_list': ['punctuation:no_comma', 'keywords:existence'],
           # A table has a column for every setting, with integers as floats where some are empty.
           'kwargs': [{'keywords': None, 'num_words': None}, {'keywords': ['Rhine']}]}
          for i in range(6)]

  def test_prompts_of_your_own(self, tmp_path):
    task = tasks.get('ifeval')
    source = str(tiny.write_jsonl(tmp_path / 'own.jsonl', self.ROWS))
    row = task.load('eval', tasks.options(task, dict(source=source)))[2]
    assert row['prompt'] == 'Name 2 rivers without commas.'
    assert task.grade(row, 'Rhine and Elbe') == 1.0
    assert task.grade(row, 'Rhine, Elbe') == task.grade(row, 'Elbe') == task.grade(row, '') == 0.0
    assert task.grade_all([row] * 2, ['Rhine', 'Elbe']) == [1.0, 0.0]
    assert task.measures(row, 'Elbe')['instruction_strict'] == [1.0, 0.0]
    trained = tasks.options(task, dict(source=source, holdout_examples=2))
    assert len(task.load('train', trained)) == 4

  def test_a_row_that_is_wrong(self, tmp_path):
    rows = json.loads(json.dumps(self.ROWS))
    rows[3]['kwargs'].pop()
    source = str(tiny.write_jsonl(tmp_path / 'own.jsonl', rows))
    task = tasks.get('ifeval')
    with pytest.raises(ValueError, match='task.options.source=.*row 3.*kwargs=.*allowed'):
      task.load('eval', tasks.options(task, dict(source=source)))

  def test_other_tasks_have_no_measures(self):
    assert tasks.get('aime24').measures({'grader': 'boxed'}, 'x') == {}
