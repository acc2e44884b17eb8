"""Branches, tags and nothing, of what is on the hub: resolved once, kept, and used from then on."""

from __future__ import annotations

import json
import shutil

from huggingface_hub import constants
from ml_collections import ConfigDict
import pytest
import tiny

from opd_jax import build, config, experiment, train
from opd_jax.errors import ConfigError
from opd_jax.files import hub
from opd_jax.tools import pipeline

FIRST, SECOND = 'ab' * 20, 'cd' * 20


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A hub as its cache has it, out of reach: a model with a branch and a tag, and a data set."""
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  for repository in ('models--acme--tiny', 'datasets--acme--sums'):
    for commit in (FIRST, SECOND):
      (tmp_path / 'hub' / repository / 'snapshots' / commit).mkdir(parents=True)
    refs = tmp_path / 'hub' / repository / 'refs'
    refs.mkdir()
    for name, commit in (('main', FIRST), ('v1', SECOND)):
      (refs / name).write_text(commit)
  monkeypatch.chdir(tmp_path)
  return tmp_path / 'hub'


def make(**fields):
  return tiny.config('opd_exact', **{**dict(student__path='acme/tiny', teacher__path='acme/tiny'),
                                     **fields})


def move(cache, repository='models--acme--tiny'):
  """Somebody pushes to the main branch."""
  (cache / repository / 'refs' / 'main').write_text(SECOND)


def test_names_become_commits_and_stay_them(cache, tmp_path, capsys):
  c = make(teacher__revision='v1')
  pinned = config.pin(c, tmp_path / 'run')
  assert (pinned.student.revision, pinned.teacher.revision) == (FIRST, SECOND)
  assert c.student.revision == ''  # the config of whoever calls is left alone
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 2 and f"student.revision='' of 'acme/tiny' is the commit {FIRST}" in said[0]
  assert json.loads((tmp_path / 'run' / 'revisions.json').read_text()) == {
      'model acme/tiny (main)': FIRST, 'model acme/tiny v1': SECOND}
  move(cache)
  again = config.pin(c, tmp_path / 'run')
  assert config.to_dict(again) == config.to_dict(pinned) and not capsys.readouterr().out
  assert config.pin(c, tmp_path / 'another').student.revision == SECOND
  assert config.pin(pinned, tmp_path / 'third').student.revision == FIRST  # a commit is one
  assert not (tmp_path / 'third').exists()


def test_training_uses_the_commit_and_the_config_of_the_directory_has_it(
    cache, tmp_path, monkeypatch):
  seen = []

  def stop(run):
    seen.append(run)
    raise KeyboardInterrupt

  monkeypatch.setattr(build, 'open_parts', stop)
  settings = []
  monkeypatch.setattr(train.workdir_lib, 'check', lambda _, values: settings.append(values))
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      train.train(make(), tmp_path / 'run')
    move(cache)
  assert [r.student.revision for r in seen] == [FIRST, FIRST]
  assert settings[0] == settings[1] and settings[0]['teacher']['revision'] == FIRST


def test_all_stages_of_a_pipeline_have_one_commit(cache, tmp_path, monkeypatch):
  c = experiment.default_pipeline()
  c.stages = ConfigDict(dict(one=make(), two=make()))
  c.order, c.report.methods, c.report.labels = ('one', 'two'), ('two',), ('two',)
  monkeypatch.setattr(pipeline, 'check_data', lambda p: None)
  begun = []

  def stage(pinned, folder):
    begun.append((pinned.name, pinned.student.revision, pinned.teacher.revision))
    move(cache)  # while the first stage runs
    if len(begun) > 1:
      raise KeyboardInterrupt

  monkeypatch.setattr(train, 'train', stage)
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      pipeline.run(c, tmp_path / 'run')
  assert begun == [('one', FIRST, FIRST), ('two', FIRST, FIRST), ('one', FIRST, FIRST)]


def test_data_sets_too(cache, tmp_path):
  c = tiny.config('sft')
  c.task = config.task_config('prompts', source='acme/sums', prompt_column='q', eval_split='test',
                              eval_source='acme/sums', eval_revision='v1')
  options = config.pin(c, tmp_path / 'run').task.options
  assert (options.revision, options.eval_revision) == (FIRST, SECOND)
  c.task.options.source = 'nowhere.jsonl'  # a file that is missing is no data set of the hub
  assert config.pin(c, tmp_path / 'other').task.options.revision == ''


def test_looking_keeps_nothing(cache, tmp_path, capsys):
  assert config.pin(make(), tmp_path / 'run', keep=False).student.revision == FIRST
  assert not (tmp_path / 'run').exists() and not capsys.readouterr().out


@pytest.mark.parametrize('fields', [dict(student__revision='v2'), dict(student__path='runs/base')])
def test_what_the_hub_does_not_know(cache, tmp_path, fields):
  # The second is a directory that was misspelt.
  with pytest.raises(ConfigError) as e:
    config.pin(make(**fields), tmp_path / 'run')
  revision, path = fields.get('student__revision', ''), fields.get('student__path', 'acme/tiny')
  assert f"student.revision={revision!r} of {path!r}, which is not here" in str(e.value)
  assert 'allowed: a branch, a tag, the 40 hex digits' in str(e.value)
  assert '\n' not in str(e.value) and not (tmp_path / 'run').exists()


def test_a_damaged_record_is_not_passed_over(cache, tmp_path):
  config.pin(make(), tmp_path / 'run')
  shutil.copy(cache / 'models--acme--tiny' / 'refs' / 'main', tmp_path / 'run' / 'revisions.json')
  with pytest.raises(ConfigError, match=r'revisions\.json cannot be read'):
    config.pin(make(), tmp_path / 'run')


def test_only_40_hex_digits_are_a_commit():
  assert hub.is_commit(FIRST)
  assert not any(map(hub.is_commit, ('', 'main', FIRST[:7], FIRST.upper(), FIRST + '0')))
