"""Rollouts in slots: many rows written through fewer places of one batch of static shape
(continuous batching; Yu et al. 2022, Orca, OSDI).

Where answers differ in length, a batch that is decoded to its end spends most of its steps on rows
that have ended. Here a row that ends gives its slot to the next of a queue. The cache is a ring of
positions: all slots write at one place, a fresh prompt is laid so that it ends there, and what a
slot may read is what its own row wrote. Once the queue is empty and few rows live, they move into
half and then a quarter of the slots.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models import layout
from opd_jax.types import Prompts

PARTS = 8  # a prefill is of this part of the slots: so many have to be free before it is worth it
NARROWER = (2, 4)  # parts of the slots into which the last rows move
LONG = 512  # tokens of room from which on the cache begins small: each length compiles a loop
_own = functools.partial(layout.on_own_rows, rules=layout.DECODE)


def group_size(slots: int) -> int:
  """Says how many rows of a device's `slots` are refilled at a time."""
  return max(1, slots // PARTS)


def lengths(room: int, last: int = 0) -> list[int]:
  """Lists for how many tokens of a completion the cache has places, one after another: each step
  reads them all. Of these the `last` so many, 0 for all."""
  return ([room // 4, room // 2, room] if room >= LONG else [room])[-last:]


def widths(slots: int, rows: int) -> list[int]:
  """Lists in how many slots a device decodes, one after another. With a slot for every row nothing
  moves, so that all is as without slots."""
  return [slots] + [slots // n for n in NARROWER if slots < rows and slots >= n]


@dataclasses.dataclass(frozen=True)
class Writer:
  """Writes a completion for each prompt, through some slots at a time. Each device has a queue of
  its own rows: none moves to another.

  Its state: 'slots', of each the row that it has (`at`, in the queue of its device), the `size` of
  the prompt, the `step` and last `token` of the completion, and whether it is `live`; 'caches';
  'out', what was written, [B, C]; 'next' of each queue, [shards]; 'spent', steps times slots.

  Attributes:
    prompts: tokens [B, P], left-padded.
    uniforms: [B, C, 2], what each token is drawn with.
    slots: M, static; B, if there are no more rows.
    room, lengths: C, for a completion, and for how many tokens of it there are places, in turn.
    pad_token: what fills a row after its end.
    prefill: (tokens [n,P], valid, length) -> logits of the next token, caches of `length` places.
    decode: (tokens [n,1], positions, valid, caches) -> logits, caches with them.
    choose: (logits, uniforms [n, 2]) -> tokens, log-probs, offsets [n].
    refill: (caches, new caches, source [n]) -> the caches, in which slot i has the prompt at
      source[i] of the new ones, ending before the present place; what it has, where that is -1.
    grow: (caches, length) -> the caches with so many places; not called for a single length.
    is_stop: (tokens) -> bool.
  """

  prompts: Prompts
  uniforms: jax.Array
  slots: int
  room: int
  lengths: list[int]
  pad_token: int
  prefill: Callable[..., Any]
  decode: Callable[..., Any]
  choose: Callable[..., Any]
  refill: Callable[..., Any]
  grow: Callable[..., Any]
  is_stop: Callable[[jax.Array], jax.Array]

  @property
  def shards(self) -> int:
    """Into how many parts the devices split the rows."""
    return layout.row_parts(len(self.uniforms), layout.DECODE)

  @property
  def rows(self) -> int:
    """Of the queue of a device."""
    return len(self.uniforms) // self.shards

  @property
  def width(self) -> int:
    """Slots of a device."""
    return self.slots // self.shards

  def write(self) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Writes all of them.

    Returns:
      {'tokens', 'logprobs', 'offset', 'alive': [B, C]}; whether rows ended by a stop token [B]; and
      how many slots were decoded, steps times slots, int32.
    """
    prompt_length, sizes = self.prompts.tokens.shape[1], [*widths(self.width, self.rows), 0]
    state = self._begin(prompt_length + self.lengths[0])
    for room in self.lengths:
      if room != self.lengths[0]:
        state = {**state, 'caches': self.grow(state['caches'], prompt_length + room)}
      state = self._through_queue(
          functools.partial(self._busy, enough=sizes[1], room=room), state)
    for here, enough in zip(sizes[1:-1], sizes[2:], strict=True):
      state = jax.lax.while_loop(functools.partial(self._busy, enough=enough, room=self.room),
                                 self._step, self._narrow(state, here))
    stops = self.is_stop(state['out']['tokens'])  # padding may be one
    alive = jnp.cumsum(stops, axis=1) - stops == 0
    return {**state['out'], 'alive': alive}, jnp.any(stops, axis=1), state['spent']

  def _through_queue(self, going, state):
    if self.width == self.rows:
      return jax.lax.while_loop(going, self._step, state)

    def fill_and_go(state):
      state = jax.lax.while_loop(self._wants_rows, self._renew, state)
      return jax.lax.while_loop(lambda s: going(s) & ~self._wants_rows(s), self._step, state)

    return jax.lax.while_loop(going, fill_and_go, state)

  def _draw(self, logits, at, step):
    return self.choose(logits, _own(
        lambda u, at, step: u[jnp.minimum(at, self.rows - 1), step], self.uniforms, at, step))

  def _start(self, tokens, valid, at, places):
    """Prefills rows and draws their first tokens."""
    logits, caches = self.prefill(tokens, valid, places)
    token, logprob, offset = self._draw(logits, at, 0 * at)
    live = (at < self.rows) & ~self.is_stop(token) & (self.room > 1)
    fresh = dict(at=at, size=jnp.sum(valid.astype(jnp.int32), axis=-1),
                 step=jnp.ones_like(at), token=token, live=live)
    return fresh, dict(tokens=token, logprobs=logprob, offset=offset), caches

  def _begin(self, places):
    taken = _own(lambda t: jax.tree.map(lambda x: x[:self.width], t),
                 (self.prompts.tokens, self.prompts.valid))
    at = layout.rows(jnp.tile(jnp.arange(self.width), self.shards), layout.DECODE)
    fresh, chosen, caches = self._start(*taken, at, places)
    blank = {name: jnp.full((len(self.uniforms), self.room), self.pad_token * (name == 'tokens'),
                            x.dtype) for name, x in chosen.items()}
    return dict(slots=fresh, caches=caches, next=jnp.full(self.shards, self.width),
                out=_put(layout.rows(blank, layout.DECODE), at, 0 * at, chosen),
                spent=jnp.int32(0))

  def _per_device(self, state):
    """How many rows live and how many wait on each device, [shards] both."""
    live = jnp.sum(state['slots']['live'].reshape(self.shards, -1), axis=1)
    return live, self.rows - state['next']

  def _wants_rows(self, state):
    live, waiting = self._per_device(state)
    group = jnp.minimum(group_size(self.width), waiting)
    return jnp.any((waiting > 0) & (self.width - live >= group))

  def _busy(self, state, enough, room):
    """Whether to go on: more live than are enough, and all have a place for their last token."""
    live, waiting = self._per_device(state)
    longest = jnp.max(state['slots']['step'], where=state['slots']['live'], initial=0)
    return (jnp.any(waiting > 0) | jnp.any(live > enough)) & (longest <= room)

  def _renew(self, state):
    """Gives free slots to rows that wait."""
    rows, width, group = self.rows, self.width, group_size(self.width)

    def take(live, next_row, tokens, valid):
      free = jnp.argsort(live, stable=True)[:group]  # False before True
      fresh = next_row + jnp.arange(group)
      can = ~live[free] & (fresh < rows)
      source = jnp.full(width, -1).at[jnp.where(can, free, width)].set(
          jnp.arange(group), mode='drop')
      chosen = jax.tree.map(lambda x: x[jnp.minimum(fresh, rows - 1)], (tokens, valid))
      return source, next_row + jnp.sum(can), *chosen, jnp.where(can, fresh, rows)

    def merge(old, fresh, source):
      return jax.tree.map(lambda x, y: jnp.where(source >= 0, y[jnp.maximum(source, 0)], x),
                          old, fresh)

    source, next_row, tokens, valid, at = _own(
        take, state['slots']['live'], state['next'], self.prompts.tokens, self.prompts.valid)
    fresh, chosen, new = self._start(tokens, valid, at, tokens.shape[1])
    return dict(slots=_own(merge, state['slots'], fresh, source),
                caches=self.refill(state['caches'], new, source),
                out=_put(state['out'], at, 0 * at, chosen), next=next_row, spent=state['spent'])

  def _step(self, state):
    """Decodes a token of every slot."""
    s, live = state['slots'], state['slots']['live']
    logits, caches = self.decode(s['token'][:, None], (s['size'] + s['step'] - 1)[:, None],
                                 live[:, None], state['caches'])
    token, logprob, offset = self._draw(logits, s['at'], s['step'])
    out = _put(state['out'], jnp.where(live, s['at'], self.rows), s['step'],
               dict(tokens=token, logprobs=logprob, offset=offset))
    step = s['step'] + live
    live = live & ~self.is_stop(token) & (step < self.room)
    return {**state, 'slots': {**s, 'step': step, 'token': token, 'live': live}, 'caches': caches,
            'out': out, 'spent': state['spent'] + len(step)}

  def _narrow(self, state, width):
    """Moves the rows that live into `width` slots of a device."""
    order = _own(lambda live: jnp.argsort(~live, stable=True)[:width], state['slots']['live'])
    moved = {name: state[name] for name in ('slots', 'caches')}
    picked = _own(lambda t, order: jax.tree.map(lambda x: x[order], t),
                  jax.tree.map(lambda x: x if x.ndim else None, moved), order)
    return state | jax.tree.map(lambda x, new: x if new is None else new, moved, picked)


def _put(out, at, steps, chosen):
  """Writes what was chosen in slots; a slot without a row is at one that is not there."""
  def own(out, at, steps, chosen):
    return {name: x.at[at, steps].set(chosen[name], mode='drop') for name, x in out.items()}
  return _own(own, out, at, steps, chosen)


def useful_share(parts: list[np.ndarray], slots: int, shards: int = 1) -> float:
  """Computes which part of the steps times slots wrote a token of a row, of rows that are written
  in parts, one after another; the other arguments are those of `slot_steps`, and no slots are a
  slot for every row."""
  spent = sum(slot_steps(lengths, slots if 0 < slots < len(lengths) else len(lengths), shards)
              for lengths in parts)
  return float(sum(np.sum(lengths - 1) for lengths in parts) / spent) if spent else 1.0


def slot_steps(lengths: np.ndarray, slots: int, shards: int = 1) -> int:
  """Counts the steps times slots that `Writer` takes for rows of given lengths: what a metric and a
  plan say without running it.

  Args:
    lengths: [B], of the completions, stop token included.
    slots: M, of all devices.
    shards: into how many parts the devices split the rows.
  """
  queues = lengths.reshape(shards, -1)
  rows, width = queues.shape[1], slots // shards
  left = queues[:, :width] - 1  # the first token is the prefill's
  following, spent, sizes = np.full(shards, width), 0, widths(width, queues.shape[1])
  group = group_size(width)
  for here, enough in zip(sizes, [*sizes[1:], 0], strict=True):
    left = -np.sort(-left, axis=1)[:, :here]
    while True:
      waiting = rows - following
      while np.any((waiting > 0) & (np.sum(left <= 0, axis=1) >= np.minimum(group, waiting))):
        for d in range(shards):
          free = np.flatnonzero(left[d] <= 0)[:group][:waiting[d]]
          left[d, free] = queues[d, following[d]:following[d] + len(free)] - 1
          following[d] += len(free)
        waiting = rows - following
      if not (np.any(waiting > 0) or np.any(np.sum(left > 0, axis=1) > enough)):
        break
      left, spent = left - 1, spent + shards * here
  return spent
