"""opd_jax: on-policy distillation of language models in JAX.

The three pure functions of the method; the loop that joins them is `opd_jax.train`.
"""

from opd_jax.algorithm.sample import sample_fn
from opd_jax.algorithm.score import teacher_logprob_fn
from opd_jax.algorithm.update import reverse_kl_update

__all__ = ['reverse_kl_update', 'sample_fn', 'teacher_logprob_fn']
