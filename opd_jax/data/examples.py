"""Prompts in a deterministic order, as left-padded batches.

What step s trains on is a function of (seed, s) alone: epoch e visits the examples in the order of
permutation (seed, e). The data position in a checkpoint is therefore the step, and every host
derives the same batch.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import numpy as np

from opd_jax.data import control
from opd_jax.data import prompts as prompts_lib
from opd_jax.errors import ConfigError
from opd_jax.parallel import hosts
from opd_jax.types import Prompts, Rollout

SHOWN = prompts_lib.SHOWN
LONGEST = 4 * 10**6  # characters of an example: about a million tokens
OPENING = 16  # tokens at the end of a prompt in which thinking may begin
PLAIN = prompts_lib.Style()
OVERLONG = ('raise', 'drop', 'cut')


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(size)


class Examples:
  """The examples of a split, encoded: prompts, and completions where the split has them.

  Attributes:
    rows: the examples that are left, as the task made them.
    asked: what the task asks in each, a text or messages.
    tokenizer: the student's.
    report: for the log: how many examples there are, and how many did not fit.
  """

  def __init__(self, task: Any, dataset: Any, tokenizer: Any, *, max_prompt_tokens: int,
               max_new_tokens: int, seed: int, style: prompts_lib.Style = PLAIN,
               overlong: str = 'raise', with_completions: bool = True):
    """Encodes everything, so that bad examples are found before training starts.

    Args:
      task: see `tasks`; gives the prompt of a row.
      dataset: its rows; a column 'completion' is encoded too, `with_completions`.
      tokenizer: of the student.
      max_prompt_tokens: room for a prompt.
      max_new_tokens: room for a completion and the tokens that end it.
      seed: of the order.
      style: how prompts become tokens.
      overlong: what happens to an example that does not fit: 'raise'; 'drop'; or 'cut', which keeps
        the end of a prompt and the beginning of a completion (which then does not end).
      with_completions: False leaves completions alone: nobody needs them.

    Raises:
      ValueError: an empty split, a prompt without tokens, or (overlong='raise') a prompt or
        completion longer than the room for it.
    """
    if not len(dataset):
      raise ValueError(f'task.name={task.__name__.rpartition(".")[2]!r}: a split has no examples'
                       f' ({dataset.info.description or "the task says no more"}); allowed: at '
                       'least one')
    self.rows = dataset.to_list()
    self._seed, self.tokenizer = seed, tokenizer
    self._prompt_room, self._completion_room = max_prompt_tokens, max_new_tokens
    self.report: dict[str, Any] = {'examples': len(self.rows)}
    if dataset.info.description:
      self.report['task'] = dataset.info.description
    taught = with_completions and 'completion' in dataset.column_names
    prompts = self._readable([task.prompt(r) for r in self.rows], taught, overlong)
    self.asked, self._completions = prompts, None
    if taught:
      answers = [r['completion'] for r in self.rows]
      self._prompts, self._completions = prompts_lib.render_answers(
          tokenizer, style, prompts, answers)
    else:
      answers, self._prompts = [], prompts_lib.render(tokenizer, style, prompts)
    written = prompts_lib.count_control_tokens(tokenizer, style, prompts + answers)
    if written:
      self.report[f'control_tokens_as_{style.control_tokens}'] = written
    empty = [i for i, ids in enumerate(self._prompts) if not ids]
    if empty:
      raise ValueError(f'task.name={_name(task)!r}: {len(empty)} of {len(prompts)} prompts encode '
                       f'to no tokens, the first is {prompts[empty[0]]!r} of example {empty[0]}; '
                       'allowed: at least one token')
    self._ended = np.ones(len(self.rows), bool)
    self._fit('data.max_prompt_tokens', overlong)
    if self._completions is not None:
      self._fit('data.max_new_tokens', overlong)
    # Lists of Python integers would take nine times the memory.
    self._prompts, self._completions = (
        encoded and [np.array(ids, np.int32) for ids in encoded]
        for encoded in (self._prompts, self._completions))

  def _readable(self, prompts, taught, overlong):
    """Drops or refuses rows with so much text that a tokenizer would need minutes for it."""
    sizes = [sum(map(len, control.texts(p) + [r['completion'] if taught else '']))
             for p, r in zip(prompts, self.rows, strict=True)]
    long = [i for i, size in enumerate(sizes) if size > LONGEST]
    if long and overlong != 'drop':
      raise ValueError(f'data.overlong={overlong!r}: {len(long)} of {len(sizes)} examples have '
                       f'more than {LONGEST} characters of text, the first is example {long[0]} '
                       f"with {sizes[long[0]]}; allowed: shorter ones, or data.overlong='drop'")
    if long:
      self.report[f'longer_than_{LONGEST}_characters_dropped'] = len(long)
      kept = [i for i, size in enumerate(sizes) if size <= LONGEST]
      self.rows, prompts = [self.rows[i] for i in kept], [prompts[i] for i in kept]
      self.report['examples'] = len(self.rows)
    if not prompts:
      raise ValueError(f'all examples have more than {LONGEST} characters of text; allowed: at '
                       'least one that is shorter')
    return prompts

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def has_completions(self) -> bool:
    """Whether the split comes with completions, so that `given` works."""
    return self._completions is not None

  @property
  def lengths(self) -> np.ndarray:
    """Tokens of each prompt and the completion behind it, int [examples]."""
    return np.array([len(p) + len(c) for p, c in zip(
        self._prompts, self._completions or [()] * len(self), strict=True)])

  def text(self, index: int) -> str:
    """Renders what a model is given of one example, special tokens included."""
    return self.tokenizer.decode(self._prompts[index])

  def first(self, count: int) -> Examples:
    """Takes the first `count` examples."""
    out = copy.copy(self)
    out.report = {**self.report, 'examples': count}
    out._keep(range(count))
    return out

  def answered(self, samples: int, completions: list[np.ndarray], ended: list[bool]) -> Examples:
    """Gives every example other completions, `samples` each.

    Args:
      samples: of an example; its own follow one another.
      completions: their tokens, int32 each.
      ended: whether each ended before its room did.

    Raises:
      ValueError: a completion without tokens, or longer than its room.
    """
    sizes = [len(ids) for ids in completions]
    if not 1 <= min(sizes) <= max(sizes) <= self._completion_room:
      raise ValueError(f'a completion has {min(sizes)} tokens, another {max(sizes)}; allowed: 1 to '
                       f'{self._completion_room}')
    out = copy.copy(self)
    out._keep(np.arange(len(self)).repeat(samples))
    out._completions, out._ended = completions, np.array(ended)
    return out

  def _keep(self, chosen):
    self.rows = [self.rows[i] for i in chosen]
    self.asked = [self.asked[i] for i in chosen]
    self._prompts = [self._prompts[i] for i in chosen]
    self._ended = self._ended[list(chosen)]
    if self._completions is not None:
      self._completions = [self._completions[i] for i in chosen]

  def _fit(self, field, overlong):
    """Does to what is longer than its room what `overlong` says, and puts the count in `report`."""
    prompts = field == 'data.max_prompt_tokens'
    room = self._prompt_room if prompts else self._completion_room
    sizes = [len(ids) for ids in (self._prompts if prompts else self._completions)]
    long = [i for i, size in enumerate(sizes) if size > room]
    if long and overlong == 'raise':
      worst = max(long, key=sizes.__getitem__)
      text = self.text(worst) if prompts else self.rows[worst]['completion']
      raise ValueError(
          f'{field}={room}: {len(long)} of {len(sizes)} examples do not fit, the longest with '
          f'{sizes[worst]} tokens: {text[:SHOWN]!r}; allowed: at least {sizes[worst]}, or '
          "data.overlong='drop'")
    if overlong != 'raise':
      done = {'drop': 'dropped', 'cut': 'cut'}[overlong]
      self.report[f'{"prompts" if prompts else "completions"}_too_long_{done}'] = len(long)
    if long and overlong == 'drop':
      if len(long) == len(sizes):
        raise ValueError(f"{field}={room} with data.overlong='drop': none of {len(sizes)} examples "
                         f'fits; allowed: at least {min(sizes)}')
      self._keep([i for i, size in enumerate(sizes) if size <= room])
      self.report['examples'] = len(self.rows)
    elif long and prompts:
      self._prompts = [ids[-room:] for ids in self._prompts]
    elif long:  # without what ends it: an end in the middle of a text is not to be learned
      self._completions = [ids[:room] for ids in self._completions]
      self._ended[long] = False

  def indices(self, step: int, count: int) -> np.ndarray:
    """Picks the examples of a step that takes `count` of them, int [count]."""
    places = np.arange(step * count, (step + 1) * count)
    return np.array([_order(self._seed, int(p // len(self)), len(self))[p % len(self)]
                     for p in places])

  def prompts(self, indices: np.ndarray) -> Prompts:
    """Makes left-padded prompts, NumPy arrays [B, P]."""
    tokens = np.full((len(indices), self._prompt_room), prompts_lib.pad_id(self.tokenizer),
                     np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, i in enumerate(indices):
      ids = self._prompts[i]
      tokens[row, self._prompt_room - len(ids):] = ids
      valid[row, self._prompt_room - len(ids):] = True
    return Prompts(tokens=tokens, valid=valid)

  def given(self, indices: np.ndarray) -> Rollout:
    """Puts the split's own completions into the form of a rollout, NumPy arrays.

    Nobody sampled them, so the sampler's log-probs are zero: only an objective with
    importance='none' may be used.
    """
    if self._completions is None:
      raise ValueError("data.source='dataset' needs a split with completions; this one has columns "
                       f'{sorted(self.rows[0])}')
    prompts = self.prompts(indices)
    room = (len(indices), self._completion_room)
    tokens = np.full(room, prompts_lib.pad_id(self.tokenizer), np.int32)
    alive = np.zeros(room, bool)
    for row, i in enumerate(indices):
      ids = self._completions[i]
      tokens[row, :len(ids)] = ids
      alive[row, :len(ids)] = True
    mask = np.pad(alive.astype(np.float32), ((0, 0), (self._prompt_room - 1, 0)))
    return Rollout(tokens=np.concatenate([prompts.tokens, tokens], 1),
                   valid=np.concatenate([prompts.valid, alive], 1), mask=mask,
                   sampler_logprobs=np.zeros_like(mask), policy_offset=np.zeros_like(mask),
                   ended=self._ended[np.asarray(indices)], prompt_length=self._prompt_room)


def completions(rollout: Rollout, tokenizer: Any) -> list[str]:
  """Decodes the text of each row's completion, without what ended it (which a tokenizer need not
  call special) and without special tokens but those around thinking. Where one stood between two
  texts there is a space: the 7 before [/THINK] and the 8 behind it are no 78."""
  tokens, alive, ended = hosts.fetch((rollout.tokens, rollout.valid, rollout.ended))
  written = [t[a][:-1] if end else t[a] for t, a, end in zip(
      tokens[:, rollout.prompt_length:], alive[:, rollout.prompt_length:], ended, strict=True)]
  special = set(tokenizer.all_special_ids) | {
      i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
  texts = tokenizer.batch_decode(written, skip_special_tokens=True)
  return [_decode(ids, tokenizer, special) if not special.isdisjoint(ids.tolist()) else text
          for ids, text in zip(written, texts, strict=True)]


def _decode(ids, tokenizer, special):
  markers = {mark for pair in control.THOUGHTS for mark in pair}
  texts, run = [''], []
  for token in [*ids.tolist(), None]:
    if token is not None and token not in special:
      run.append(token)
      continue
    texts[-1] += tokenizer.decode(run) if run else ''
    run, mark = [], None if token is None else tokenizer.convert_ids_to_tokens(token)
    if mark in markers:
      texts[-1] += mark
    else:
      texts.append('')
  return ' '.join(filter(None, texts))


def answer(text: str) -> str:
  """Cuts off the thinking: what is graded is what follows it; nothing if it has not ended."""
  for begin, end in control.THOUGHTS:
    text = text.rpartition(end)[2]
    if begin in text:
      return ''
  return text


def _opened(rollout, tokenizer):
  """The mark with which each prompt opens the thinking, as some templates do; '' where it does not.
  """
  begins = tuple(begin for begin, _ in control.THOUGHTS)
  room = rollout.prompt_length
  ends = tokenizer.batch_decode([t[:room][v[:room]][-OPENING:] for t, v in zip(
      rollout.tokens, rollout.valid, strict=True)])
  return [next((b for b in begins if end.rstrip().endswith(b)), '') for end in ends]


def has_verifier(task: Any, examples: Examples) -> bool:
  """Tells whether these examples can be graded.

  Raises:
    ConfigError: some can and others cannot: no mean of their rewards would mean anything.
  """
  graded = [task.grade(row, '') is not None for row in examples.rows]
  if any(graded) and not all(graded):
    i = graded.index(False)
    raise ConfigError(f'task.name={_name(task)!r}: example {i} cannot be graded, and '
                      f'{sum(graded)} of {len(graded)} others can: {str(examples.rows[i])[:SHOWN]};'
                      ' allowed: all of a split or none')
  return graded[0]


def _name(task):
  return task.__name__.rpartition('.')[2]


def grade(task: Any, rows: list[dict[str, Any]], rollout: Rollout, tokenizer: Any
          ) -> tuple[np.ndarray, list[str]]:
  """Asks the verifier for rewards, float32 [B]; returns the texts too. A completion that ran out of
  room before its stop token has not answered and gets 0; an example that nobody can grade gets NaN.
  Several processes take a part of the rows each.

  Raises:
    ConfigError: the verifier gives no number for an answer to an example that it can grade.
  """
  tokens, valid, ended = hosts.fetch((rollout.tokens, rollout.valid, rollout.ended))

  def part(places):
    here = slice(places[0], places[-1] + 1)
    return [_grade(task, rows[here], rollout.replace(
        tokens=tokens[here], valid=valid[here], ended=ended[here]), tokenizer)]

  parts = hosts.divide(range(len(rows)), part)
  return np.concatenate([r for r, _ in parts]), [text for _, texts in parts for text in texts]


def _answers(texts, rollout, tokenizer):
  """What of each completion is graded; nothing of one that has not ended."""
  return [answer(begun + text) if end else '' for begun, text, end in zip(
      _opened(rollout, tokenizer), texts, rollout.ended, strict=True)]


def measure(task: Any, rows: list[dict[str, Any]], rollout: Rollout, texts: list[str],
            tokenizer: Any) -> dict[str, float]:
  """Asks a task that has `measures` for them, of what `grade` returned as `texts`; means over all
  values of all answers."""
  found: dict[str, list[float]] = {}
  if not hasattr(task, 'measures'):
    return {}
  rollout = hosts.fetch(rollout)
  for row, text in zip(rows, _answers(texts, rollout, tokenizer), strict=True):
    for name, values in task.measures(row, text).items():
      found.setdefault(name, []).extend(values)
  return {name: float(np.mean(values)) for name, values in found.items()}


def _grade(task, rows, rollout, tokenizer):
  texts, ended = completions(rollout, tokenizer), rollout.ended
  answers = _answers(texts, rollout, tokenizer)
  if hasattr(task, 'grade_all'):
    rewards = task.grade_all(rows, answers)
  else:
    rewards = [task.grade(row, text) for row, text in zip(rows, answers, strict=True)]
  for row, text, reward in zip(rows, answers, rewards, strict=True):
    number = isinstance(reward, int | float | np.number) and math.isfinite(reward)
    if not number and (reward is not None or task.grade(row, '') is not None):
      raise ConfigError(f'task.name={_name(task)!r}: its grade of {text[:SHOWN]!r} is {reward!r}; '
                        'allowed: a finite number, or None for every answer to an example')
  rewards = [reward if reward is None or end else 0.0
             for reward, end in zip(rewards, ended, strict=True)]
  return np.array(rewards, np.float32), texts  # None becomes NaN
