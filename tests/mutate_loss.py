"""Does a test fail for every error that one could make in the loss? A script, not a test.

Each mutation replaces one piece of one line in a copy of the package; the tests named beside it
must fail. Run it from the root of the repository, all of it (minutes) or the mutations whose text
has a word:

  python tests/mutate_loss.py [WORD]

It prints killed or survived for each and exits with the number that survived. A mutation whose text
is no longer in its file stops it: follow the code.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
ORACLE = 'test_update.py::test_'
CREDIT = 'test_credit.py::'
WEIGHTS = (ORACLE + 'weights_that_papers_give', ORACLE + 'weights_in_float32_are_those_of_float64_'
           'and_zero_at_equality')
TOP_K = (ORACLE + 'top_k_of_everything_is_the_divergence_itself',
         ORACLE + 'top_k_is_its_definition',
         'test_contracts.py::test_divergence_has_no_nan_at_extreme_logits')
KS = (ORACLE + 'k2_and_k3_are_their_definition',
      ORACLE + 'k2_and_k3_differentiated_at_the_sampled_token')
RATIO = (ORACLE + 'bounded_ratios_are_their_definition', ORACLE + 'ppo_clip_is_pessimistic')
EXACT = (ORACLE + 'the_exact_baseline_keeps_the_mean_of_the_gradient',
         ORACLE + 'self_distillation_is_a_fixed_point_bit_for_bit')
LOSS = (ORACLE + 'loss_and_gradient_against_numpy',)
METRICS = (ORACLE + 'metrics_against_numpy',)

MUTATIONS = (  # file, text, what takes its place, tests
    ('estimators', 'return -jax.jvp', 'return jax.jvp', WEIGHTS),
    ('estimators', 'jnp.where(log_u == 0.0, 0.0, weight', 'jnp.where(log_u == -9.0, 0.0, weight',
     WEIGHTS),
    ('estimators', 'jnp.minimum(log_u, 80.0)', 'log_u', WEIGHTS),
    ('estimators', ' - weight(jnp.zeros_like(log_u))', '', WEIGHTS),
    ('estimators', '0.5 * jnp.square(log_u)', 'jnp.square(log_u)', KS),
    ('estimators', 'jnp.expm1(log_u) - log_u', 'jnp.expm1(-log_u) + log_u', KS),
    ('estimators', 'jnp.expm1(log_u) - log_u', 'jnp.expm1(log_u)', KS),
    ('estimators', '1 - twice', '1 + 0 * twice', TOP_K),
    ('estimators', 'jax.lax.top_k(teacher, top_k)[1]\n  elif', 'jax.lax.top_k(student, top_k)[1]\n'
     '  elif', TOP_K),
    ('estimators', 'jax.lax.stop_gradient(mine) - theirs', 'mine - theirs', TOP_K),
    ('estimators', 'jax.nn.log_softmax(x, axis=-1) for', '(x + 0.0) for', TOP_K),
    ('estimators', '(theirs, teacher)))', '(theirs, student)))', TOP_K),
    ('estimators', '.set(_GONE)', '.set(0.0)', TOP_K),
    ('estimators', 'jnp.where(counted, f(mine, theirs), 0.0)', 'f(mine, theirs)', TOP_K),
    ('estimators', 'jnp.where(counted, x, 0.0) for x', 'x + 0.0 for x', TOP_K),
    ('update', 'advantage + o.distill_coef *', 'advantage - o.distill_coef *', EXACT),
    ('update', 'own = logprobs if student_hidden is None', 'own = logprobs if True', EXACT),
    ('update', "jax.lax.stop_gradient(out['divergence'])", "out['divergence']", EXACT),
    ('update', "loss + o.distill_coef", "loss - o.distill_coef", LOSS),
    ('update', 'loss = loss - jnp.sum', 'loss = loss + jnp.sum', LOSS),
    ('update', "in ('two_sided', 'ppo_clip')", "in ('two_sided',)", RATIO),
    ('update', "in ('two_sided', 'ppo_clip')", "in ('ppo_clip',)", RATIO),
    ('update', 'jax.lax.stop_gradient(jnp.minimum(ratio', '(jnp.minimum(ratio', RATIO),
    ('update', 'jnp.minimum(ratio, o.ratio_high)', 'ratio', RATIO),
    ('update', '(ratio >= o.ratio_low) & ', '', RATIO),
    ('update', ' & (ratio <= o.ratio_high)', '', RATIO),
    ('update', 'jax.lax.stop_gradient(jnp.where(inside', '(jnp.where(inside', RATIO),
    ('update', 'jnp.minimum(ratio * advantage, clipped)', 'clipped', RATIO),
    ('update', 'o.teacher_temperature))\n', 'o.temperature))\n', LOSS),
    ('update', 'credit.reduction_weights(counted', 'credit.reduction_weights(rollout.mask',
     (ORACLE + 'gated_tokens_are_as_if_they_were_masked',)),
    ('update', 'jnp.sum(counted) /', 'jnp.sum(rollout.mask) /',
     (ORACLE + 'gated_tokens_are_as_if_they_were_masked',)),
    ('update', "mean(aux['logprobs'] - theirs)", "mean(theirs - aux['logprobs'])", METRICS),
    ('credit', 'theirs - own)', 'own - theirs)', (CREDIT,)),
    ('credit', '-(theirs < own)', '-(theirs > own)', (CREDIT,)),
    ('credit', 'reward + discount * later', 'reward + later', (CREDIT,)),
    ('credit', 'reverse=True', 'reverse=False', (CREDIT,)),
    ('credit', 'x for x in (totals', '0 * x for x in (totals', (CREDIT,)),
    ('credit', 'return values - jnp.sum(values * mask)', 'return values - jnp.sum(values)',
     (CREDIT,)),
    ('credit', 'jax.lax.stop_gradient(total)', 'total', (CREDIT,)),
    ('credit', 'jnp.cumsum(mask, axis=1) - 1.0', 'jnp.cumsum(mask, axis=1)', (CREDIT,)),
    ('credit', 'place < o.window_start', 'place <= o.window_start', (CREDIT,)),
    ('credit', '(rewards >= 1.0)', '(rewards > 0.0)', (CREDIT,)),
    ('credit', '(rewards < 1.0)', '(rewards <= 1.0)', (CREDIT,)),
    ('credit', 'count > 0, o.row_keep', 'count >= 0, o.row_keep', (CREDIT,)),
    ('credit', 'mask > 0, o.token_keep', 'mask >= 0, o.token_keep', (CREDIT,)),
    ('credit', 'jnp.max(x * mask)', 'jnp.max(x)', (CREDIT,)),
    ('credit', 'jnp.ceil(share', 'jnp.floor(share', (CREDIT,)),
    ('credit', 'wanted - 1, 0', 'wanted, 0', (CREDIT,)),
    ('credit', 'rollout.sampler_logprobs + rollout.policy_offset', 'rollout.sampler_logprobs',
     LOSS),
)


def survives(file: str, text: str, other: str, tests: tuple[str, ...]) -> bool:
  """Whether the tests pass with `other` in the place of `text`."""
  with tempfile.TemporaryDirectory() as folder:
    shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(
        '.git', '__pycache__', '.pytest_cache', 'shared'))
    path = pathlib.Path(folder) / 'opd_jax' / f'{file}.py'
    code = path.read_text()
    if code.count(text) != 1:
      raise ValueError(f'{file}.py has {text!r} {code.count(text)} times; allowed: 1')
    path.write_text(code.replace(text, other))
    command = [sys.executable, '-m', 'pytest', '-n', '0', '-x', '-q']
    result = subprocess.run(
        [*command, *(f'tests/{t}'.removesuffix('::') for t in tests)], cwd=folder,
        env={**os.environ, 'PYTHONPATH': folder}, capture_output=True, text=True)
  if result.returncode not in (0, 1):  # nothing collected, or no such test
    raise RuntimeError(result.stdout + result.stderr)
  return result.returncode == 0


def main() -> int:
  count = 0
  for mutation in MUTATIONS:
    if any(word not in ' '.join(mutation[:3]) for word in sys.argv[1:]):
      continue
    alive = survives(*mutation)
    count += alive
    print('SURVIVED' if alive else 'killed  ', *(repr(x) for x in mutation[:3]), flush=True)
  return count


if __name__ == '__main__':
  sys.exit(main())
