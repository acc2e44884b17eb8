"""The task that reads any data set: sources, columns, filters, evaluation rows, graders."""

import json

import datasets
import pytest
import tiny

from opd_jax import tasks
from opd_jax.tasks import _graders, prompts

ROWS = [{'question': f'What is {i} plus one?', 'solution': f'It is {i + 1}.', 'level': i % 5,
         'source': 'math' if i % 2 else 'code', 'checked': i % 3 == 0} for i in range(40)]


def options(source, **fields):
  return tasks.options(prompts, {
      'source': str(source), 'prompt_column': 'question', 'answer_column': 'solution',
      'grader': 'last_number', 'holdout_examples': 10} | fields)


@pytest.fixture
def jsonl(tmp_path):
  return tiny.write_jsonl(tmp_path / 'rows.jsonl', ROWS)


def refused(*parts, split='train', **fields):
  with pytest.raises(ValueError, match='allowed') as e:
    prompts.load(split, options(**fields))
  for part in parts:
    assert part in str(e.value), f'{part!r} is not in {e.value}'


def asked(rows):
  return sorted(int(p.split()[2]) for p in rows['prompt'][:])


class TestSources:

  def write(self, path, kind):
    table = datasets.Dataset.from_list(ROWS)
    if kind == 'json':
      path = path / 'rows.json'
      path.write_text(json.dumps(ROWS))
    elif kind == 'jsonl':
      path = tiny.write_jsonl(path / 'rows.jsonl', ROWS)
    elif kind == 'parquet':
      path = path / 'rows.parquet'
      table.to_parquet(path)
    elif kind == 'csv':
      path = path / 'rows.csv'
      table.to_csv(path)
    elif kind == 'folder':
      path = path / 'rows'
      path.mkdir()
      tiny.write_jsonl(path / 'train-00000.jsonl', ROWS[:15])
      tiny.write_jsonl(path / 'train-00001.jsonl', ROWS[15:])
    else:
      path = path / 'saved'
      (table if kind == 'saved' else datasets.DatasetDict(train=table)).save_to_disk(path)
    return path

  @pytest.mark.parametrize('kind', ['json', 'jsonl', 'parquet', 'csv', 'folder', 'saved', 'splits'])
  def test_all_hold_the_same(self, kind, tmp_path, jsonl):
    want = prompts.load('train', options(jsonl))
    got = prompts.load('train', options(self.write(tmp_path / '.', kind)))
    assert got.to_list() == want.to_list() and len(got) == 30
    assert got[0] == {'prompt': f"What is {asked(got)[0]} plus one?", 'grader': 'last_number',
                      'answer': f'It is {asked(got)[0] + 1}.'}

  def test_splits_by_name(self, tmp_path):
    folder = tmp_path / 'rows'
    folder.mkdir()
    tiny.write_jsonl(folder / 'train.jsonl', ROWS[:30])
    tiny.write_jsonl(folder / 'test.jsonl', ROWS[30:])
    own = dict(source=folder, train_split='train', holdout_examples=0)
    assert asked(prompts.load('train', options(**own, eval_split='test'))) == list(range(30))
    assert asked(prompts.load('eval', options(**own, eval_split='test'))) == list(range(30, 40))
    refused("eval_split='dev'", "['train', 'test']", **own, eval_split='dev')
    refused("train_split=''", "['train', 'test']", source=folder)  # which one?

  def test_what_is_not_there(self, tmp_path):
    for source in (tmp_path / 'no.jsonl', 'no.jsonl', 'a/b/c', '~/rows'):
      refused(f'task.options.source={str(source)!r} does not exist', source=source)
    (tmp_path / 'rows.txt').write_text('one')
    refused('rows.txt', "'.jsonl'", source=tmp_path / 'rows.txt')
    for text in ('{"question": "one"', ''):
      (tmp_path / 'rows.jsonl').write_text(text)
      refused('rows.jsonl', 'cannot be read', source=tmp_path / 'rows.jsonl')

  def test_a_name_on_the_hub_needs_a_commit(self, monkeypatch):
    for revision in ('', 'main', 'v1.0', 'abc123'):
      refused(f'task.options.revision={revision!r}', "'owner/sums'", 'commit',
              source='owner/sums', revision=revision)
    calls = []

    def load_dataset(*args, **kwargs):
      calls.append((args, kwargs))
      return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    commit = '0123456789abcdef' * 2 + '01234567'
    rows = prompts.load('train', options('owner/sums', revision=commit, subset='easy'))
    assert len(rows) == 30
    assert calls == [(('owner/sums',), dict(name='easy', revision=commit))]

  def test_what_has_no_effect_on_a_file(self, jsonl):
    refused("task.options.revision='main' has no effect", source=jsonl, revision='main')
    refused("task.options.subset='easy' has no effect", source=jsonl, subset='easy')


class TestColumns:

  def test_missing(self, jsonl):
    refused("task.options.prompt_column='problem'", "'question'", source=jsonl,
            prompt_column='problem')
    refused("task.options.answer_column='answer'", "'solution'", source=jsonl,
            answer_column='answer')
    refused("task.options.completion_column='text'", "'solution'", source=jsonl,
            completion_column='text')

  def test_a_row_without_a_value(self, tmp_path):
    path = tiny.write_jsonl(tmp_path / 'rows.jsonl', [*ROWS, {'question': None}])
    refused("task.options.prompt_column='question': row 40", 'has None', "['str']", source=path)

  def test_completions_and_suffix(self, jsonl):
    o = options(jsonl, completion_column='solution', suffix=' Be brief.')
    rows = prompts.load('train', o)
    assert all(r['completion'] == r['answer'] and r['prompt'].endswith('one? Be brief.')
               for r in rows)

  def test_numbers_are_answers_too(self, jsonl):
    rows = prompts.load('eval', options(jsonl, answer_column='level', grader='exact'))
    assert all(r['answer'] == str(int(r['prompt'].split()[2]) % 5) for r in rows)
    refused("answer_column='checked'", 'row 0', 'True', source=jsonl, answer_column='checked')

  def conversations(self, tmp_path, rows, **fields):
    path = tiny.write_jsonl(tmp_path / 'talks.jsonl', [{'talk': r} for r in rows])
    return dict(source=path, prompt_column='', messages_column='talk', answer_column='',
                grader='none', holdout_examples=1) | fields

  def test_conversations(self, tmp_path):
    talks = [[{'role': 'system', 'content': 'Sums.'}, {'role': 'user', 'content': f'{i}?'}]
             for i in range(4)]
    rows = prompts.load('train', options(**self.conversations(tmp_path, talks, suffix='!')))
    assert len(rows) == 3 and rows.column_names == ['prompt', 'grader']
    for row in rows:
      system, user = prompts.prompt(row)
      assert system == talks[0][0]
      assert user['role'] == 'user' and user['content'] in {f'{i}?!' for i in range(4)}

  def test_the_last_turn_of_the_assistant_is_the_completion(self, tmp_path):
    talks = [[{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': f'{i}!'}]
             for i in range(4)]
    rows = prompts.load('train', options(**self.conversations(tmp_path, talks)))
    for row in rows:
      assert [m['role'] for m in row['prompt']] == ['user']
      assert row['completion'][0] == row['prompt'][0]['content'][0]

  @pytest.mark.parametrize(('turns', 'parts'), [
      ([], ('row 2', '[]')),
      ([{'role': 'system', 'content': 'a'}], ("['system']", "'user'")),
      ([{'role': 'assistant', 'content': 'a'}], ("['assistant']",)),
      ([{'role': 'user', 'content': None}], ("'content': None",)),
      ([{'role': 'user', 'content': 'a', 'tool': 'b'}], ("'tool': 'b'", 'nothing else')),
      ([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}],
       ("1 of 3 conversations end with 'assistant'", 'all of them or none'))])
  def test_a_conversation_that_is_none(self, turns, parts, tmp_path):
    talks = [[{'role': 'user', 'content': 'a'}]] * 2 + [turns]
    refused("task.options.messages_column='talk'", *parts,
            **self.conversations(tmp_path, talks))


class TestFilters:

  @pytest.mark.parametrize(('filters', 'keep'), [
      (('level >= 3',), lambda r: r['level'] >= 3),
      (('level<3',), lambda r: r['level'] < 3),
      (("source == 'math'", 'level != 0'), lambda r: r['source'] == 'math' and r['level']),
      (('level in [1, 4]',), lambda r: r['level'] in (1, 4)),
      (('checked == True',), lambda r: r['checked']),
      (("question > 'What is 3'", 'level <= 2.5'),
       lambda r: r['question'] > 'What is 3' and r['level'] <= 2.5)])
  def test_kept(self, filters, keep, jsonl):
    o = options(jsonl, filters=filters, holdout_examples=1)
    both = asked(prompts.load('train', o)) + asked(prompts.load('eval', o))
    assert sorted(both) == [i for i, r in enumerate(ROWS) if keep(r)]

  @pytest.mark.parametrize('text', [
      'level', 'level >= ', 'level => 3', 'level >= three', 'level in 3', "level in 'abc'",
      '>= 3', 'level == __import__("os")', 'level == f()', ''])
  def test_what_cannot_be_read_is_refused_before_anything_is_loaded(self, text):
    with pytest.raises(ValueError, match=r'task\.options\.filters has .*allowed: COLUMN') as e:
      options('nowhere.jsonl', filters=(text,))
    assert repr(text) in str(e.value)

  def test_unknown_column(self, jsonl):
    refused("'difficulty >= 3'", "['question', 'solution', 'level', 'source', 'checked']",
            source=jsonl, filters=('difficulty >= 3',))

  @pytest.mark.parametrize('text', [
      "level == '3'", "level >= '3'", 'source == 1', 'source < 1', 'checked == 1', 'level == True',
      "level in [1, '2']", 'checked > False'])
  def test_a_comparison_with_another_type(self, text, jsonl):
    # It would keep everything or nothing without a word.
    refused(repr(text), 'values of type', source=jsonl, filters=(text,))

  def test_missing_values(self, tmp_path):
    path = tiny.write_jsonl(tmp_path / 'rows.jsonl', [*ROWS, {**ROWS[0], 'level': None}])
    refused("'level >= 3'", 'NoneType', source=path, filters=('level >= 3',))
    rows = prompts.load('train', options(path, filters=('level != None', 'level >= 3')))
    assert len(rows) == 16 - 10

  def test_nothing_left(self, jsonl):
    refused("filters=('level > 9',)", 'no rows are left', source=jsonl, filters=('level > 9',))

  def test_of_evaluation_rows(self, jsonl):
    own = dict(eval_source=str(jsonl), holdout_examples=0, eval_filters=('level == 4',))
    rows = prompts.load('eval', options(jsonl, filters=('level < 4',), **own))
    assert asked(rows) == [i for i in range(40) if i % 5 == 4]
    refused("task.options.eval_filters has 'hardness == 4'", source=jsonl,
            **{**own, 'eval_filters': ('hardness == 4',)})


class TestEvaluationRows:

  def test_held_out_at_random_and_for_good(self, jsonl):
    held_out = prompts.load('eval', options(jsonl))
    train = prompts.load('train', options(jsonl))
    assert len(held_out) == 10 and sorted(asked(held_out) + asked(train)) == list(range(40))
    assert asked(held_out) != list(range(10))
    assert prompts.load('eval', options(jsonl)).to_list() == held_out.to_list()
    other = prompts.load('eval', options(jsonl, holdout_seed=1))
    assert asked(other) != asked(held_out)
    refused('holdout_examples=40', 'below the 40', source=jsonl, holdout_examples=40)

  def test_training_rows_that_are_evaluation_rows_are_left_out(self, tmp_path, jsonl):
    near = ['what is 3  plus ONE?', ' What is\n4 plus one? ', 'What is 5 plus one', 'Another?']
    path = tiny.write_jsonl(tmp_path / 'eval.jsonl',
                            [{'problem': p, 'truth': '1'} for p in near])
    o = options(jsonl, holdout_examples=0, eval_source=str(path), eval_prompt_column='problem',
                eval_answer_column='truth')
    train = prompts.load('train', o)
    assert asked(train) == [i for i in range(40) if i not in (3, 4)]  # 5 differs by its '?'
    assert train.info.description == '40 rows read, 2 left out that are in the evaluation set'
    assert prompts.load('eval', o).info.description == '4 rows read'
    assert prompts.load('eval', o)['prompt'][:] == near

  def test_twins_of_held_out_rows_are_left_out(self, tmp_path):
    path = tiny.write_jsonl(tmp_path / 'rows.jsonl', ROWS + ROWS)
    held_out, train = (asked(prompts.load(s, options(path))) for s in ('eval', 'train'))
    assert not set(held_out) & set(train) and set(held_out) | set(train) == set(range(40))
    described = prompts.load('train', options(path, filters=('level > 0',))).info.description
    assert described.startswith('80 rows read, 64 kept by filters, 10 held out, ')

  def test_conversations_are_known_by_their_words(self, tmp_path):
    talks = [{'talk': [{'role': 'system', 'content': 'Sums.'}, {'role': 'user', 'content': t}]}
             for t in ('One?', 'Two?')]
    train = tiny.write_jsonl(tmp_path / 'talks.jsonl', talks)
    held_out = tiny.write_jsonl(tmp_path / 'eval.jsonl', [{'q': 'two?', 'a': '3'}])
    o = prompts.Options(source=str(train), messages_column='talk', eval_source=str(held_out),
                        eval_prompt_column='q', eval_answer_column='a', grader='exact')
    rows = prompts.load('train', o)
    assert [r['prompt'][-1]['content'] for r in rows] == ['One?']
    # Only the evaluation rows have answers.
    assert prompts.grade(rows[0], '3') is None
    assert prompts.grade(prompts.load('eval', o)[0], '3') == 1.0

  def test_of_a_benchmark(self, tmp_path, jsonl):
    rules = [{'prompt': 'What is 3 plus one?', 'instruction_id_list': ['punctuation:no_comma'],
              'kwargs': [{}], 'group': 'marks'},
             {'prompt': 'Name cats.', 'instruction_id_list': ['keywords:existence'],
              'kwargs': [{'keywords': ['tiger']}], 'group': 'words'}]
    o = options(jsonl, holdout_examples=0, eval='ifeval',
                eval_source=str(tiny.write_jsonl(tmp_path / 'rules.jsonl', rules)))
    held_out, train = (prompts.load(split, o) for split in ('eval', 'train'))
    assert asked(train) == [i for i in range(40) if i != 3]
    assert [prompts.group(row) for row in held_out] == ['marks', 'words']
    assert [prompts.grade(row, 'A tiger, a lion.') for row in held_out] == [0.0, 1.0]
    assert prompts.measures(held_out[1], 'none')['keywords_strict'] == [0.0]
    # The training rows have graders of their own.
    assert prompts.grade(train[0], 'It is 1.') == 1.0 and prompts.measures(train[0], '1') == {}
    assert prompts.group(train[0]) == ''

  def test_suffixes_of_a_benchmark_do_not_hide_twins(self, tmp_path, jsonl):
    aime = [{'problem': 'What is 4 plus one?', 'answer': '5'}]
    o = options(jsonl, holdout_examples=0, eval='aime24', suffix=' Be brief.',
                eval_source=str(tiny.write_jsonl(tmp_path / 'aime.jsonl', aime)))
    assert asked(prompts.load('train', o)) == [i for i in range(40) if i != 4]
    assert 'boxed' in prompts.load('eval', o)[0]['prompt']

  def test_what_a_benchmark_cannot_read_is_said_of_eval_source(self, tmp_path, jsonl):
    asked = dict(source=jsonl, holdout_examples=0, eval='ifeval')
    refused(f"task.options.eval_source='{tmp_path}/no.jsonl' does not exist", **asked,
            eval_source=f'{tmp_path}/no.jsonl')
    refused('task.options.eval_source', "no columns ['prompt'", **asked, eval_source=str(jsonl))
    refused("task.options.eval_revision='v1' has no effect", **asked, eval_source=str(jsonl),
            eval_revision='v1')
    (tmp_path / 'both').mkdir()
    for split in ('train', 'validation'):
      tiny.write_jsonl(tmp_path / 'both' / f'{split}.jsonl',
                       [{'question': '1?', 'answer': '#### 1'}])
    refused("task.options.eval_source=", "['train', 'validation']", "'test'", source=jsonl,
            holdout_examples=0, eval='gsm8k', eval_source=str(tmp_path / 'both'))

  def test_the_only_split_of_a_folder_is_the_benchmarks(self, tmp_path, jsonl):
    (tmp_path / 'gsm8k').mkdir()
    tiny.write_jsonl(tmp_path / 'gsm8k' / 'rows.jsonl', [{'question': '1?', 'answer': '#### 1'}])
    o = options(jsonl, holdout_examples=0, eval='gsm8k', eval_source=str(tmp_path / 'gsm8k'))
    assert prompts.load('eval', o)['answer'][:] == ['1']

  def test_nothing_but_evaluation_rows(self, jsonl):
    refused('all of 40 training rows', source=jsonl, holdout_examples=0, eval_source=str(jsonl))


@pytest.mark.parametrize(('fields', 'parts'), [
    (dict(source=''), ("source=''",)),
    (dict(grader='judge'), ("grader='judge'", "'boxed'")),
    (dict(grader='none'), ("grader='none'", "answer_column='solution'")),
    (dict(answer_column=''), ("grader='last_number'", "answer_column=''")),
    (dict(holdout_examples=0), ('holdout_examples=0', "eval_split=''")),
    (dict(holdout_examples=-2), ('holdout_examples=-2',)),
    (dict(eval_split='test'), ('holdout_examples=10', "eval_split='test'")),
    (dict(eval_split='test', holdout_examples=0, holdout_seed=3), ('holdout_seed=3',)),
    (dict(eval_subset='easy'), ("eval_subset='easy' has no effect",)),
    (dict(eval_revision='0' * 40), ('eval_revision', 'no effect')),
    (dict(eval_filters=('level > 1',)), ('eval_filters', 'no effect')),
    (dict(eval_prompt_column='q'), ('eval_prompt_column', 'no effect')),
    (dict(eval='tulu3', holdout_examples=0), ("eval='tulu3'", "'ifeval'")),
    (dict(eval='ifeval'), ('holdout_examples=10', "eval='ifeval'")),
    (dict(eval='ifeval', holdout_examples=0, eval_split='test'), ("eval_split='test'",)),
    (dict(eval='ifeval', holdout_examples=0, eval_prompt_column='q'),
     ('eval_prompt_column', "eval='ifeval'")),
    (dict(eval='ifeval', holdout_examples=0, eval_filters=('a > 1',)), ('eval_filters',)),
    (dict(eval='ifeval', holdout_examples=0, eval_revision='0' * 40), ('eval_revision',)),
    (dict(eval='ifeval', holdout_examples=0, grader='none'), ("grader='none'", 'solution')),
    (dict(prompt_column=''), ("prompt_column=''", "messages_column=''", 'one of them')),
    (dict(messages_column='talk'), ("prompt_column='question'", "messages_column='talk'")),
    (dict(filters=(3,)), ('filters=(3,)',)),
    (dict(holdout_examples='10'), ("holdout_examples='10'",)),
], ids=str)
def test_options_are_refused(fields, parts):
  with pytest.raises(ValueError, match='allowed') as e:
    options(**{'source': 'rows.jsonl', **fields})
  for part in parts:
    assert part in str(e.value), f'{part!r} is not in {e.value}'


class TestGrade:

  @pytest.mark.parametrize(('grader', 'answer', 'right', 'wrong'), [
      ('exact', 'Paris', ['paris', ' Paris\n', 'PARIS.'], ['In Paris', 'Par is', '', 'Rome']),
      ('exact', '42', ['42', '42.0', ' 42 ', '$42$', '84/2'], ['the answer is 42', '4 2', '43']),
      ('boxed', '7', [r'so \boxed{7}', r'\boxed{3}, no: \boxed{7.0}', r'$\boxed{ 7 }$'],
       ['7', r'\boxed{8}', r'\boxed{7} or \boxed{8}', r'\boxed{7', r'\boxed{}', '']),
      ('boxed', r'Hence $\boxed{\frac{1}{2}}$.',
       [r'\boxed{\frac{1}{2}}', r'\boxed{\dfrac{1}{2}}', r'\boxed{0.5}', r'\boxed{1/2}'],
       [r'\boxed{1/3}', r'\boxed{2}', '1/2']),
      ('boxed', r'\left( 1, 2 \right)', [r'\boxed{(1, 2)}', r'\boxed{\left(1, 2\right)}'],
       [r'\boxed{(2, 1)}', r'\boxed{12}']),
      ('last_number', 'So 5 * 200 = 1,000\n#### 1,000',
       ['1000', 'It is 1,000.', '5 * 200 = 1000.00', 'about $1000'],
       ['1000 or 1001', '100', 'none', '', '1,0000', '-1000']),
      ('last_number', '-3', ['-3', '1 - 4 = -3', '\u22123'], ['3', '0-3', '7-3']),
      ('last_number', '3/4', ['it is 3/4', '.75', '0.750'], ['3', '4', '3/5', '3/0']),
  ])
  def test_answers(self, grader, answer, right, wrong):
    example = {'answer': answer, 'grader': grader}
    assert [prompts.grade(example, t) for t in right] == [1.0] * len(right)
    assert [prompts.grade(example, t) for t in wrong] == [0.0] * len(wrong)

  def test_numbers_are_compared_exactly(self):
    assert not _graders.same_answer('0.3333333333333333', '1/3')
    assert _graders.same_answer('12345678901234567891', '12,345,678,901,234,567,891')
    assert not _graders.same_answer('12345678901234567891', '12345678901234567890')

  def test_a_long_text_takes_no_time(self):
    # A student writes what it likes: digits without end, braces that never close.
    for text in ('9' * 20_000, r'\boxed{' * 5000, '1,' * 20_000, '{' * 20_000, '-' * 20_000):
      for grader in ('exact', 'boxed', 'last_number'):
        assert prompts.grade({'answer': '1', 'grader': grader}, text) in (0.0, 1.0)

  def test_without_answers_there_is_no_grade(self):
    assert prompts.grade({'grader': 'none'}, 'text') is None
