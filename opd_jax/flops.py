"""Floating-point operations, counted from tokens: 2 a parameter and token, and the attention.

Padding and rows that have ended are not counted: these are the operations that the method needs,
which is what the paper compares, not those that a batch layout happens to spend.
"""

from __future__ import annotations

import numpy as np

from opd_jax.params import count_params
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


def step_flops(student: Model, teacher: Model | None, lengths: np.ndarray, *, source: str,
               teacher_scores: bool, student_rescores: bool, updates: int) -> dict[str, float]:
  """The operations of one step, by who spends them.

  Args:
    student, teacher: the models; teacher None where there is none.
    lengths: prompt plus completion tokens of each row.
    source: who wrote the rows: 'student', 'teacher' or 'dataset'.
    teacher_scores: the teacher graded the rows.
    student_rescores: the student graded its own rows for the advantage.
    updates: gradient steps on the rows.

  Returns:
    'student' (training: forward and backward, 3 forwards each, and rescoring), 'sampling',
    'teacher' (grading).
  """
  own = forward_flops(student, lengths)
  theirs = forward_flops(teacher, lengths) if teacher is not None else 0.0
  return {
      'student': own * (3.0 * updates + student_rescores),
      'sampling': {'student': own, 'teacher': theirs, 'dataset': 0.0}[source],
      'teacher': theirs if teacher_scores else 0.0,
  }
