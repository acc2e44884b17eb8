"""Whose prefixes and which direction of the KL, two by two ("Decoupling", arXiv 2605.16826): text
of the student or of the teacher, forward or reverse KL over the whole vocabulary.

Expected at `tiny` (three seeds, docs/results.md, "The ablations at tiny size"): the student's
prefixes 0.13 ahead on few prompts, no difference between the directions. Time at `tiny`: about
half a minute an arm and seed on one CPU core.

    opd train --config experiments/prefix_source.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size, seeds, models (ablation.py)."""
  arg = ablation.parse_arg(arg)
  c = ablation.opd(arg)
  c = ablation.changed(c, data__limit={'tiny': 64, 'small': 256}.get(arg.size, 0))
  arms = {}
  for source in ('student', 'teacher'):
    for kl in ('reverse', 'forward'):
      run = ablation.changed(c, data__source=source, objective__divergence=f'{kl}_kl')
      arms[f'{source}_{kl}'] = f"{source}'s prefixes, {kl} KL", run
  metric, sign = ('reverse_kl', -1) if arg.size == 'smollm2' else ('sampled_accuracy', 1)

  def mean(a, b):
    return f'0.5 * ({a}.{metric} + {b}.{metric})'

  return ablation.pipeline('prefix_source', arg, arms, {
      'prefix': Claim(
          "The student's own prefixes are better", 'the prefix matters more than the direction',
          f'{sign} * ({mean("student_reverse", "student_forward")}'
          f' - {mean("teacher_reverse", "teacher_forward")})', 0.0, 0.02),
      'direction': Claim(
          'The reverse KL is better than the forward', 'smaller',
          f'{sign} * ({mean("student_reverse", "teacher_reverse")}'
          f' - {mean("student_forward", "teacher_forward")})', 0.0, 0.02)})
