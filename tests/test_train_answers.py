"""What the teacher writes once, before the first step, and the rows of a run are taken from."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import reuse
import tiny

from opd_jax import build, config, errors, load, programs, train
from opd_jax.files import answers, disk
from opd_jax.files import workdir as workdir_lib
from opd_jax.run import flops

FILE = workdir_lib.ANSWERS.format('own')
PARTIAL = f'{FILE}.partial'
EXAMPLES, SAMPLES = 10, 2
BLOCKS = (8, 16, 20)  # answers when one, two and all three are written


def make(**fields):
  """Ten examples in batches of four: an epoch ends within a batch, and the writer's last block
  begins again."""
  return tiny.with_models('sft_teacher', **{
      'data__teacher_answers': 'fixed', 'data__limit': EXAMPLES, 'data__prompts_per_step': 4,
      'data__samples_per_prompt': SAMPLES, 'sample__temperature': 2.0, **fields})


def lines(workdir):
  return [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """The work directory of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp('straight')
  reuse.train(make(), workdir)
  return workdir


def test_every_example_has_its_answers(straight):
  parts = build.open_parts(config.parse(make()))
  examples, found = parts.examples['own'], lines(straight)
  assert [row['example'] for row in found] == np.arange(EXAMPLES).repeat(SAMPLES).tolist()
  assert [row['prompt'] for row in found] == [
      parts.task.prompt(examples.rows[row['example']]) for row in found]
  for row in found:
    ended = row['tokens'][-1] in parts.stop_tokens
    assert row['ended'] == ended
    # The text is what the tokens say, without what ended it.
    assert parts.student.tokenizer.decode(row['tokens'][:-1] if ended else row['tokens']
                                          ) == row['completion']
  # Two samples of an example are two samples, and the file's next block is no copy of the first.
  assert len({(row['example'], row['completion']) for row in found}) > EXAMPLES
  # A trained teacher answers what it was asked, sometimes rightly; another example, by chance.
  right = [np.mean([parts.task.grade(examples.rows[(row['example'] + shift) % EXAMPLES],
                                     row['completion']) for row in found])
           for shift in range(EXAMPLES)]
  assert right[0] > 0.1 + 2 * np.mean(right[1:])


def test_a_step_takes_the_answers_of_its_examples(straight):
  run = config.parse(make())
  made = programs.compile_programs(run, build.open_parts(run))
  stream, = made.parts.streams
  # There is a file.
  made = made.with_answers(straight, {}, jax.random.key(0), pytest.fail, pytest.fail)
  indices = np.array([7, 0, 9]).repeat(SAMPLES)
  rollout, = made.write(stream, {}, {}, indices, jax.random.key(0))
  found = lines(straight)
  want = [found[i * SAMPLES + j] for i in (7, 0, 9) for j in range(SAMPLES)]
  first = rollout.prompt_length
  for row, valid, tokens, mask, ended in zip(want, *map(np.asarray, (
      rollout.valid, rollout.tokens, rollout.mask, rollout.ended)), strict=True):
    assert tokens[first:][valid[first:]].tolist() == row['tokens']
    assert mask.sum() == len(row['tokens'])
    assert ended == row['ended']


def test_the_teacher_is_paid_once(straight):
  result = json.loads((straight / 'result.json').read_text())
  parts = build.open_parts(config.parse(make()))
  prompts = parts.examples['own'].prompts(np.arange(EXAMPLES)).valid.sum(1).repeat(SAMPLES)
  written = np.array([len(row['tokens']) for row in lines(straight)])
  assert result['flops']['teacher_sampling'] == flops.forward_flops(
      parts.teacher.model, prompts + written)
  row, = tiny.rows(straight, 'answers')
  assert (row['examples'], row['tokens']) == (EXAMPLES * SAMPLES, (prompts + written).sum())


@pytest.mark.parametrize('left', [True, False], ids=['from the file', 'written again'])
def test_a_restart_learns_from_the_same_answers(tmp_path, straight, left):
  tmp_path = tmp_path / 'killed'
  shutil.copytree(straight, tmp_path)
  for gone in ('result.json', 'export', 'checkpoints/6', *([] if left else [FILE])):
    shutil.rmtree(tmp_path / gone) if (tmp_path / gone).is_dir() else (tmp_path / gone).unlink()
  reuse.train(make(), tmp_path)
  assert (tmp_path / FILE).read_bytes() == (straight / FILE).read_bytes()
  tiny.assert_same_bits(tiny.read_checkpoint(tmp_path, 6), tiny.read_checkpoint(straight, 6))
  assert tiny.rows(tmp_path, 'answers') == tiny.rows(straight, 'answers')


class TestEndedWhileItWrites:

  @pytest.fixture
  def written(self, monkeypatch):
    """Where in the file blocks were written, since the last look."""
    places, write = [], answers.write

    def noted(partial, examples, samples, first, rollout):
      write(partial, examples, samples, first, rollout)
      places.append(first)

    monkeypatch.setattr(answers, 'write', noted)
    return places

  @pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
  def test_a_signal_keeps_what_is_written_and_the_rest_is_written_next_time(
      self, number, tmp_path, straight, monkeypatch, written):
    old, write = signal.signal(number, signal.default_int_handler), answers.write

    def interrupting(partial, examples, samples, first, rollout):
      if first == BLOCKS[0]:
        os.kill(os.getpid(), number)
      write(partial, examples, samples, first, rollout)

    with monkeypatch.context() as m:
      m.setattr(answers, 'write', interrupting)
      with pytest.raises(train.PreemptedError, match='had written 16 of 20 answers to .*, which'):
        reuse.train(make(), tmp_path)
    signal.signal(number, old)
    whole = (straight / FILE).read_bytes().splitlines(keepends=True)
    assert (tmp_path / PARTIAL).read_bytes() == b''.join(whole[:BLOCKS[1]])
    assert not (tmp_path / FILE).exists() and not tiny.rows(tmp_path, 'answers')
    assert written == [0, BLOCKS[0]]
    reuse.train(make(), tmp_path)
    assert written == [0, *BLOCKS[:2]]
    assert (tmp_path / FILE).read_bytes() == b''.join(whole)
    assert not (tmp_path / PARTIAL).exists()
    # The teacher's writing is counted once, in the same row and the same operations.
    tiny.assert_same_bits(tiny.read_checkpoint(tmp_path, 6), tiny.read_checkpoint(straight, 6))
    assert tiny.rows(tmp_path, timing=False) == tiny.rows(straight, timing=False)
    results = [json.loads((w / 'result.json').read_text()) for w in (tmp_path, straight)]
    assert results[0]['flops'] == results[1]['flops']

  @pytest.mark.parametrize(('kept', 'blocks'), [
      (0, 0), (0.3, 0), (7.5, 0), (8, 1), (15, 1), (15.99, 1), (16, 2), (18, 2), (19.9, 2),
      (20, 3)])
  def test_a_killed_one_goes_on_behind_the_last_whole_block(
      self, kept, blocks, tmp_path, straight, written):
    # What a process leaves that ends at any moment: some lines, and a part of the next.
    whole = (straight / FILE).read_bytes().splitlines(keepends=True)
    left = b''.join(whole[:int(kept)])
    if kept % 1:
      left += whole[int(kept)][:int(kept % 1 * len(whole[int(kept)]))]
    (tmp_path / PARTIAL).write_bytes(left)
    run, seen = config.parse(make()), []
    with reuse.programs_of_earlier_runs():
      made = programs.compile_programs(run, build.open_parts(run))
      key = load.fold_in(jax.random.key(run.seed), load.ANSWERS, 0)
      with jax.set_mesh(made.parts.mesh):
        made = made.with_answers(tmp_path, made.connect(None), key, lambda line: None,
                                 seen.append)
    assert written == [0, *BLOCKS[:2]][blocks:]
    assert [f'had written {n} of {BLOCKS[-1]} ' in line for n, line in zip(
        BLOCKS[blocks:], seen, strict=True)] == [True] * len(seen)
    assert (tmp_path / FILE).read_bytes() == b''.join(whole)
    assert not (tmp_path / PARTIAL).exists()
    assert len(made.answers['own']) == BLOCKS[-1]

  @pytest.mark.parametrize('damage', [
      lambda text: '\n'.join(reversed(text.splitlines())) + '\n',
      lambda text: text.replace('"ended"', '"over"', 1),
      lambda text: text + text[:text.index('\n') + 1],
      lambda text: text.replace('=", "completion"', '+0=", "completion"')],
      ids=['order', 'field', 'longer', 'prompts'])
  def test_a_damaged_part_is_refused(self, tmp_path, straight, damage):
    (tmp_path / PARTIAL).write_text(damage((straight / FILE).read_text()))
    run = config.parse(make())
    made = programs.compile_programs(run, build.open_parts(run))
    with pytest.raises(errors.ConfigError, match=rf'{PARTIAL} is damaged .*allowed: what'):
      made.with_answers(tmp_path, {}, jax.random.key(0), pytest.fail, pytest.fail)

  def test_a_file_that_is_removed_meanwhile_is_not_begun_in_the_middle(
      self, tmp_path, monkeypatch, written):
    append = disk.append_bytes

    def removing(file, content):
      if written:
        file.unlink()
      append(file, content)

    monkeypatch.setattr(disk, 'append_bytes', removing)
    with pytest.raises(disk.StorageError, match=rf'{PARTIAL} cannot be written: No such file'):
      reuse.train(make(), tmp_path)
    assert not (tmp_path / PARTIAL).exists()


@pytest.mark.parametrize('damage', [
    lambda text: text[:-20], lambda text: text + text[:text.index('\n') + 1],
    lambda text: text.replace('"tokens": [', '"tokens": ["x", ', 1),
    lambda text: '\n'.join(reversed(text.splitlines())),
    lambda text: text.replace('"ended"', '"over"', 1),
    lambda text: text.replace('"tokens": [', '"tokens": [-5, ', 1),
    lambda text: text.replace('"tokens": [', '"tokens": [64, ', 1),
    lambda text: text.replace('=", "completion"', '+0=", "completion"')],
    ids=['cut', 'longer', 'no token', 'order', 'field', 'negative', 'unknown', 'prompts'])
def test_a_damaged_file_is_refused(tmp_path, straight, damage):
  (tmp_path / FILE).write_text(damage((straight / FILE).read_text()))
  run = config.parse(make())
  made = programs.compile_programs(run, build.open_parts(run))
  with pytest.raises(errors.ConfigError, match=rf'{FILE} is damaged .*allowed: what'):
    made.with_answers(tmp_path, {}, jax.random.key(0), pytest.fail, pytest.fail)


def test_streams_have_answers_of_their_own(tmp_path):
  c = tiny.with_models('opd_exact', data__teacher_answers='fixed', data__limit=EXAMPLES,
                       data__prompts_per_step=4, data__on_policy_fraction=0.5, steps=3,
                       data__off_policy_source='teacher', given__source='teacher',
                       given__prompts_per_step=4, given__likelihood_coef=0.1,
                       sample__temperature=3.0)
  c.task.options.train_examples = EXAMPLES
  reuse.train(c, tmp_path)
  written = {}
  for name in ('off_policy', 'given'):
    rows = (tmp_path / workdir_lib.ANSWERS.format(name)).read_text().splitlines()
    written[name] = {json.loads(row)['prompt']: json.loads(row)['completion'] for row in rows}
  assert written['off_policy'].keys() == written['given'].keys()
  assert written['off_policy'] != written['given']


def test_fixed_answers_without_a_teacher_that_writes_are_refused():
  c = tiny.override(tiny.with_models('opd_exact'), data__teacher_answers='fixed')
  with pytest.raises(errors.ConfigError, match='data.teacher_answers'):
    config.parse(c)
