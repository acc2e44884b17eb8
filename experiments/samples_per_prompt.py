"""Many prompts once, or few prompts often, at the same number of answers a step (Thinking Machines
Lab's recipes take four samples of each prompt).

Expected at `tiny` (three seeds, docs/results.md, "The ablations at tiny size"): 4 samples 0.05 to
0.07 behind, 16 samples 0.17 to 0.24. Time at `tiny`: about half a minute an arm and seed on one CPU
core.

    opd train --config experiments/samples_per_prompt.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size, seeds, models (ablation.py)."""
  arg = ablation.parse_arg(arg)
  c = ablation.opd(arg)
  rows = c.data.prompts_per_step * c.data.samples_per_prompt
  arms = {f'{way}_{n}': (f'OPD {way}, {n} of each prompt', ablation.changed(
      run, data__prompts_per_step=rows // n, data__samples_per_prompt=n))
      for way, run in (('exact', c), ('sampled', ablation.sampled(c))) for n in (1, 4, 16)}
  metric, sign = ('reverse_kl', -1) if arg.size == 'smollm2' else ('sampled_accuracy', 1)
  return ablation.pipeline('samples_per_prompt', arg, arms, {
      f'{way}_{n}': Claim(
          f'{n} samples of each prompt are as good as one of {n} times the prompts ({way})',
          'four are used throughout', f'{sign} * ({way}_{n}.{metric} - {way}_1.{metric})',
          -0.02, -0.02)
      for way in ('exact', 'sampled') for n in (4, 16)})
