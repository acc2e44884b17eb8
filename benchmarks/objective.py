"""What one learning step costs on one CPU core, objective by objective, side by side.

    python benchmarks/objective.py [--microbatch_rows 4] [--chunk_tokens 512] [--rounds 5]

A batch of 32 rows of 32 + 128 tokens, a vocabulary of 32768, a Qwen3 student of 256 x 4 layers and
a teacher of 512 x 8, float32, random weights. A learning step is what the loop does with a rollout:
the teacher scores it, the student scores it where the objective asks for that, and the update.

One process times all objectives in turn, round by round, so that ratios hold on a machine whose
speed drifts; printed are medians of wall time (CPU time in brackets), the ratio of the update to
that of the sampled reverse KL, and the share of the floor: the operations of the step (its matrix
products, each once) at the speed of this core's best large matrix product, measured in the same
run, divided by the time. Then a fresh process for each objective takes three steps, with the
allocator as the launcher `opd` sets it, and prints its peak resident memory.
Ten minutes on a core that is shared.
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import statistics
import subprocess
import sys
import time

if hasattr(os, 'sched_setaffinity'):  # one core, before JAX starts its threads
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from opd_jax import __main__ as launcher  # noqa: E402
from opd_jax import models, types  # noqa: E402
from opd_jax.algorithm import score, update  # noqa: E402
from opd_jax.algorithm.objective import Objective, wants  # noqa: E402
from opd_jax.models import params  # noqa: E402

ROWS, PROMPT, NEW, VOCAB = 32, 32, 128, 32768
STUDENT, TEACHER = (256, 768, 4), (512, 1536, 8)  # width, feed-forward width, layers
PARTS = ('score_teacher', 'score_student', 'update', 'step')
_direct = functools.partial(Objective, route='direct', importance='none')
OBJECTIVES = {  # the others are compared with the first
    'sampled': Objective(),
    'full': _direct(support='full'),
    'full_js': _direct(support='full', divergence='jensen_shannon(0.5)'),
    'teacher_top_k': _direct(support='teacher_top_k(64, tail="bucket")'),
    'union_top_k': _direct(support='union_top_k(64, tail="bucket")')}


def make_model(width: int, inner: int, layers: int) -> types.Model:
  """A Qwen3 with heads of 64 and a tied head."""
  return models.build(dict(
      model_type='qwen3', vocab_size=VOCAB, hidden_size=width, intermediate_size=inner,
      num_hidden_layers=layers, num_attention_heads=width // 64,
      num_key_value_heads=width // 128, head_dim=64, rms_norm_eps=1e-6, rope_theta=1e6,
      tie_word_embeddings=True, max_position_embeddings=4096))


def forward_flops(shape: tuple[int, int, int]) -> float:
  """Multiplications and additions of one forward pass without the head, all positions counted."""
  width, inner, layers = shape
  length = PROMPT + NEW - 1
  per_token = layers * 2 * (3 * width * width + 3 * width * inner)  # keys and values: half a width
  attention = layers * 4 * width * length**2
  return ROWS * (length * per_token + attention)


def head_flops(shape: tuple[int, int, int]) -> float:
  """One product with the vocabulary, for the completions."""
  return 2.0 * ROWS * NEW * shape[0] * VOCAB


def step_flops(objective: Objective) -> dict[str, float]:
  """The operations of each part of a learning step."""
  student, teacher = forward_flops(STUDENT), forward_flops(TEACHER)
  out = {'score_teacher': teacher, 'update': 3 * (student + head_flops(STUDENT))}
  asked = wants(objective)
  if asked['teacher'].hidden:
    out['update'] += head_flops(TEACHER)
  else:
    out['score_teacher'] += head_flops(TEACHER)
  if asked['student']:
    out['score_student'] = student + head_flops(STUDENT)
  return out


class Step:
  """The learning step of one objective, on a fixed rollout."""

  def __init__(self, name: str, microbatch_rows: int, chunk_tokens: int):
    o = self.objective = OBJECTIVES[name]
    student, teacher = make_model(*STUDENT), make_model(*TEACHER)
    sizes = dict(microbatch_rows=microbatch_rows, chunk_tokens=chunk_tokens)

    def scorer(model, known):
      return jax.jit(functools.partial(
          score.teacher_logprob_fn, model=model, temperature=1.0, wants=known, **sizes))

    def draw(model, seed):  # by NumPy: to compile the initializers would take longer than to train
      rng, flat = np.random.default_rng(seed), params.flatten(model.specs)
      return params.unflatten({
          name: jnp.asarray(np.ones(spec.shape, np.float32) if len(spec.hf_shape) == 1 else
                            0.05 * rng.standard_normal(spec.shape, np.float32))
          for name, spec in flat.items()})

    optimizer = optax.adam(1e-5)
    asked = wants(o)
    self.score_teacher = scorer(teacher, asked['teacher'])
    self.score_student = scorer(student, asked['student']) if asked['student'] else None
    self.update = jax.jit(functools.partial(
        update.update_fn, model=student, optimizer=optimizer,
        terms=(update.Term(name, o, microbatch_rows=microbatch_rows),), chunk_tokens=chunk_tokens),
        donate_argnums=0)
    self.teacher_params, trained = draw(teacher, 1), draw(student, 0)
    self.teacher_head = teacher.head(self.teacher_params) if asked['teacher'].hidden else None
    self.state = types.TrainState(jnp.int32(0), trained, optimizer.init(trained))
    tokens = np.random.RandomState(0).randint(0, VOCAB, (ROWS, PROMPT + NEW))
    mask = np.zeros((ROWS, PROMPT + NEW - 1), np.float32)
    mask[:, PROMPT - 1:] = 1.0
    self.rollout = types.Rollout(
        tokens=jnp.asarray(tokens, jnp.int32), valid=jnp.ones(tokens.shape, bool),
        mask=jnp.asarray(mask), sampler_logprobs=-np.float32(np.log(VOCAB)) * jnp.asarray(mask),
        policy_offset=jnp.zeros(mask.shape), ended=jnp.ones(ROWS, bool), prompt_length=PROMPT)

  def run(self) -> dict[str, tuple[float, float]]:
    """One learning step; (wall, CPU) seconds of each of its parts."""
    spent = {}

    def timed(name, f, *args):
      wall, cpu = time.perf_counter(), time.process_time()
      out = jax.block_until_ready(f(*args))
      spent[name] = (time.perf_counter() - wall, time.process_time() - cpu)
      return out

    own = None
    theirs = timed('score_teacher', self.score_teacher, self.teacher_params, self.rollout)
    if self.score_student is not None:
      own = timed('score_student', self.score_student, self.state.params, self.rollout)
    self.state, _ = timed('update', self.update, self.state,
                          (types.Batch(self.rollout, theirs, own),),
                          types.Heads(self.teacher_head))
    spent['step'] = tuple(map(sum, zip(*spent.values(), strict=True)))
    return spent


def matmul_flops_per_s() -> float:
  """The best of some large float32 matrix products on this core."""
  best = 0.0
  product = jax.jit(jnp.matmul)
  for m, k, n in ((2048, 2048, 2048), (5120, 256, 768), (512, 256, VOCAB)):
    a, b = jnp.ones((m, k)), jnp.ones((k, n))
    product(a, b).block_until_ready()
    for _ in range(5):
      began = time.perf_counter()
      product(a, b).block_until_ready()
      best = max(best, 2 * m * k * n / (time.perf_counter() - began))
  return best


def measure(args: argparse.Namespace) -> None:
  """Times the objectives in turn, and prints the table."""
  steps = {}
  for name in args.objectives:
    began = time.perf_counter()
    steps[name] = Step(name, args.microbatch_rows, args.chunk_tokens)
    steps[name].run()
    print(f'{name}: first step, with compiling, {time.perf_counter() - began:.1f} s', flush=True)
  speed = matmul_flops_per_s()
  rounds = {name: [] for name in steps}
  for _ in range(args.rounds):
    for name, step in steps.items():
      rounds[name].append(step.run())
    speed = max(speed, matmul_flops_per_s())
  print(f'best matrix product {speed / 1e9:.0f} GFLOP/s; microbatch_rows={args.microbatch_rows}, '
        f'chunk_tokens={args.chunk_tokens}; seconds, medians of {args.rounds} rounds')
  print(f'{"":14}' + ''.join(f'{part:>18}' for part in PARTS)
        + '   update to the first   share of the floor: update, step')
  first = None
  for name, runs in rounds.items():
    wall, cpu = ({part: statistics.median(r[part][i] for r in runs) for part in runs[0]}
                 for i in (0, 1))
    first = first or runs
    ratio = statistics.median(
        a['update'][0] / b['update'][0] for a, b in zip(runs, first, strict=True))
    needed = step_flops(OBJECTIVES[name])
    shares = [needed['update'] / speed / wall['update'], sum(needed.values()) / speed
              / wall['step']]
    print(f'{name:14}' + ''.join(
        f'{wall[p]:9.2f} ({cpu[p]:5.2f}) ' if p in wall else f'{"-":>18}' for p in PARTS)
        + f'{ratio:18.2f}' + f'{shares[0]:22.2f}{shares[1]:8.2f}', flush=True)


def main() -> None:
  """Times in one process, and peak memory in one for each objective."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--microbatch_rows', type=int, default=4)
  parser.add_argument('--chunk_tokens', type=int, default=512)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--objectives', nargs='+', default=list(OBJECTIVES), choices=OBJECTIVES)
  parser.add_argument('--part', choices=('time', 'memory'), help='(of a child process)')
  args = parser.parse_args()
  if args.part == 'time':
    measure(args)
  elif args.part == 'memory':
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = Step(args.objectives[0], args.microbatch_rows, args.chunk_tokens)
    for _ in range(3):
      step.run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f'{args.objectives[0]:14} peak resident memory {peak / 2**20:.2f} GiB, of which '
          f'{before / 2**20:.2f} with nothing but the imports')
  else:
    env = {**os.environ, **launcher._MALLOC, 'JAX_PLATFORMS': 'cpu'}
    again = [sys.executable, __file__, *sys.argv[1:]]
    subprocess.run([*again, '--part', 'time'], env=env, check=True)
    for name in args.objectives:
      subprocess.run([*again, '--part', 'memory', '--objectives', name], env=env, check=True)


if __name__ == '__main__':
  main()
