"""Models, data and directories that a config names: each is looked at before anything is computed.
"""

import os
import pathlib

import pytest
from refusal import refused
import tiny

from opd_jax import build, config, train
from opd_jax.data import prompts as prompts_lib
from opd_jax.errors import ConfigError
from opd_jax.files import workdir as workdir_lib


def claim(c, path):
  workdir_lib.claim(path, config.to_dict(c), {})


class TestModels:

  @pytest.mark.parametrize('part', ['student', 'teacher'])
  def test_missing_directory(self, part, tmp_path):
    c = tiny.config('opd_sampled', **{f'{part}__path': str(tmp_path / 'nowhere')})
    refused(c, f'{part}.path=', 'nowhere')

  @pytest.mark.parametrize('part', ['student', 'teacher'])
  def test_a_repository_has_a_pinned_commit(self, part):
    for revision in ('', 'main'):
      c = tiny.config('opd_sampled', **{f'{part}__path': 'acme/tiny',
                                        f'{part}__revision': revision})
      refused(c, f'{part}.revision={revision!r}', "path='acme/tiny'")

  @pytest.mark.parametrize('part', ['student', 'teacher'])
  @pytest.mark.parametrize('path', ['', '.', 'stage:first'])
  def test_a_revision_of_something_else(self, part, path):
    c = tiny.config('opd_sampled', **{f'{part}__path': path, f'{part}__revision': 'ab' * 20})
    refused(c, f'{part}.revision=', "''")

  @pytest.mark.parametrize('missing', ['config.json', 'model.safetensors', 'tokenizer_config.json'])
  @pytest.mark.parametrize('part', ['student', 'teacher'])
  def test_a_directory_that_is_not_a_checkpoint(self, part, missing, tmp_path):
    whole = tiny.write_model(tmp_path / 'whole')
    broken = tiny.write_model(tmp_path / 'broken')
    (broken / missing).unlink()
    c = tiny.config('opd_sampled', student__path=str(whole), teacher__path=str(whole))
    c[part].path = str(broken)
    with pytest.raises(ConfigError) as e:
      train.train(c, tmp_path / 'run')
    for word in (f'{part}.path', str(broken), missing):
      assert word in str(e.value), f'{word!r} is not in {e.value}'

  @pytest.mark.parametrize(('file', 'text'), [
      ('tokenizer.json', '{}'), ('tokenizer.json', '{"a'), ('tokenizer_config.json', '{"a'),
      ('tokenizer_config.json', '[]'), ('generation_config.json', '{"a'),
      ('generation_config.json', '[]')])
  @pytest.mark.parametrize('part', ['student', 'teacher'])
  def test_a_damaged_file_of_a_checkpoint(self, part, file, text, tmp_path):
    whole = tiny.write_model(tmp_path / 'whole')
    broken = tiny.write_model(tmp_path / 'broken')
    (broken / file).write_text(text)
    c = tiny.config('opd_sampled', student__path=str(whole), teacher__path=str(whole))
    c[part].path = str(broken)
    with pytest.raises(ConfigError,
                       match=rf'{part}\.path=.*broken.*allowed'):
      build.open_parts(config.parse(c))

  @pytest.mark.parametrize('alphabet', [prompts_lib.ALPHABET[:-1], prompts_lib.ALPHABET[::-1]],
                           ids=['smaller', 'other order'])
  def test_vocabulary_mismatch(self, alphabet, tmp_path):
    other = tiny.write_model(tmp_path / 'other', alphabet=alphabet)
    c = tiny.config('opd_sampled', teacher__path=str(other))
    with pytest.raises(ConfigError) as e:
      train.train(c, tmp_path / 'run')
    for part in ('teacher.path=', str(other), str(len(alphabet) + 2), '64',
                 'allowed'):
      assert part in str(e.value)

  def test_a_prompt_longer_than_the_room(self, tmp_path):
    c = tiny.config('sft', data__max_prompt_tokens=4)
    with pytest.raises(ConfigError, match=(
        r"data\.max_prompt_tokens=4\b.*\b256\b.*'\d\d[+-]\d='.*allowed.*\b5\b")):
      train.train(c, tmp_path)

  def test_a_completion_longer_than_the_room(self, tmp_path):
    c = tiny.config('sft', data__max_new_tokens=3)
    with pytest.raises(ConfigError, match=r'data\.max_new_tokens=3\b.*allowed.*\b4\b'):
      train.train(c, tmp_path)

  def test_unknown_split(self, tmp_path):
    c = tiny.config('sft', data__split='test')
    with pytest.raises(ConfigError, match=r"split='test'.*\['corpus', 'eval', 'train'\]"):
      train.train(c, tmp_path)

  def test_a_split_without_completions(self, tmp_path):
    c = tiny.config('sft', data__split='train')
    with pytest.raises(ConfigError, match=r"data\.source='dataset'.*allowed"):
      train.train(c, tmp_path)


class TestWorkdir:

  def test_another_configs_run(self, tmp_path):
    claim(tiny.config('sft'), tmp_path)
    c = tiny.config('sft', optimizer__learning_rate=0.5, steps=7)
    with pytest.raises(ConfigError) as e:
      train.train(c, tmp_path)
    for part in (str(tmp_path), 'steps: 6 -> 7', 'optimizer/learning_rate: 0.01 -> 0.5', 'allowed'):
      assert part in str(e.value)
    claim(tiny.config('sft'), tmp_path)  # the same config is welcome

  def test_the_doctors_switches_may_change(self, tmp_path):
    # Or a run that the doctor does not let resume could never go on as it advises.
    claim(tiny.config('sft'), tmp_path)
    claim(tiny.config('sft', doctor__support='off: known'), tmp_path)

  def test_a_start_that_failed_does_not_keep_the_directory(self, tmp_path):
    with pytest.raises(ConfigError, match='max_prompt_tokens'):
      train.train(tiny.config('sft', data__max_prompt_tokens=4), tmp_path)
    claim(tiny.config('sft'), tmp_path)  # the corrected config may have it

  def test_under_a_file(self, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match=r'workdir=.*file/run.*allowed'):
      train.train(tiny.config('sft'), tmp_path / 'file' / 'run')

  @pytest.mark.parametrize('call', ['mkdir', 'write_text', 'rename'])
  def test_no_permission(self, call, tmp_path, monkeypatch):
    def refuse(self, *args, **options):
      raise PermissionError(13, 'Permission denied', str(self))

    monkeypatch.setattr(pathlib.Path, call, refuse)
    with pytest.raises(ConfigError, match=r'workdir=.*Permission denied.*allowed'):
      claim(tiny.config('sft'), tmp_path / 'run')

  @pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
  def test_a_directory_of_somebody_else(self, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r'workdir=.*Permission denied.*allowed'):
      train.train(tiny.config('sft'), tmp_path / 'run')

  def test_a_config_file_that_was_cut_off(self, tmp_path):
    for text in ('{"steps": ', '3'):
      (tmp_path / 'config.json').write_text(text)
      with pytest.raises(ConfigError, match=r'workdir=.*config\.json'):
        claim(tiny.config('sft'), tmp_path)
