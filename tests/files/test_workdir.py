"""Whose a work directory is, what its run read, and what another run may have left there."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import tiny

from opd_jax import config, load, train
from opd_jax.errors import ConfigError
from opd_jax.files import digest, disk, huggingface, peft
from opd_jax.files import workdir as workdir_lib


@pytest.fixture
def inputs(tmp_path):
  """A run on a data set, with a student and a teacher of its own, which tests may change."""
  for name, seed in (('student', 1), ('teacher', 2)):
    tiny.write_model(tmp_path / name, seed)
  rows = [{'question': f'{a}+{b}=', 'answer': str(a + b)} for a in range(9) for b in range(9)]
  tiny.write_jsonl(tmp_path / 'sums.jsonl', rows)
  c = tiny.config('opd_exact', student__path=str(tmp_path / 'student'),
                  teacher__path=str(tmp_path / 'teacher'))
  c.task = config.task_config('prompts', source=str(tmp_path / 'sums.jsonl'), grader='exact',
                              prompt_column='question', answer_column='answer', holdout_examples=16)
  return c


def begin(c, workdir):
  """A work directory as a run leaves it that was killed at its first step."""
  settings = config.to_dict(c)
  workdir_lib.claim(workdir, settings, load.inputs(config.parse(c)))
  return settings


def refusal(c, workdir):
  with pytest.raises(ConfigError) as e:
    train.train(c, workdir)
  return str(e.value)


def change_weights(folder, name='model.norm.weight'):
  """Other numbers in one tensor of a model, and nothing else."""
  file = folder / huggingface.WEIGHTS
  tensors = load_file(file)
  save_file({**tensors, name: tensors[name] + np.float32(1e-3)}, file, {'format': 'pt'})


def append_row(folder):
  with open(folder / 'sums.jsonl', 'a') as f:
    f.write(json.dumps({'question': '9+9=', 'answer': '18'}) + '\n')


CHANGES = {
    'rows': (append_row, 'task.options.source: sums.jsonl has changed'),
    'teacher': (lambda folder: tiny.write_model(shutil.rmtree(folder / 'teacher') or
                                                folder / 'teacher', 3),
                'teacher.path: model.safetensors has changed'),
    'base': (lambda folder: change_weights(folder / 'student'),
             'student.path: model.safetensors has changed'),
    'tokenizer': (lambda folder: (folder / 'student' / 'tokenizer_config.json').write_text(
        (folder / 'teacher' / 'tokenizer_config.json').read_text() + ' '),
                  'student.path: tokenizer_config.json has changed'),
    'stop tokens': (lambda folder: (folder / 'teacher' / 'generation_config.json').unlink(),
                    'teacher.path: generation_config.json is gone'),
}


class TestInputs:

  @pytest.mark.parametrize('change', CHANGES)
  def test_a_run_does_not_go_on_with_others(self, inputs, tmp_path, change, capsys):
    do, told = CHANGES[change]
    settings = begin(inputs, tmp_path / 'run')
    do(tmp_path)
    message = refusal(inputs, tmp_path / 'run')
    assert told in message and message.count(' has changed') + message.count(' is gone') == 1
    assert "doctor.changed_inputs='REASON'" in message
    # On purpose: it is said, and from then on these are the run's inputs.
    now = load.inputs(config.parse(inputs))
    workdir_lib.check_inputs(tmp_path / 'run', now, 'a longer list')
    assert told in (err := capsys.readouterr().err) and "'a longer list'" in err
    inputs.doctor.changed_inputs = 'a longer list'
    workdir_lib.claim(tmp_path / 'run', config.to_dict(inputs), now)
    workdir_lib.check_inputs(tmp_path / 'run', now, '')
    assert json.loads((tmp_path / 'run' / 'config.json').read_text()) == settings

  def test_of_a_finished_run_too(self, inputs, tmp_path):
    begin(inputs, tmp_path / 'run')
    evaluation = {'step': 0, 'flops': {}}
    result = {'name': inputs.name, 'seed': inputs.seed, 'steps': inputs.steps, 'flops': {},
              'before': evaluation, 'after': evaluation, 'evals': [evaluation], 'teacher': None}
    disk.write_json(tmp_path / 'run' / workdir_lib.RESULT, result)
    assert train.train(inputs, tmp_path / 'run') == result
    append_row(tmp_path)
    assert 'sums.jsonl has changed' in refusal(inputs, tmp_path / 'run')

  def test_the_same_under_another_name_are_the_same(self, inputs, tmp_path):
    before = digest.of_model(tmp_path / 'student')
    (tmp_path / 'student' / 'README.md').write_text('nobody reads this')
    shutil.copytree(tmp_path / 'student', tmp_path / 'elsewhere')
    assert digest.of_model(tmp_path / 'elsewhere') == before

  def test_hidden_files_of_a_folder_of_data_are_not_read(self, tmp_path):
    (tmp_path / '.cache').mkdir()
    for name in ('a.jsonl', '.DS_Store', '.cache/x'):
      (tmp_path / name).write_text('{}')
    assert set(digest.of_data(tmp_path)) == {'a.jsonl'}

  @pytest.mark.parametrize('content', [None, '', '[]', '{"student.path": "ab"}'])
  def test_a_directory_that_does_not_say(self, inputs, tmp_path, content):
    begin(inputs, tmp_path / 'run')
    file = tmp_path / 'run' / workdir_lib.INPUTS
    file.unlink() if content is None else file.write_text(content)
    assert 'inputs.json' in refusal(inputs, tmp_path / 'run')
    workdir_lib.check_inputs(tmp_path / 'run', load.inputs(config.parse(inputs)), 'a reason')

  def test_every_tensor_tells(self, tmp_path):
    # Also one of many blocks, whatever is between the blocks that are read.
    values = {'large': np.arange(2**18, dtype=np.float32), 'small': np.zeros(3, np.float32),
              'empty': np.zeros((0, 3), np.float32)}
    file = tmp_path / 'x.safetensors'
    save_file(values, file)
    seen = {digest.of_weights(file)}
    for name, shape in (('large', 2**18), ('small', 3)):
      save_file({**values, name: values[name] + np.ones(shape, np.float32)}, file)
      seen.add(digest.of_weights(file))
    for place in (-1, 2**18 // 3):  # of a large one, its end and what is evenly between
      changed = values['large'].copy()
      changed[place] += 1
      save_file({**values, 'large': changed}, file)
      seen.add(digest.of_weights(file))
    save_file({**values, 'small': values['small'].reshape(1, 3)}, file)
    assert len(seen | {digest.of_weights(file)}) == 6

  def test_a_folder_of_data_is_all_of_its_files(self, tmp_path):
    (tmp_path / 'data' / 'train').mkdir(parents=True)
    (tmp_path / 'data' / 'train' / '0.jsonl').write_text('{}')
    before = {'source': digest.of_data(tmp_path / 'data')}
    (tmp_path / 'data' / 'train' / '1.jsonl').write_text('{}')
    assert digest.changes(before, {'source': digest.of_data(tmp_path / 'data')}) == [
        'source: train/1.jsonl is new']


class TestOddFiles:
  """What stands in the place of a file of ours is refused or passed over, and not waited for."""

  @pytest.mark.parametrize('content', ['[]', '{"a": 3}', '{', '[' * 100_000, '\udcff', None])
  @pytest.mark.parametrize('name', [workdir_lib.INPUTS, workdir_lib.REVISIONS])
  def test_are_refused(self, name, content, tmp_path):
    self.put(tmp_path / name, content)
    read = {workdir_lib.INPUTS: lambda: workdir_lib.read_inputs(tmp_path),
            workdir_lib.REVISIONS: lambda: workdir_lib.read_revisions(tmp_path / name)}[name]
    with pytest.raises(ConfigError, match=name):
      read()

  @pytest.mark.parametrize('content', ['[]', '{"inputs": 3}', '{"inputs": {"a": 3}}', '{',
                                       '[' * 100_000, None])
  def test_an_origin_that_says_nothing(self, content, tmp_path):
    self.put(tmp_path / huggingface.ORIGIN, content)
    assert workdir_lib.read_origin(tmp_path) == {}

  @staticmethod
  def put(path, content):
    if content is None:
      os.mkfifo(path)
    else:
      path.write_bytes(content.encode('utf-8', 'surrogateescape'))


class TestLeftovers:

  @pytest.mark.parametrize('name', ['export', 'adapter', 'checkpoints/3', 'result.json',
                                    'answers_own.jsonl', 'answers_given.jsonl.partial'])
  def test_of_another_run_are_not_taken_for_this_ones(self, name, tmp_path):
    c = tiny.config('sft')
    (tmp_path / name).mkdir(parents=True)
    message = refusal(c, tmp_path)
    assert name.partition('/')[0] in message and 'another run' in message
    assert not (tmp_path / 'config.json').exists()

  @pytest.mark.parametrize('change', [None, dict(seed=1), dict(optimizer__learning_rate=0.5)])
  def test_an_export_of_another_config_in_a_directory_of_this_one(self, change, tmp_path):
    c = tiny.config('sft')
    settings = begin(c, tmp_path)
    other = config.to_dict(tiny.config('sft', **change)) if change else None
    (tmp_path / 'export').mkdir()
    if other:  # as another run wrote it; or one of an older version, which says nothing
      disk.write_json(tmp_path / 'export' / huggingface.ORIGIN,
                             workdir_lib.origin(other, {}, 6, [1, 2]))
    assert "holds ['export'] of another run" in refusal(c, tmp_path)
    shutil.rmtree(tmp_path / 'export')
    workdir_lib.check(tmp_path, settings)

  def test_of_a_refused_start_do_not_count(self, tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    for name in ('metrics.jsonl', 'doctor.json'):
      (tmp_path / name).write_text('')
    workdir_lib.check(tmp_path, config.to_dict(tiny.config('sft')))

  def test_only_what_this_very_state_delivered_is_kept(self, tmp_path):
    settings = config.to_dict(tiny.config('sft'))
    mine = workdir_lib.origin(settings, {'student.path': {'x': 'y'}}, 6, [1, 2])
    for origin, kept in ((mine, True), ({**mine, 'step': 5}, False),
                         ({**mine, 'checksums': [1, 3]}, False), ({**mine, 'inputs': {}}, False)):
      folder = tmp_path / 'export'
      folder.mkdir()
      disk.write_json(folder / huggingface.ORIGIN, origin)
      assert workdir_lib.delivered(folder, mine) == folder.exists() == kept
      shutil.rmtree(folder, ignore_errors=True)


class TestAdapters:

  def test_an_adapter_is_not_put_on_another_base(self, inputs, tmp_path):
    inputs.student.lora.rank, inputs.student.lora.alpha = 2, 4.0
    run = config.parse(inputs)
    student = load.open_student(run)
    adapter = load.make_adapter(run, student)
    origin = workdir_lib.origin(config.to_dict(inputs), load.inputs(run), 6, [1])
    peft.write_adapter(tmp_path / 'adapter', student.model, adapter.read(), adapter.settings,
                       student.tokenizer, run.student.path, origin)
    inputs.student.lora.rank, inputs.student.lora.alpha = 0, 32.0
    inputs.student.lora.path = str(tmp_path / 'adapter')
    # The same base, wherever it is, and whatever came to its tokenizer.
    moved = pathlib.Path(shutil.move(tmp_path / 'student', tmp_path / 'moved'))
    (moved / 'generation_config.json').unlink()
    inputs.student.path = str(moved)
    load.make_adapter(config.parse(inputs), student)
    change_weights(moved)
    with pytest.raises(ConfigError, match=r'student\.lora\.path=.*another base.*model\.safetensors '
                                          'has changed'):
      load.make_adapter(config.parse(inputs), student)
    inputs.doctor.changed_inputs = 'a merge of two'
    load.make_adapter(config.parse(inputs), student)
