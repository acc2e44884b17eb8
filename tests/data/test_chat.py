"""Whole runs on prompts from a file, in a chat template."""

import contextlib
import functools
import io
import json
import runpy

from ml_collections import ConfigDict
import numpy as np
import pytest
import tiny

from opd_jax import build, config, experiment, load, train
from opd_jax.data import examples as examples_lib
from opd_jax.data.streams import OWN
from opd_jax.doctor import examine as doctor
from opd_jax.doctor import static
from opd_jax.errors import ConfigError
from opd_jax.run import metrics
from opd_jax.tasks import prompts
from opd_jax.tools import evaluate_model, pipeline

ROWS = [{'question': f'{i} plus one?', 'answer': f'{i + 1}'} for i in range(24)]
LONG = [{'question': 'plus one ' * 20, 'answer': '0'}] * 2
HELD_OUT = [{'question': f'What is {i}?', 'answer': f'{i}'} for i in range(8)]


@functools.cache
def files():
  """A folder with student, teacher and data: the student has no template of its own, training rows
  include two that are too long and one that is an evaluation row."""
  folder = tiny.folder() / 'chat'
  folder.mkdir()
  tiny.write_chat_model(folder / 'student', template=None)
  tiny.write_chat_model(folder / 'teacher', seed=1)
  tiny.write_jsonl(folder / 'train.jsonl', [*ROWS[:9], *LONG, *ROWS[9:], HELD_OUT[3]])
  tiny.write_jsonl(folder / 'eval.jsonl', HELD_OUT)
  return folder


def make(kind='opd_sampled', task=None, **fields):
  """Three batches of eight prompts are an epoch."""
  folder = files()
  c = tiny.config(kind, student__path=str(folder / 'student'), name='chat')
  if c.teacher.kind != 'none':
    c.teacher.path, c.prompt.template = str(folder / 'teacher'), 'teacher'
  else:
    c.student.path, c.prompt.template = str(folder / 'teacher'), 'student'
  c.task = config.task_config('prompts', **dict(
      source=str(folder / 'train.jsonl'), eval_source=str(folder / 'eval.jsonl'),
      prompt_column='question', answer_column='answer', grader='last_number') | (task or {}))
  c.data.prompts_per_step, c.data.samples_per_prompt, c.data.split = 8, 1, 'train'
  c.data.max_prompt_tokens, c.data.max_new_tokens, c.data.overlong = 48, 5, 'drop'
  c.prompt.thinking = 'off'
  c.eval.problems, c.eval.samples_per_problem, c.eval.pass_k = 8, 1, 1
  c.checkpoint.every_steps = 100
  return tiny.override(c, **fields)


def open_parts(c):
  return build.open_parts(config.parse(c))


def templates(c):
  """What the doctor says of the templates."""
  run = config.parse(c)
  return static.check_templates(run, build.open_parts(run))


class Watch:
  """Notes what the loop asks of its examples."""

  def __init__(self, monkeypatch):
    self.steps, self.rows, self.prompts = [], [], []
    indices, prompts = examples_lib.Examples.indices, examples_lib.Examples.prompts

    def watched(examples, step, count):
      out = indices(examples, step, count)
      self.steps.append(step)
      self.rows += [examples.rows[i]['prompt'] for i in out]
      self.prompts += list(prompts(examples, out).tokens)
      return out

    monkeypatch.setattr(examples_lib.Examples, 'indices', watched)


@functools.cache
def finished():
  """(config, work directory, what was visited) of six steps, two epochs. Output in output.txt."""
  with pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(io.StringIO()) as out:
    seen, workdir = Watch(m), files() / 'run'
    c = make()
    train.train(c, workdir)
  (workdir / 'output.txt').write_text(out.getvalue())
  return c, workdir, seen


def test_every_epoch_visits_every_row_once_in_another_order():
  _, _, seen = finished()
  questions = sorted(r['question'] for r in ROWS)
  assert sorted(seen.rows[:24]) == sorted(seen.rows[24:]) == questions
  assert seen.rows[:24] != seen.rows[24:] and seen.rows[:24] != [r['question'] for r in ROWS]


def test_what_the_models_read():
  c, _, seen = finished()
  tokens = load.open_student(config.parse(c)).tokenizer
  pad = tokens.eos_token_id  # this tokenizer has no padding token
  for row, ids in zip(seen.rows, seen.prompts, strict=True):
    text = tokens.decode(np.trim_zeros(ids - pad, 'f') + pad)
    # By hand from the teacher's template; the student has none.
    assert text == f'<|turn|>user\n{row}<|over|>\n<|turn|>assistant\n<|quiet|>'


def test_the_counts_are_in_the_log():
  _, workdir, _ = finished()
  row, = tiny.rows(workdir, 'data')
  assert row == {
      'kind': 'data', 'step': 0,
      'train': {'examples': 24, 'prompts_too_long_dropped': 2,
                'task': '27 rows read, 1 left out that are in the evaluation set'},
      'eval': {'examples': 8, 'prompts_too_long_dropped': 0, 'task': '8 rows read'}}
  out = (workdir / 'output.txt').read_text()
  assert ('chat train data: examples 24, task 27 rows read, 1 left out that are in the evaluation '
          'set, prompts too long dropped 2\n') in out
  assert '<|turn|>user\nWhat is 0?<|over|>' in out  # a transcript


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
  c, straight, whole = finished()
  seen = Watch(monkeypatch)

  class Flag:
    """Up from the second time that the loop looks."""

    def __enter__(self):
      self.looks = 0
      return self

    def __exit__(self, *exc):
      pass

    def __call__(self):
      self.looks += 1
      return self.looks > 3

    end = None  # before the first step nothing is written

  with monkeypatch.context() as m:
    m.setattr(train, 'Interrupts', Flag)
    with pytest.raises(train.PreemptedError):
      train.train(c, tmp_path)
  stopped = len(seen.steps)
  assert 0 < stopped < 6
  train.train(c, tmp_path)
  assert seen.steps == list(range(6)) and seen.rows == whole.rows
  tiny.assert_same_bits(tiny.read_checkpoint(tmp_path, 6), tiny.read_checkpoint(straight, 6))
  assert tiny.rows(tmp_path, timing=False) == tiny.rows(straight, timing=False)


def test_prompts_that_nobody_grades(tmp_path, capsys):
  c = make(task=dict(answer_column='', grader='none'), checkpoint__keep_best=0, steps=2)
  result = train.train(c, tmp_path)
  assert result['after']['reverse_kl'] > 0 and result['after']['length'] > 0
  # An accuracy of 0 would be a lie.
  assert not [name for name in result['after'] if 'accuracy' in name or 'pass' in name]
  assert not [name for name in result['teacher'] if 'accuracy' in name]
  out = capsys.readouterr().out
  assert 'accuracy' not in out and '✗' not in out and '  · <|turn|>user' in out
  assert 'chat eval at step 2: ' in out and 'reverse KL' in out
  with pytest.raises(ConfigError, match=r"checkpoint\.keep_best=1, .*'prompts'.*allowed: 0"):
    open_parts(make(task=dict(answer_column='', grader='none'), checkpoint__keep_best=1))


def one_flag(tmp_path, rows, **fields):
  """The config of experiments/checkpoints.py for tiny models, and nothing but the file said."""
  c = make(checkpoint__every_steps=1, steps=2, **fields)
  whole = runpy.run_path(str(tiny.ROOT / 'experiments' / 'checkpoints.py'))['get_config']()
  c.task, c.eval.problems = whole.task, whole.eval.problems
  c.task.options.source = str(tiny.write_jsonl(tmp_path / 'rows.jsonl', rows))
  return c


def test_prompts_without_answers_need_one_flag(tmp_path, capsys):
  c = one_flag(tmp_path, [{'id': i, 'question': f'{i}?', 'level': None} for i in range(80)])
  assert c.task.options.grader != 'none' and c.checkpoint.keep_best == -1
  result = train.train(c, tmp_path / 'run')
  assert not [name for name in result['after'] if 'accuracy' in name]
  out = capsys.readouterr().out
  assert ("chat train data: examples 64, task 80 rows read, prompt_column is 'question' (guessed), "
          'no answers, nothing is graded, 16 held out') in out
  # Of the checkpoints only the latest are left: none is the best.
  assert sorted(int(f.name) for f in (tmp_path / 'run/checkpoints').iterdir()) == [1, 2]
  assert train.train(c, tmp_path / 'run') == result
  c.checkpoint.keep_best = 1  # asked for
  with pytest.raises(ConfigError, match=r'checkpoint\.keep_best=1, .*allowed: 0, or -1'):
    open_parts(c)
  c.checkpoint.keep_best, c.eval.every_steps, c.eval.stop_at_sampled_accuracy = -1, 1, 0.5
  with pytest.raises(ConfigError, match=r'eval\.stop_at_sampled_accuracy=0\.5, .*allowed: 0'):
    open_parts(c)


def test_prompts_with_answers_are_graded_with_the_same_flag(tmp_path):
  rows = [{'question': f'{i}?', 'answer': i} for i in range(80)]
  s = open_parts(one_flag(tmp_path, rows))
  assert examples_lib.has_verifier(s.task, s.held_out)
  assert "answer_column is 'answer' (guessed)" in s.report['train']['task']
  run = config.parse(one_flag(tmp_path, rows))
  assert run.checkpoint.most_best == 1


@pytest.mark.parametrize(('rows', 'held_out'), [(2, 1), (10, 2), (320, 64), (1000, 64)])
def test_a_few_prompts_need_no_other_flag(rows, held_out, tmp_path):
  c = one_flag(tmp_path, [{'question': f'{i}?'} for i in range(rows)])
  parts = open_parts(c)
  assert (len(parts.examples[OWN]), len(parts.held_out)) == (rows - held_out, held_out)


def test_a_grader_of_ones_own_needs_answers(tmp_path):
  c = one_flag(tmp_path, [{'question': f'{i}?', 'label': i} for i in range(9)])
  c.task.options.grader = 'boxed'
  with pytest.raises(ConfigError, match=r"task\.options\.answer_column='auto'.*'label'"):
    open_parts(c)
  c.task.options.answer_column = 'label'
  assert examples_lib.has_verifier(prompts, open_parts(c).held_out)


def test_rewards_that_nobody_gives():
  c = make('grpo', task=dict(answer_column='', grader='none'), checkpoint__keep_best=0,
           data__samples_per_prompt=4)
  with pytest.raises(ConfigError, match=r"objective\.reward_coef=1\.0, .*allowed: 0"):
    open_parts(c)


def test_supervision_ends_a_turn_as_the_template_does():
  task = dict(answer_column='', completion_column='answer', grader='none')
  fields = dict(task=task, checkpoint__keep_best=0, data__source='dataset')
  # In prompts the template writes that there is no thinking, and in whole conversations not.
  with pytest.raises(ConfigError, match=r"thinking='off': example 0: .*<\|quiet\|>.*allowed: com"):
    open_parts(make('sft', **fields))
  s = open_parts(make('sft', **fields, prompt__thinking='default'))
  rollout = s.examples[OWN].given(np.arange(4))
  for i, row in enumerate(s.examples[OWN].rows[:4]):
    learned = rollout.tokens[i][np.flatnonzero(rollout.mask[i]) + 1]
    assert s.student.tokenizer.decode(learned) == row['completion'] + '<|over|>'
    assert learned[-1] in s.student.stop_tokens


class TestRefused:

  def refused(self, c, *parts):
    with pytest.raises(ConfigError, match='allowed') as e:
      open_parts(c)
    for part in parts:
      assert part in str(e.value), f'{part!r} is not in {e.value}'

  def test_no_template(self):
    self.refused(make(prompt__template='student'), "prompt.template='student'", 'student',
                 'no chat template')
    # The character tokenizer of a fresh model has none either.
    self.refused(make('sft', student__path='', data__max_prompt_tokens=20),
                 "prompt.template='student'", 'no chat template')

  def test_rows_that_do_not_fit(self):
    self.refused(make(data__overlong='raise'), 'data.max_prompt_tokens=48: 2 of 26',
                 "data.overlong='drop'")
    self.refused(make(eval__problems=9), 'eval.problems=9', 'at most 8')
    self.refused(make(data__limit=25), 'data.limit=25', 'at most 24', "'prompts_too_long_dropped'")

  def test_a_limit_counts_what_fits(self):
    s = open_parts(make(data__limit=12))
    assert [r['prompt'] for r in s.examples[OWN].rows] == [r['question'] for r in ROWS[:12]]
    assert s.report['train']['examples'] == 12

  def test_a_file_that_is_not_there(self):
    self.refused(make(task=dict(source='no.jsonl')), "task.options.source='no.jsonl'")

  def test_a_tokenizer_of_another_model(self, tmp_path):
    path = tiny.write_chat_model(tmp_path / 'model')
    other = tiny.chat_tokenizer()
    other.add_tokens([f'word{i}' for i in range(36)])
    other.save_pretrained(path)
    self.refused(make(student__path=str(path)), f"student.path='{path}'",
                 'the id 320, and vocab_size is 320')


def test_a_pipeline_looks_at_every_stages_prompts_first(tmp_path, monkeypatch):
  monkeypatch.setattr(train, 'train', None)
  c = experiment.default_pipeline()
  c.stages = ConfigDict(dict(
      base=make('sft', task=dict(completion_column='answer'), data__source='dataset',
                prompt__thinking='default'),
      student=make(student__path='stage:base', teacher__path='stage:base', data__limit=25)))
  c.order = ('base', 'student')
  c.report.methods, c.report.labels = ('student',), ('last',)
  with pytest.raises(ConfigError, match=r'stages\.student: data\.limit=25'):
    pipeline.run(c, tmp_path)


def test_evaluation_of_a_directory_needs_the_template_that_the_run_used(capsys):
  c = make()
  student, teacher = (str(files() / name) for name in ('student', 'teacher'))
  with pytest.raises(ConfigError, match=r"prompt\.template='teacher'.*allowed"):
    evaluate_model.evaluate_model(c, student, '')
  values = evaluate_model.evaluate_model(c, student, teacher)
  _, workdir, _ = finished()
  assert values['reverse_kl'] == tiny.rows(workdir, 'eval')[0]['reverse_kl']


def test_the_doctor_compares_the_templates(tmp_path):
  finding = templates(make())
  assert finding.status == doctor.OK and '16 prompts rendered alike' in finding.detail
  other = tiny.write_chat_model(tmp_path / 'other', template=tiny.CHAT.replace('quiet', 'begin'))
  # Both models get the teacher's: the student has to learn it. The other way round, the teacher
  # would grade in a form that it does not know.
  for template, status in (('teacher', doctor.WARN), ('student', doctor.FAIL)):
    c = make(student__path=str(other), prompt__template=template)
    finding = templates(c)
    assert (finding.status, finding.field) == (status, 'prompt.template')
    assert 'begin|>' in finding.detail and 'quiet|>' in finding.detail
  strict = "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{%- endif %}"
  other = tiny.write_chat_model(tmp_path / 'strict', template=strict + tiny.CHAT)
  c = make(student__path=str(other), prompt__system='Sums.')
  finding = templates(c)
  assert finding.status == doctor.WARN and 'no system' in finding.detail


def test_the_doctor_asks_the_teacher_too(tmp_path):
  strict = "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{%- endif %}"
  for name, how in (('student', dict(bos=True)), ('teacher', dict(template=strict + tiny.CHAT))):
    tiny.write_chat_model(tmp_path / name, **how)
  pair = dict(student__path=str(tmp_path / 'student'), teacher__path=str(tmp_path / 'teacher'))
  for fields, why in ((dict(prompt__template='student', prompt__system='Sums.'), 'no system'),
                      (dict(prompt__template='none', prompt__special_tokens=True,
                            prompt__thinking='default'), 'the teacher cannot .* adds none')):
    c = make(**pair, **fields)
    with pytest.raises(ConfigError, match=rf"templates' failed: .*{why}"):
      doctor.require(config.parse(c), [templates(c)])


def test_the_doctor_finds_a_tokenizer_that_splits_otherwise(tmp_path):
  path = tiny.write_chat_model(tmp_path / 'other')
  values = json.loads((path / 'tokenizer.json').read_text())
  values['model']['merges'] = values['model']['merges'][:3]  # the same ids for the same strings
  (path / 'tokenizer.json').write_text(json.dumps(values))
  for template in ('student', 'teacher'):
    c = make(prompt__template=template, student__path=make().teacher.path, teacher__path=str(path))
    finding = templates(c)
    assert static.check_token_ids(config.parse(c), open_parts(c)).status == doctor.OK
    assert finding.status == doctor.FAIL and finding.field == 'teacher.path'
    assert 'token ids of the same prompt' in finding.detail


def test_the_line_about_data(capsys):
  metrics.Display('run', 1, 1).data({'train': {'examples': 3, 'task': '[4 rows] read'}})
  assert capsys.readouterr().out == 'run train data: examples 3, task [4 rows] read\n'
