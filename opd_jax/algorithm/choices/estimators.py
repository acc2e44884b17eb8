"""What is differentiated at a sampled token, one function each; see `choices`.

They take `log_u`, log p_T - log p_S of the token, whose gradient reaches the student only:
-grad log p_S. (k1 = -log u itself would differentiate to nothing: E_S[grad log p_S] = 0.)
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from opd_jax.algorithm import support

# The divergence of which differentiating each is an unbiased estimate.
ESTIMATES = {'k2': 'reverse_kl', 'k3': 'forward_kl'}


def k2(log_u: Float[Array, '...']) -> Float[Array, '...']:
  """(log u)^2 / 2 (Schulman 2020, Approximating KL Divergence; as a loss: Tang & Munos 2025, arXiv
  2506.09477)."""
  return 0.5 * jnp.square(log_u)


def k3(log_u: Float[Array, '...']) -> Float[Array, '...']:
  """u - 1 - log u (Schulman 2020, Approximating KL Divergence; as a loss: Shao et al. 2024, GRPO,
  arXiv 2402.03300).

  Above log u = 30, u goes on along its tangent (`support.split_exponent`).
  """
  exponent, beyond = support.split_exponent(log_u)
  return jnp.expm1(exponent) + beyond - log_u
