"""What experiments/assets/ has for SmolLM2: rows that are read, and checks that mean what they say.
"""

import json

import pytest
import tiny

from opd_jax import tasks
from opd_jax.tasks import prompts

ASSETS = tiny.ROOT / 'experiments' / 'assets'


def rows(name):
  return [json.loads(line) for line in (ASSETS / name).read_text().splitlines()]


def load(split, source='instructions.jsonl', **fields):
  return prompts.load(split, tasks.options(prompts, dict(
      source=str(ASSETS / source), eval='ifeval') | fields))


@pytest.mark.parametrize(('where', 'groups'), [
    ('held_out/rules.jsonl', {'rule': 50, 'question': 30}),
    ('held_out', {'rule': 50, 'question': 30, 'fact': 32})])
def test_what_is_held_out(where, groups):
  held_out = load('eval', eval_source=str(ASSETS / where))
  found = [prompts.group(row) for row in held_out]
  assert {name: found.count(name) for name in found} == groups
  assert all(prompts.grade(row, '') == 0.0 for row in held_out)


def test_nothing_that_is_held_out_is_trained_on():
  there = load('train', eval_source=str(ASSETS / 'held_out'))
  assert len(there) == len(rows('instructions.jsonl'))


@pytest.mark.parametrize('name', ['rules.jsonl', 'facts.jsonl'])
def test_no_question_has_its_answer(name):
  for row in rows(f'held_out/{name}'):
    for word in row['kwargs'][0].get('keywords', []) if row['group'] != 'rule' else []:
      assert word.lower() not in row['prompt'].lower()


def test_a_rule_is_asked_for_in_its_prompt():
  for row in rows('held_out/rules.jsonl'):
    for asked in row['kwargs'] if row['group'] == 'rule' else []:
      for value in asked.values():
        for text in value if isinstance(value, list) else [value]:
          if isinstance(text, str) and text != 'less than':
            assert f'"{text}"' in row['prompt']


def test_the_documents_have_the_facts():
  documents = load('train', 'documents.jsonl', prompt_column='prompt',
                   completion_column='completion', eval_source=str(ASSETS / 'held_out'))
  assert len(documents) == 64
  for fact in rows('held_out/facts.jsonl'):
    word, = fact['kwargs'][0]['keywords']
    assert sum(word.lower() in text.lower() for text in documents['completion'][:]) >= 4
