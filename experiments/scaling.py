"""How far a student gets, by its size, its teacher and the tokens that it learns from: a small
scaling study of on-policy distillation, for which surveys conjecture a law that nobody has fitted
(arXiv 2604.00626, open problems).

Students of several widths begin from random weights. They learn by the forward KL, on the teacher's
text until their own makes sense, and then on their own. Every evaluation is a cell (parameters,
tokens, reverse KL); the law is fitted to all but those of one width, which it then has to predict
(opd_jax/experiment/scaling.py). Not measured yet.

    opd train --config experiments/scaling.py:tiny
"""

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment
from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim

WIDTHS = (24, 32, 48, 64, 96)
HELD_OUT = 64
WARM_STEPS = 400


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size (tiny), seeds."""
  arg = ablation.parse_arg(arg)
  experiment.pick({'tiny': 0}, size=arg.size)
  c = ablation.opd(arg)
  teachers = {'rl': c.teacher.path, 'base': c.student.path}
  arms, groups = {}, {}
  for teacher, path in teachers.items():
    for width in WIDTHS:
      arms[f'{teacher}_{width}'] = f'width {width}, from {teacher}', student(c, width, path)
    groups[teacher] = tuple(f'{teacher}_{width}' for width in WIDTHS)
  small, large = WIDTHS[0], WIDTHS[-1]
  out = ablation.pipeline('scaling', arg, arms, {
      f'{teacher}_size': Claim(
          f'A larger student comes nearer to its teacher ({teacher})', 'conjectured',
          f'{teacher}_{small}.reverse_kl / {teacher}_{large}.reverse_kl', 1.0, 2.0)
      for teacher in teachers})
  out.report.scaling = ConfigDict(groups)
  out.report.held_out = tuple(f'{teacher}_{HELD_OUT}' for teacher in teachers)
  return out


def student(c: ConfigDict, width: int, teacher: str) -> ConfigDict:
  """From random weights, warmed up on the teacher's text."""
  out = ablation.changed(
      c, teacher__path=teacher, student__path='', steps=2 * WARM_STEPS,
      data__warm_steps=WARM_STEPS, data__off_policy_source='teacher',
      objective__divergence='forward_kl', optimizer__schedule='constant',
      optimizer__final_learning_rate=0.0, optimizer__warmup_steps=50, eval__every_steps=100,
      eval__problems=256, checkpoint__every_steps=2 * WARM_STEPS, doctor__support='off: at first',
      doctor__truncation='off: at first')
  out.student.fresh = config_lib.default_config().student.fresh
  out.student.fresh.update(hidden_size=width, intermediate_size=3 * width)
  return out
