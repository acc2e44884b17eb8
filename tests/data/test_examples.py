"""Prompts and given completions as batches, their order, and what is too long."""

import time
import types

import datasets
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import tiny

from opd_jax.data import examples as examples_lib
from opd_jax.data import prompts as prompts_lib
from opd_jax.parallel import hosts
from opd_jax.tasks import arithmetic, prompts

UNTIMED = settings(deadline=None, derandomize=True)  # the machine is shared; failures must repeat
CHARACTERS = prompts_lib.character_tokenizer()
EOS = CHARACTERS.eos_token_id
PAD = CHARACTERS.pad_token_id


def make(count=10, *, seed=0, room=(8, 12), completions=True, problems=None, **options):
  problems = problems or [f'{i}+{i % 7 + 1}' for i in range(count)]
  columns = {'problem': problems, 'answer': [arithmetic.solve(p) for p in problems]}
  if completions:
    columns['completion'] = [arithmetic.write_chain(p) for p in problems]
  return examples_lib.Examples(arithmetic, datasets.Dataset.from_dict(columns), CHARACTERS,
                       max_prompt_tokens=room[0], max_new_tokens=room[1], seed=seed, **options)


class TestOrder:

  @UNTIMED
  @given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 100), st.integers(0, 2**31))
  def test_a_pure_function_of_seed_and_step(self, count, step, size, seed):
    a = make(size, seed=seed).indices(step, count)
    other = make(size, seed=seed)
    for s in (step + 3, 0, step):  # asked in another order, with other steps in between
      b = other.indices(s, count)
    np.testing.assert_array_equal(a, b)
    assert a.shape == (count,) and a.min() >= 0 and a.max() < size

  @UNTIMED
  @given(st.integers(1, 13), st.integers(1, 50))
  def test_every_epoch_is_a_permutation(self, count, size):
    examples = make(size)
    steps = -(-3 * size // count)
    visited = np.concatenate([examples.indices(s, count) for s in range(steps)])
    for epoch in range(3):
      np.testing.assert_array_equal(np.sort(visited[epoch * size:(epoch + 1) * size]),
                                    np.arange(size))

  def test_epochs_and_seeds_differ(self):
    first, second = (make(50, seed=1).indices(s, 50) for s in (0, 1))
    assert (first != second).any()
    assert (make(50, seed=2).indices(0, 50) != first).any()
    # Not the same orders one epoch later under the next seed.
    assert (make(50, seed=2).indices(0, 50) != second).any()

  def test_a_batch_larger_than_the_split(self):
    counts = np.bincount(make(4).indices(0, 10), minlength=4)
    assert counts.sum() == 10 and counts.min() == 2 and counts.max() == 3


class TestPrompts:

  @UNTIMED
  @given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
  def test_padded_on_the_left(self, chosen):
    examples = make(10)
    prompts = examples.prompts(np.array(chosen))
    assert prompts.tokens.shape == prompts.valid.shape == (len(chosen), 8)
    assert prompts.tokens.dtype == np.int32 and prompts.valid.dtype == bool
    for row, valid, i in zip(prompts.tokens, prompts.valid, chosen, strict=True):
      text = arithmetic.prompt(examples.rows[i])
      assert list(valid) == [False] * (8 - len(text)) + [True] * len(text)
      assert CHARACTERS.decode(row[valid]) == text
      assert (row[~valid] == PAD).all()


class TestGiven:

  def test_masks_and_shift(self):
    examples = make(10)
    rollout = examples.given(np.array([3, 0, 3]))
    assert rollout.prompt_length == 8
    assert rollout.tokens.shape == rollout.valid.shape == (3, 20)
    assert rollout.mask.shape == rollout.sampler_logprobs.shape == (3, 19)
    for b, i in enumerate((3, 0, 3)):
      prompt = arithmetic.prompt(examples.rows[i])
      completion = examples.rows[i]['completion']
      assert CHARACTERS.decode(rollout.tokens[b][rollout.valid[b]], skip_special_tokens=True) == (
          prompt + completion)
      # [B, T-1]: entry t belongs to tokens[t + 1], so the ones stand one place before the tokens.
      chosen = np.flatnonzero(rollout.mask[b]) + 1
      assert CHARACTERS.decode(rollout.tokens[b][chosen[:-1]]) == completion
      assert rollout.tokens[b][chosen[-1]] == EOS  # EOS is learned
      np.testing.assert_array_equal(chosen, 8 + np.arange(len(completion) + 1))
      assert set(np.unique(rollout.mask[b])) == {0.0, 1.0}
      assert (rollout.tokens[b][~rollout.valid[b]] == PAD).all()
    assert rollout.ended.all()
    assert not rollout.sampler_logprobs.any() and not rollout.policy_offset.any()

  def test_knows_whether_there_are_completions(self):
    assert make().has_completions and not make(completions=False).has_completions
    with pytest.raises(ValueError, match=r"data.source='dataset'.*completions.*\['answer'"):
      make(completions=False).given(np.array([0]))

  def test_texts_come_back(self):
    examples = make(5)
    rollout = examples.given(np.arange(5))
    assert examples_lib.completions(rollout, CHARACTERS) == [r['completion'] for r in examples.rows]
    rewards, texts = examples_lib.grade(arithmetic, examples.rows, rollout, CHARACTERS)
    np.testing.assert_array_equal(rewards, np.ones(5, np.float32))
    assert rewards.dtype == np.float32 and texts == [r['completion'] for r in examples.rows]

  def test_a_stop_token_is_no_part_of_the_answer_even_if_it_is_not_special(self):
    examples = make(5)
    rollout = examples.given(np.arange(5))
    semicolon = CHARACTERS.convert_tokens_to_ids(';')
    ended = rollout.replace(tokens=np.where(rollout.tokens == EOS, semicolon, rollout.tokens))
    assert examples_lib.completions(ended, CHARACTERS) == [r['completion'] for r in examples.rows]
    cut = ended.replace(ended=np.zeros(5, bool))
    assert examples_lib.completions(cut, CHARACTERS) == [
        r['completion'] + ';' for r in examples.rows]

  def test_an_answer_cut_off_gets_nothing_even_if_it_reads_right(self):
    examples = make(5)
    rollout = examples.given(np.arange(5))
    cut = rollout.replace(ended=np.array([True, False, True, False, True]))
    rewards, texts = examples_lib.grade(arithmetic, examples.rows, cut, CHARACTERS)
    assert list(rewards) == [1, 0, 1, 0, 1]
    assert texts == [r['completion'] for r in examples.rows]

  @pytest.mark.parametrize(('place', 'own'), [(0, [0, 1]), (1, [2, 3, 4])])
  def test_of_two_processes_each_grades_its_rows(self, place, own, monkeypatch):
    monkeypatch.setattr(hosts, 'count', lambda: 2)
    monkeypatch.setattr(hosts, 'index', lambda: place)
    monkeypatch.setattr(hosts, 'exchange', lambda mine: [mine])
    examples, asked = make(5), []
    task = types.SimpleNamespace(grade=lambda row, text: asked.append(row) or 1.0)
    rewards, texts = examples_lib.grade(task, examples.rows, examples.given(np.arange(5)),
                                        CHARACTERS)
    assert asked == [examples.rows[i] for i in own] and len(rewards) == len(texts) == len(own)

  @pytest.mark.parametrize(('count', 'encoded'), [(hosts.FEW, hosts.FEW // 2), (8, 8)])
  def test_of_two_processes_each_encodes_its_part_of_many_texts(
      self, count, encoded, monkeypatch):
    monkeypatch.setattr(hosts, 'count', lambda: 2)
    monkeypatch.setattr(hosts, 'index', lambda: 1)
    monkeypatch.setattr(hosts, 'exchange', lambda mine: [mine])
    texts = [f'{i}+1=' for i in range(count)]
    assert prompts_lib.render(CHARACTERS, prompts_lib.Style(), texts) == [
        CHARACTERS.encode(text) for text in texts[count - encoded:]]

  def test_rewards_belong_to_their_rows(self):
    examples = make(5)
    rollout = examples.given(np.arange(5))
    shifted = examples.rows[1:] + examples.rows[:1]
    rewards, _ = examples_lib.grade(arithmetic, shifted, rollout, CHARACTERS)
    assert list(rewards) == [float(a['answer'] == b['answer'])
                             for a, b in zip(shifted, examples.rows, strict=True)]


class TestRoom:

  def test_a_prompt_that_is_too_long(self):
    with pytest.raises(ValueError) as e:
      make(problems=['1+1', '12+34+56', '12+34'], room=(5, 40))
    assert ("data.max_prompt_tokens=5: 2 of 3 examples do not fit, the longest with 9 tokens: "
            "'12+34+56='; allowed: at least 9, or data.overlong='drop'") == str(e.value)

  def test_a_completion_that_is_too_long(self):
    # '1+1=2#2' has seven characters, and EOS needs a place.
    make(problems=['1+1'], room=(4, 8))
    with pytest.raises(ValueError, match=r"max_new_tokens=7: 1 of 1 .* 8 .*'1\+1=2#2'"):
      make(problems=['1+1'], room=(4, 7))

  def test_empty_split(self):
    with pytest.raises(ValueError, match='no examples'):
      examples_lib.Examples(arithmetic, datasets.Dataset.from_dict({'problem': [], 'answer': []}),
                    CHARACTERS, max_prompt_tokens=4, max_new_tokens=4, seed=0)


def ids_of(examples):
  """The tokens of every prompt, without padding."""
  prompts = examples.prompts(np.arange(len(examples)))
  return [list(t[v]) for t, v in zip(prompts.tokens, prompts.valid, strict=True)]


class TestOverlong:

  LONG = ('1+1', '12+34+56', '12+34', '1+2+3+4', '2+2')  # 4, 9, 6, 8 and 4 tokens with '='

  def test_dropped(self):
    examples = make(problems=self.LONG, room=(6, 40), overlong='drop')
    assert [r['problem'] for r in examples.rows] == ['1+1', '12+34', '2+2']
    assert examples.report == {'examples': 3, 'prompts_too_long_dropped': 2,
                               'completions_too_long_dropped': 0}
    assert [CHARACTERS.decode(ids) for ids in ids_of(examples)] == ['1+1=', '12+34=', '2+2=']
    # Completions stay with their prompts.
    rollout = examples.given(np.arange(3))
    assert examples_lib.completions(rollout, CHARACTERS) == ['1+1=2#2', '12+34=46#46', '2+2=4#4']
    assert set(examples.indices(0, 3)) == {0, 1, 2}

  def test_a_completion_alone_drops_its_example(self):
    examples = make(problems=self.LONG, room=(9, 12), overlong='drop')
    assert [r['problem'] for r in examples.rows] == ['1+1', '12+34', '2+2']
    assert examples.report == {'examples': 3, 'prompts_too_long_dropped': 0,
                               'completions_too_long_dropped': 2}
    # Where nobody needs the completions they drop nothing.
    examples = make(problems=self.LONG, room=(9, 12), overlong='drop', with_completions=False)
    assert len(examples) == 5 and not examples.has_completions

  def test_all_of_them(self):
    with pytest.raises(ValueError, match=r"max_prompt_tokens=3.*data\.overlong='drop'.*\b5 .*"
                                         'allowed: .*4'):
      make(problems=self.LONG, room=(3, 40), overlong='drop')

  def test_cut(self):
    examples = make(problems=self.LONG, room=(6, 12), overlong='cut')
    assert [CHARACTERS.decode(ids) for ids in ids_of(examples)] == [
        '1+1=', '34+56=', '12+34=', '2+3+4=', '2+2=']
    assert examples.text(1) == '34+56='  # the transcript shows what the model was given
    assert examples.report == {'examples': 5, 'prompts_too_long_cut': 2,
                               'completions_too_long_cut': 2}
    rollout = examples.given(np.array([1, 2]))
    assert list(rollout.ended) == [False, True]
    # The beginning of the text, and no end that was never there.
    whole = CHARACTERS.encode('12+34=46;46+56=102#102', add_special_tokens=False)
    np.testing.assert_array_equal(rollout.completion_targets[0], whole[:12])
    assert rollout.mask[0].sum() == 12 and rollout.completion_targets[1, 11] == EOS

  def test_what_fits_is_left_alone(self):
    for overlong in examples_lib.OVERLONG:
      examples = make(problems=self.LONG, room=(9, 40), overlong=overlong)
      assert ids_of(examples) == prompts_lib.encode(CHARACTERS, [p + '=' for p in self.LONG])
      assert set(examples.report.values()) <= {0, 5}

  def test_the_first_of_those_that_fit(self):
    examples = make(problems=self.LONG, room=(6, 40), overlong='drop')
    first = examples.first(2)
    assert [r['problem'] for r in first.rows] == ['1+1', '12+34'] and len(examples) == 3
    assert first.report['examples'] == 2 and ids_of(first) == ids_of(examples)[:2]
    assert sorted(first.indices(0, 2)) == [0, 1]
    assert examples_lib.completions(first.given(np.array([1])), CHARACTERS) == ['12+34=46#46']


class TestStyle:

  CHAT = tiny.chat_tokenizer()

  def chat(self, rows, room=(60, 20), **fields):
    ends = tuple(self.CHAT.convert_tokens_to_ids(['<|end|>', '<|over|>']))
    style = prompts_lib.Style(template='student', chat=self.CHAT, stop_tokens=ends, **fields)
    table = datasets.Dataset.from_list([{'grader': 'none', **row} for row in rows])
    return examples_lib.Examples(prompts, table, self.CHAT, max_prompt_tokens=room[0],
                         max_new_tokens=room[1], seed=0, style=style)

  def test_what_a_model_is_given(self):
    examples = self.chat([{'prompt': 'What is one?'}, {'prompt': 'And two?'}], system='Be brief.')
    assert [self.CHAT.decode(ids) for ids in ids_of(examples)] == [
        f'<|turn|>system\nBe brief.<|over|>\n<|turn|>user\n{q}<|over|>\n<|turn|>assistant\n'
        for q in ('What is one?', 'And two?')] == [examples.text(i) for i in (0, 1)]

  def test_a_given_completion_ends_as_the_template_ends_a_turn(self):
    examples = self.chat([{'prompt': [{'role': 'user', 'content': 'one?'}], 'completion': 'two'}])
    rollout = examples.given(np.array([0]))
    ids = rollout.tokens[0][np.flatnonzero(rollout.mask[0]) + 1]
    assert self.CHAT.decode(ids) == 'two<|over|>'
    # Prompt and completion together are the whole conversation, as the template writes it.
    turns = [{'role': 'user', 'content': 'one?'}, {'role': 'assistant', 'content': 'two'}]
    whole = self.CHAT.apply_chat_template(turns, tokenize=False)
    assert self.CHAT.decode(rollout.tokens[0][rollout.valid[0]]) + '\n' == whole

  def test_control_tokens_are_counted(self):
    rows = [{'prompt': 'a<|over|>b', 'completion': '<|turn|>c'}, {'prompt': 'd', 'completion': 'e'}]
    for choice in ('text', 'tokens'):
      report = self.chat(rows, control_tokens=choice).report
      assert report == {'examples': 2, f'control_tokens_as_{choice}': 2}
    assert self.chat(rows[1:]).report == {'examples': 1}
    with pytest.raises(ValueError, match=r"prompt\.control_tokens='refuse'.*1 of 2"):
      self.chat(rows)

  def test_an_example_that_is_too_long_counts_with_its_template(self):
    with pytest.raises(ValueError, match=r"prompt_tokens=20: 1 of 1 .*'<\|turn\|>user\\nWhat is"):
      self.chat([{'prompt': 'What is ' * 10}], room=(20, 5))

  def test_a_text_of_many_megabytes(self):
    long = {'prompt': 'What is one? ' * 2**20}
    start = time.monotonic()
    for rows, why in (([{'prompt': 'one?'}, long], '1 of 2 .* example 1 .*13631488; allowed'),
                      ([{'prompt': 'one?', 'completion': long['prompt']}], '1 of 1 .* example 0')):
      with pytest.raises(ValueError, match=why):
        self.chat(rows)
    # To have them dropped costs nothing either.
    table = datasets.Dataset.from_list([{'prompt': 'one?', 'grader': 'none'},
                                        {**long, 'grader': 'none'}])
    examples = examples_lib.Examples(prompts, table, self.CHAT, max_prompt_tokens=20,
                                     max_new_tokens=4, seed=0, overlong='drop')
    assert len(examples) == examples.report['examples'] == 1
    assert examples.report['longer_than_4000000_characters_dropped'] == 1
    assert time.monotonic() - start < 10

  def test_a_prompt_without_tokens(self):
    table = datasets.Dataset.from_list([{'prompt': p, 'grader': 'none'} for p in ('1', '', '')])
    with pytest.raises(ValueError, match="2 of 3 .*'' .*example 1"):
      examples_lib.Examples(prompts, table, CHARACTERS, max_prompt_tokens=4, max_new_tokens=4,
                            seed=0)

  def test_examples_that_nobody_grades(self):
    examples = self.chat([{'prompt': 'one?', 'completion': 'two'}] * 2)
    assert not examples_lib.has_verifier(prompts, examples)
    assert examples_lib.has_verifier(arithmetic, make())
    rewards, _ = examples_lib.grade(prompts, examples.rows, examples.given(np.arange(2)), self.CHAT)
    assert np.isnan(rewards).all() and rewards.shape == (2,)
