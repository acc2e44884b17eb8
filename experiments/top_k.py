"""How many of the vocabulary's tokens a teacher has to give: all, the k that it or the student
finds most likely, or the one that was sampled (the SDFT recipe of Thinking Machines: with 20 tokens
almost nothing is lost).

Expected at `tiny` (three seeds, docs/results.md, "The ablations at tiny size"): top 2 and top 4
of teacher or student as good as all, one sampled token 0.13 behind. Time at `tiny`: about half a
minute an arm and seed on one CPU core.

    opd train --config experiments/top_k.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size, seeds, models (ablation.py)."""
  arg = ablation.parse_arg(arg)
  c = ablation.opd(arg)
  few, some = (2, 4) if arg.size in ('tiny', 'small') else (4, 20)

  def top(kind, k):
    return ablation.changed(c, objective__support=f'{kind}_top_k({k}, tail="bucket")')

  arms = {
      'full': ('whole vocabulary', c),
      'student_few': (f"the student's top {few}", top('student', few)),
      'student_some': (f"the student's top {some}", top('student', some)),
      'teacher_few': (f"the teacher's top {few}", top('teacher', few)),
      'teacher_some': (f"the teacher's top {some}", top('teacher', some)),
      'sampled': ('the sampled token', ablation.sampled(c))}
  metric, sign = ('reverse_kl', -1) if arg.size == 'smollm2' else ('sampled_accuracy', 1)
  return ablation.pipeline('top_k', arg, arms, {
      'some_are_enough': Claim(
          f"The teacher's top {some} are as good as all", 'top 20: 68.0 against 68.0',
          f'{sign} * (teacher_some.{metric} - full.{metric})', -0.02, -0.02),
      'one_is_less': Claim(
          'One sampled token teaches less in as many steps', '-',
          f'{sign} * (full.{metric} - sampled.{metric})', 0.0, 0.02)})
