"""Which teacher: one that RL made of the student, another that was pretrained from other weights on
right solutions only, or a student that it has taught ("Rethinking OPD", arXiv 2604.13016: a teacher
helps as far as its way to think is the student's own, and has something new).

Expected at `tiny` (three seeds, docs/results.md, "The ablations at tiny size"): all three within
0.04. Time at `tiny`: about half a minute an arm and seed on one CPU core, and five minutes for
the other teacher.

    opd train --config experiments/teacher_identity.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax import experiment
from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size (tiny), seeds."""
  arg = ablation.parse_arg(arg)
  experiment.pick({'tiny': 0}, size=arg.size)  # the other sizes have no second teacher
  c = ablation.opd(arg)
  arms = {
      'other': ('the other teacher, pretraining', ablation.other_teacher(c)),
      'own': ('OPD, teacher made of the student by RL', c),
      'from_other': ('OPD, teacher of other weights', ablation.changed(
          c, teacher__path='stage:other')),
      'from_own': ('OPD, teacher a student that OPD made', ablation.changed(
          c, teacher__path='stage:own'))}
  return ablation.pipeline('teacher_identity', arg, arms, {
      'own_is_faster': Claim(
          'A teacher made of the student closes more of the distance', 'overlap of thinking counts',
          'from_other.reverse_kl / from_other.before.reverse_kl'
          ' - own.reverse_kl / own.before.reverse_kl', 0.0, 0.01),
      'copy_is_as_good': Claim(
          'A copy of the teacher teaches as well as the teacher', '-',
          'from_own.sampled_accuracy - own.sampled_accuracy', -0.02, -0.02)})
