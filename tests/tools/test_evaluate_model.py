"""`opd evaluate` on published sets of problems, from local copies with their columns."""

import contextlib
import io

import pytest
import tiny

from opd_jax import config
from opd_jax.errors import ConfigError
from opd_jax.tools.evaluate_model import evaluate_model

PROBLEMS = ['91-1=', '92-2=', '93+1=', '94+2=']


def evaluate(task, source, samples=4, **options):
  c = tiny.config('opd_sampled', eval__problems=4, eval__samples_per_problem=samples)
  c.task = config.task_config(task, source=str(source), suffix='', **options)
  with contextlib.redirect_stdout(io.StringIO()):
    return evaluate_model(c, str(tiny.student()), '')


def test_levels_and_the_curve_of_math500(tmp_path):
  # The student writes '#4' and no box: nothing is right, and of each level there are two.
  rows = [{'problem': p, 'answer': '4', 'level': 1 + i % 2} for i, p in enumerate(PROBLEMS)]
  values = evaluate('math500', tiny.write_jsonl(tmp_path / 'math500.jsonl', rows))
  assert values['sampled_accuracy'] == values['greedy_accuracy'] == 0.0
  assert values['pass_at'] == {'1': 0.0, '2': 0.0, '4': 0.0}
  assert values['by_group']['1_problems'] == values['by_group']['2_problems'] == 2
  assert 'measures' not in values


def test_strict_and_loose_of_ifeval(tmp_path):
  rows = [{'prompt': p, 'instruction_id_list': ['punctuation:no_comma', 'keywords:existence'],
           'kwargs': [{}, {'keywords': ['#9']}]} for p in PROBLEMS]
  values = evaluate('ifeval', tiny.write_jsonl(tmp_path / 'ifeval.jsonl', rows))
  said = 1 - values['truncation_rate']  # an answer without a comma, whatever it is
  assert values['measures']['punctuation_strict'] == pytest.approx(said) and said > 0
  assert values['measures']['keywords_strict'] == values['sampled_accuracy'] > 0
  assert values['measures']['prompt_loose'] == values['sampled_accuracy']
  assert values['measures']['instruction_strict'] == pytest.approx(
      (said + values['sampled_accuracy']) / 2)


def test_a_wrong_schema_is_one_line(tmp_path):
  source = tiny.write_jsonl(tmp_path / 'rows.jsonl', [{'question': '1+1=', 'answer': '2'}])
  with pytest.raises(ConfigError, match=r"no columns \['problem'\], only \['question', 'answer'\]"):
    evaluate('aime24', source)
