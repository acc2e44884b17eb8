"""What the teacher writes once, before the first step, and the rows of a run are taken from."""

import json
import shutil

import jax
import numpy as np
import pytest
import reuse
import tiny

from opd_jax import build, config, errors, programs
from opd_jax.files import workdir as workdir_lib
from opd_jax.run import flops

FILE = workdir_lib.ANSWERS.format('own')
EXAMPLES, SAMPLES = 10, 2


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
  made = made.with_answers(straight, {}, jax.random.key(0), pytest.fail)  # there is a file
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
    made.with_answers(tmp_path, {}, jax.random.key(0), pytest.fail)


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
