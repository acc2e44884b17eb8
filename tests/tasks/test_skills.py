"""Two skills and facts: what each split holds, and how answers are graded."""

import re

import pytest

from opd_jax import tasks
from opd_jax.data import prompts as prompts_lib

SKILLS = tasks.get('skills')
KINDS = ('instruction', 'arithmetic', 'fact')


def rows(split, **options):
  return SKILLS.load(split, SKILLS.Options(**{
      'train_examples': 300, 'corpus_examples': 300, 'documents_examples': 300, **options})
                     ).to_list()


def kinds(table):
  return {kind: sum(row['kind'] == kind for row in table) / len(table) for kind in KINDS}


def test_what_splits_hold():
  assert set(kinds(rows('eval'))) == set(KINDS)
  assert [sum(row['kind'] == kind for row in rows('eval')) for kind in KINDS] == [128, 128, 64]
  for split in ('train', 'corpus'):
    shares = kinds(rows(split))
    assert shares['fact'] == 0 and 0.4 < shares['arithmetic'] < 0.6
  assert kinds(rows('documents'))['fact'] == 1.0
  assert 0.6 < kinds(rows('documents', chat=0.3))['fact'] < 0.8
  assert 'completion' not in rows('train')[0]


def test_nobody_trains_on_held_out_problems():
  held_out = {row['problem'] for row in rows('eval') if row['kind'] != 'fact'}
  for split in ('train', 'corpus', 'documents'):
    for seed in (0, 1):
      table = rows(split, chat=0.5, data_seed=seed)
      assert held_out.isdisjoint(row['problem'] for row in table)


def test_documents_say_every_fact_that_is_asked():
  asked = {row['problem']: row['answer'] for row in rows('eval') if row['kind'] == 'fact'}
  told = {row['problem']: row['completion'] for row in rows('documents', documents_examples=2000)}
  assert told == asked and len(asked) == 64


@pytest.mark.parametrize('kind', KINDS)
def test_right_answers_are_right_and_fit(kind):
  letters = set(prompts_lib.ALPHABET)
  for row in rows('eval') + rows('corpus'):
    if row['kind'] != kind:
      continue
    assert SKILLS.grade(row, row['answer']) == 1.0 and SKILLS.group(row) == kind
    assert SKILLS.grade(row, row['answer'][:-1]) == SKILLS.grade(row, '') == 0.0
    assert set(row['problem'] + row['answer']) <= letters
    assert len(SKILLS.prompt(row)) <= 11 and len(row['answer']) <= 35


def test_instructions():
  answers = {row['problem'].split()[0]: row for row in rows('corpus') if
             row['kind'] == 'instruction'}
  for rule, expected in (('dup', r'(\w+)\1'), ('wrap', r'\(\w+\)'), ('spell', r'\w-\w-\w'),
                         ('yell', r'\w+!!!')):
    word = answers[rule]['problem'].split()[1].rstrip(':')
    assert re.fullmatch(expected, answers[rule]['answer'])
    assert set(answers[rule]['answer']) - set('()-!') == set(word)
  row = answers['rev']
  assert row['answer'][::-1] == row['problem'].split()[1].rstrip(':')


def test_of_arithmetic_the_number_counts():
  row = next(row for row in rows('eval') if row['kind'] == 'arithmetic')
  number = row['answer'].rpartition('#')[2]
  assert SKILLS.grade(row, f'1+1=3#{number}') == 1.0
  assert SKILLS.grade(row, number) == 0.0


@pytest.mark.parametrize(('options', 'match'), [
    (dict(rules=('shout',)), 'rules='), (dict(rules=()), 'rules='),
    (dict(word_length=5), 'word_length=5'), (dict(operations=0), 'operations=0'),
    (dict(facts=0), 'facts=0'), (dict(chat=1.0), r'chat=1\.0'),
    (dict(documents_examples=0), 'documents_examples='), (dict(eval_examples=0), '_examples=')])
def test_bad_knobs(options, match):
  with pytest.raises(ValueError, match=rf'task\.options\..*{match}.*allowed'):
    SKILLS.Options(**options)


def test_unknown_split():
  with pytest.raises(ValueError, match=r"split='test'; allowed: \['corpus', 'documents'"):
    SKILLS.load('test', SKILLS.Options())
