"""One prompt, many rollouts (Thinking Machines Lab 2025, "On-Policy Distillation", data reuse).

The post: 20 steps of 256 rollouts of one random prompt come close to the teacher, and there is no
collapse into one answer, because the whole distribution is what is learned.

    opd train --config experiments/single_prompt.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size, seeds, models (ablation.py)."""
  arg = ablation.parse_arg(arg)
  c = ablation.opd(arg)
  rows = 16 if arg.size == 'smollm2' else 256
  c = ablation.changed(c, steps=20, data__prompts_per_step=rows, data__samples_per_prompt=1,
                       optimizer__warmup_steps=0, eval__every_steps=5)
  c = ablation.with_rate(c, 0.25)  # one prompt is soon learned by heart
  arms = {}
  for name, label, limit in (('1', 'one prompt', 1), ('16', '16 prompts', 16),
                             ('all', 'all prompts', 0)):
    few = ablation.changed(c, data__limit=limit)
    arms[f'opd_{name}'] = f'OPD, {label}', few
  arms['sft_1'] = 'SFT, one prompt', ablation.sft(
      ablation.changed(c, data__limit=1), answers='fresh')
  graded = arg.size != 'smollm2'
  metric = 'sampled_accuracy' if graded else 'reverse_kl'
  return ablation.pipeline('single_prompt', arg, arms, {
      'one_is_enough': Claim(
          'One prompt teaches what all prompts do', 'about the teacher\'s accuracy (AIME 24)',
          f'(opd_1.{metric} - opd_1.before.{metric})'
          f' / (opd_all.{metric} - opd_all.before.{metric})', 0.0, 0.9),
      'no_collapse': Claim(
          'One prompt does not make greedy answers worse', 'no collapse',
          'opd_1.greedy_accuracy - opd_1.before.greedy_accuracy' if graded else
          'opd_1.before.reverse_kl - opd_1.reverse_kl', 0.0, 0.0),
      'sft_forgets': Claim(
          'SFT on the teacher\'s answers to it is worse than OPD', '-',
          'opd_1.sampled_accuracy - sft_1.sampled_accuracy' if graded else
          'sft_1.reverse_kl - opd_1.reverse_kl', 0.0, 0.02)})
