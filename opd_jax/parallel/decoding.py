"""Lays weights out for decoding, as a step of its own, and measures it."""

from __future__ import annotations

from collections.abc import Callable
import time

import jax

from opd_jax.types import Params


class DecodeLayout:
  """Lays the parameters of a model out for decoding, before it writes.

  Attributes:
    program: the compiled `Model.for_decoding`; None on one device, where the sampler does it.
    received_bytes: by each device, for a call.
    seconds: of the last call, where it was waited for; else None.
  """

  def __init__(self, program: Callable[[Params], Params] | None, received_bytes: int, wait: bool):
    """Takes what is called, what it moves, and whether it is waited for."""
    self.program, self._wait = program, wait
    self.received_bytes, self.seconds = received_bytes, None

  def __call__(self, params: Params) -> Params:
    """Returns the parameters as decoding reads them."""
    if self.program is None:
      return params
    began = time.perf_counter()
    out = self.program(params)
    if self._wait:
      out = jax.block_until_ready(out)
      self.seconds = time.perf_counter() - began
    return out

  def compile_count(self) -> int:
    """Counts the programs that this has compiled."""
    return 0 if self.program is None else self.program._cache_size()

  def report(self) -> dict[str, float]:
    """Says what the last call cost, for the metrics; nothing where there is nothing to lay out."""
    if self.program is None:
      return {}
    seconds = {} if self.seconds is None else {'decode_layout_s': self.seconds}
    return {'decode_layout_bytes': self.received_bytes, **seconds}
