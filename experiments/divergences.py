"""Which divergence, on the student's own samples and over the whole vocabulary (GKD, arXiv
2306.13649; f-divergences, arXiv 2604.00626).

Expected at `tiny` (three seeds, docs/results.md, "The ablations at tiny size"): all within 0.04
of sampled accuracy, total variation first, forward KL last. Time at `tiny`: about half a minute
an arm and seed on one CPU core.

    opd train --config experiments/divergences.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim

DIVERGENCES = {'reverse_kl': 'reverse_kl', 'forward_kl': 'forward_kl',
               'jensen_shannon': 'jensen_shannon(0.5)', 'skew_kl': 'skew_kl(0.1)',
               'total_variation': 'total_variation'}


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size, seeds, models (ablation.py)."""
  arg = ablation.parse_arg(arg)
  c = ablation.opd(arg)
  arms = {name: (value, ablation.changed(c, objective__divergence=value))
          for name, value in DIVERGENCES.items()}
  metric, sign = ('reverse_kl', -1) if arg.size == 'smollm2' else ('sampled_accuracy', 1)
  return ablation.pipeline('divergences', arg, arms, {
      'forward': Claim(
          'On own samples the forward KL is as good as the reverse', 'on-policy data count, '
          'not the divergence (GKD)', f'{sign} * (forward_kl.{metric} - reverse_kl.{metric})',
          -0.02, -0.02),
      'jensen_shannon': Claim(
          'On own samples the Jensen-Shannon divergence is as good as the reverse KL', 'the same',
          f'{sign} * (jensen_shannon.{metric} - reverse_kl.{metric})', -0.02, -0.02)})
