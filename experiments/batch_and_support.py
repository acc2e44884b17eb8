"""How small a batch may be, with a teacher that was made of the student and with one that was not
(Thinking Machines Lab 2025, "On-Policy Distillation": small batches do where the teacher is within
the student's support, else much larger ones are needed).

The other teacher has another width and other random weights, and was pretrained on right
solutions only. Expected at `tiny` (three seeds, docs/results.md, "The ablations at tiny size"): 8
rows end 0.19 behind 128 with either teacher. Time at `tiny`: about half a minute an arm and seed
on one CPU core, and five minutes for the other teacher.

    opd train --config experiments/batch_and_support.py:tiny,seeds=3
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
  arms = {'other': ('the other teacher', ablation.other_teacher(c))}
  for name, label, path in (('own', 'made of the student', c.teacher.path),
                            ('other', 'of other weights', 'stage:other')):
    for rows in (8, 32, 128):
      arms[f'{name}_{rows}'] = f'{rows} rows, teacher {label}', ablation.changed(
          c, teacher__path=path, data__prompts_per_step=rows)
  return ablation.pipeline('batch_and_support', arg, arms, {
      'small_is_enough': Claim(
          '8 rows do as well as 128 with a teacher made of the student', 'small batches work',
          'own_8.sampled_accuracy - own_128.sampled_accuracy', -0.05, -0.05),
      'not_with_another': Claim(
          'With another teacher, 8 rows fall further behind 128', 'much larger ones are needed',
          '(other_128.sampled_accuracy - other_8.sampled_accuracy)'
          ' - (own_128.sampled_accuracy - own_8.sampled_accuracy)', 0.0, 0.05)})
