"""`opd export`: the model of a work directory, or a line that names the directory."""

import json
import shutil

from forks import assert_one_line, run
import ml_dtypes
import numpy as np
import pytest
import reuse
import tiny

from opd_jax.errors import ConfigError
from opd_jax.files import huggingface
from opd_jax.models import params
from opd_jax.tools import export

NEWEST = 'export --workdir run --output out'
HALF = 'export --workdir moved --output out16 --dtype bfloat16'
DAMAGED = 'export --workdir damaged --output new'
REFUSED = [
    ('--workdir run --output new --dtype int8', ("dtype='int8'", "'bfloat16'")),
    ('--workdir run --output new --step 17', ('step=17', '-1', '3]')),
    ('--workdir run --output new --format gguf', ("format='gguf'", "['full', 'adapter']")),
    ('--workdir run --output new --format adapter', ("format='adapter'",)),
    ('--workdir run --output run', ("output='run'",)),
    ('--workdir half --output new', ("workdir='half'", 'allowed')),
    ('--workdir run', ('--output',)),
    ('--workdir run --output new --stage x', ('--stage', "'export'", 'allowed')),
]


def edit_config(workdir, change):
  file = workdir / 'config.json'
  file.write_text(json.dumps(change(json.loads(file.read_text()))))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A finished run, copies of it in other states, and something else."""
  path = tmp_path_factory.mktemp('export')
  reuse.train(tiny.config('sft', steps=3), path / 'run')
  for name in ('moved', 'damaged'):
    shutil.copytree(path / 'run', path / name)
  edit_config(path / 'moved', changed(compute=dict(mesh=dict(data=1, fsdp=2, tensor=2, expert=1))))
  (path / 'damaged' / 'checkpoints' / '3' / 'state' / '_METADATA').write_text('{"')
  (path / 'half').mkdir()
  return path


@pytest.fixture(scope='module')
def outcomes(folder):
  return run([NEWEST, HALF, DAMAGED, *(f'export {arguments}' for arguments, _ in REFUSED)], folder)


def test_the_newest_checkpoint_is_the_final_model(folder, outcomes):
  done = outcomes[NEWEST]
  assert done.returncode == 0 and done.stdout == 'step 3: out\n', done.stderr
  for file in (folder / 'run' / 'export').iterdir():
    assert (folder / 'out' / file.name).read_bytes() == file.read_bytes(), file.name


def test_in_bfloat16_and_for_a_mesh_that_is_not_here(folder, outcomes):
  assert outcomes[HALF].returncode == 0, outcomes[HALF].stderr
  whole, half = (params.flatten(huggingface.load(folder / d, {}).read())
                 for d in ('run/export', 'out16'))
  for name in whole:
    np.testing.assert_array_equal(half[name], whole[name].astype(ml_dtypes.bfloat16), name)


@pytest.mark.parametrize(('arguments', 'parts'), REFUSED)
def test_refused(arguments, parts, folder, outcomes):
  done = outcomes[f'export {arguments}']
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert all(part in done.stderr for part in parts), done.stderr
  assert not (folder / 'new').exists()


def test_a_damaged_checkpoint(folder, outcomes):
  assert_one_line(outcomes[DAMAGED], 'step=3', "workdir='damaged'", 'allowed')
  assert not (folder / 'new').exists()


def changed(**changes):
  """Makes other content of a config.json: a dict in `changes` changes a group, anything else
  replaces what is there."""
  def change(config):
    return {**config, **{name: {**config[name], **value} if isinstance(value, dict) else value
                         for name, value in changes.items()}}
  return change


class TestExportOfOddDirectories:
  """In this process: every one is a line that names the directory."""

  def refused(self, workdir, output, *parts):
    with pytest.raises(ConfigError) as e:
      export.export(workdir, output, 'full', -1)
    assert '\n' not in str(e.value) and not output.exists()
    assert all(part in str(e.value) for part in (*parts, 'allowed')), e.value

  @pytest.fixture
  def workdir(self, folder, tmp_path):
    shutil.copytree(folder / 'run', tmp_path / 'run')
    return tmp_path / 'run'

  @pytest.mark.parametrize('text', ['', '[]', '3', 'null', '"a"', '{}', '{"steps": 3', '\x00',
                                    '[' * 100_000, '{"a.b": 1}', '{"1": 2}'])
  def test_content_of_config_json(self, text, workdir, tmp_path):
    (workdir / 'config.json').write_text(text)
    self.refused(workdir, tmp_path / 'new', f'workdir={str(workdir)!r}')

  @pytest.mark.parametrize('change', [
      changed(student=None), changed(student=[1]), changed(student='x'), changed(task=None),
      changed(task=dict(name='nope')), changed(task=dict(options=[1])), changed(steps='4'),
      changed(seed=None), changed(student=dict(fresh=None)), changed(colour=1),
      changed(student=dict(path='/nowhere')), changed(optimizer=[])])
  def test_fields_of_config_json(self, change, workdir, tmp_path):
    edit_config(workdir, change)
    self.refused(workdir, tmp_path / 'new', f'workdir={str(workdir)!r}')

  @pytest.mark.parametrize('name', ['state', 'host'])
  def test_half_a_checkpoint(self, name, workdir, tmp_path):
    shutil.rmtree(workdir / 'checkpoints' / '3' / name)
    self.refused(workdir, tmp_path / 'new', 'step=3')

  def test_no_checkpoints(self, workdir, tmp_path):
    shutil.rmtree(workdir / 'checkpoints')
    self.refused(workdir, tmp_path / 'new', f'workdir={str(workdir)!r}')
    (workdir / 'checkpoints').touch()
    self.refused(workdir, tmp_path / 'new', f'workdir={str(workdir)!r}')

  def test_what_lies_beside_the_checkpoints_is_left_alone(self, workdir, tmp_path):
    (workdir / 'checkpoints' / 'notes').mkdir()
    (workdir / 'checkpoints' / '3' / 'metrics' / 'metrics').write_text('{"')  # not needed here
    assert export.export(workdir, tmp_path / 'new', 'full', -1) == 3

  def test_an_output_that_is_a_link_to_nothing(self, workdir, tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'nothing')
    self.refused(workdir, tmp_path / 'link', 'link', 'exists')
