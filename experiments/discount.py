"""Credit from the future: discount factors of the reverse KL (Thinking Machines Lab 2025,
"On-Policy Distillation", section on the loss).

Each token is rewarded by its own log-ratio (discount 0), or by the discounted sum of those that
follow, which is nearer to the gradient of the sequence's divergence. The post saw no gain.

Expected at `tiny` (three seeds, docs/results.md, "The ablations at tiny size"): 0.5 as good as 0,
0.9 behind by 0.03 and 1 by 0.10, both within the noise of three seeds. Time at `tiny`: about half a
minute an arm and seed on one CPU core.

    opd train --config experiments/discount.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size, seeds, models (ablation.py)."""
  arg = ablation.parse_arg(arg)
  c = ablation.sampled(ablation.opd(arg))
  c = ablation.changed(c, data__prompts_per_step=2 * c.data.prompts_per_step)
  arms = {name: (f'discount {value:g}', ablation.changed(
      c, objective__discount=value)) for name, value in (
          ('d0', 0.0), ('d50', 0.5), ('d90', 0.9), ('d100', 1.0))}
  metric, sign = ('reverse_kl', -1) if arg.size == 'smollm2' else ('sampled_accuracy', 1)
  return ablation.pipeline('discount', arg, arms, {
      f'd{n}': Claim(f'A discount of {n / 100:g} brings nothing', 'no improvement',
                     f'{sign} * (d0.{metric} - d{n}.{metric})', -0.02, -0.02)
      for n in (50, 90, 100)})
