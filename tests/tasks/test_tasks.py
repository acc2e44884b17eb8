"""The arithmetic task: its generator, its chains of thought and its verifier."""

import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from opd_jax import tasks
from opd_jax.tasks import arithmetic

UNTIMED = settings(deadline=None, derandomize=True)  # the machine is shared; failures must repeat
STEP = re.compile(r'(\d+)([+-])(\d+)=(\d+)')
SMALL = dict(train_examples=200, eval_examples=50, corpus_examples=2000)


def evaluated(problem):
  """(partial results) of a problem, by Python's own arithmetic on its left-to-right prefixes."""
  ends = [m.start() for m in re.finditer(r'[+-]', problem)] + [len(problem)]
  return [eval(problem[:end]) for end in ends]  # noqa: S307, digits and signs only


def chain_parts(completion):
  """[(before, signed operand, result)] and the final answer, as written."""
  chain, answer = completion.split('#')
  steps = [STEP.fullmatch(part).groups() for part in chain.split(';')]
  return [(int(a), int(sign + b), int(r)) for a, sign, b, r in steps], int(answer)


problems = st.builds(
    lambda seed, operations, operand_max: arithmetic.make_problem(
        random.Random(seed), operations, operand_max),
    st.integers(), st.integers(1, 6), st.integers(1, 99))


@UNTIMED
@given(st.integers(), st.integers(1, 6), st.integers(1, 99))
def test_partial_results_stay_in_range(seed, operations, operand_max):
  problem = arithmetic.make_problem(random.Random(seed), operations, operand_max)
  assert all(0 <= v <= 99 for v in evaluated(problem))
  operands = [int(x) for x in re.findall(r'[+-](\d+)', problem)]
  assert len(operands) == operations and all(1 <= x <= operand_max for x in operands)


@UNTIMED
@given(problems)
def test_solve_is_arithmetic(problem):
  assert arithmetic.solve(problem) == evaluated(problem)[-1]


@UNTIMED
@given(problems)
def test_a_clean_chain_is_right_step_by_step_and_graded_right(problem):
  completion = arithmetic.write_chain(problem)
  steps, answer = chain_parts(completion)
  results = evaluated(problem)
  assert [s[0] for s in steps] == results[:-1] and [s[2] for s in steps] == results[1:]
  assert answer == results[-1]
  assert arithmetic.grade({'problem': problem, 'answer': answer}, completion) == 1.0


@UNTIMED
@given(problems, st.integers(), st.floats(0.1, 1.0))
def test_a_sloppy_chain_carries_its_errors_on(problem, seed, error):
  steps, answer = chain_parts(arithmetic.write_chain(problem, random.Random(seed), error))
  operands = [int(x) for x in re.findall(r'[+-]\d+', problem)]
  assert [s[1] for s in steps] == operands  # it solves this problem, if badly
  assert steps[0][0] == evaluated(problem)[0]
  for (_, _, result), (before, _, _) in zip(steps, steps[1:], strict=False):
    assert before == result
  assert answer == steps[-1][2]
  assert all(0 <= result <= 99 for _, _, result in steps)
  right = arithmetic.grade({'answer': arithmetic.solve(problem)}, f'#{answer}')
  assert right == (answer == arithmetic.solve(problem))


def test_the_rate_of_wrong_steps():
  rng, wrong, count = random.Random(0), 0, 0
  for _ in range(2000):
    problem = arithmetic.make_problem(rng, 4, 9)
    steps, _ = chain_parts(arithmetic.write_chain(problem, rng, 0.3))
    # Clipping to 0..99 makes a right step look wrong and the other way round only at the ends.
    inner = [s for s in steps if 10 <= s[0] + s[1] <= 89]
    wrong, count = wrong + sum(a + b != r for a, b, r in inner), count + len(inner)
  assert abs(wrong / count - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5
  assert count > 4000


@UNTIMED
@given(st.integers(0, 99), st.text('0123456789=;#+- \n', max_size=12))
def test_grade_reads_the_integer_after_the_last_hash(answer, text):
  example = {'answer': answer}
  assert arithmetic.grade(example, f'1+1=2;{answer}#{answer}') == 1.0
  assert arithmetic.grade(example, f'#{(answer + 1) % 100}') == 0.0
  assert arithmetic.grade(example, str(answer)) == 0.0
  assert arithmetic.grade(example, f'#{answer} ') == 0.0
  assert arithmetic.grade(example, f'#{answer}x') == 0.0
  assert arithmetic.grade(example, f'#-{answer}') == 0.0
  # Whatever the text, only a '#' followed by the number at its very end can be right.
  tail = re.search(r'#0*(\d+)\n?\Z', text)
  assert arithmetic.grade(example, text) in (0.0, 1.0)
  if not tail or int(tail[1]) != answer:
    assert arithmetic.grade(example, text) == 0.0


class TestSplits:

  @pytest.mark.parametrize('split', ['train', 'eval', 'corpus'])
  def test_answers_are_those_of_the_problems(self, split):
    rows = arithmetic.load(split, arithmetic.Options(**SMALL)).to_list()
    assert len(rows) == SMALL[f'{split}_examples']
    assert all(r['answer'] == evaluated(r['problem'])[-1] for r in rows)
    assert all(arithmetic.prompt(r) == r['problem'] + '=' for r in rows)
    assert ('completion' in rows[0]) == (split == 'corpus')

  def test_difficulty(self):
    o = arithmetic.Options(operations=(1, 3), eval_operations=2, operand_max=5, **SMALL)
    counts = {split: {len(re.findall('[+-]', p)) for p in arithmetic.load(split, o)['problem']}
              for split in ('train', 'corpus', 'eval')}
    assert counts == {'train': {1, 3}, 'corpus': {1, 3}, 'eval': {2}}
    operands = {int(x) for p in arithmetic.load('train', o)['problem']
                for x in re.findall(r'[+-](\d+)', p)}
    assert operands == {1, 2, 3, 4, 5}

  # One operation with small operands: so few problems that an overlap could not be missed.
  @settings(UNTIMED, max_examples=10)
  @given(st.integers(0, 1000))
  def test_no_held_out_problem_is_trained_on(self, seed):
    o = arithmetic.Options(operations=(1,), eval_operations=1, operand_max=3, data_seed=seed,
                           train_examples=1000, corpus_examples=1000, eval_examples=30)
    held_out = arithmetic.load('eval', o)['problem']
    assert len(set(held_out)) == 30
    for split in ('train', 'corpus'):
      assert not set(held_out) & set(arithmetic.load(split, o)['problem'])

  def test_a_function_of_the_data_seed(self):
    first, again, other = (
        {split: arithmetic.load(split, arithmetic.Options(data_seed=seed, **SMALL)).to_list()
         for split in ('train', 'eval', 'corpus')} for seed in (0, 0, 1))
    assert first == again
    assert all(first[split] != other[split] for split in ('train', 'corpus'))
    assert first['eval'] == other['eval']  # two runs are judged by the same problems
    # Not the same problems under two names.
    assert [r['problem'] for r in first['train']] != [
        r['problem'] for r in first['corpus'][:SMALL['train_examples']]]

  def test_held_out_problems_do_not_depend_on_the_other_splits(self):
    a = arithmetic.load('eval', arithmetic.Options(**SMALL))
    b = arithmetic.load('eval', arithmetic.Options(**{**SMALL, 'train_examples': 7}))
    assert a.to_list() == b.to_list()

  def test_mixture_of_the_corpus(self):
    o = arithmetic.Options(clean=0.2, direct=0.5, sloppy=0.3, sloppy_error=1.0, **SMALL)
    rows = arithmetic.load('corpus', o).to_list()
    direct = sum(r['completion'] == f"#{r['answer']}" for r in rows)
    clean = sum(r['completion'] == arithmetic.write_chain(r['problem']) for r in rows)
    # With every sloppy step wrong, a chain of four that is right anyway is rare.
    for count, share in ((direct, 0.5), (clean, 0.2)):
      assert abs(count / len(rows) - share) < 4 * (share * (1 - share) / len(rows)) ** 0.5 + 0.005

  @pytest.mark.parametrize('kind', ['clean', 'direct', 'sloppy'])
  def test_weights_are_relative(self, kind):
    weights = dict(clean=0.0, direct=0.0, sloppy=0.0) | {kind: 7.0}
    rows = arithmetic.load('corpus', arithmetic.Options(sloppy_error=0.0, **weights, **SMALL))
    for r in rows.to_list()[:50]:
      wanted = f"#{r['answer']}" if kind == 'direct' else arithmetic.write_chain(r['problem'])
      assert r['completion'] == wanted

  def test_unknown_split(self):
    with pytest.raises(ValueError, match=r"split='test'.*\['corpus', 'eval', 'train'\]"):
      arithmetic.load('test', arithmetic.Options(**SMALL))


class TestOptions:

  @pytest.mark.parametrize(('field', 'value'), [
      ('operations', ()), ('operations', (0,)), ('eval_operations', 0), ('operand_max', 0),
      ('operand_max', 100), ('clean', -1.0), ('clean', 0.0), ('sloppy_error', 1.5),
      ('sloppy_error', -0.1)])
  def test_refused_with_field_value_and_what_is_allowed(self, field, value):
    with pytest.raises(ValueError, match='allowed') as e:
      arithmetic.Options(**{field: value})
    assert field in str(e.value) and str(value) in str(e.value)

  def test_more_held_out_problems_than_there_are(self):
    # Else the generator would look for another new problem for ever.
    with pytest.raises(ValueError, match='eval_examples=1000'):
      arithmetic.Options(eval_operations=1, operand_max=2, eval_examples=1000)

  def test_unknown_knob(self):
    with pytest.raises(ValueError, match=r"\['operandmax'\].*operand_max"):
      tasks.options(arithmetic, {'operandmax': 3})


def test_names_are_the_files():
  assert 'arithmetic' in tasks.names() and '__init__' not in tasks.names()
  with pytest.raises(ValueError, match=r"task.name='algebra'.*arithmetic"):
    tasks.get('algebra')
