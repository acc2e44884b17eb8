"""The statistics that tell estimators apart, and the command that prints them."""

import dataclasses
import functools
import io
import itertools
import json
import math

from conftest import _QUICK, make_rollout
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
import tiny

from opd_jax import config
from opd_jax.algorithm import metrics, score
from opd_jax.algorithm import support as support_lib
from opd_jax.rules import objective as objective_rules
from opd_jax.rules import run as run_rules
from opd_jax.run import evaluate
from opd_jax.tools import compare_estimators, compare_models, gradient_statistics, pipeline

TINY = dict(diagnose__prompts=16, diagnose__top_k=4, eval__problems=4)


def _logprobs(*shape, seed=0, scale=2.0):
  x = scale * np.random.RandomState(seed).standard_normal(shape)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(('width', 'k'), [(17, 1), (100, 3), (1000, 16), (1001, 1), (64, 32)])
def test_top_k_in_two_steps(width, k):
  x = np.random.RandomState(0).standard_normal((7, width)).astype(np.float32)
  x[0] = np.sort(x[0])  # all of them in one block or two
  x[1, ::2] = -np.inf
  x[2] = 0.5  # everything ties: the first ones, as jax.lax.top_k has it
  for mine, wanted in zip(support_lib.top_k(jnp.asarray(x), k), jax.lax.top_k(x, k), strict=True):
    np.testing.assert_array_equal(mine, wanted)


class TestOverlap:

  @pytest.mark.parametrize('k', [1, 3, 8])
  def test_against_sets(self, k):
    own, other = _logprobs(20, 17), _logprobs(20, 17, seed=1)
    got = metrics.overlap(jnp.asarray(own), jnp.asarray(other), k)
    for i in range(20):
      mine, theirs = (set(np.argsort(-x[i])[:k]) for x in (own, other))
      p = np.exp(own[i])
      assert float(got['overlap_count'][i]) == pytest.approx(len(mine & theirs) / k, abs=1e-6)
      # float32 sums of at most 17 terms below 1
      assert float(got['overlap_mass'][i]) == pytest.approx(p[list(mine & theirs)].sum(), abs=1e-6)
      outside = [v for v in range(17) if v not in theirs]
      assert float(got['mass_outside'][i]) == pytest.approx(p[outside].sum(), abs=1e-6)

  def test_of_a_model_with_itself(self):
    own = jnp.asarray(_logprobs(5, 9))
    got = metrics.overlap(own, own, 4)
    np.testing.assert_array_equal(got['overlap_count'], 1.0)
    np.testing.assert_allclose(got['overlap_mass'] + got['mass_outside'], 1.0, atol=1e-6)


class TestAuroc:

  def test_against_all_pairs_with_ties(self):
    rng = np.random.RandomState(0)
    scores, right = rng.randint(0, 6, 40) / 2.0, rng.rand(40) < 0.4
    wins = [1.0 if a > b else 0.5 if a == b else 0.0
            for a in scores[right] for b in scores[~right]]
    assert gradient_statistics.auroc(scores, right) == pytest.approx(np.mean(wins), abs=1e-12)
    assert gradient_statistics.auroc(-scores, right) == pytest.approx(1 - np.mean(wins), abs=1e-12)

  def test_of_one_kind_only(self):
    assert math.isnan(gradient_statistics.auroc(np.ones(3), np.ones(3, bool)))
    assert math.isnan(gradient_statistics.auroc(np.ones(3), np.zeros(3, bool)))


def test_places():
  mask = np.array([[0, 1, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0], [0] * 7, [1, 1, 1, 0, 0, 0, 0]])
  got = {name: x.astype(int).tolist() for name, x in gradient_statistics.places(mask).items()}
  assert got['all'] == mask.tolist()
  assert got['first token'] == [[0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0] * 7,
                                [1, 0, 0, 0, 0, 0, 0]]
  # Five tokens: 0 and 1, 2, 3, 4. One token: the first quarter. Three: 0, 1 and 2 of 4.
  assert got['quarter 1'] == [[0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0] * 7,
                              [1, 0, 0, 0, 0, 0, 0]]
  assert got['quarter 4'] == [[0, 0, 0, 0, 0, 1, 0], [0] * 7, [0] * 7, [0] * 7]
  quarters = np.sum([got[f'quarter {q}'] for q in (1, 2, 3, 4)], axis=0)
  assert quarters.tolist() == mask.tolist()


def _statistics(g, x):
  return gradient_statistics.gradient_statistics(g @ g.T, g @ x.T, x @ x.T)


class TestGradientStatistics:

  def test_known_mean_and_covariance(self):
    # x ~ N(m, s^2 I), g = a x + b + N(0, t^2 I) in 30 dimensions; everything follows.
    rng, count, wide, a, s, t = np.random.RandomState(0), 2000, 30, 0.7, 0.2, 0.5
    m, b = rng.standard_normal(wide), 0.3 * rng.standard_normal(wide)
    x = m + s * rng.standard_normal((count, wide))
    g = a * x + b + t * rng.standard_normal((count, wide))
    got = _statistics(g, x)
    size, mean = np.linalg.norm(m), a * m + b
    variance = wide * (a**2 * s**2 + t**2)
    # 2000 batches: the mean is known to 2.2 % of a deviation in each direction
    assert got['bias'] == pytest.approx(np.linalg.norm(mean - m) / size, rel=0.03)
    assert got['biased']
    apart = wide * ((1 - a)**2 * s**2 + t**2)
    assert got['noise'] == pytest.approx((apart / count)**0.5 / size, rel=0.03)
    assert got['variance'] == pytest.approx(variance / size**2, rel=0.03)
    assert got['snr'] == pytest.approx(mean @ mean / variance, rel=0.03)
    assert got['cosine'] == pytest.approx(mean @ m / size / np.linalg.norm(mean), abs=0.01)
    draws = mean + (a**2 * s**2 + t**2)**0.5 * rng.standard_normal((20000, wide))
    cosines = draws @ m / size / np.linalg.norm(draws, axis=1)
    assert got['cosine_of_one'] == pytest.approx(cosines.mean(), abs=0.01)

  def test_few_batches_estimate_squares_without_bias(self):
    # Averaged over many draws of 8 batches; squares of plain means would be 0.125 |noise|^2 off.
    rng, wide = np.random.RandomState(1), 20
    m = rng.standard_normal(wide)
    squares, variances, cosines, wanted = [], [], [], []
    for _ in range(3000):
      g = m + rng.standard_normal((8, wide))
      squares.append(gradient_statistics.across(g @ g.T))
      variances.append(np.mean(np.diag(g @ g.T)) - squares[-1])
      # With the size of E x, which 8 batches know badly, put right.
      cosines.append(_statistics(g, g)['cosine_of_one'] * squares[-1]**0.5)
      wanted.append(np.mean(g @ m / np.linalg.norm(g, axis=1)))
    # the standard errors are 0.06 and 0.05
    assert np.mean(squares) == pytest.approx(m @ m, abs=0.25)
    assert np.mean(variances) == pytest.approx(wide, abs=0.2)
    assert np.mean(cosines) == pytest.approx(np.mean(wanted), rel=0.02)

  def test_the_exact_gradient_itself(self):
    x = 1.0 + 0.3 * np.random.RandomState(2).standard_normal((8, 12))
    got = _statistics(x, x)
    assert (got['bias'], got['noise'], got['bias_p'], got['biased']) == (0.0, 0.0, 1.0, False)
    assert got['cosine'] == pytest.approx(1.0, abs=1e-12)

  def test_no_false_alarms_without_a_bias(self):
    rng = np.random.RandomState(3)
    found = [_statistics(x + rng.standard_normal((8, 6)), x) for x in
             1.0 + 0.1 * rng.standard_normal((400, 8, 6))]
    p = np.array([f['bias_p'] for f in found])
    # A test at level q is wrong in a share q: 1/128 is the least p that 8 batches can give.
    assert np.mean([f['biased'] for f in found]) < 0.025
    assert np.mean(p <= 0.25) == pytest.approx(0.25, abs=0.07)

  def test_a_bias_of_four_times_the_noise_is_found(self):
    rng = np.random.RandomState(4)
    x = np.ones((8, 6))
    g = x + 4 / 8**0.5 + rng.standard_normal((100, 8, 6))
    found = [_statistics(one, x)['biased'] for one in g]
    assert np.mean(found) > 0.9

  def test_where_the_exact_gradient_vanishes(self):
    g = np.random.RandomState(5).standard_normal((8, 3))
    got = _statistics(g, 0 * g)
    assert not got.pop('biased') and all(map(math.isnan, got.values()))


class TestSignFlips:

  def test_all_of_them(self):
    d = np.random.RandomState(0).standard_normal((6, 3)) + 0.5
    lengths = [np.sum((np.array(s) @ d)**2) for s in itertools.product((1, -1), repeat=6)]
    wanted = np.mean(np.array(lengths) >= np.sum(d.sum(axis=0)**2) - 1e-9)
    assert gradient_statistics.sign_flip_p(d @ d.T) == pytest.approx(wanted, abs=1e-12)

  def test_a_draw_of_them(self):
    d = np.random.RandomState(1).standard_normal((16, 3)) + 0.4
    lengths = np.sum((np.array(list(itertools.product((1, -1), repeat=16))) @ d)**2, axis=1)
    wanted = np.mean(lengths >= np.sum(d.sum(axis=0)**2))
    assert 0.02 < wanted < 0.5
    # of 8192 draws, three standard errors
    assert gradient_statistics.sign_flip_p(d @ d.T) == pytest.approx(wanted, abs=0.017)


# --- The command, on a trained pair ---

UNBIASED = ('sampled', 'sampled, exact baseline', 'sampled, leave_one_out baseline',
            'sampled, k2 direct')
BIASED = (compare_estimators.THIS, 'sampled, log', 'exact forward KL')


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
  """(what diagnose.json says, what was printed, the parts, the probe) of a run, with some of the
  estimators: every one is a program to compile, and what each expects is in
  test_expectations.py."""
  every, take = compare_estimators.objectives, compare_estimators.take_probe
  seen = []

  def some(*args):
    return {name: o for name, o in every(*args).items()
            if name in (compare_estimators.EXACT, *UNBIASED, *BIASED)}

  def remember(run, parts):
    seen.extend((parts, take(run, parts)))
    return seen[-1]

  # A clip that is far below the largest log-ratios of this pair.
  c = tiny.with_models('opd_sampled', **TINY, objective__shaping='clip(0.5)')
  out, folder = io.StringIO(), tmp_path_factory.mktemp('diagnose')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compare_estimators, 'objectives', some)
    patch.setattr(compare_estimators, 'take_probe', remember)
    patch.setattr(jax, 'jit', functools.partial(jax.jit, compiler_options=_QUICK))
    patch.setattr(pipeline.metrics, 'make_console', lambda *_: Console(file=out, width=140))
    pipeline.measure(c, None, folder / 'new', write=True)
  return json.loads((folder / 'new' / compare_estimators.RESULT).read_text()), out.getvalue(), *seen


@pytest.fixture(scope='module')
def rows(measured):
  return {row['estimator']: row for row in measured[0]['estimators']}


class TestCommand:

  def test_every_row_is_there_and_this_config_first(self, measured, rows):
    assert list(rows)[0] == compare_estimators.THIS
    assert {*rows} == {compare_estimators.EXACT, *UNBIASED, *BIASED}
    for name in ('where', 'quarter 4', 'AUROC', *rows):
      assert name in measured[1], name
    rate = measured[0]['rates']['shaped_rate']  # of the config's own clip
    assert 0 < rate < 1 and f'shaped_rate {rate:.3f}' in measured[1]

  def test_the_exact_gradient_has_the_least_noise(self, rows):
    exact = rows[compare_estimators.EXACT]
    assert (exact['bias'], exact['noise'], exact['biased']) == (0.0, 0.0, False)
    assert exact['cosine'] == pytest.approx(1.0, abs=1e-6)
    for name in UNBIASED:
      assert exact['variance'] < rows[name]['variance']
      assert exact['snr'] > rows[name]['snr']
      assert exact['cosine_of_one'] > rows[name]['cosine_of_one']

  @pytest.mark.parametrize('name', UNBIASED)
  def test_unbiased(self, name, rows):
    assert not rows[name]['biased'] and rows[name]['cosine'] > 0.9
    assert rows[name]['bias'] < 3 * rows[name]['noise']

  @pytest.mark.parametrize('name', BIASED)
  def test_biased(self, name, rows):
    assert rows[name]['biased'] and rows[name]['bias'] > rows[name]['noise']

  def test_k2_is_the_plain_gradient(self, rows):
    # On the student's own samples the two are the same product, in another order.
    for name in ('variance', 'cosine', 'cosine_of_one'):
      assert rows['sampled, k2 direct'][name] == pytest.approx(rows['sampled'][name], rel=1e-3)

  def test_cost(self, rows):
    # Equal models, forward passes: teacher 1, student's own scores 1, gradient 3.
    assert rows['sampled']['flops'] == 1.0
    for name in (compare_estimators.EXACT, 'sampled, k2 direct'):
      assert rows[name]['flops'] == pytest.approx(4 / 5)
    assert all(row['tokens_per_s'] > 0 for row in rows.values())

  def test_support(self, measured):
    """Everything again from log-probs of the whole vocabulary."""
    _, _, parts, probe = measured
    assert len(probe.rollouts) == 8 and probe.rollouts[0].mask.shape[0] == 32
    own, other, tokens, mask = [], [], [], []
    for rollout in probe.rollouts:
      for into, weights in ((own, probe.student), (other, probe.graders['teacher'].params)):
        hidden = score.completion_hidden(parts.student.model, weights, rollout)
        into.append(jax.nn.log_softmax(parts.student.model.head(weights).logits(hidden)))
      tokens.append(rollout.completion_targets)
      mask.append(rollout.mask[:, rollout.prompt_length - 1:] > 0)
    own, other, tokens, mask = (np.concatenate(x) for x in (own, other, tokens, mask))
    ratio = np.take_along_axis(other - own, tokens[..., None], axis=-1)[..., 0]
    seen = measured[0]['support']
    everywhere, first = seen['places']['all'], seen['places']['first token']
    assert everywhere['tokens'] == mask.sum() == measured[0]['tokens']
    assert first['tokens'] == len(mask)
    # float32 log-probs by another program
    for q in (5, 25, 50, 75, 95):
      assert everywhere[f'log_ratio_p{q:02d}'] == pytest.approx(
          np.percentile(ratio[mask], q), abs=1e-4)
    kl = (np.exp(own) * (own - other)).sum(-1)
    assert everywhere['reverse_kl'] == pytest.approx(kl[mask].mean(), rel=1e-3)
    assert first['reverse_kl'] == pytest.approx(kl[:, 0].mean(), rel=1e-3)
    assert everywhere['entropy_student'] == pytest.approx(
        -(np.exp(own) * own).sum(-1)[mask].mean(), rel=1e-3)
    best = np.argsort(-other[mask])[:, :4]
    outside = 1 - np.take_along_axis(np.exp(own[mask]), best, axis=1).sum(1)
    assert seen['top_k']['4']['mass_outside'] == pytest.approx(outside.mean(), abs=1e-4)


def test_json_has_no_nan():
  got = compare_estimators.plain({'a': [math.nan, {'b': math.inf}], 'c': 1.0})
  assert got == {'a': [None, {'b': None}], 'c': 1.0}
  assert compare_models.number(math.nan) == '–'


def test_informativeness():
  ratio = np.array([[0.0, 1.0, 2.0], [5.0, -1.0, 9.0], [-2.0, -2.0, -2.0], [7.0, 7.0, 7.0]])
  mask = np.array([[0, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]])
  got = compare_models.informativeness(ratio, mask, np.array([1.0, 0.0, 0.5, 1.0]))
  assert got['accuracy'] == 0.5
  assert got['log_ratio_correct'] == 1.5  # the row without tokens has no part in it
  assert got['log_ratio_wrong'] == pytest.approx((4.0 - 6.0) / 5)
  assert got['auroc'] == 0.5  # 1.5 against 2 and -2
  none_right = compare_models.informativeness(ratio, mask, np.zeros(4))
  assert math.isnan(none_right['log_ratio_correct'])


class TestObjectives:

  def make(self, **fields):
    c = tiny.config('opd_exact', teacher__path=str(tiny.ROOT), **fields)
    return compare_estimators.objectives(config.parse(c), tiny.objective_of(c), 16)

  def test_each_is_allowed_and_of_the_configs_own_distributions(self):
    got = self.make(sample__temperature=0.7, objective__teacher_temperature=0.9,
                    objective__reduction='sequence_mean')
    assert list(got)[0] == compare_estimators.THIS and len(got) == len(set(got.values())) + 1 == 18
    for name, o in got.items():
      objective_rules.check(o)
      assert (o.temperature, o.teacher_temperature, o.reduction) == (0.7, 0.9, 'sequence_mean')
      assert o.needs_teacher and not o.needs_rewards, name
    assert got[compare_estimators.EXACT] == got[compare_estimators.THIS]
    assert got['teacher top 16, bucket'].support == 'teacher_top_k(16, tail="bucket")'
    assert dataclasses.replace(got['sampled, clip 5'], shaping='none') == got['sampled']

  def test_k2_only_for_samples_of_the_policy_itself(self):
    for fields in (dict(sample__top_p=0.9), dict(sample__top_k=3)):
      got = self.make(**fields)
      assert compare_estimators.K2 not in got and len(got) == 17


class TestRefused:

  @pytest.mark.parametrize(('kind', 'fields', 'parts'), [
      ('sft', {}, ("teacher.kind='none'", "'checkpoint'")),
      ('sft_teacher', {}, ("data.source='teacher'", "allowed: 'student'")),
      ('opd_exact', dict(diagnose__batches=7), ('diagnose.batches=7', 'at least 8')),
      ('opd_exact', dict(diagnose__prompts=0), ('diagnose.prompts=0', 'at least 1')),
      ('opd_exact', dict(diagnose__top_k=1), ('diagnose.top_k=1', 'at least 2')),
      ('opd_exact', dict(eval__overlap_top_k=-1), ('eval.overlap_top_k=-1', 'at least 0')),
  ])
  def test_before_anything_is_loaded(self, kind, fields, parts):
    c = tiny.config(kind, teacher__path='' if kind == 'sft' else str(tiny.ROOT), **fields)
    with pytest.raises(config.ConfigError) as e:
      compare_estimators.command(c, None, Console())
    assert all(part in str(e.value) for part in (*parts, 'allowed')), e.value

  def test_an_overlap_without_a_teacher_is_read_by_nobody(self):
    run = config.parse(tiny.config('sft', eval__overlap_top_k=4))
    assert run_rules.unused_options(run) == ['eval.overlap_top_k=4 (there is no teacher)']


class TestEvaluation:

  def test_of_all_tokens_the_most_likely_are_the_same(self, tiny_model):
    model, _ = tiny_model
    assert evaluate.clamp_top_k(16, model) == 16
    assert evaluate.clamp_top_k(10**6, model) == model.vocab_in_use // 2 == 24

  def test_it_can_be_off(self, tiny_model):
    model, params = tiny_model
    rollout = make_rollout([[3, 4]], [[5, 6, 7]], prompt_width=2, room=3)
    names = [set(jax.eval_shape(functools.partial(
        evaluate.row_sums, model=model, teacher=model, temperature=1.0, teacher_temperature=1.0,
        chunk_tokens=8, microbatch_rows=0, overlap_top_k=k), params, params, rollout))
        for k in (0, 3)]
    assert names == [{'reverse_kl', 'teacher_logprob', 'tokens'}, {'tokens', *evaluate.BY_TEACHER}]
