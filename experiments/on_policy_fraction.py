"""How many of the batches the student has to write (GKD, arXiv 2306.13649, lambda): the rest are
the teacher's text, by the same exact divergence.

Expected at `tiny` (three seeds, docs/results.md, "The ablations at tiny size"): no difference
from all to none. Time at `tiny`: about half a minute an arm and seed on one CPU core.

    opd train --config experiments/on_policy_fraction.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size, seeds, models (ablation.py)."""
  arg = ablation.parse_arg(arg)
  c = ablation.opd(arg)
  arms = {'f100': ('all by the student', c)}
  for share in (75, 50, 25, 0):
    arms[f'f{share}'] = f'{share} % by the student', ablation.changed(
        c, data__on_policy_fraction=share / 100, data__off_policy_source='teacher')
  metric, sign = ('reverse_kl', -1) if arg.size == 'smollm2' else ('sampled_accuracy', 1)
  return ablation.pipeline('on_policy_fraction', arg, arms, {
      'own_text_counts': Claim(
          'Own text is better than the teacher\'s', 'from lambda 0 to 1 all of GKD\'s tasks gain',
          f'{sign} * (f100.{metric} - f0.{metric})', 0.0, 0.02),
      'half_is_enough': Claim(
          'Half of it is as good as all', 'lambda 0.5 and 1 are close',
          f'{sign} * (f50.{metric} - f100.{metric})', -0.02, -0.02)})
