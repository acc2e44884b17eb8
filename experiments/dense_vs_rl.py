"""Dense supervision against reinforcement learning (Thinking Machines Lab 2025, "On-Policy
Distillation", section on dense supervision).

A base model is pretrained; reinforcement learning with a verifiable reward makes a teacher of it;
the teacher is distilled back into the same base, and the gradient steps and the compute to reach
the teacher's accuracy are compared with those that reinforcement learning needed. The paper: 7-10x
fewer steps, 50-100x less compute, at 8B.

    opd train --config experiments/dense_vs_rl.py:tiny
    opd train --config experiments/dense_vs_rl.py:tiny,seeds=3     (seeds 0, 1, 2)
    opd train --config experiments/dense_vs_rl.py:small

`small` has 1.1 million parameters in five layers and chains of ten steps, where `tiny` has 105
thousand in two layers and chains of four.

The settings below were chosen on seed 100, which is not reported, by

    opd train --config experiments/dense_vs_rl.py:tiny,sweep=rl
    opd train --config experiments/dense_vs_rl.py:tiny,sweep=opd

which are 8 settings of RL, 5 of exact OPD, 4 of exact OPD with small batches, 4 of sampled OPD.
"""

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax import experiment
from opd_jax.errors import ConfigError


def get_config(arg: str | None = None) -> ConfigDict:
  """Argument: size (tiny, small), seeds (how many, from 0), sweep (rl or opd: the tuning runs)."""
  arg = experiment.parse_arg(arg, size='tiny', seeds=1, sweep='')
  experiment.pick(dict.fromkeys(('tiny', 'small')), size=arg.size)
  c = experiment.default_pipeline()
  c.name = 'dense_vs_rl' if arg.size == 'tiny' else f'dense_vs_rl_{arg.size}'
  if arg.sweep and arg.size != 'tiny':
    raise ConfigError(f"sweep={arg.sweep!r} with size={arg.size!r}; allowed: size='tiny'")
  if arg.sweep:
    return sweep(c, arg.sweep)
  c.seeds = tuple(range(arg.seeds))
  stages = {
      'base_clean': base_clean(), 'base': base(), 'teacher': teacher(), 'opd_exact': opd_exact(),
      'opd_exact_small': opd_exact_small(), 'opd_sampled': opd_sampled()}
  if arg.size == 'small':
    for stage in stages.values():
      small(stage)
  c.stages = ConfigDict(stages)
  c.order = tuple(stages)
  c.report.teacher = 'stage:teacher'
  c.report.methods = ('teacher', 'opd_exact', 'opd_exact_small', 'opd_sampled')
  c.report.labels = ('RL (GRPO)', 'OPD exact', 'OPD exact, small batch', 'OPD sampled')
  return c


def tiny() -> ConfigDict:
  """What every stage of the tiny size shares."""
  c = config_lib.default_config()
  c.compute.layer_unroll = 2
  c.compute.microbatch_rows = 64
  c.optimizer.b2 = 0.95
  c.eval.problems = 512
  c.eval.samples_per_problem = 2
  c.checkpoint.every_steps = 100
  return c


def small(c: ConfigDict) -> None:
  """What the stages of the small size have otherwise."""
  longest = 10
  operations = range(1, longest + 1) if c.data.source == 'dataset' else (longest,)
  c.task.options.operations, c.task.options.eval_operations = tuple(operations), longest
  c.data.max_prompt_tokens, c.data.max_new_tokens = 26, 96
  c.compute.layer_unroll, c.compute.microbatch_rows = 1, 32
  c.eval.problems, c.eval.every_steps = 256, max(c.eval.every_steps, 20)
  if not c.student.path:
    c.student.fresh.update(hidden_size=128, intermediate_size=384, num_hidden_layers=5, head_dim=32)
    c.steps, c.optimizer.learning_rate = 6000, 2e-3
    c.eval.every_steps = 100


def base_clean() -> ConfigDict:
  """Pretraining on clean chains, until it can do them about as often as not: a fixed number of
  steps would stop before the ability appears on one seed and long after it on another."""
  c = tiny()
  c.steps = 1500
  c.data.source, c.data.split = 'dataset', 'corpus'
  c.data.prompts_per_step = 64
  c.task = config_lib.task_config('arithmetic', operations=(1, 2, 3, 4))
  supervised(c)
  c.optimizer.learning_rate = 4e-3
  c.optimizer.warmup_steps = 50
  c.eval.every_steps = 25
  c.eval.stop_at_sampled_accuracy = 0.43
  return c


def base() -> ConfigDict:
  """Then some "web text": mostly direct answers and sloppy chains."""
  c = tiny()
  c.steps = 200
  c.student.path = 'stage:base_clean'
  c.data.source, c.data.split = 'dataset', 'corpus'
  c.data.prompts_per_step = 64
  c.task = config_lib.task_config('arithmetic', operations=(1, 2, 3, 4), clean=0.2, direct=0.4,
                                  sloppy=0.4, corpus_examples=12800, data_seed=1)
  supervised(c)
  c.optimizer.learning_rate = 4e-3
  c.optimizer.final_learning_rate = 2e-4
  c.optimizer.schedule = 'linear'
  return c


def supervised(c: ConfigDict) -> None:
  """Cross-entropy on given completions."""
  c.objective.distill_coef = 0.0
  c.objective.likelihood_coef = 1.0
  c.objective.importance = 'none'


def teacher() -> ConfigDict:
  """GRPO with the verifier's reward."""
  c = tiny()
  c.steps = 400
  c.student.path = 'stage:base'
  c.data.prompts_per_step, c.data.samples_per_prompt = 32, 8
  c.objective.distill_coef = 0.0
  c.objective.reward_coef = 1.0
  c.objective.reward_baseline = 'group_mean_std'
  c.objective.importance = 'ppo_clip(0.2)'
  c.optimizer.learning_rate, c.optimizer.final_learning_rate = 8e-4, 8e-5
  c.optimizer.schedule = 'linear'
  c.eval.every_steps = 10
  return c


def distil() -> ConfigDict:
  """From the base towards the teacher, on the student's own samples."""
  c = tiny()
  c.student.path = 'stage:base'
  c.teacher.kind, c.teacher.path = 'checkpoint', 'stage:teacher'
  c.optimizer.schedule = 'linear'
  c.optimizer.warmup_steps = 10
  c.eval.every_steps = 5
  return c


def opd_exact() -> ConfigDict:
  """The exact full-vocabulary reverse KL, 256 prompts a step."""
  c = distil()
  c.steps = 80
  exact(c)
  c.optimizer.learning_rate, c.optimizer.final_learning_rate = 4e-3, 4e-4
  return c


def opd_exact_small() -> ConfigDict:
  """The same with 64 prompts a step."""
  c = opd_exact()
  c.steps = 120
  c.data.prompts_per_step = 64
  c.optimizer.learning_rate, c.optimizer.final_learning_rate = 2e-3, 2e-4
  return c


def exact(c: ConfigDict) -> None:
  """Differentiate the divergence over the whole vocabulary instead of sampling it."""
  c.objective.route, c.objective.support = 'direct', 'full'
  c.objective.importance = 'none'


def opd_sampled() -> ConfigDict:
  """The paper's loss: the sampled-token policy gradient."""
  c = distil()
  c.steps = 160
  c.optimizer.learning_rate, c.optimizer.final_learning_rate = 2e-3, 2e-4
  return c


def sweep(c: ConfigDict, which: str) -> ConfigDict:
  """The runs that the settings above were chosen from."""
  if which not in ('rl', 'opd'):
    raise ConfigError(f"sweep={which!r}; allowed: ['opd', 'rl']")
  c.name = f'dense_vs_rl_sweep_{which}'
  c.seeds = (100,)
  stages = {}

  def add(name, make, rate, schedule='linear', warmup=10, prompts=0, steps=0):
    stage = make()
    stage.optimizer.learning_rate, stage.optimizer.schedule = rate, schedule
    stage.optimizer.final_learning_rate = rate / 10 if schedule == 'linear' else 0.0
    stage.optimizer.warmup_steps = warmup
    stage.steps = steps or stage.steps
    if prompts:
      stage.data.prompts_per_step = prompts
      rows = prompts * stage.data.samples_per_prompt
      stage.compute.microbatch_rows = min(rows, stage.compute.microbatch_rows)
    stages[name] = stage

  if which == 'rl':
    for rate in ('4e-4', '8e-4', '16e-4', '32e-4'):
      add(f'rl_{rate}_constant', teacher, float(rate), 'constant', 0, steps=300)
    for rate, warmup in (('4e-4', 0), ('8e-4', 0), ('16e-4', 10)):
      add(f'rl_{rate}', teacher, float(rate), warmup=warmup, steps=300)
    add('rl_8e-4_8_prompts', teacher, 8e-4, 'constant', 0, prompts=8, steps=300)
  else:
    for rate in ('2e-3', '4e-3', '8e-3'):
      add(f'exact_{rate}', opd_exact, float(rate))
    add('exact_4e-3_no_warmup', opd_exact, 4e-3, warmup=0)
    add('exact_4e-3_60_steps', opd_exact, 4e-3, steps=60)
    for rate, prompts, steps in (('2e-3', 64, 120), ('4e-3', 64, 120), ('2e-3', 32, 160),
                                 ('2e-3', 16, 240)):
      add(f'exact_{rate}_{prompts}_prompts', opd_exact_small, float(rate), prompts=prompts,
          steps=steps)
    for rate in ('1e-3', '2e-3', '4e-3'):
      add(f'sampled_{rate}', opd_sampled, float(rate))
    add('sampled_2e-3_constant', opd_sampled, 2e-3, 'constant')
  c.report.methods = c.report.labels = tuple(stages)
  before = {'base_clean': base_clean(), 'base': base()}
  if which == 'opd':
    before['teacher'] = teacher()
  c.stages = ConfigDict({**before, **stages})
  c.order = (*before, *stages)
  return c
