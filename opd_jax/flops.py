"""Floating-point operations, counted from tokens: 2 a parameter and token, and the attention.

Padding and rows that have ended are not counted: these are the operations that the method needs,
which is what the paper compares, not those that a batch layout happens to spend.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from opd_jax.params import abstract_params, count_params
from opd_jax.types import Model


def forward_flops(model: Model, lengths: np.ndarray) -> float:
  """One forward pass (or one decode) over rows of these lengths.

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
  """One product of hidden states with the vocabulary."""
  matrix = jax.eval_shape(model.head, abstract_params(model.specs)).matrix
  return 0.0 if matrix is None else 2.0 * matrix.size * float(np.sum(lengths))


def step_flops(student: Model, teacher: Model | None, lengths: np.ndarray, *, source: str,
               teacher_scores: bool, student_rescores: int, updates: int,
               adapter_specs: dict[str, Any] | None = None, reference: Model | None = None,
               teacher_mixed: bool = False, extra_heads: dict[str, int] | None = None
               ) -> dict[str, float]:
  """The operations of one step, by who spends them.

  Args:
    student, teacher: the models; teacher None where there is none.
    lengths: prompt plus completion tokens of each row.
    source: who wrote the rows: 'student', 'teacher' or 'dataset'.
    teacher_scores: the teacher graded the rows.
    student_rescores: how often the student graded its own rows for the advantage.
    updates: gradient steps on the rows.
    adapter_specs: of the adapters that are trained instead of the student.
    reference: a model that graded the rows too; None without.
    teacher_mixed: the teacher's distribution was mixed into the sampler's.
    extra_heads: `Objective.extra_heads`.

  Returns:
    'student' (training and rescoring), 'sampling', 'teacher' (grading, by the reference too). A
    gradient step is a forward pass, the gradient of the activations, which costs as much, and that
    of the trained weights, which costs as much as their share of the forward pass: 3 forwards for a
    whole model, 2 and three times the adapters for adapters.
  """
  own = forward_flops(student, lengths)
  update = 3.0 * own
  if adapter_specs is not None:
    extra = 2.0 * count_params(adapter_specs, matmul_only=True) * float(np.sum(lengths))
    update, own = 2.0 * own + 3.0 * extra, own + extra
  theirs = forward_flops(teacher, lengths) if teacher is not None else 0.0

  def again(part, model):
    times = (extra_heads or {}).get(part, 0)
    return times * head_flops(model, lengths) if times else 0.0

  return {
      'student': update * updates + own * student_rescores + again('student', student),
      'sampling': {'student': own, 'teacher': theirs, 'dataset': 0.0}[source]
                  + theirs * teacher_mixed,
      'teacher': (theirs * teacher_scores + again('teacher', teacher)
                  + again('reference', reference)
                  + (forward_flops(reference, lengths) if reference is not None else 0.0)),
  }
