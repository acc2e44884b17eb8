"""Pipelines of stages, and the report's numbers against an independent computation."""

import json
import math
import shutil

from ml_collections import ConfigDict
import pytest
import reuse
from spreads import assert_spread
import tiny

from opd_jax import experiment, train
from opd_jax.errors import ConfigError
from opd_jax.tools import pipeline, report

SEEDS = (3, 8)
ORDER = ('base', 'teacher', 'opd')


def make():
  """A base, a teacher made from it, the base distilled; two seeds."""
  c = experiment.default_pipeline()
  c.name, c.seeds, c.order = 'tiny', SEEDS, ORDER
  base = tiny.config('sft', steps=60, checkpoint__every_steps=60)
  teacher = tiny.config('sft', steps=80, student__path='stage:base', eval__every_steps=20)
  opd = tiny.config('opd_exact', steps=15, student__path='stage:base',
                    teacher__path='stage:teacher', eval__every_steps=5)
  c.stages = ConfigDict(dict(base=base, teacher=teacher, opd=opd))
  c.report.teacher = 'stage:teacher'
  c.report.methods, c.report.labels = ('teacher', 'opd'), ('made the teacher', 'OPD exact')
  c.report.levels = (0.5, 0.9)
  return c


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(work directory, what run() returned, time stamps when it had been interrupted)."""
  workdir = tmp_path_factory.mktemp('pipeline') / 'run'
  calls, run_stage = [], train.train

  def interrupted(c, path):
    if len(calls) == 3:  # the first seed has finished, the second has run nothing but its base
      raise KeyboardInterrupt
    calls.append(path)
    return run_stage(c, path)

  with pytest.MonkeyPatch.context() as m, reuse.programs_of_earlier_runs():
    m.setattr(train, 'train', interrupted)
    with pytest.raises(KeyboardInterrupt):
      pipeline.run(make(), workdir)
  between = tiny.stamps(workdir)
  with reuse.programs_of_earlier_runs():
    return workdir, pipeline.run(make(), workdir), between


@pytest.fixture(scope='module')
def results(finished):
  """{(seed, stage): content of result.json}, read without the package."""
  return {(seed, stage): json.loads(
      (finished[0] / f'seed_{seed}' / stage / 'result.json').read_text())
          for seed in SEEDS for stage in ORDER}


class TestStages:

  def test_every_stage_of_every_seed_has_run(self, finished, results):
    for (seed, stage), result in results.items():
      assert (result['name'], result['seed']) == (stage, seed)
      assert (finished[0] / f'seed_{seed}' / stage / 'export' / 'model.safetensors').exists()

  def test_a_finished_stage_is_not_run_again(self, finished):
    workdir, _, between = finished
    done = [p for p in between if p.name == 'result.json']
    assert len(done) == 3  # of six
    after = tiny.stamps(workdir)
    for result in done:
      for path, stamp in between.items():
        if path.is_relative_to(result.parent):
          assert after[path] == stamp, path

  def test_nothing_but_the_report_is_written_the_second_time(self, finished, capsys):
    workdir, summary, _ = finished
    before = tiny.stamps(workdir)
    assert pipeline.run(make(), workdir) == summary
    after = tiny.stamps(workdir)
    changed = {p.name for p in after if after[p] != before.get(p)}
    assert changed <= {'report.md', 'report.json', 'curves.png', 'times.json'}
    assert capsys.readouterr().out.count('(finished before)') == 6

  def test_the_directory_may_be_named_in_another_way(self, finished, monkeypatch):
    # Paths to earlier stages are in the stages' configs; the same directory is the same run.
    workdir, summary, _ = finished
    monkeypatch.chdir(workdir.parent)
    assert pipeline.run(make(), 'run') == summary

  def test_stages_start_from_earlier_ones(self, finished, results):
    workdir, _, _ = finished
    for seed in SEEDS:
      base = results[seed, 'base']['after']
      for stage in ('teacher', 'opd'):
        # Another task of the same problems and the same key: the very same evaluation.
        assert results[seed, stage]['before']['sampled_accuracy'] == base['sampled_accuracy']
        assert results[seed, stage]['before']['length'] == base['length']
      made = results[seed, 'teacher']['after']
      assert results[seed, 'opd']['teacher']['sampled_accuracy'] == made['sampled_accuracy']

  def test_seeds_differ(self, finished):
    a, b = (tiny.load_export(finished[0] / f'seed_{seed}' / 'base') for seed in SEEDS)
    assert all((a[name] != b[name]).any() for name in a)

  def test_another_config_is_refused_before_anything_runs(self, finished, monkeypatch):
    monkeypatch.setattr(train, 'train', None)
    c = make()
    c.stages.opd.steps = 16
    with pytest.raises(ConfigError, match='steps: 15 -> 16'):
      pipeline.run(c, finished[0])

  def test_a_wrong_last_stage_is_found_before_the_first_runs(self, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'train', None)
    c = make()
    c.stages.opd.objective.route = 'straight'
    with pytest.raises(ConfigError, match="stages.opd.objective.route='straight'"):
      pipeline.run(c, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def crossing(points, level):
  """The x at which a polyline through (x, y) first is at `level` or above, else None."""
  for i, (x, y) in enumerate(points):
    if y >= level:
      if i == 0:
        return x
      x0, y0 = points[i - 1]
      return x0 + (x - x0) * (level - y0) / (y - y0)
  return None


class TestReport:

  def test_files(self, finished):
    workdir, summary, _ = finished
    assert json.loads((workdir / 'report.json').read_text()) == json.loads(json.dumps(summary))
    image = (workdir / 'curves.png').read_bytes()
    assert image.startswith(b'\x89PNG') and len(image) > 10_000
    text = (workdir / 'report.md').read_text()
    for label in ('base', 'made the teacher', 'OPD exact', 'seeds [3, 8]'):
      assert label in text

  def test_accuracies(self, finished, results):
    rows = finished[1]['rows']
    assert list(rows) == ['base', 'teacher', 'opd']  # the teacher is a method: no row of its own
    for name in ('sampled_accuracy', 'greedy_accuracy'):
      assert_spread(rows['base'][name], [results[s, 'opd']['before'][name] for s in SEEDS])
      for stage in ('teacher', 'opd'):
        assert_spread(rows[stage][name], [results[s, stage]['after'][name] for s in SEEDS])
    assert_spread(rows['opd']['reverse_kl'], [results[s, 'opd']['after']['reverse_kl']
                                              for s in SEEDS])
    assert rows['teacher']['reverse_kl'] is None  # it had no teacher

  def test_steps_and_flops(self, finished, results):
    rows = finished[1]['rows']
    for stage in ('teacher', 'opd'):
      assert rows[stage]['steps']['values'] == [results[s, stage]['steps'] for s in SEEDS]
      assert_spread(rows[stage]['flops'],
                    [sum(results[s, stage]['flops'].values()) for s in SEEDS])

  @pytest.mark.parametrize('level', [0.5, 0.9])
  def test_reach_and_ratios(self, finished, results, level):
    rows, key = finished[1]['rows'], str(level)
    hits = {}
    for stage in ('teacher', 'opd'):
      for unit, x in (('steps', lambda e: e['step']),
                      ('flops', lambda e: sum(e['flops'].values()))):
        hits[stage, unit] = [
            crossing([(x(e), e['sampled_accuracy']) for e in results[s, stage]['evals']],
                     level * results[s, 'opd']['teacher']['sampled_accuracy']) for s in SEEDS]
        got = rows[stage]['reach'][key]
        assert got['seeds_reached'] == sum(h is not None for h in hits[stage, unit])
        if None in hits[stage, unit]:
          assert got[unit] is None
        else:
          assert_spread(got[unit], hits[stage, unit])
    for unit in ('steps', 'flops'):
      mine, theirs = hits['opd', unit], hits['teacher', unit]
      if None not in mine + theirs and 0 not in mine:
        assert_spread(finished[1]['ratios']['opd'][key][unit],
                      [t / m for t, m in zip(theirs, mine, strict=True)])

  def test_the_table_shows_the_numbers(self, finished):
    workdir, summary, _ = finished
    line = next(x for x in (workdir / 'report.md').read_text().splitlines() if 'OPD exact' in x)
    got = summary['rows']['opd']
    accuracy = got['sampled_accuracy']
    low, high = max(accuracy['low'], 0.0), min(accuracy['high'], 1.0)  # shown where it can be
    assert f"{accuracy['mean']:.3f} [{low:.3f}, {high:.3f}]" in line
    assert f"{got['reverse_kl']['mean']:.4f}" in line

  def test_an_unfinished_stage_is_named(self, finished, tmp_path):
    with pytest.raises((FileNotFoundError, ConfigError),
                       match=r'teacher\b.*\b3\b.*result\.json'):
      report.read_results(experiment.parse_pipeline(make()), tmp_path)


def edit(file, **changes):
  content = json.loads(file.read_text())
  file.write_text(json.dumps({**content, **changes}))


def evaluated(result, **values):
  return {'after': {**result['after'], **values}}


class TestReportOfSomethingElse:
  """Every result is held against the config, as `train` holds it."""

  @pytest.fixture
  def workdir(self, finished, tmp_path):
    """A copy of what the report reads."""
    for seed in SEEDS:
      for stage in ORDER:
        target = tmp_path / f'seed_{seed}' / stage
        target.mkdir(parents=True)
        for name in ('result.json', 'config.json', 'inputs.json'):
          shutil.copy(finished[0] / f'seed_{seed}' / stage / name, target)
    return tmp_path

  def refused(self, workdir, *parts):
    with pytest.raises(ConfigError) as e:
      pipeline.write_report(make(), workdir)
    assert '\n' not in str(e.value) and 'seed 8' in str(e.value)
    assert all(part in str(e.value) for part in parts), e.value
    assert not (workdir / 'report.md').exists()

  def test_a_copy_of_the_whole_directory_is_reported(self, finished, workdir):
    pipeline.write_report(make(), workdir)
    report_of = (finished[0] / 'report.json').read_text()
    assert (workdir / 'report.json').read_text() == report_of

  def test_another_stages_result(self, workdir):
    here = workdir / 'seed_8'
    shutil.copy(here / 'teacher' / 'result.json', here / 'opd' / 'result.json')
    self.refused(workdir, 'opd', "name: 'teacher' -> 'opd'", 'steps: 80 -> 15')

  def test_another_seeds_result(self, workdir):
    shutil.copy(workdir / 'seed_3' / 'opd' / 'result.json', workdir / 'seed_8' / 'opd')
    self.refused(workdir, 'opd', 'seed: 3 -> 8')

  def test_another_config(self, workdir):
    file = workdir / 'seed_8' / 'opd' / 'config.json'
    content = json.loads(file.read_text())
    content['optimizer']['learning_rate'] = 0.5
    file.write_text(json.dumps(content))
    self.refused(workdir, 'opd', 'optimizer/learning_rate: 0.5 -> 0.001')

  def test_no_config(self, workdir):
    (workdir / 'seed_8' / 'opd' / 'config.json').unlink()
    self.refused(workdir, 'opd', 'config.json')

  @pytest.mark.parametrize(('value', 'text'), [
      (math.nan, 'nan'), (1.5, '1.5'), ('0.5', "'0.5'"), (None, 'None'), (True, 'True')])
  def test_an_accuracy_that_is_none(self, value, text, workdir):
    file = workdir / 'seed_8' / 'opd' / 'result.json'
    edit(file, **evaluated(json.loads(file.read_text()), sampled_accuracy=value))
    self.refused(workdir, 'opd', f'sampled_accuracy={text}', '15')

  @pytest.mark.parametrize('text', ['', '{"name": "op', '[]', '3', '\x00\x00', '[' * 100_000])
  def test_a_result_that_is_not_whole(self, text, finished, workdir):
    (workdir / 'seed_8' / 'opd' / 'result.json').write_text(text)
    self.refused(workdir, 'opd', 'result.json')
    with pytest.raises(ConfigError, match=r'result\.json'):
      train.train(experiment.stage_config(experiment.parse_pipeline(make()), 'opd', 8,
                                          finished[0].resolve()), workdir / 'seed_8' / 'opd')

  @pytest.mark.parametrize('changes', [
      dict(evals=None), dict(evals=[3]), dict(after={}), dict(before=[]), dict(flops=7),
      dict(teacher='none'), dict(steps='15'), dict(seed=None), dict(name=3)])
  def test_fields_of_another_type(self, changes, workdir):
    edit(workdir / 'seed_8' / 'opd' / 'result.json', **changes)
    self.refused(workdir, 'opd', 'result.json')
