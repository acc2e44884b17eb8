"""What a grader is given: the text without thinking, and which grades are none."""

import math
import types

import numpy as np
import pytest
import tiny

from opd_jax.data import examples as examples_lib
from opd_jax.data import prompts as prompts_lib
from opd_jax.errors import ConfigError
from opd_jax.tasks import arithmetic, prompts
from opd_jax.types import Rollout

CHARACTERS = prompts_lib.character_tokenizer()
EOS = CHARACTERS.eos_token_id
PAD = CHARACTERS.pad_token_id


class TestWhatIsGraded:

  CHAT = tiny.chat_tokenizer()
  CHAT.add_special_tokens({'extra_special_tokens': ['[THINK]', '[/THINK]']})

  def rollout(self, *texts, ended=True):
    """Completions of these texts, each ended by a token unless told otherwise."""
    ids = [self.CHAT.encode(t, add_special_tokens=False) + [self.CHAT.eos_token_id] * ended
           for t in texts]
    tokens = np.full((len(ids), 1 + max(map(len, ids))), self.CHAT.eos_token_id, np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, some in enumerate(ids):
      tokens[row, 1:1 + len(some)], valid[row, :1 + len(some)] = some, True
    zeros = np.zeros((len(ids), tokens.shape[1] - 1), np.float32)
    return Rollout(tokens=tokens, valid=valid, mask=valid[:, 1:].astype(np.float32),
                   sampler_logprobs=zeros, policy_offset=zeros,
                   ended=np.full(len(ids), ended), prompt_length=1)

  def test_special_tokens_do_not_join_their_neighbours(self):
    texts = ['[THINK]3 + 4 = 7[/THINK]7', 'is 1<|quiet|>2', '<|begin|> is<|quiet|><|turn|> 4',
             'is 4']
    assert examples_lib.completions(self.rollout(*texts), self.CHAT) == [
        '[THINK]3 + 4 = 7[/THINK]7', 'is 1 2', ' is  4', 'is 4']
    characters = [CHARACTERS.encode(t, add_special_tokens=False) for t in ('#1', '2')]
    rollout = self.rollout('12').replace(  # '#1<pad>2<eos>'
        tokens=np.array([[EOS, *characters[0], PAD, *characters[1], EOS]], np.int32),
        valid=np.ones((1, 6), bool))
    rewards, texts = examples_lib.grade(arithmetic, [{'answer': 12}], rollout, CHARACTERS)
    assert texts == ['#1 2'] and rewards == [0]

  @pytest.mark.parametrize(('text', 'answer'), [
      ('[THINK]3 + 4 = 7[/THINK]7', '7'), ('<think>\nIt is 8.</think>\n\n7', '\n\n7'),
      ('It is 8.</think>7', '7'),  # the template may have begun it
      ('<think>a</think>b<think>c</think>7', '7'), ('<think>It is 7', ''),
      ('<think>8</think>7<think>', ''), ('7', '7'), ('2 < 3 and 4 > 3', '2 < 3 and 4 > 3'),
      ('<|begin_of_thought|>8<|end_of_thought|>7', '7'), ('', '')])
  def test_the_thinking_is_cut_off(self, text, answer):
    assert examples_lib.answer(text) == answer

  @pytest.mark.parametrize('grader', ['exact', 'last_number'])
  def test_an_answer_after_thinking(self, grader):
    rows = [{'grader': grader, 'answer': '7'}] * 4
    rollout = self.rollout('[THINK]3 + 4 = 7[/THINK]7', '<think>7</think> 8', '<think> is 7',
                           '<think>8</think> 7')
    rewards, texts = examples_lib.grade(prompts, rows, rollout, self.CHAT)
    assert list(rewards) == [1, 0, 0, 1]
    assert texts[3] == '<think>8</think> 7'  # a transcript shows it all
    rewards, _ = examples_lib.grade(prompts, rows, rollout.replace(ended=np.zeros(4, bool)),
                                    self.CHAT)
    assert list(rewards) == [0, 0, 0, 0]

  def test_what_is_measured_is_what_is_graded(self):
    seen = []
    task = types.SimpleNamespace(measures=lambda row, text: seen.append(text) or {
        'words': [float(len(text)), 0.0], row['name']: [1.0]})
    rollout = self.rollout('<think>8</think>7', 'two').replace(ended=np.array([True, False]))
    _, texts = examples_lib.grade(prompts, [{'grader': 'none'}] * 2, rollout, self.CHAT)
    got = examples_lib.measure(task, [{'name': 'a'}, {'name': 'b'}], rollout, texts, self.CHAT)
    assert seen == ['7', '']  # without thinking, and nothing of what has not ended
    assert got == {'words': 0.25, 'a': 1.0, 'b': 1.0}
    for none in (prompts, types.SimpleNamespace()):  # nothing of such rows, or at all
      rows = [{'grader': 'none'}] * 2
      assert examples_lib.measure(none, rows, rollout, texts, self.CHAT) == {}

  def grader(self, **grades):
    """A task that gives these grades, by the text."""
    return types.SimpleNamespace(
        __name__='opd_jax.tasks.judge', grade=lambda row, text: grades.get(text, row.get('known')))

  @pytest.mark.parametrize('reward', [None, math.nan, math.inf])
  def test_a_grade_that_is_none(self, reward):
    task = self.grader(fine=1.0, odd=reward)
    with pytest.raises(ConfigError, match=r"task\.name='judge': .*'odd' .*allowed"):
      examples_lib.grade(task, [{'known': 0.0}] * 2, self.rollout('fine', 'odd'), self.CHAT)
    rewards, _ = examples_lib.grade(task, [{}] * 2, self.rollout('a', 'b'), self.CHAT)
    assert np.isnan(rewards).all()  # of what nobody grades

  def test_a_split_of_which_only_some_can_be_graded(self):
    examples = types.SimpleNamespace(rows=[{'known': 0.0}, {}, {'known': 0.0}])
    with pytest.raises(ConfigError, match='example 1 .*2 of 3 .*allowed'):
      examples_lib.has_verifier(self.grader(), examples)
    examples.rows.pop(1)
    assert examples_lib.has_verifier(self.grader(), examples)
    assert not examples_lib.has_verifier(self.grader(), types.SimpleNamespace(rows=[{}]))
