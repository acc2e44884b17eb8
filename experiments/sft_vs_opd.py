"""Off-policy distillation against on-policy, by the number of prompts (Thinking Machines Lab 2025,
"On-Policy Distillation", section on distillation for reasoning).

SFT learns from one answer of the teacher to each of N prompts, again and again; OPD has the student
answer the same N prompts anew in every step. The post: accuracy after SFT is log-linear in the
number of prompts, and OPD gets to the same place with 9 to 30 times less compute.

Expected at `tiny` (three seeds, docs/results.md, "The ablations at tiny size"): OPD 0.18 ahead with
64 prompts, and 0.01 with 1024. Time at `tiny`: about half a minute an arm and seed on one CPU core.

    opd train --config experiments/sft_vs_opd.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim

# Times the rate of the size, (SFT, OPD): each the best of four, 5e-4 to 4e-3, on seed 100.
RATES = {'tiny': {16: (0.25, 0.25), 64: (0.25, 0.5), 256: (1.0, 1.0), 1024: (2.0, 2.0)}}
COUNTS = {'tiny': (16, 64, 256, 1024), 'small': (64, 256, 1024, 4096), 'smollm2': (16, 64, 256)}
PUBLISHED = (256, 1024, 4096)


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size, seeds, models (ablation.py)."""
  arg = ablation.parse_arg(arg)
  c = ablation.opd(arg)
  c = ablation.changed(
      c, data__samples_per_prompt=1,
      data__prompts_per_step=c.data.prompts_per_step * c.data.samples_per_prompt)
  counts = COUNTS.get(arg.size, PUBLISHED)
  arms = {}
  for n in counts:
    slow, fast = RATES.get(arg.size, {}).get(n, (1.0, 1.0))
    few = ablation.changed(c, data__limit=n,
                           data__prompts_per_step=min(n, c.data.prompts_per_step))
    arms[f'sft_{n}'] = f'SFT, {n} prompts', ablation.with_rate(ablation.sft(few), slow)
    arms[f'opd_{n}'] = f'OPD, {n} prompts', ablation.with_rate(few, fast)
  few, more, many = (f'{counts[i]}' for i in range(3))
  return ablation.pipeline('sft_vs_opd', arg, arms, {
      'few_prompts': Claim(
          f'OPD gets further than SFT with {more} prompts', '70 % against 60 % (AIME 24)',
          f'opd_{more}.sampled_accuracy - sft_{more}.sampled_accuracy', 0.0, 0.1),
      'many_prompts': Claim(
          f'OPD gets further than SFT with {counts[-1]} prompts', 'the same',
          f'opd_{counts[-1]}.sampled_accuracy - sft_{counts[-1]}.sampled_accuracy', 0.0, 0.1),
      'log_linear': Claim(
          'SFT goes on as it began, log-linear in the number of prompts',
          'log-linear from 50 thousand prompts on',
          f'(sft_{many}.sampled_accuracy - sft_{more}.sampled_accuracy)'
          f' - 0.8 * (sft_{more}.sampled_accuracy - sft_{few}.sampled_accuracy)', 0.0, 0.0),
      'compute': Claim(
          f'SFT on {counts[-1]} prompts needs many times the compute of OPD to 80 % of the teacher',
          '30 times, the teacher\'s writing charged',
          f'flops(sft_{counts[-1]}, 0.8) / flops(opd_{counts[-1]}, 0.8)', 1.0, 30.0),
  } if arg.size != 'smollm2' else {
      'few_prompts': Claim(
          f'OPD gets further than SFT with {more} prompts', '70 % against 60 % (AIME 24)',
          f'sft_{more}.reverse_kl - opd_{more}.reverse_kl', 0.0, 0.1)},
      baseline=f'sft_{counts[-1]}' if arg.size != 'smollm2' else '')
