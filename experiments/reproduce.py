"""Reproduces the claims of the Thinking Machines post, and those beside it, that a tiny model can
speak to: the ablations of this folder, in one report. All but personalize.py start from the
shipped models.

The report has a table of claims: what the source measured, what is measured here, and whether the
claim holds (the effect is as large as is claimed, and its 95 % interval over seeds leaves out that
there is none), holds in part (one of the two), or does not. Whatever was interrupted goes on by the
same command, and each ablation runs alone by its own file. dense_vs_rl.py is not in it: it makes
its models itself.

Time: 70 stages a seed, which took 54 minutes of one core's processor time with a cold cache and
50 with a filled one; three seeds are about 80 minutes of two cores. A seed can be computed beside
others by another process (`--config.seeds='(1,)'`, the same work directory); the command below
then makes the report. Expected: docs/results.md, "The ablations at tiny size".

    opd train --config experiments/reproduce.py:tiny
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

from opd_jax import experiment
from opd_jax.experiment import ablation

ABLATIONS = ('sft_vs_opd', 'lora_gap', 'single_prompt', 'self_sft', 'discount',
             'samples_per_prompt', 'context_length', 'batch_and_support', 'divergences', 'top_k',
             'teacher_identity', 'on_policy_fraction', 'prefix_source', 'personalize')


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size (tiny), seeds (how many, from 0), only (names of ablations, with + between)."""
  arg = experiment.parse_arg(arg, size='tiny', seeds=3, only='+'.join(ABLATIONS))
  experiment.pick({'tiny': 0}, size=arg.size)
  names = arg.only.split('+')
  for name in names:
    experiment.pick(dict.fromkeys(ABLATIONS), only=name)
  return ablation.join(f'reproduce_{arg.size}', {
      name: _load(name).get_config(f'{arg.size},seeds={arg.seeds}') for name in names})


def _load(name: str):
  """The experiment of a file beside this one."""
  spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).parent / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
