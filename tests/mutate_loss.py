"""Does a test fail for every error that one could make in the loss? A script, not a test.

Each mutation replaces one piece of one line in a copy of the package; the tests named beside it
must fail. Run it from the root of the repository, all of it (minutes) or the mutations whose text
has a word:

  python tests/mutate_loss.py [WORD]

It prints killed or survived for each and exits with the number that survived. A mutation whose text
is no longer in its file stops it: follow the code.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import shutil
import sys
import tempfile

import pytest

# What takes long to import and does not depend on the package: the forks have it already.
for name in ('jax', 'flax', 'optax', 'orbax.checkpoint', 'transformers', 'hypothesis', 'beartype'):
  importlib.import_module(name)

ROOT = pathlib.Path(__file__).parent.parent
UPDATE = 'test_update.py::test_'
CREDIT = 'test_credit.py::'
CHUNKS = ('test_chunks.py',)
WEIGHTS = (UPDATE + 'weights_that_papers_give', UPDATE + 'weights_in_float32_are_those_of_float64_'
           'and_zero_at_equality')
STEP = ('test_oracle.py::test_a_step_adds_the_gradient_of_given_rows',)
MASKED = (UPDATE + 'token_weights_are_detached_and_zero_where_the_mask_is',)
DETACHED = (CREDIT + 'test_everything_is_detached',)
GATES = (CREDIT + 'TestGates', CREDIT + 'test_keep_highest_keeps_ties')
METRICS = (UPDATE + 'metrics_against_numpy',)


def _grid(*names: str) -> tuple[str, ...]:
  """The tests of these objectives of test_oracle.py."""
  return tuple(f'test_oracle.py::test_objective_is_the_oracle[{name}]' for name in names)


# Not here is what something else does again, so that without it nothing changes: either of the two
# `jnp.where(counted` of estimators.py, `at_chosen(sum(terms))` (the weights are zero there) and
# `hit * mask` (so is the signal).
MUTATIONS = (  # file, text, what takes its place, tests
    ('divergences', 'jnp.maximum(difference, -difference)', 'jnp.abs(difference)',
     _grid('total_variation')),
    ('estimators', 'return -jax.jvp', 'return jax.jvp', WEIGHTS),
    ('estimators', 'jnp.where(log_u == 0.0, 0.0, weight', 'jnp.where(log_u == -9.0, 0.0, weight',
     WEIGHTS),
    ('estimators', 'jnp.minimum(log_u, 80.0)', 'log_u', WEIGHTS),
    ('estimators', ' - weight(jnp.zeros_like(log_u))', '', WEIGHTS),
    ('estimators', '0.5 * jnp.square(log_u)', 'jnp.square(log_u)', _grid('k2_extrapolated')),
    ('estimators', 'jnp.expm1(log_u) - log_u', 'jnp.expm1(-log_u) + log_u',
     _grid('k3_with_reward')),
    ('estimators', 'jnp.expm1(log_u) - log_u', 'jnp.expm1(log_u)', _grid('k3_with_reward')),
    ('estimators', 'teacher + (scale - 1.0)', 'teacher + scale', _grid('full_extrapolated')),
    ('estimators', 'jax.nn.log_softmax(teacher + (scale - 1.0) * (teacher - reference), axis=-1)',
     'teacher + (scale - 1.0) * (teacher - reference)', _grid('full_extrapolated')),
    ('estimators', '1 - twice', '1 + 0 * twice', _grid('bucket')),
    ('estimators', 'top_k(teacher, k)[1]\n  elif', 'top_k(student, k)[1]\n'
     '  elif', _grid('drop')),
    ('estimators', 'jax.lax.stop_gradient(mine) - theirs', 'mine - theirs',
     _grid('stop_gradient')),
    ('estimators', 'jax.nn.log_softmax(x, axis=-1) for', '(x + 0.0) for', _grid('renormalize')),
    ('estimators', '(theirs, teacher)))', '(theirs, student)))', _grid('bucket')),
    ('estimators', '.set(_GONE)', '.set(0.0)', _grid('bucket')),
    ('update', "in ('two_sided', 'ppo_clip')", "in ('two_sided',)", _grid('exact_of_the_sampler')),
    ('update', "in ('two_sided', 'ppo_clip')", "in ('ppo_clip',)", _grid('two_sided')),
    ('update', 'heads.reference, o.temperature)', 'heads.reference, o.teacher_temperature)',
     _grid('renormalize')),
    ('update', 'heads.teacher, o.teacher_temperature)', 'heads.teacher, o.temperature)',
     _grid('renormalize')),
    ('update', 'estimators.extrapolate(theirs, reference, o.extrapolation)', 'theirs',
     _grid('full_extrapolated')),
    ('update', "if 'student_hidden' in a:", 'if False:', _grid('exact_rescored')),
    ('update', "a['local_weights'] * coef *", "a['local_weights'] *", _grid('local_negative')),
    ('update', 'coef * o.local.coef *', 'coef *', _grid('local_untrusted')),
    ('update', 'over_support(o.local, *score_lib.same_width(own, teacher))',
     'over_support(o.local, *score_lib.same_width(mine, teacher))', _grid('local_by_entropy')),
    ('update', 'over_support(o.local, *', 'over_support(o, *', _grid('local_negative')),
    ('update', "a['teacher_logprobs'] - logprobs", "logprobs - a['teacher_logprobs']",
     _grid('k3_with_reward')),
    ('update', "a['weights'] * coef * out", "a['weights'] * out", _grid('k2_extrapolated')),
    ('update', "a['weights'] * o.reference_coef", "a['weights']", _grid('drop')),
    ('update', "a['reference_logprobs'] - logprobs", "logprobs - a['reference_logprobs']",
     _grid('extrapolated')),
    ('update', 'same_width(own, reference))', 'same_width(reference, own))', _grid('drop')),
    ('update', 'advantage + coef * jax', 'advantage - coef * jax', _grid('exact_rescored')),
    ('update', 'advantage + coef * jax', 'advantage + jax', _grid('exact_rescored')),
    ('update', "jax.lax.stop_gradient(out['divergence'])", "out['divergence']",
     _grid('exact_of_the_sampler')),
    ('update', "-a['weights'] * surrogate", "a['weights'] * surrogate", _grid('default')),
    ('update', 'jax.lax.stop_gradient(jnp.minimum(ratio', '(jnp.minimum(ratio',
     _grid('truncated')),
    ('update', 'jnp.minimum(ratio, o.ratio_high)', 'ratio', _grid('truncated')),
    ('update', '(ratio >= o.ratio_low) & ', '', _grid('two_sided')),
    ('update', ' & (ratio <= o.ratio_high)', '', _grid('two_sided')),
    ('update', 'jax.lax.stop_gradient(jnp.where(inside', '(jnp.where(inside', _grid('two_sided')),
    ('update', 'jnp.minimum(ratio * advantage, clipped)', 'clipped',
     (*_grid('k3_with_reward'), UPDATE + 'ppo_clip_is_pessimistic')),
    ('update', 'credit.reduction_weights(counted', 'credit.reduction_weights(mask',
     _grid('fixed_negative')),
    ('update', 'credit.distill_coef(o, step)', 'o.distill_coef', _grid('k2_extrapolated')),
    ('update', 'advantage = advantage + coef * distil', 'advantage = advantage + distil',
     _grid('local_negative')),
    ('update', 'distil * (1.0 - local)', 'distil * local', _grid('local_untrusted')),
    ('update', 'else local * weights', 'else local', _grid('local_untrusted')),
    ('update', 'credit.local_gate(o, batch, distil, noise)',
     'credit.local_gate(o, batch, advantage, noise)', _grid('local_negative')),
    ('update', 'credit.teacher_logprobs(o, batch) if', 'batch.teacher.logprobs if',
     _grid('k2_extrapolated')),
    ('update', 'jnp.add, grads, more)', 'jnp.subtract, grads, more)', STEP),
    ('update', 'total + extra,', 'total,', STEP),
    ('update', 'objective=given_objective', 'objective=objective', STEP),
    ('update', 'jnp.sum(counted) /', 'jnp.sum(mask) /', STEP),
    ('update', 'jnp.sum(local * counted)', 'jnp.sum(local)', STEP),
    ('update', "metrics['distill_coef'] = coef", "metrics['distill_coef'] = 1.0 * o.distill_coef",
     STEP),
    ('update', "mean(aux['logprobs'] - theirs)", "mean(theirs - aux['logprobs'])", METRICS),
    ('credit', 'mask / jnp.maximum(jnp.sum(mask), 1.0)', 'mask / mask.size', _grid('default')),
    ('credit', 'jnp.sum(jnp.any(mask > 0, axis=1))', '1.0 * len(mask)',
     _grid('skew_reverse_kl')),
    ('credit', 'reward + discount * later', 'reward + later', _grid('later_returns')),
    ('credit', 'reverse=True', 'reverse=False', _grid('later_returns')),
    ('credit', 'total = total - rewards', 'pass', _grid('later_returns')),
    ('credit', '- jnp.cumsum(mask, axis=1)\n', '- jnp.cumsum(mask, axis=1) + 1.0\n',
     _grid('two_sided')),
    ('credit', 'jnp.mean(groups, axis=1, keepdims=True)', 'jnp.mean(groups)',
     _grid('exact_rescored')),
    ('credit', 'True) + 1e-4)', 'True) + 1e-2)', _grid('k3_with_reward')),
    ('credit', '-(theirs < own)', '-(theirs > own)', _grid('fixed_negative')),
    ('credit', 'jnp.exp(o.shaping_scale * own)', 'jnp.exp(own)', _grid('two_sided')),
    ('credit', 'o.term, theirs - own)', 'o.term, own - theirs)', _grid('default')),
    ('credit', 'jnp.clip(raw, -o.shaping_scale', 'jnp.clip(raw, 0.0', _grid('truncated')),
    ('credit', 'jnp.log1p(jnp.abs(raw))', 'jnp.log1p(raw**2)', _grid('later_returns')),
    ('credit', 'x for x in (totals', '0 * x for x in (totals', _grid('truncated')),
    ('credit', 'return values - jnp.sum(values * mask)', 'return values - jnp.sum(values)',
     _grid('later_returns')),
    ('credit', 'linear_schedule(o.distill_coef, o.final_distill_coef',
     'linear_schedule(o.final_distill_coef, o.distill_coef', _grid('k2_extrapolated')),
    ('credit', 'theirs + (o.extrapolation - 1.0)', 'theirs + o.extrapolation',
     _grid('extrapolated')),
    ('credit', 'return batch.rollout.sampler_logprobs + batch.rollout.policy_offset',
     'return batch.rollout.sampler_logprobs', _grid('exact_of_the_sampler')),
    ('credit', 'return batch.rollout.sampler_logprobs + batch.rollout.policy_offset',
     'return batch.rollout.sampler_logprobs', _grid('local_untrusted_by_the_sampler')),
    ('credit', 'baseline, group_size) * mask)', 'baseline, group_size))',
     (CREDIT + 'TestBaselines',)),
    ('credit', 'jax.lax.stop_gradient(subtract_baseline(', '(subtract_baseline(', DETACHED),
    ('credit', 'jax.lax.stop_gradient(total)', 'total', MASKED),
    ('credit', 'o.likelihood_coef * mask', 'o.likelihood_coef + 0.0 * mask', MASKED),
    ('credit', 'advantage[:, None] * mask', 'advantage[:, None] * (mask > -1)', MASKED),
    ('credit', 'jnp.cumsum(mask, axis=1) - 1.0', 'jnp.cumsum(mask, axis=1)',
     _grid('exact_of_the_sampler')),
    ('credit', 'place < o.window_start', 'place <= o.window_start',
     _grid('exact_of_the_sampler')),
    ('credit', '(rewards >= 1.0)[', '(rewards > 0.0)[', _grid('fixed_negative')),
    ('credit', '(rewards < 1.0)', '(rewards <= 1.0)', _grid('jensen_shannon')),
    ('credit', 'lead > 0.0, lead < 0.0', 'lead < 0.0, lead > 0.0', _grid('skew_kl')),
    ('credit', 'jnp.where(rewards >= 1.0, lead', 'jnp.where(rewards > 0.0, lead',
     _grid('skew_kl', 'k3_with_reward', 'renormalize')),
    ('credit', 'count > 0, o.row_keep', 'count >= 0, o.row_keep', GATES),
    ('credit', '/ jnp.maximum(count, 1.0)\n', '\n', _grid('skew_reverse_kl')),
    ('credit', 'mask > 0, o.token_keep', 'mask >= 0, o.token_keep', _grid('exact_rescored')),
    ('credit', 'jnp.max(x * mask)', 'jnp.max(x)', GATES),
    ('credit', '(1.0 - unit(student.entropy)) *', '(1.0 - student.entropy) *',
     _grid('alpha_divergence')),
    ('credit', 'return student.entropy', 'return teacher.entropy', _grid('exact_rescored')),
    ('credit', '    return teacher.entropy', '    return student.entropy', _grid('bucket')),
    ('credit', 'axis=1) * reachable', 'axis=1) + 0 * reachable',
     _grid('squared_hellinger', 'full_extrapolated')),
    ('credit', 'estimators.top_k(own, o.token_top_k)', 'estimators.top_k(other, o.token_top_k)',
     _grid('squared_hellinger', 'full_extrapolated')),
    ('credit', 'teacher_head, o.teacher_temperature)', 'teacher_head, o.temperature)',
     _grid('full_extrapolated')),
    ('credit', '> o.local.entropy', '< o.local.entropy', _grid('bucket')),
    ('credit', 'noise >= ', 'noise < ', _grid('local_untrusted')),
    ('credit', 'advantage <= 0.0', 'advantage < 0.0', _grid('fixed_negative')),
    ('credit', 'jnp.ceil(share', 'jnp.floor(share', GATES),
    ('credit', 'wanted - 1, 0', 'wanted, 0', GATES),
    ('credit', 'score >= threshold', 'score > threshold', GATES),
    ('chunks', 'jnp.where(real, losses, 0.0)', 'losses', _grid('default')),
    ('chunks', "mode='edge'", "mode='constant'", CHUNKS),
    ('chunks', 'lambda total, x: total + x.astype', 'lambda total, x: x.astype',
     _grid('default')),
    ('chunks', '(scale * x)', 'x', CHUNKS),
    ('chunks', '(scale * d_hidden)', 'd_hidden', CHUNKS),
    ('chunks', 'return total + value, out', 'return value, out', CHUNKS),
    ('chunks', '(total + value, d_head)', '(value, d_head)', _grid('default')),
    ('chunks', 'jnp.zeros(x.shape, _wide(x))', 'jnp.zeros(x.shape, x.dtype)', CHUNKS),
)


def _run(folder: str, file: str, text: str, other: str, tests: tuple[str, ...]) -> int:
  """In a child process: the exit status of the tests, with `other` in the place of `text`."""
  shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(
      '.git', '__pycache__', '.pytest_cache', 'shared'))
  path = pathlib.Path(folder) / 'opd_jax' / f'{file}.py'
  path.write_text(path.read_text().replace(text, other))
  os.chdir(folder)
  os.environ['PYTHONPATH'] = folder  # for what the tests start
  sys.path[:1] = [folder]  # the first was this file's folder
  with open('output', 'w') as output:
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    return pytest.main(['-n', '0', '-x', '-q', *(f'tests/{t}' for t in tests)])


def _start(mutation: tuple[str, str, str, tuple[str, ...]], folder: str) -> int:
  """The process id of a fork that tests a mutation: nothing heavy is imported again."""
  sys.stdout.flush()
  child = os.fork()
  if not child:
    status = 3
    try:
      status = _run(folder, *mutation)
    finally:
      os._exit(status)
  return child


def main() -> int:
  chosen = [m for m in MUTATIONS if all(word in ' '.join(m[:3]) for word in sys.argv[1:])]
  for file, text, *_ in chosen:
    number = (ROOT / 'opd_jax' / f'{file}.py').read_text().count(text)
    if number != 1:
      raise ValueError(f'{file}.py has {text!r} {number} times; allowed: 1')
  count, running = 0, {}
  while chosen or running:
    if chosen and len(running) < 2:
      folder = tempfile.TemporaryDirectory()
      mutation = chosen.pop(0)
      running[_start(mutation, folder.name)] = mutation, folder
      continue
    child, status = os.wait()
    mutation, folder = running.pop(child)
    status = os.waitstatus_to_exitcode(status)
    if status not in (0, 1):  # nothing collected, or no such test
      raise RuntimeError(f'{mutation}: {(pathlib.Path(folder.name) / "output").read_text()}')
    folder.cleanup()
    count += status == 0
    print('killed  ' if status else 'SURVIVED', *(repr(x) for x in mutation[:3]), flush=True)
  print(f'{count} survived')
  return count


if __name__ == '__main__':
  sys.exit(main())
