"""How far adapters stay behind the whole model, after SFT and after OPD (Thinking Machines Lab
2025, "On-Policy Distillation", LoRA).

The post: rank 32 is 13 % behind full fine-tuning after SFT on much data, 6 % after OPD.

Expected at `tiny` (three seeds, docs/results.md, "The ablations at tiny size"): rank 4 0.12 behind
after SFT, and as far after OPD. Time at `tiny`: about half a minute an arm and seed on one CPU
core.

    opd train --config experiments/lora_gap.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim

RANKS = {'tiny': (1, 4, 16), 'small': (2, 8, 32), 'smollm2': (4, 16, 64)}
PUBLISHED = (8, 32, 128)


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size, seeds, models (ablation.py)."""
  arg = ablation.parse_arg(arg)
  c = ablation.opd(arg)
  text = ablation.sft(c, answers='fresh')  # as much data as there is
  arms = {'sft_full': ('SFT, whole model', text), 'opd_full': ('OPD, whole model', c)}
  ranks = RANKS.get(arg.size, PUBLISHED)
  for rank in ranks:
    arms[f'sft_{rank}'] = f'SFT, rank {rank}', ablation.lora(text, rank, 5.0)
    arms[f'opd_{rank}'] = f'OPD, rank {rank}', ablation.lora(c, rank, 5.0)
  middle = ranks[1]
  gaps = [f'({way}_full.sampled_accuracy - {way}_{middle}.sampled_accuracy)'
          for way in ('sft', 'opd')]
  if arg.size == 'smollm2':
    gaps = [f'({way}_{middle}.reverse_kl - {way}_full.reverse_kl)' for way in ('sft', 'opd')]
  return ablation.pipeline('lora_gap', arg, arms, {
      'behind': Claim(f'Rank {middle} is behind the whole model after SFT', '13 %', gaps[0],
                      0.0, 0.13),
      'less_behind': Claim(f'Rank {middle} is less behind after OPD than after SFT',
                           '6 % against 13 %', f'{gaps[0]} - {gaps[1]}', 0.0, 0.07)})
