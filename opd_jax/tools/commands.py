"""The commands of the console and their flags: what each does and may be given."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Command:
  """A command, for its help and for what it may be given.

  Attributes:
    does: what, in a line.
    flags: those that it reads; with others they would have no effect.
    required: those of them that it cannot do without.
    example: a command line.
  """

  does: str
  flags: tuple[str, ...]
  required: tuple[str, ...]
  example: str


HOSTS = ('coordinator', 'processes', 'process')
COMMANDS = {
    'train': Command(
        'trains a run, or every stage of a pipeline, from the start or from where it stopped',
        ('config', 'workdir', *HOSTS), ('config',), 'opd train --config experiments/quickstart.py'),
    'doctor': Command(
        'checks before any training whether student, teacher, config and device belong together',
        ('config', 'workdir', 'stage', *HOSTS), ('config',),
        'opd doctor --config experiments/quickstart.py --stage opd'),
    'diagnose': Command(
        'compares gradient estimators on the two models of a run, before any training',
        ('config', 'workdir', 'stage', *HOSTS), ('config',),
        'opd diagnose --config experiments/quickstart.py --stage opd'),
    'evaluate': Command(
        "evaluates a Hugging Face directory on a run's held-out problems, as the run would",
        ('config', 'workdir', 'stage', 'model', 'teacher', *HOSTS), ('config', 'model'),
        'opd evaluate --config experiments/quickstart.py --stage opd --model DIR'),
    'report': Command(
        'writes the tables and the picture of a finished pipeline again',
        ('config', 'workdir'), ('config',),
        'opd report --config experiments/dense_vs_rl.py:tiny,seeds=3 --workdir DIR'),
    'plan': Command(
        'says what a run would take of machines that are not here: memory, time, chip-hours',
        ('config', 'stage', 'topology', 'models', 'price', 'json'), ('config', 'topology'),
        'opd plan --config experiments/checkpoints.py --config.student.path=Qwen/Qwen3-8B-Base '
        '--config.teacher.path=Qwen/Qwen3-32B --topology v5p:4x4x4'),
    'export': Command(
        "writes a run's checkpoint as a directory that others open",
        ('workdir', 'output', 'format', 'step', 'dtype', 'changed_inputs', *HOSTS),
        ('workdir', 'output'),
        'opd export --workdir runs/quickstart/seed_0/opd --output DIR --format adapter'),
}
FLAGS = {
    'config': ('FILE or FILE:ARGUMENT', 'the experiment; --config.FIELD=VALUE changes a field of '
               'it, such as --config.optimizer.learning_rate=1e-4 (fields: opd_jax/settings.py)'),
    'workdir': ('DIR', 'where the run lives; runs/EXPERIMENT unless given'),
    'stage': ('NAME', 'of a pipeline'),
    'model': ('DIR', 'the Hugging Face directory to evaluate'),
    'teacher': ('DIR', 'another, to measure the reverse KL to'),
    'output': ('DIR', 'the directory to make'),
    'format': ('full | adapter', "the whole model (unless given), or a PEFT directory"),
    'step': ('N', 'of which checkpoint; the newest unless given'),
    'changed_inputs': ('REASON', 'why the base may be another than the one the run began with; '
                       'refused unless given (for train: --config.doctor.changed_inputs)'),
    'topology': ('KIND:SHAPE', 'TPUs such as v5p:4x4x4, v6e:8x8, v5e:4x4 or v4:2x2x1, or GPUs such '
                 'as gpu:8xh100, gpu:8xh200 or gpu:8xb200'),
    'models': ('DIR', 'holds ORGANIZATION/NAME/config.json or NAME/config.json of the models that '
               'are no directories; the hub is asked unless given'),
    'price': ('USD', 'of a chip an hour, for the cost of the run'),
    'json': ('FILE', 'where all numbers go'),
    'dtype': ('float32 | bfloat16', 'of the weights; float32 unless given'),
    'coordinator': ('HOST:PORT', 'of several processes that are one run: where process 0 listens; '
                    'found on SLURM, Cloud TPU, Open MPI unless given (docs/running.md)'),
    'processes': ('N', 'how many there are; 1 runs alone whatever the environment says'),
    'process': ('I', 'which of them this is, from 0'),
}
