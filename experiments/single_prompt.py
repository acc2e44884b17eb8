"""One prompt, many rollouts (Thinking Machines Lab 2025, "On-Policy Distillation", data reuse).

The post: 20 steps of 256 rollouts of one random prompt come close to the teacher, and there is no
collapse into one answer, because the whole distribution is what is learned. Expected at `tiny`
(three seeds, docs/results.md, "The ablations at tiny size"): one prompt 0.05 above the base, and
no collapse; all prompts 0.65 above it. Time at `tiny`: about half a minute an arm and seed on one
CPU core.

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
  arms = {}
  # One prompt is soon learned by heart: the fewer there are, the lower the rate.
  for name, label, limit, times in (('1', 'one prompt', 1, 0.25), ('16', '16 prompts', 16, 0.5),
                                    ('all', 'all prompts', 0, 1.0)):
    arms[f'opd_{name}'] = f'OPD, {label}', ablation.with_rate(
        ablation.changed(c, data__limit=limit), times)
  arms['sft_1'] = 'SFT, one prompt', ablation.sft(arms['opd_1'][1], answers='fresh')
  graded = arg.size != 'smollm2'
  return ablation.pipeline('single_prompt', arg, arms, {
      'as_the_teacher': Claim(
          'One prompt brings the student to 90 % of its teacher', "about the teacher's AIME 24",
          'opd_1.sampled_accuracy - 0.9 * opd_1.teacher.sampled_accuracy', 0.0, 0.0),
      'one_is_enough': Claim(
          'One prompt teaches 90 % of what all prompts do', '-',
          'opd_1.sampled_accuracy - opd_1.before.sampled_accuracy'
          ' - 0.9 * (opd_all.sampled_accuracy - opd_all.before.sampled_accuracy)', 0.0, 0.0),
      'no_collapse': Claim(
          'One prompt does not make greedy answers worse', 'no collapse',
          'opd_1.greedy_accuracy - opd_1.before.greedy_accuracy', -0.02, -0.02),
      'sft_forgets': Claim(
          "SFT on the teacher's answers to it is worse than OPD", '-',
          'opd_1.sampled_accuracy - sft_1.sampled_accuracy', 0.0, 0.02)} if graded else {
      'one_is_enough': Claim(
          'One prompt brings the reverse KL 90 % as far down as all prompts do', '-',
          'opd_1.before.reverse_kl - opd_1.reverse_kl'
          ' - 0.9 * (opd_all.before.reverse_kl - opd_all.reverse_kl)', 0.0, 0.0),
      'sft_forgets': Claim(
          "SFT on the teacher's answers to it is worse than OPD, by the reverse KL", '-',
          'sft_1.reverse_kl - opd_1.reverse_kl', 0.0, 0.0)})
