"""SFT on a model's own samples against OPD with itself as the teacher (Thinking Machines Lab 2025,
"On-Policy Distillation", section on continual learning).

The samples are the model's own distribution, and yet each finite batch has a gradient: the post
finds that SFT at any rate that is of use makes the model worse, and that a schedule which falls
stops that and does not repair it. OPD with a fixed copy as the teacher stays.

Expected at `tiny` (three seeds, docs/results.md, "The ablations at tiny size"): SFT 0.04 worse,
0.02 at a rate that falls; OPD by the sampled loss stays. Time at `tiny`: about half a minute an arm
and seed on one CPU core.

    opd train --config experiments/self_sft.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size, seeds, models (ablation.py)."""
  arg = ablation.parse_arg(arg)
  c = ablation.opd(arg)
  c = ablation.changed(c, student__path=c.teacher.path, teacher__kind='initial_student',
                       teacher__path='', optimizer__warmup_steps=0,
                       student__revision=c.teacher.revision, data__limit=_answers(arg.size))
  if c.prompt.template == 'teacher':
    c.prompt.template, c.sample.stop = 'student', 'student'
  constant = ablation.changed(c, optimizer__schedule='constant',
                              optimizer__final_learning_rate=0.0)
  own = ablation.sft(constant)
  arms = {
      'sft': ('SFT on own samples', own),
      'sft_quarter': ('SFT, a quarter of the rate', ablation.with_rate(own, 0.25)),
      'sft_linear': ('SFT, a rate that falls', ablation.sft(c)),
      'opd': ('OPD, itself the teacher', constant),
      'opd_sampled': ('OPD of sampled tokens, itself the teacher', ablation.sampled(constant))}
  metric = 'reverse_kl' if arg.size == 'smollm2' else 'sampled_accuracy'

  def worse(stage):
    return (f'{stage}.before.{metric} - {stage}.{metric}' if metric != 'reverse_kl' else
            f'{stage}.{metric} - {stage}.before.{metric}')

  return ablation.pipeline('self_sft', arg, arms, {
      'drifts': Claim('SFT on own samples makes the model worse', 'at any rate that is of use',
                      worse('sft'), 0.0, 0.02),
      'at_a_quarter': Claim('SFT on own samples does so at a quarter of the rate', 'the same',
                            worse('sft_quarter'), 0.0, 0.01),
      'linear': Claim('SFT on own samples does so at a rate that falls',
                      'it stops, and does not recover',
                      worse('sft_linear'), 0.0, 0.01),
      'opd_stays': Claim('OPD with itself as teacher does not make it worse',
                         'stays at the teacher', f'0.02 - ({worse("opd_sampled")})', 0.0, 0.0)})


def _answers(size: str) -> int:
  return {'tiny': 512, 'small': 512, 'smollm2': 256}.get(size, 4096)
