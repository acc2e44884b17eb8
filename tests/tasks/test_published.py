"""Published data sets: where rows come from, what they become, what they are evaluated on."""

import json

import datasets
import pytest
import tiny

from opd_jax import config, tasks
from opd_jax.files import hub

COMMIT = '0123456789abcdef' * 2 + '01234567'
PUBLISHED = [name for name in tasks.names() if hasattr(tasks.get(name).Options, 'data')]
DEEPMATH = [{'question': f'What is {i} times 2?', 'final_answer': str(2 * i), 'difficulty': i / 2,
             'topic': 'Numbers', 'r1_solution_1': 'x'} for i in range(12)]
AIME = [{'id': i, 'problem': f'Find {i}.', 'answer': f'{i:03}', 'year': '2024'} for i in range(5)]


@pytest.fixture
def write(tmp_path):
  return lambda rows, name='rows.jsonl': str(tiny.write_jsonl(tmp_path / name, rows))


def make(name, **values):
  return tasks.options(tasks.get(name), values)


def load(name, split, **values):
  return tasks.get(name).load(split, make(name, **values))


def refused(name, *parts, split='train', **values):
  with pytest.raises(ValueError, match='allowed') as e:
    load(name, split, **values)
  assert '\n' not in str(e.value)
  for part in parts:
    assert part in str(e.value), f'{part!r} is not in {e.value}'


def row(name, **values):
  return load(name, 'eval', **values)[0]


class TestTable:

  @pytest.mark.parametrize('name', PUBLISHED)
  def test_of_the_hub_at_a_commit(self, name):
    data = tasks.get(name).Options.data
    assert hub.is_commit(data.revision) and '/' in data.hub
    assert data.needs or bool(data.prompt_column) != bool(data.messages_column)
    # A config for it names no more than that, so that the commit is the one of its file.
    options = config.task_config(name).options
    assert (options.source, options.revision) == ('', '')

  @pytest.mark.parametrize('name', PUBLISHED)
  def test_the_commit_is_what_is_asked_for(self, name, monkeypatch):
    asked = []

    def load_dataset(source, name, revision):
      asked.append((source, name, revision))
      return datasets.Dataset.from_list([{'nothing': 1}])

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    data = tasks.get(name).Options.data
    fields = {} if data.eval_split is not None else dict(eval='', holdout_examples=1)
    if data.eval_split:
      fields = dict(holdout_examples=1)  # two splits; the fake has only 'train'
    with pytest.raises(ValueError, match=rf"has no columns .*\['nothing'\].*{data.hub}"):
      load(name, 'eval', **fields)
    assert asked == [(data.hub, data.subset or None, data.revision)]


class TestTraining:

  def test_on_deepmath_and_evaluation_on_aime(self, write):
    local = dict(source=write(DEEPMATH), eval_source=write(AIME, 'aime.jsonl'))
    rows, held_out = (load('deepmath', split, **local) for split in ('train', 'eval'))
    assert len(rows) == 12 and len(held_out) == 5
    assert rows[3] == {
        'prompt': 'What is 3 times 2?\nPlease reason step by step, and put your final answer within'
                  ' \\boxed{}.', 'answer': '6', 'group': '1.5', 'grader': 'boxed'}
    task = tasks.get('deepmath')
    assert task.grade(held_out[4], r'So \boxed{4}.') == 1.0  # 004
    assert task.grade(held_out[4], r'So \boxed{40}.') == task.grade(held_out[4], '4') == 0.0

  def test_a_problem_of_the_evaluation_is_not_trained_on(self, write):
    twin = dict(AIME[0], question=' find  0. ', final_answer='0')
    local = dict(source=write([*DEEPMATH, twin]), eval_source=write(AIME, 'aime.jsonl'))
    for suffix in ('', ' Think.'):  # with another suffix than that of the evaluation, too
      rows = load('deepmath', 'train', suffix=suffix, **local)
      assert len(rows) == 12 and '1 left out' in rows.info.description

  def test_some_rows_held_out(self, write):
    local = dict(source=write(DEEPMATH), eval='', holdout_examples=4)
    rows, held_out = (load('deepmath', split, **local) for split in ('train', 'eval'))
    assert (len(rows), len(held_out)) == (8, 4)
    assert not set(rows['prompt']) & set(held_out['prompt'])
    assert held_out['prompt'] != load('deepmath', 'eval', holdout_seed=1, **local)['prompt']

  def test_filters_and_the_first_ones(self, write):
    rows = load('deepmath', 'train', source=write(DEEPMATH), eval_source=write(AIME, 'a.jsonl'),
                filters=('difficulty >= 2',), train_examples=3)
    assert [p.split()[2] for p in rows['prompt']] == ['4', '5', '6']

  def test_a_problem_that_is_there_a_hundred_times(self, write):
    rows = [{'prompt': [{'role': 'user', 'content': f'Find {i}. End with Answer: $Answer'}],
             'reward_model': {'ground_truth': str(i), 'style': 'rule'}, 'data_source': 'x'}
            for _ in range(100) for i in range(90)]  # 9000 rows: more than are looked at together
    got = load('dapo_math', 'train', source=write(rows), eval='', holdout_examples=10)
    assert len(got) == 80 and len({json.dumps(p) for p in got['prompt']}) == 80
    assert '90 with a prompt of their own' in got.info.description
    assert tasks.get('dapo_math').grade(got[0], f'Answer: {got[0]["answer"]}') == 1.0
    many = load('dapo_math', 'train', source=write(rows), eval='', holdout_examples=10,
                distinct=False)
    assert len(many) > 80

  def test_answers_to_learn(self, write):
    rows = [{'conversations': [{'from': 'human', 'value': f'Is {i // 2} odd?'},
                               {'from': 'gpt', 'value': f'<think>{i}</think>No.'}],
             'domain': 'math'} for i in range(6)]
    local = dict(source=write(rows), eval_source=write(AIME, 'aime.jsonl'))
    got = load('openthoughts3', 'train', **local)
    assert got[1] == {'prompt': [{'role': 'user', 'content': 'Is 0 odd?'}], 'grader': 'none',
                      'completion': '<think>1</think>No.'}
    assert tasks.get('openthoughts3').grade(got[1], 'No.') is None
    assert tasks.get('openthoughts3').grade(load('openthoughts3', 'eval', **local)[1],
                                            r'\boxed{1}') == 1.0
    # One answer to each problem, although the answers differ.
    assert load('openthoughts3', 'train', distinct=True, **local)['completion'] == [
        f'<think>{i}</think>No.' for i in (0, 2, 4)]


class TestEvaluation:

  def test_gsm8k_has_both_splits(self, tmp_path, write):
    for split, count in (('train', 5), ('test', 3)):
      write([{'question': f'{split} {i}?', 'answer': f'2 more make {i}.\n#### 1,00{i}'}
             for i in range(count)], f'{split}.jsonl')
    rows = load('gsm8k', 'eval', source=str(tmp_path))
    assert [r['answer'] for r in rows] == ['1,000', '1,001', '1,002']
    assert tasks.get('gsm8k').grade(rows[1], r'\boxed{1001}') == 1.0
    assert len(load('gsm8k', 'train', source=str(tmp_path))) == 5
    few = dict(source=str(tmp_path), train_examples=2)
    assert (len(load('gsm8k', 'train', **few)), len(load('gsm8k', 'eval', **few))) == (2, 3)
    assert len(load('gsm8k', 'eval', source=str(tmp_path / 'test.jsonl'))) == 3

  def test_every_row_is_evaluated_on(self, write):
    assert len(load('aime25', 'eval', source=write(AIME))) == 5
    refused('aime25', 'holdout_examples=0', "eval=''", source=write(AIME))
    assert len(load('aime25', 'train', source=write(AIME), holdout_examples=2)) == 3
    assert len(load('aime25', 'train', source=write(AIME), eval='gsm8k', eval_source=write(
        [{'question': '1?', 'answer': '#### 1'}], 'gsm8k.jsonl'))) == 5

  def test_groups(self, write):
    rows = [{'problem': str(i), 'answer': '1', 'level': i} for i in (1, 5)]
    task = tasks.get('math500')
    assert [task.group(r) for r in load('math500', 'eval', source=write(rows))] == ['1', '5']
    bare = [{'problem': '2', 'answer': '1'}]
    assert task.group(load('math500', 'eval', source=write(bare))[0]) == ''

  def test_the_letters_of_gpqa(self, write):
    def ask(i):
      return {'Question': f' What is {i}? ', 'Correct Answer': 'right\n',
              **{f'Incorrect Answer {k}': f'wrong {k}' for k in (1, 2, 3)}}
    task, rows = tasks.get('gpqa_diamond'), [ask(i) for i in range(40)]
    got = load('gpqa_diamond', 'eval', source=write(rows)).to_list()
    assert {r['answer'] for r in got} == set('ABCD')
    for r in got:
      assert f'\n{r["answer"]}) right\n' in r['prompt']
      assert task.grade(r, rf'\boxed{{{r["answer"]}}}') == 1.0
      assert task.grade(r, r'\boxed{right}') == 0.0
    # The order is of the question alone: a part of the set, in another order, has the same.
    again = load('gpqa_diamond', 'eval', source=write(rows[30:9:-1])).to_list()
    assert again == got[30:9:-1]
    del rows[7]['Incorrect Answer 2']
    refused('gpqa_diamond', 'row 7', 'Incorrect Answer 2', split='eval', source=write(rows))


class TestRefusals:

  def test_a_column_that_is_not_there(self, write):
    source = write([{'problem': 'x', 'final_answer': '1'}])
    refused('deepmath', f'task.options.source={source!r}', "no columns ['question']",
            "['problem', 'final_answer']", "'zwhe99/DeepMath-103K'", source=source, eval='',
            holdout_examples=1)
    refused('deepmath', 'task.options.eval_source', "no columns ['answer']", split='eval',
            eval_source=write([{'problem': 'x'}]))

  @pytest.mark.parametrize('answer', [None, '', float('nan'), {'is': 1}])
  def test_an_answer_that_is_none(self, write, answer):
    source = write([*AIME, {'problem': 'x', 'answer': answer}])
    refused('aime24', "column 'answer'", 'row 5', split='eval', source=source)

  @pytest.mark.parametrize('answer', ['12', '####', 'x #### '])
  def test_a_solution_without_its_end(self, write, answer):
    source = write([{'question': '1?', 'answer': '#### 1'}, {'question': '2?', 'answer': answer}])
    refused('gsm8k', "column 'answer'", 'row 1', "'####'", split='eval', source=source)

  @pytest.mark.parametrize('name, values, part', [
      ('deepmath', dict(eval='aime'), "task.options.eval='aime'"),
      ('deepmath', dict(eval=''), "eval='' with holdout_examples=0"),
      ('deepmath', dict(holdout_examples=5), "eval='aime24' with holdout_examples=5"),
      ('aime24', dict(holdout_examples=-1), 'holdout_examples=-1'),
      ('aime24', dict(holdout_seed=1), 'holdout_seed=1'),
      ('deepmath', dict(revision='main'), "revision='main' has no effect without source"),
      ('deepmath', dict(eval_revision='v1'), 'has no effect without eval_source'),
      ('aime24', dict(eval_source='x'), 'has no effect without eval'),
      ('deepmath', dict(train_examples=-1), 'train_examples=-1'),
      ('deepmath', dict(filters=('difficulty',)), 'COLUMN OPERATOR LITERAL')])
  def test_options(self, name, values, part):
    with pytest.raises(ValueError, match='allowed') as e:
      make(name, **values)
    assert part in str(e.value)
    if 'eval' in values and values['eval'] != '':
      assert "'aime24'" in str(e.value) and "'tulu3'" not in str(e.value)

  def test_a_name_on_the_hub_and_nobody_to_ask(self, monkeypatch):
    def unreachable(*args, **kwargs):
      raise ConnectionError("Couldn't reach the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, 'load_dataset', unreachable)
    refused('aime24', "task.options.source='HuggingFaceH4/aime_2024'", 'OfflineModeIsEnabled',
            'a local copy', split='eval')
    refused('deepmath', 'task.options.eval_source as a local copy', split='eval')
    refused('gpqa_diamond', 'consent', 'https://huggingface.co/datasets/Idavidrein/gpqa', 'login',
            split='eval')
    assert 'consent' not in str(pytest.raises(ValueError, load, 'aime24', 'eval').value)

  def test_what_is_left_of_nothing(self, write):
    refused('aime24', 'no rows are left', split='eval', source=write(AIME), filters=('id > 9',))
    same = [dict(r, question=r['problem'], final_answer='1') for r in AIME]
    refused('deepmath', 'all of 5 training rows', source=write(same, 'a.jsonl'),
            eval_source=write(AIME))
