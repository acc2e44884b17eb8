"""Training on the beginning of answers, evaluated on whole ones (Thinking Machines Lab 2025,
"On-Policy Distillation": dense rewards come from partial rollouts too, RL has to train near the
length of the evaluation).

The student writes so many tokens a step and no more; evaluations have the whole room.

Expected at `tiny` (three seeds, docs/results.md, "The ablations at tiny size"): 9 of 36 tokens stay
0.36 short of nine tenths of what all of them bring, 18 of 36 0.22. Time at `tiny`: about half a
minute an arm and seed on one CPU core.

    opd train --config experiments/context_length.py:tiny,seeds=3
"""

from ml_collections import ConfigDict

from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim

ROOMS = {'tiny': (9, 18, 36), 'small': (24, 48, 96), 'smollm2': (16, 32, 64)}
PUBLISHED = (512, 1024, 4096)


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size, seeds, models (ablation.py)."""
  arg = ablation.parse_arg(arg)
  c = ablation.opd(arg)
  rooms = ROOMS.get(arg.size, PUBLISHED)
  c = ablation.changed(c, eval__max_new_tokens=rooms[-1],
                       doctor__truncation='off: answers are cut on purpose')
  arms = {f'opd_{n}': (f'OPD, {n} tokens', ablation.changed(c, data__max_new_tokens=n))
          for n in rooms}
  metric, sign = ('reverse_kl', -1) if arg.size == 'smollm2' else ('sampled_accuracy', 1)
  whole = f'(opd_{rooms[-1]}.{metric} - opd_{rooms[-1]}.before.{metric})'
  return ablation.pipeline('context_length', arg, arms, {
      f'opd_{n}': Claim(
          f'{n} of {rooms[-1]} tokens teach nearly what all of them do',
          'distillation learns at shorter contexts',
          f'{sign} * (opd_{n}.{metric} - opd_{n}.before.{metric} - 0.9 * {whole})', 0.0, 0.0)
      for n in rooms[:-1]})
