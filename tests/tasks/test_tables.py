"""Rows as people have them: read as they were written, or refused with file, row and column."""

import datetime
import json
import os

import datasets
import pytest
import tiny

from opd_jax import tasks
from opd_jax.tasks import prompts


def options(source, **fields):
  return tasks.options(prompts, {
      'source': str(source), 'prompt_column': 'q', 'answer_column': 'a', 'grader': 'exact',
      'holdout_examples': 1} | fields)


def load(source, **fields):
  """All rows, those held out too, in the order of their prompts."""
  o = options(source, **fields)
  rows = [*prompts.load('train', o), *prompts.load('eval', o)]
  return sorted(rows, key=lambda r: str(r['prompt']))


def answers(source, **fields):
  return [r['answer'] for r in load(source, **fields)]


def refused(source, *parts, **fields):
  with pytest.raises(ValueError, match='allowed') as e:
    prompts.load('train', options(source, **fields))
  for part in (str(source), *parts):
    assert part in str(e.value), f'{part!r} is not in {e.value}'


def rows_of(values):
  return [{'q': f'{i}?', 'a': value} for i, value in enumerate(values)]


def text(path, content, encoding='utf-8'):
  path.write_bytes(content.encode(encoding))
  return path


DATES = ['2024-01-31', '2024-02-01', '2024-02-01 10:00:00', '2024-02-01T10:00:00Z']


class TestTexts:

  @pytest.mark.parametrize('kind', ['jsonl', 'json', 'csv', 'folder'])
  def test_dates_stay_texts(self, kind, tmp_path):
    # The readers of `datasets` make timestamps of them.
    rows = rows_of(DATES)
    if kind == 'csv':
      path = text(tmp_path / 'rows.csv', 'q,a\n' + ''.join(f'{r["q"]},{r["a"]}\n' for r in rows))
    elif kind == 'json':
      path = text(tmp_path / 'rows.json', json.dumps(rows))
    elif kind == 'jsonl':
      path = tiny.write_jsonl(tmp_path / 'rows.jsonl', rows)
    else:
      path = tmp_path
      tiny.write_jsonl(tmp_path / 'train-0.jsonl', rows[:2])
      tiny.write_jsonl(tmp_path / 'train-1.jsonl', rows[2:])
    assert answers(path) == DATES

  def test_a_csv_has_texts_only(self, tmp_path):
    cells = ['True', 'False', 'NA', 'nan', 'null', '007', '1e5', '1.50', str(2**63), '#N/A']
    path = text(tmp_path / 'rows.csv',
                'q,a\n' + ''.join(f'{i}?,{cell}\n' for i, cell in enumerate(cells)))
    assert answers(path) == cells

  def test_filters_of_a_csv_know_numbers(self, tmp_path):
    path = text(tmp_path / 'rows.csv', 'q,a,level,ok\n0?,x,3,True\n1?,y,-2,False\n2?,z,,true\n')
    for filters, kept in ((('level != None', 'level >= -2.5'), 'xy'), (('ok == True',), 'xz'),
                          (("level in ['3', '-2']",), 'xy'), (('level in [3, -2]',), 'xy')):
      assert answers(path, filters=filters) == list(kept)
    refused(path, "'level >= 0'", 'row 2 of', 'NoneType', filters=('level >= 0',))
    refused(path, 'no rows are left', filters=("a >= 'x'", "q == 'none'"))

  def test_integers_of_any_size(self, tmp_path):
    values = [2**63, -2**70, 10**30, 7, '8', 0.5]
    path = tiny.write_jsonl(tmp_path / 'rows.jsonl', rows_of(values))
    assert answers(path) == [str(v) for v in values]
    assert prompts.grade(load(path)[0], '9,223,372,036,854,775,808') == 1.0
    assert prompts.grade(load(path)[0], '9223372036854775807') == 0.0

  @pytest.mark.parametrize('name', ['rows.csv', 'rows.jsonl', 'rows.json'])
  def test_another_encoding(self, name, tmp_path):
    rows = rows_of(['1', '2', 'caf\u00e9'])
    content = {'rows.csv': 'q,a\n' + ''.join(f'{r["q"]},{r["a"]}\n' for r in rows)}.get(
        name, ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows))
    path = text(tmp_path / name, content, 'latin-1')
    line = 4 if name == 'rows.csv' else 3
    refused(path, 'task.options.source=', f"line {line} of '{path}' is not UTF-8 (byte 0xe9",
            'iconv')
    text(path, content, 'utf-8-sig')  # with a byte order mark
    assert answers(path) == ['1', '2', 'caf\u00e9']

  @pytest.mark.parametrize(('name', 'content', 'parts'), [
      ('rows.csv', 'q,a\n1,2\n3\n', ('line 3 has 1 cells', 'first line 2')),
      ('rows.csv', 'q,a\n1,"2\n', ('cannot be read',)),
      ('rows.csv', 'q,q\n1,2\n', ("twice, ['q', 'q']",)),
      ('rows.csv', 'q;a\n1;2\n', ("'q;a'", "not by ';'")),
      ('rows.csv', 'q\ta\n1\t2\n', ("not by '\\t'",)),
      ('rows.jsonl', '{"q": "1", "a": "2"}\n{"q": \n', ('line 2 is no JSON',)),
      ('rows.jsonl', '{"q": "1", "a": "2"}\n["q"]\n', ("line 2 is ['q'], no JSON object",)),
      ('rows.json', '[{"q": "1"}, 3]', ('entry 1 is 3, no JSON object',)),
      ('rows.json', '3', ('entry 0 is 3',)),
      ('rows.jsonl', '{"q": "\\ud800", "a": "2"}\n',
       ("line 1 has half of a surrogate pair in 'q'",)),
      ('rows.json', '[' * 100_000, ('cannot be read',)),
      ('rows.csv', '', ('cannot be read',)), ('rows.csv', 'q,a\n', ('it is empty',))])
  def test_damaged(self, name, content, parts, tmp_path):
    refused(text(tmp_path / name, content), *parts)

  def test_utf_16(self, tmp_path):
    refused(text(tmp_path / 'rows.csv', 'q,a\n1,2\n', 'utf-16'), 'iconv -f utf-16')

  def test_a_nested_field_that_is_not_there(self, tmp_path):
    path = tiny.write_jsonl(tmp_path / 'rows.jsonl', [{'q': {'x': '1'}, 'a': '2'}] * 3)
    for name, column in (('prompt_column', 'q.y'), ('answer_column', 'a.b'),
                         ('completion_column', 'q.z')):
      refused(path, f'task.options.{name}={column!r}', "without",
              **{'prompt_column': 'q.x', name: column})
    refused(path, 'task.options.filters', "without 'y'", prompt_column='q.x',
            filters=("q.y == '1'",))

  def test_what_is_all_right(self, tmp_path):
    emoji = '{"q": "\\ud83d\\ude00?", "a": "1"}\n\n{"q": "\u2028?", "a": "2"}\n'
    rows = load(text(tmp_path / 'rows.json', emoji))  # an object a line, and an empty one
    assert [(r['prompt'], r['answer']) for r in rows] == [('\u2028?', '2'), ('\U0001f600?', '1')]

  def test_a_pipe_is_no_file(self, tmp_path):
    os.mkfifo(tmp_path / 'rows.jsonl')
    refused(tmp_path / 'rows.jsonl', 'no regular files')


class TestAnswers:

  def test_several_accepted(self, tmp_path):
    path = tiny.write_jsonl(tmp_path / 'rows.jsonl', rows_of([['Paris', 'the city of Paris'], '7',
                                                              ['8']]))
    rows = load(path)
    assert [r['answer'] for r in rows] == [['Paris', 'the city of Paris'], ['7'], ['8']]
    assert [prompts.grade(rows[0], t) for t in ('paris', 'The city of Paris.', 'Rome')] == [1, 1, 0]
    tiny.write_jsonl(path, rows_of([['7'], ['8']]))
    assert answers(path) == ['7', '8']

  @pytest.mark.parametrize('bad', [None, '', ' ', [], ['7', None], True, {'b': 1}, [['7']],
                                   float('nan')])
  def test_none(self, bad, tmp_path):
    path = tiny.write_jsonl(tmp_path / 'rows.jsonl', rows_of(['7', '8', bad]))
    refused(path, "task.options.answer_column='a'", 'row 2 of', "filters=('a != None',)")

  def test_the_hint_for_rows_without_one_works(self, tmp_path):
    path = tiny.write_jsonl(tmp_path / 'rows.jsonl', rows_of(['7', None, ['8', '9'], '10']))
    assert answers(path, filters=('a != None',)) == [['7'], ['8', '9'], ['10']]
    # Rows keep their numbers when others are left out before them.
    tiny.write_jsonl(path, rows_of(['7', None, '8', '']))
    refused(path, 'row 3 of', filters=('a != None',))

  def test_a_type_that_is_no_text(self, tmp_path):
    day = datetime.datetime(2024, 1, 31)
    path = tmp_path / 'rows.parquet'
    datasets.Dataset.from_list(rows_of([day, day])).to_parquet(path)
    refused(path, "answer_column='a'", f"row 0 of '{path}' has datetime.datetime(2024")

  def test_the_row_is_named_with_the_file_of_a_folder(self, tmp_path):
    tiny.write_jsonl(tmp_path / 'train-0.jsonl', rows_of(['7', '8']))
    tiny.write_jsonl(tmp_path / 'train-1.jsonl', rows_of(['9', None]))
    refused(tmp_path, f"row 1 of '{tmp_path / 'train-1.jsonl'}'")


class TestNested:

  ROWS = [{'prompt': [{'role': 'user', 'content': f'{i}?'}],
           'reward_model': {'style': 'rule' if i else 'model', 'ground_truth': str(i)}}
          for i in range(4)]

  @pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
  def test_columns(self, kind, tmp_path):
    path = tmp_path / f'rows.{kind}'
    if kind == 'jsonl':
      tiny.write_jsonl(path, self.ROWS)
    else:
      datasets.Dataset.from_list(self.ROWS).to_parquet(path)
    fields = dict(prompt_column='', messages_column='prompt',
                  answer_column='reward_model.ground_truth')
    assert answers(path, **fields) == ['0', '1', '2', '3']
    assert answers(path, **fields, filters=("reward_model.style == 'rule'",)) == ['1', '2', '3']
    refused(path, "answer_column='reward.ground_truth'", "['prompt', 'reward_model']",
            **fields | {'answer_column': 'reward.ground_truth'})
    refused(path, "answer_column='reward_model.truth'", 'row 0 of', "without 'truth'",
            **fields | {'answer_column': 'reward_model.truth'})

  def test_a_row_without_the_field(self, tmp_path):
    path = tiny.write_jsonl(tmp_path / 'rows.jsonl', [*self.ROWS, {**self.ROWS[0],
                                                                   'reward_model': None}])
    refused(path, "_column='reward_model.ground_truth'", 'row 4 of', 'has None', prompt_column='',
            messages_column='prompt', answer_column='reward_model.ground_truth')


class TestConversations:

  def path(self, tmp_path, *talks):
    return tiny.write_jsonl(tmp_path / 'rows.jsonl', [{'talk': t} for t in talks])

  FIELDS = dict(prompt_column='', messages_column='talk', answer_column='', grader='none')

  def test_from_and_value(self, tmp_path):
    talk = [{'from': 'system', 'value': 'Sums.'}, {'from': 'human', 'value': '1?', 'weight': None},
            {'from': 'gpt', 'value': '2'}]
    other = [{'from': 'user', 'value': '2?'}, {'from': 'assistant', 'value': '3'}]
    row, last = load(self.path(tmp_path, talk, other), **self.FIELDS, suffix='!')
    assert row['prompt'] == [{'role': 'system', 'content': 'Sums.'},
                             {'role': 'user', 'content': '1?!'}]
    assert last['prompt'] == [{'role': 'user', 'content': '2?!'}] and last['completion'] == '3'
    assert row['completion'] == '2'

  def test_content_in_parts(self, tmp_path):
    parts = [{'type': 'text', 'text': '1'}, {'type': 'text', 'text': '?', 'image_url': None}]
    rows = load(self.path(tmp_path, [{'role': 'user', 'content': parts}],
                          [{'role': 'user', 'content': '2?'}]), **self.FIELDS)
    assert [r['prompt'][0]['content'] for r in rows] == ['1?', '2?']

  def test_as_text_in_a_csv(self, tmp_path):
    talks = [json.dumps([{'role': 'user', 'content': f'{i}?'}]).replace('"', '""') for i in (1, 2)]
    path = text(tmp_path / 'rows.csv', 'talk\n' + ''.join(f'"{t}"\n' for t in talks))
    assert load(path, **self.FIELDS)[0]['prompt'] == [{'role': 'user', 'content': '1?'}]

  @pytest.mark.parametrize('talk', [
      None, 7, 'Hello', '[{', {'role': 'user', 'content': '1'}, [7], ['Hello'], [None], [[]], [{}],
      [{'role': 'user'}], [{'role': 'user', 'content': 7}], [{'role': 1, 'content': 'a'}],
      [{'role': 'user', 'content': [{'type': 'image', 'image': 'a.png'}]}],
      [{'role': 'user', 'content': [{'type': 'text'}]}], [{'role': 'user', 'content': ['a']}],
      [{'role': 'user', 'from': 'human', 'content': '1'}], [{'from': 'human'}],
      [{'from': 'tool', 'value': '1'}], [{'from': ['human'], 'value': '1'}]])
  def test_what_is_none(self, talk, tmp_path):
    good = [{'role': 'user', 'content': '1'}]
    refused(self.path(tmp_path, good, good, talk), "task.options.messages_column='talk'",
            'row 2 of', **self.FIELDS)

  def test_where_a_text_is_wanted(self, tmp_path):
    refused(self.path(tmp_path, [{'role': 'user', 'content': '1'}]), "prompt_column='talk'",
            'messages_column for a conversation', **self.FIELDS | dict(
                prompt_column='talk', messages_column=''))


class TestGuesses:

  AUTO = dict(prompt_column='auto', answer_column='auto', grader='auto')

  def told(self, tmp_path, *rows, **fields):
    path = tiny.write_jsonl(tmp_path / 'rows.jsonl', [
        {name: f'{value} {i}' if isinstance(value, str) else value for name, value in row.items()}
        for i, row in enumerate(rows * 3)])
    rows = prompts.load('train', options(path, **self.AUTO | fields))
    return rows, rows.info.description

  @pytest.mark.parametrize(('row', 'prompt', 'answer'), [
      ({'question': 'a', 'id': 3}, 'question', ''),
      ({'text': 'a', 'id': 3, 'score': 0.5}, 'text', ''),  # the only column of texts
      ({'problem': 'a', 'answer': 'b', 'subject': 'c'}, 'problem', 'answer'),
      ({'prompt': 'a', 'reward_model': {'ground_truth': '7'}}, 'prompt',
       'reward_model.ground_truth'),
      ({'prompt': 'a', 'reward_model': {'style': 'none'}}, 'prompt', ''),
      ({'problem': 'a', 'solution': 'b', 'source': 'c'}, 'problem', 'solution')])
  def test_the_only_candidate(self, row, prompt, answer, tmp_path):
    rows, told = self.told(tmp_path, row)
    assert f"prompt_column is '{prompt}' (guessed)" in told and rows[0]['prompt'][:2] == 'a '
    assert (f"answer_column is '{answer}' (guessed)" if answer else 'no answers, nothing is graded'
            ) in told
    assert (prompts.grade(rows[0], 'x') is None) == (not answer)

  @pytest.mark.parametrize('name', ['messages', 'prompt'])
  def test_conversations(self, name, tmp_path):
    path = tiny.write_jsonl(tmp_path / 'rows.jsonl', [
        {name: [{'role': 'user', 'content': f'{i}'}], 'source': 'b'} for i in range(3)])
    rows = prompts.load('train', options(path, **self.AUTO))
    assert f"messages_column is '{name}' (guessed)" in rows.info.description
    assert rows[0]['prompt'][0]['role'] == 'user'
    # One that is named is not guessed.
    named = prompts.load('train', options(path, messages_column=name, **self.AUTO))
    assert named.to_list() == rows.to_list() and 'messages_column' not in named.info.description

  @pytest.mark.parametrize(('row', 'parts'), [
      ({'question': 'a', 'problem': 'b'}, ("prompt_column='auto'", "['question', 'problem']")),
      ({'one': 'a', 'two': 'b'}, ("prompt_column='auto'", "['one', 'two']")),
      ({'one': 1, 'two': 0.5}, ("prompt_column='auto'", "['one', 'two']")),
      ({'question': 'a', 'answer': 'b', 'solution': 'c'},
       ("answer_column='auto'", "['answer', 'solution']"))])
  def test_not_one(self, row, parts, tmp_path):
    with pytest.raises(ValueError, match='allowed: one of') as e:
      self.told(tmp_path, row)
    for part in parts:
      assert part in str(e.value), f'{part!r} is not in {e.value}'

  @pytest.mark.parametrize('grader', ['exact', 'boxed'])
  def test_a_grader_that_was_chosen_needs_answers(self, grader, tmp_path):
    with pytest.raises(ValueError, match=r"answer_column='auto': .*allowed: one of .*'label'"):
      self.told(tmp_path, {'question': 'a', 'label': 'b'}, grader=grader)

  def test_no_answers_are_looked_for_without_a_grader(self, tmp_path):
    row = {'question': 'a', 'answer': 'b', 'solution': 'c'}
    rows, told = self.told(tmp_path, row, grader='none')
    assert rows.column_names == ['prompt', 'grader'] and 'answer' not in told

  def test_evaluation_rows_have_columns_of_their_own(self, tmp_path):
    path = tiny.write_jsonl(tmp_path / 'eval.jsonl', [{'problem': 'x', 'answer': '7'}])
    fields = dict(eval_source=str(path), holdout_examples=0)
    rows, told = self.told(tmp_path, {'question': 'a'}, **fields)
    assert prompts.grade(rows[0], '7') is None
    held_out = prompts.load('eval', options(tmp_path / 'rows.jsonl', **self.AUTO | fields))
    assert "eval_prompt_column is 'problem' (guessed)" in held_out.info.description
    assert prompts.grade(held_out[0], '7') == 1.0
