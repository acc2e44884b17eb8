"""The numbers of a pipeline's report, from results that are written down here."""

import dataclasses
import json

import pytest
from spreads import assert_spread

from opd_jax import experiment
from opd_jax.experiment.claims import Claim
from opd_jax.run.ledger import Ledger
from opd_jax.tools import curves, report


def evaluation(step, accuracy, flops=None, wrote='student'):
  flops = 10.0 * step if flops is None else flops
  spent = {'student_training': flops / 2, f'{wrote}_sampling': flops / 4,
           'teacher_scoring': flops / 4}
  return {'step': step, 'sampled_accuracy': accuracy, 'greedy_accuracy': accuracy,
          'flops': Ledger(**spent).parts()}


def result(*accuracies, every=10, teacher=None, wrote='student'):
  evals = [evaluation(i * every, a, wrote=wrote) for i, a in enumerate(accuracies)]
  return {'steps': evals[-1]['step'], 'flops': evals[-1]['flops'], 'before': evals[0],
          'after': evals[-1], 'evals': evals,
          'teacher': teacher and {'sampled_accuracy': teacher, 'greedy_accuracy': teacher}}


def settings(*methods, teacher='', levels=(0.5,), baseline=''):
  return experiment.Pipeline(report=experiment.Report(
      teacher=teacher, methods=methods, labels=methods, levels=levels, baseline=baseline))


def reached(evals, level):
  """The steps and all operations to a level."""
  steps, spent = report.reach(evals, level)
  return steps, spent.total


class TestReach:

  def test_interpolated_from_the_evaluation_before(self):
    evals = [evaluation(0, 0.0), evaluation(10, 0.2), evaluation(30, 0.6), evaluation(40, 0.1)]
    assert reached(evals, 0.3) == pytest.approx((15, 150))
    assert reached(evals, 0.2) == pytest.approx((10, 100))

  def test_the_first_time_counts(self):
    evals = [evaluation(0, 0.0), evaluation(10, 0.6), evaluation(20, 0.1), evaluation(30, 0.9)]
    assert reached(evals, 0.6) == pytest.approx((10, 100))

  def test_never(self):
    assert report.reach([evaluation(0, 0.0), evaluation(10, 0.49)], 0.5) is None

  def test_from_the_start(self):
    assert reached([evaluation(0, 0.7), evaluation(10, 0.9)], 0.5) == (0, 0.0)

  def test_flops_are_those_of_all_parts(self):
    evals = [evaluation(0, 0.0, 0.0), evaluation(10, 1.0, 800.0)]
    assert report.reach(evals, 0.5) == (5, Ledger(
        student_training=200.0, student_sampling=100.0, teacher_scoring=100.0))


class TestSpread:

  def test_t_interval(self):
    assert_spread(report.spread([1.0, 2.0, 6.0]), [1.0, 2.0, 6.0])

  def test_shown_where_the_quantity_can_be(self):
    c = settings('a')
    text = str(report.tables(report.summarize(c, {
        s: {'a': result(0.0, accuracy, teacher=1.0)} for s, accuracy in ((0, 0.5), (1, 0.9))})))
    assert '0.700 [0.000, 1.000]' in text

  def test_one_value_has_no_interval(self):
    assert report.spread([2.5]) == {'mean': 2.5, 'values': [2.5]}

  @pytest.mark.parametrize('values', [[], [None], [1.0, None]])
  def test_not_without_all_seeds(self, values):
    assert report.spread(values) is None


class TestSummarize:

  def test_one_seed_has_the_interval_over_problems(self):
    run = result(0.1, 0.8, teacher=0.9)
    run['after'] |= {'sampled_accuracy_low': 0.7, 'sampled_accuracy_high': 0.85}
    row = report.summarize(settings('a'), {0: {'a': run}})['rows']['a']
    assert row['sampled_accuracy'] == {'mean': 0.8, 'values': [0.8], 'low': 0.7, 'high': 0.85}

  def test_a_level_that_one_seed_never_reached(self):
    results = {0: {'a': result(0.0, 0.9, teacher=1.0)}, 1: {'a': result(0.0, 0.3, teacher=1.0)}}
    got = report.summarize(settings('a'), results)['rows']['a']['reach']['0.5']
    assert got == {'seeds_reached': 1, 'steps': None, 'flops': None}
    text = str(report.tables(report.summarize(settings('a', 'b', teacher='stage:b'), {
        s: {'a': r['a'], 'b': result(0.0, 1.0)} for s, r in results.items()})))
    assert '1 of 2 seeds' in text

  def test_every_seed_has_its_own_goal(self):
    results = {0: {'a': result(0.0, 1.0, teacher=1.0)}, 1: {'a': result(0.0, 1.0, teacher=0.5)}}
    got = report.summarize(settings('a'), results)['rows']['a']['reach']['0.5']
    assert got['steps']['values'] == pytest.approx([5.0, 2.5])

  def test_ratios_are_paired_by_seed(self):
    results = {0: {'rl': result(0.0, 0.5, every=100), 'opd': result(0.0, 0.5, teacher=1.0)},
               1: {'rl': result(0.0, 0.5, every=40), 'opd': result(0.0, 1.0, teacher=1.0)}}
    got = report.summarize(settings('rl', 'opd', teacher='stage:rl'), results)
    assert got['ratios']['opd']['0.5']['steps']['values'] == pytest.approx([10.0, 8.0])
    assert 'rl' not in got['ratios']

  def test_any_method_can_be_the_baseline(self):
    # As in the post: SFT on the teacher's text, which is given, or whose writing is charged.
    results = {s: {'opd': result(0.0, 0.5, teacher=1.0),
                   'sft': result(0.0, 0.5, every=n, teacher=1.0, wrote='teacher')}
               for s, n in ((0, 40), (1, 80))}
    got = report.summarize(settings('opd', 'sft', baseline='sft'), results)
    assert got['baseline'] == 'sft' and list(got['ratios']) == ['opd']
    ratios = {unit: r['values'] for unit, r in got['ratios']['opd']['0.5'].items()}
    assert ratios == {'steps': [4.0, 8.0], 'flops': [4.0, 8.0], 'flops_text_given': [3.0, 6.0]}
    title, columns, rows = report.tables(got)[-1]
    assert title.endswith('ratios to sft')
    assert columns[-2:] == ['less compute', 'less compute, its text given']
    assert [row[-2:] for row in rows][1] == ['–', '–'] and rows[0][-1].startswith('4.5x')
    # The other way round nobody's text is there before: one column.
    got = report.summarize(settings('opd', 'sft', baseline='opd'), results)
    assert got['ratios']['sft']['0.5']['flops']['values'] == [0.25, 0.125]
    assert report.tables(got)[-1][1][-1] == 'less compute'

  def test_where_the_compute_went(self):
    results = {0: {'a': result(0.0, 0.5, every=10**9, teacher=1.0),
                   'b': result(0.0, 0.5, every=2 * 10**9, wrote='teacher')}}
    title, columns, rows = report.tables(report.summarize(settings('a', 'b'), results))[1]
    assert (title, columns) == ('GFLOP by part, mean', [
        '', 'student training', 'student sampling', 'teacher scoring', 'teacher sampling'])
    assert rows == [['a', '5', '2', '2', '0'], ['b', '10', '0', '5', '5']]

  def test_a_method_that_starts_at_the_level(self):
    # Nothing to divide by: it needed no step at all.
    results = {s: {'rl': result(0.0, 0.9), 'opd': result(0.8, 0.9, teacher=1.0)} for s in (0, 1)}
    got = report.summarize(settings('rl', 'opd', teacher='stage:rl'), results)
    assert got['rows']['opd']['reach']['0.5']['steps']['mean'] == 0
    json.dumps(got, allow_nan=False)
    report.tables(got)

  def test_a_teacher_that_gets_nothing_right(self):
    results = {0: {'rl': result(0.0, 0.0), 'opd': result(0.0, 0.0, teacher=0.0)}}
    results[0]['opd']['teacher'] = {'sampled_accuracy': 0.0, 'greedy_accuracy': 0.0}
    got = report.summarize(settings('rl', 'opd', teacher='stage:rl'), results)
    json.dumps(got, allow_nan=False)
    report.tables(got)

  def test_no_method_with_a_teacher(self):
    got = report.summarize(settings('a', 'b', teacher='stage:a'),
                           {0: {'a': result(0.0, 0.5), 'b': result(0.0, 0.7)}})
    assert list(got['rows']) == ['base', 'a', 'b']
    report.tables(got)

  def test_without_sections_the_base_and_the_teacher_are_those_of_one_that_has_a_teacher(self):
    runs = {'a': result(0.25, 0.5), 'b': result(0.125, 0.7, teacher=0.75),
            'c': result(0.25, 0.6, teacher=1.0)}
    rows = report.summarize(settings('a', 'b', 'c'), {0: runs})['rows']
    assert list(rows) == ['base', 'a', 'b', 'c', 'teacher']
    assert rows['base']['sampled_accuracy']['mean'] == 0.125
    assert rows['teacher']['sampled_accuracy']['mean'] == 0.75

  @pytest.mark.parametrize('ungraded', [('a', 'b'), ('b',)])
  def test_a_task_that_does_not_grade(self, ungraded, tmp_path):
    c = settings('a', 'b', teacher='stage:a')
    runs = {m: result(0.1, 0.5, teacher=0.9) for m in 'ab'}
    for m in ungraded:
      for e in (*runs[m]['evals'], runs[m]['teacher']):
        e['reverse_kl'] = e.pop('sampled_accuracy')
        del e['greedy_accuracy']
    got = report.write(c, {0: runs}, tmp_path)
    assert got['rows']['b']['sampled_accuracy'] is None
    assert got['rows']['b']['reverse_kl']['mean'] == 0.5
    assert not got['rows']['b']['reach'] and not got['ratios']
    assert (tmp_path / 'curves.png').stat().st_size > 10_000


class TestClaims:

  def pipeline(self, measure, **fields):
    claim = Claim(says='more', post='a lot', measure=measure, **fields)
    return experiment.Pipeline(report=experiment.Report(
        methods=('a', 'b'), labels=('A', 'B'), claims={'gain': claim},
        sections={'one': ('a', 'b'), 'two': ('b',)}))

  def results(self):
    return {s: {'a': result(0.0, 0.8 + s / 100, teacher=1.0), 'b': result(0.2, 0.4, teacher=0.5)}
            for s in (0, 1, 2)}

  def test_a_difference_over_seeds(self):
    summary = report.summarize(self.pipeline('a.sampled_accuracy - b.sampled_accuracy',
                                             at_least=0.3), self.results())
    claim = summary['claims']['gain']
    assert_spread(claim['found'], [0.4, 0.41, 0.42])
    assert claim['verdict'] == 'holds'
    _, columns, rows = next(t for t in report.tables(summary) if t[0].startswith('Claims'))
    assert len(columns) == len(rows[0]) and rows[0][0] == 'more' and rows[0][-1] == 'holds'
    assert rows[0][2].startswith('0.41 [0.')

  def test_before_and_the_share_of_its_own_teacher(self):
    for measure, expected in (('b.sampled_accuracy - b.before.sampled_accuracy', 0.2),
                              ('steps(b, 0.6)', 5.0), ('steps(a, 0.6)', 7.5),
                              ('b.teacher.sampled_accuracy', 0.5)):
      summary = report.summarize(self.pipeline(measure), {0: self.results()[0]})
      assert summary['claims']['gain']['found']['mean'] == pytest.approx(expected), measure

  def test_no_number(self):
    summary = report.summarize(self.pipeline('steps(b, 0.9)'), self.results())
    assert summary['claims']['gain']['found'] is None
    assert summary['claims']['gain']['verdict'] == 'no number'

  def test_a_table_a_section(self):
    out = report.tables(report.summarize(self.pipeline('a.reverse_kl'), self.results()))
    assert [[row[0] for row in rows] for title, _, rows in out[:2]] == [
        ['A', 'B'], ['base', 'B', 'teacher']]  # two bases and teachers, and one
    assert [title.split()[0] for title, _, _ in out[:2]] == ['one', 'two']
    assert [row[1].split()[0] for row in out[1][2]] == ['0.200', '0.400', '0.500']

  def section(self, a, b, **report_fields):
    """The rows of the section of two methods, whose results of two seeds these make."""
    p = self.pipeline('a.sampled_accuracy')
    p = dataclasses.replace(p, report=dataclasses.replace(p.report, **report_fields))
    summary = report.summarize(p, {s: {'a': a(s), 'b': b(s)} for s in (0, 1)})
    json.dumps(summary, allow_nan=False)
    assert set(summary['rows']) >= {'a', 'b'}
    return [(row[0], row[1].split()[0], row[3]) for row in report.tables(summary)[0][2]]

  def test_a_base_and_a_teacher_that_methods_share(self):
    def run(accuracy, kl=None, base=0.125, teacher=1.0):
      out = result(base, accuracy, teacher=teacher)
      for e in out['evals'] if kl else ():
        e['reverse_kl'] = kl
      return out

    # The seeds may differ in them; a method without a teacher has no reverse KL.
    rows = self.section(lambda s: run(0.5, teacher=None, base=0.1 + s / 10),
                        lambda s: run(0.6, kl=0.25, base=0.1 + s / 10, teacher=0.8 + s / 10))
    assert [row[0] for row in rows] == ['base', 'A', 'B', 'teacher']
    assert [row[1] for row in rows] == ['0.150', '0.500', '0.600', '0.850']
    assert rows[0][2].startswith('0.2500')

    def names(*runs, **report_fields):
      return [row[0] for row in self.section(*runs, **report_fields)]

    # In one seed another base, another teacher; only in the reverse KL; none at all.
    assert names(lambda s: run(0.5, base=0.1 + s / 10), lambda s: run(0.6, base=0.1)) == [
        'A', 'B', 'teacher']
    assert names(lambda s: run(0.5, teacher=0.9 + s / 10), lambda s: run(0.6, teacher=0.9)) == [
        'base', 'A', 'B']
    assert names(lambda s: run(0.5, kl=0.5), lambda s: run(0.6, kl=0.5 + s)) == [
        'A', 'B', 'teacher']
    assert names(*[lambda s: run(0.5, teacher=None)] * 2) == ['base', 'A', 'B']
    # The row of the method that made the teacher is there already.
    assert names(*[lambda s: run(0.5)] * 2, teacher='stage:a') == ['base', 'A', 'B']

  def test_a_row_of_pictures_a_section(self):
    heights = []
    for sections in ({}, {'one': ('a', 'b'), 'two': ('b',)}):
      p = self.pipeline('a.reverse_kl')
      p = dataclasses.replace(p, report=dataclasses.replace(p.report, sections=sections))
      png = curves.draw(p, self.results())
      width, height = (int.from_bytes(png[i:i + 4], 'big') for i in (16, 20))
      heights.append(height / width)
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.01)
