"""Floating-point operations, counted from tokens: 2 a parameter and token, and the attention.

Padding and rows that have ended are not counted: these are the operations that the method needs,
which is what the paper compares, not those that a batch layout happens to spend.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from opd_jax.algorithm.objective import wants
from opd_jax.data.streams import Stream
from opd_jax.models.params import abstract_params, count_params
from opd_jax.types import Model


def forward_flops(model: Model, lengths: np.ndarray) -> float:
  """Counts the operations of one forward pass (or one decode) over rows of these lengths.

  2 N n for the matrices (N of them per token, head included, embedding look-up not, of experts
  those that are used), plus 4 heads head_dim in every layer for each of the n (n + 1) / 2 query-key
  pairs (scores and average), or for those that a sliding window allows.
  """
  n = np.asarray(lengths, np.float64)
  c = model.config
  pairs = 0.0
  for window in model.attention_windows or (None,) * c.num_hidden_layers:
    growing = n if window is None else np.minimum(n, window)  # then each query sees `window` keys
    pairs += (growing * (growing + 1) / 2 + (n - growing) * growing).sum()
  attention = 4.0 * c.num_attention_heads * c.head_dim * pairs
  return 2.0 * count_params(model.specs, matmul_only=True) * n.sum() + attention


def head_flops(model: Model, lengths: np.ndarray) -> float:
  """Counts the operations of one product of hidden states with the vocabulary."""
  matrix = jax.eval_shape(model.head, abstract_params(model.specs)).matrix
  return 0.0 if matrix is None else 2.0 * matrix.size * float(np.sum(lengths))


def stream_flops(stream: Stream, lengths: np.ndarray, *, student: Model, teacher: Model | None,
                 reference: Model | None, adapter_specs: dict[str, Any] | None, updates: int
                 ) -> dict[str, float]:
  """Counts the operations of a step on the rows of a stream, by who spends them.

  Args:
    stream: who wrote the rows, and what they are for.
    lengths: prompt plus completion tokens of each row.
    student, teacher, reference: the models; None where there is none.
    adapter_specs: of the adapters that are trained instead of the student.
    updates: gradient steps on the rows.

  Returns:
    'student' (training and rescoring), 'sampling' (of what is written in the step), 'teacher'
    (grading, by the reference too). A gradient step is a forward pass, the gradient of the
    activations, which costs as much, and that of the trained weights, which costs as much as their
    share of the forward pass: 3 forwards for a whole model, 2 and three times the adapters for
    adapters.
  """
  o = stream.objective
  own = forward_flops(student, lengths)
  update = 3.0 * own
  if adapter_specs is not None:
    extra = 2.0 * count_params(adapter_specs, matmul_only=True) * float(np.sum(lengths))
    update, own = 2.0 * own + 3.0 * extra, own + extra
  theirs = forward_flops(teacher, lengths) if teacher is not None else 0.0
  rescores = bool(wants(o)['student']) * (updates if o.advantages == 'recomputed' else 1)
  grading = theirs * o.needs_teacher
  if wants(o)['reference']:
    grading += forward_flops(reference, lengths)
  again = {part: times * head_flops(model, lengths) for part, model, times in (
      (part, model, o.extra_heads[part]) for part, model in (
          ('student', student), ('teacher', teacher), ('reference', reference))) if times}
  return {
      'student': update * updates + own * rescores + again.get('student', 0.0),
      'sampling': ({'student': own, 'teacher': theirs, 'dataset': 0.0}[stream.writer]
                   * (not stream.fixed) + theirs * (stream.teacher_mix > 0.0)),
      'teacher': grading + again.get('teacher', 0.0) + again.get('reference', 0.0)}


def step_flops(streams: tuple[Stream, ...], lengths: dict[str, np.ndarray], **models: Any
               ) -> dict[str, float]:
  """Counts the operations of a step, by who spends them: `stream_flops` of its streams, the first
  of which has lengths without its name in front; `models` are the keywords of that."""
  total = {'student': 0.0, 'sampling': 0.0, 'teacher': 0.0}
  for i, stream in enumerate(streams):
    prefix = f'{stream.name}_' if i else ''
    spent = stream_flops(stream, lengths[f'{prefix}lengths'] + lengths[f'{prefix}prompt_lengths'],
                         **models)
    total = {name: total[name] + spent[name] for name in total}
  return total
