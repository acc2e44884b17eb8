"""Floating-point operations of a model, counted from tokens: 2 a parameter and token, and the
attention.

Padding and rows that have ended are not counted, nor what is computed twice to save memory (remat):
these are the operations that the method needs, which is what the paper compares, not those that a
batch layout happens to spend. Only products are: norms, softmax and optimizer are left out. What a
run spends them on is in ledger.py.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from opd_jax.models.params import abstract_params, count_params
from opd_jax.types import Model


def forward_flops(model: Model, lengths: np.ndarray) -> float:
  """Counts the operations of one forward pass (or one decode) over rows of these lengths: its
  matrices' and its attention's."""
  return matrix_flops(model.specs, lengths) + attention_flops(model, lengths)


def matrix_flops(specs: dict[str, Any], lengths: np.ndarray) -> float:
  """Counts 2 N n for the matrices of a table of parameters: N of them per token, head included (at
  every token), embedding look-up not, of experts those that are used."""
  return 2.0 * count_params(specs, matmul_only=True) * float(np.sum(lengths, dtype=np.float64))


def attention_flops(model: Model, lengths: np.ndarray) -> float:
  """Counts scores and average of the attention: 4 heads head_dim in every layer for each of the
  n (n + 1) / 2 query-key pairs, or for those that a sliding window allows. Heads are those of the
  queries: key/value heads that are shared save memory and projections, but no product here."""
  n = np.asarray(lengths, np.float64)
  c = model.config
  pairs = 0.0
  for window in model.attention_windows or (None,) * c.num_hidden_layers:
    growing = n if window is None else np.minimum(n, window)  # then each query sees `window` keys
    pairs += float((growing * (growing + 1) / 2 + (n - growing) * growing).sum())
  return 4.0 * c.num_attention_heads * c.head_dim * pairs


def head_flops(model: Model, lengths: np.ndarray) -> float:
  """Counts the operations of one product of hidden states with the vocabulary."""
  matrix = jax.eval_shape(model.head, abstract_params(model.specs)).matrix
  return 0.0 if matrix is None else 2.0 * matrix.size * float(np.sum(lengths))


def update_flops(model: Model, lengths: np.ndarray, adapter_specs: dict[str, Any] | None) -> float:
  """Counts the operations of a forward and a backward pass.

  Backward, a product costs once more for the gradient of each of its operands that has one: 3 times
  the forward pass for what is trained and for attention, whose operands are all activations, 2
  times for weights that are frozen under adapters. (The input of the first layer has no gradient
  either; that is counted.)

  Args:
    model: whose.
    lengths: tokens of each row.
    adapter_specs: of the adapters that are trained instead of the model.
  """
  trained = adapter_specs is None
  matrices = (3.0 if trained else 2.0) * matrix_flops(model.specs, lengths)
  extra = 0.0 if trained else 3.0 * matrix_flops(adapter_specs, lengths)
  return matrices + extra + 3.0 * attention_flops(model, lengths)
