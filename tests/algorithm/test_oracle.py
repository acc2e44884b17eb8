"""Every objective against the oracle of `oracle.py`: all presets, every value of every field."""

from __future__ import annotations

import dataclasses
import functools

from conftest import make_rollout, quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
import optax
import oracle
import pytest
import tabular
import tiny

from opd_jax import config as config_lib
from opd_jax import presets
from opd_jax.algorithm import choices, score, update
from opd_jax.algorithm import objective as objective_lib
from opd_jax.algorithm.choices import shapings
from opd_jax.algorithm.objective import KINDS, LOCAL_KINDS, Local, Objective
from opd_jax.algorithm.update import Term
from opd_jax.data import streams
from opd_jax.errors import ConfigError
from opd_jax.rules import objective as objective_rules
from opd_jax.types import TrainState, Wants

VOCAB = 11
PROMPTS = [[5, 9, 1, 2], [5, 9, 1, 2], [7], [7], [3, 3, 8], [3, 3, 8]]  # in groups of two
ROWS = [[3, 1, 4, 1, 0], [9, 0], [6, 5, 3, 8, 9], [7, 9, 0], [0], [8, 6, 2, 6, 4]]
REWARDS = np.array([1.0, 0.0, 0.25, 1.0, 0.0, 0.0])
STEP = 3  # gradient steps taken, for annealing
EXACT = 1e-10  # float64 leaves far more room, and an error of a formula is of order one


# --- the two sides ---


@functools.lru_cache  # one program for all tests of an objective
def _gradient(o):
  """The package's loss, gradient and metrics: in chunks of 7 tokens and microbatches of 2 rows, so
  that a test against the oracle, which knows neither, is one of both."""
  return quick_jit(lambda *inputs: update.gradient(
      *inputs, model=_model(), term=_term(o), chunk_tokens=7))


def _term(o, name='own'):
  return Term(name, o, group_size=2, microbatch_rows=2)


@functools.lru_cache
def _model():
  return tabular.model(VOCAB, 10, 6)


def _only_what_is_asked_for(o, batch, heads):
  """None in place of all that the objective does not want."""
  asked = objective_lib.wants(o)
  return batch.replace(
      rewards=batch.rewards if o.needs_rewards else None,
      **{name: score.only(getattr(batch, name), known) if known else None
         for name, known in asked.items()}), heads.replace(
             teacher=heads.teacher if asked['teacher'].hidden else None,
             reference=heads.reference if asked['reference'].hidden else None)


@functools.lru_cache
def _rollout():
  """Ragged rows. The sampler is an older policy, with ratios to it on both sides of 1, and was
  truncated, so that what it reports is larger than its own log-probability."""
  rollout = make_rollout(PROMPTS, ROWS, prompt_width=5, room=5, dtype=jnp.float64)
  rng, mask = np.random.RandomState(0), np.asarray(rollout.mask)
  rows = oracle.log_softmax(tabular.logits(_cast().params, rollout))
  chosen = np.take_along_axis(rows, np.asarray(rollout.tokens)[:, 1:, None], axis=-1)[..., 0]
  mass = -0.5 * rng.rand(*mask.shape) * mask
  older = (chosen + 0.25 * rng.standard_normal(mask.shape)) * mask
  return rollout.replace(sampler_logprobs=jnp.asarray(older - mass),
                         policy_offset=jnp.asarray(mass))


@functools.lru_cache
def _cast():
  """Another student was scored than is now updated: what should be detached shows in the loss."""
  student = _model()
  params, teacher, reference = (tabular.random_params(student, seed) for seed in (0, 1, 2))
  return tabular.Cast(student, params, tabular.moved(params, 5, 0.1), teacher, reference)


def _known(o, cast, rollout, key):
  def rows(params, temperature):
    return oracle.log_softmax(tabular.logits(params, rollout) / temperature)

  r = jax.tree.map(np.asarray, rollout)
  return oracle.Known(
      targets=r.tokens[:, 1:], mask=r.mask, sampler_logprobs=r.sampler_logprobs,
      policy_offset=r.policy_offset, student=rows(cast.before, o.temperature),
      teacher=rows(cast.teacher_params, o.teacher_temperature),
      reference=rows(cast.reference_params, o.temperature), rewards=REWARDS,
      noise=np.asarray(jax.random.uniform(key, r.mask.shape, r.mask.dtype)), group_size=2,
      step=STEP)


def _run(o, cast, rollout):
  """(loss, gradient) of the package."""
  inputs = _only_what_is_asked_for(o, *tabular.batch(o, cast, rollout, REWARDS, _scorer))
  return _gradient(o)(cast.params, *inputs, jnp.int32(STEP), jax.random.key(8))[:2]


@functools.lru_cache
def _scorer(temperature):
  return quick_jit(functools.partial(
      score.teacher_logprob_fn, model=_model(), temperature=temperature,
      wants=Wants(logprobs=True, hidden=True), chunk_tokens=1000, microbatch_rows=0))


def _assert_is_the_oracle(o):
  objective_rules.check(o)
  cast, rollout = _cast(), _rollout()
  loss, grads = _run(o, cast, rollout)
  known, logits = _known(o, cast, rollout, jax.random.key(8)), tabular.logits(cast.params, rollout)
  want = oracle.losses(o, known, oracle.log_softmax(logits / o.temperature)).sum()
  error = 1e-7 if o.anneal != 'none' else EXACT  # the schedule computes in float32
  assert float(loss) == pytest.approx(want, rel=error, abs=error)
  by_params = tabular.by_params(oracle.gradient(o, known, logits), cast.params, rollout)
  assert np.linalg.norm(by_params['table']) > 1e-3, 'no gradient to compare'
  for name, value in by_params.items():
    np.testing.assert_allclose(grads[name], value, rtol=0, atol=error, err_msg=name)


# --- every value of every field ---

DIRECT = dict(route='direct', importance='none')
GRID = {
    'default': dict(),
    'later_returns': dict(importance='none', shaping='log', discount=0.7, returns='later',
                          baseline='batch_mean', temperature=0.8, teacher_temperature=1.3),
    'truncated': dict(importance='truncated(1.1)', shaping='clip(0.5)', divergence='forward_kl',
                      baseline='leave_one_out'),
    'two_sided': dict(importance='two_sided(0.8, 1.2)', shaping='power(0.7)', discount=0.9,
                      returns='later_mean', reduction='sequence_mean', baseline='leave_one_out'),
    'exact_of_the_sampler': dict(baseline='exact', importance='ppo_clip(0.1)',
                                 student_logprobs='sampler', window='tokens(start=1, count=3)'),
    'exact_rescored': dict(baseline='exact', token_gate='student_entropy(keep=0.5)',
                           reward_coef=0.3, reward_baseline='group_mean', temperature=1.2,
                           teacher_temperature=0.9, distill_coef=0.6),
    'fixed_negative': dict(signal='fixed_negative', row_gate='correct', likelihood_coef=0.1,
                           local=Local(coef=0.3, gate='negative')),  # where it is 0, too
    'jensen_shannon': dict(divergence='jensen_shannon(0.3)', row_gate='wrong', reward_coef=0.2,
                           token_gate='teacher_entropy(keep=0.4)'),
    'skew_kl': dict(divergence='skew_kl(0.2)', row_gate='reward_agrees', advantages='recomputed'),
    'skew_reverse_kl': dict(divergence='skew_reverse_kl(0.2)', row_gate='teacher_likelihood(0.5)',
                            token_gate='divergence(keep=0.5)', reduction='sequence_mean'),
    'alpha_divergence': dict(divergence='alpha_divergence(0.4)', window='tokens(0, 4)',
                             token_gate='soft_or(keep=0.6)'),
    'squared_hellinger': dict(divergence='squared_hellinger',
                              token_gate='teachability(keep=0.4, top_k=3)'),
    'total_variation': dict(divergence='total_variation', reference_kl='k2(0.2)', temperature=0.8),
    'scaled_jensen_shannon': dict(divergence='scaled_jensen_shannon(0.6)'),
    'extrapolated': dict(extrapolation=1.25, reference_kl='k3(0.3)', student_logprobs='sampler',
                         discount=1.0, teacher_temperature=1.2),
    'k2_extrapolated': dict(DIRECT, estimator='k2', extrapolation=1.5,
                            anneal='linear(steps=4, to=0.25)'),
    'k3_with_reward': dict(route='direct', estimator='k3', divergence='forward_kl',
                           importance='ppo_clip(0.2)', reward_coef=1.0,
                           reward_baseline='group_mean_std', row_gate='reward_agrees'),
    'full_extrapolated': dict(DIRECT, support='full', extrapolation=1.3, window='tokens(0, 2)',
                              temperature=0.9, teacher_temperature=1.4,
                              token_gate='teachability(keep=0.4, top_k=3)'),
    'drop': dict(DIRECT, support='teacher_top_k(4, tail="drop")', divergence='forward_kl',
                 reference_kl='full(0.1)'),
    'renormalize': dict(DIRECT, support='student_top_k(4, tail="renormalize")', extrapolation=0.7,
                        row_gate='reward_agrees', temperature=0.8, teacher_temperature=1.3),
    'bucket': dict(DIRECT, support='union_top_k(4, tail="bucket")',
                   divergence='scaled_jensen_shannon(0.3)', reduction='sequence_mean',
                   token_gate='teacher_entropy(keep=0.5)',
                   local=Local(coef=0.5, gate='teacher_entropy(1.5)')),
    'stop_gradient': dict(route='direct', support='teacher_top_k(4, tail="stop_gradient")',
                          importance='ratio', likelihood_coef=0.2),
    'sft': dict(distill_coef=0.0, likelihood_coef=1.0, importance='none',
                reduction='sequence_mean', token_gate='student_entropy(keep=0.5)'),
    'local_untrusted': dict(local=Local(
        coef=0.5, gate='untrusted', instead=True, support='teacher_top_k(3, tail="drop")')),
    'local_untrusted_by_the_sampler': dict(student_logprobs='sampler', local=Local(
        coef=0.5, gate='untrusted', support='student_top_k(3, tail="renormalize")')),
    'local_negative': dict(
        baseline='leave_one_out', discount=0.5, anneal='linear(steps=4, to=0.2)',
        reward_coef=0.7, row_gate='wrong', local=Local(
            coef=0.5, gate='negative', instead=True, divergence='squared_hellinger',
            support='union_top_k(3, tail="bucket")')),
    'local_everywhere': dict(discount=1.0, returns='later', extrapolation=1.2, local=Local(
        coef=2.0, divergence='reverse_kl')),
    'local_by_entropy': dict(temperature=0.8, teacher_temperature=1.3, baseline='exact',
                             local=Local(coef=1.5, divergence='reverse_kl',
                                         support='student_top_k(2, tail="stop_gradient")',
                                         gate='teacher_entropy(1.7)')),
}


@pytest.mark.parametrize('name', GRID)
def test_objective_is_the_oracle(x64, name):
  _assert_is_the_oracle(Objective(**GRID[name]))


# --- every choice by itself, with arguments from the bounds of its parameters ---

# What it stands beside: the first of these that the rules let it stand beside.
BESIDE = (
    dict(), dict(discount=0.7), dict(reward_coef=0.5), dict(DIRECT, support='full'), DIRECT,
    dict(DIRECT, divergence='forward_kl'), dict(distill_coef=0.0, reward_coef=1.0),
    dict(DIRECT, support='full', divergence='forward_kl'), dict(local=Local(coef=0.5)),
    dict(local=Local(coef=0.5, divergence='reverse_kl')))
EVERY_FIELD = KINDS | {f'local.{field}': kind for field, kind in LOCAL_KINDS.items()}


def _with(fields, field, text):
  """Fields with one more, that of the local term too."""
  if not field.startswith('local.'):
    return Objective(**dict(fields, **{field: text}))
  local = dataclasses.replace(fields['local'], **{field.removeprefix('local.'): text})
  return Objective(**dict(fields, local=local))


def alone(field, text):
  """An objective of a choice, beside as little as possible; None where the rules have none."""
  for fields in BESIDE:
    if field.startswith('local.') and 'local' not in fields:
      continue
    try:
      o = _with(fields, field, text)
      objective_rules.check(o)
    except ConfigError:
      continue
    return o
  return None


CHOICES = [(field, text) for field, kind in EVERY_FIELD.items() for text in tabular.examples(kind)]


@pytest.mark.parametrize(('field', 'text'), CHOICES)
def test_choice_by_itself_is_the_oracle(x64, field, text):
  name = text.partition('(')[0]
  assert name in oracle.DEFINITIONS[field], (
      f'objective.{field} has a new choice {name!r}: tests/oracle.py needs a definition of it that '
      'shares nothing with the package')
  o = alone(field, text)
  if o is None:
    # Of a support's tails and divergences only some pairs mean something; no name is refused.
    assert any(alone(field, other) for f, other in CHOICES
               if f == field and other.partition('(')[0] == name) or text == 'sampled'
    pytest.skip('refused beside every other')
  _assert_is_the_oracle(o)


def test_a_new_shaping_runs_as_its_one_function(x64, monkeypatch):
  def squash(signal: Float[Array, 'B t'], *, width: choices.Positive) -> Float[Array, 'B t']:
    return signal / (1.0 + jnp.abs(signal) / width)

  squash.__module__ = shapings.__name__
  monkeypatch.setattr(shapings, 'squash', squash, raising=False)
  assert 'squash(width=0.3)' in tabular.examples(KINDS['shaping'])  # the grid has it
  with pytest.raises(AssertionError, match='tests/oracle.py needs a definition'):
    test_choice_by_itself_is_the_oracle(None, 'shaping', 'squash(width=0.3)')
  monkeypatch.setitem(oracle.SHAPINGS, 'squash',
                      lambda x, own, theirs, width: np.sign(x) / (1 / np.abs(x) + 1 / width))
  _assert_is_the_oracle(alone('shaping', 'squash(width=0.3)'))


@pytest.mark.parametrize('field', EVERY_FIELD)
def test_the_oracle_defines_what_there_is(field):
  assert {*oracle.DEFINITIONS[field]} - {'none'} == {*EVERY_FIELD[field].functions}


@pytest.mark.parametrize(('field', 'values'), [
    ('route', objective_lib.ROUTES), ('advantages', objective_lib.ADVANTAGES),
    ('reduction', objective_lib.REDUCTIONS), ('student_logprobs', objective_lib.STUDENT_LOGPROBS)])
def test_no_value_is_left_without_an_oracle(field, values):
  assert {getattr(Objective(**fields), field) for fields in GRID.values()} == {*values}


def test_no_field_is_left_without_an_oracle():
  everything = [Objective(**fields) for fields in GRID.values()]
  for field in dataclasses.fields(Objective):
    assert any(getattr(o, field.name) != field.default for o in everything), field.name
  for field in dataclasses.fields(Local):
    assert any(getattr(o.local, field.name) != field.default for o in everything), field.name


# --- every preset ---


def _config(name):
  c = presets.apply(tiny.config('opd_sampled'), name)
  if c.data.source == 'dataset':
    c.data.split = 'corpus'
  if c.given.source == 'dataset':
    c.given.split = 'corpus'
  return c


def _small(part):
  """With a top-k for a vocabulary of 11: two tokens at least stay outside."""
  return dataclasses.replace(part, support=choices.at_most(
      part.KINDS['support'], part.support, VOCAB - 2))


def _objectives(name):
  """Those of a preset: of its own rows, of those off-policy, and of those given beside them."""
  every = [stream.objective for stream in streams.make(config_lib.parse(_config(name)))]
  return [_small(dataclasses.replace(o, local=_small(o.local))) for o in dict.fromkeys(every)]


EVERY = [(name, i) for name in presets.PRESETS for i in range(len(_objectives(name)))]
every_preset = pytest.mark.parametrize(('name', 'which'), EVERY)


@every_preset
def test_preset_is_the_oracle(x64, name, which):
  _assert_is_the_oracle(_objectives(name)[which])


def _pushes_into_its_support(part):
  """Whether the divergence falls while mass moves into the support, even between equals."""
  return (part.choice('divergence').name in ('forward_kl', 'skew_kl')
          and part.choice('support').arguments.get('tail') == 'drop')


@every_preset
def test_a_student_equal_to_its_teacher_stays(x64, name, which):
  o = _objectives(name)[which]
  if o.reward_coef or o.likelihood_coef:
    pytest.skip('it has more than a teacher')
  params = _cast().params
  cast = tabular.Cast(_model(), params, params, params, params)
  loss, grads = _run(o, cast, _rollout())
  size = max(np.abs(np.asarray(g)).max() for g in grads.values())
  if o.local.coef and o.local.gate != 'untrusted' and _pushes_into_its_support(o.local):
    assert size > 1e-3  # of EOPD's top-k: it is made to be small beside the teacher's tail
  elif o.route == 'policy_gradient' and not o.local.coef and o.reference_kl == 'none':
    assert size == float(loss) == 0.0  # no rounding: Adam would make full steps of it
  else:
    assert size < 1e-12


# --- what is kept for the loss is what it reads ---


def _unread(f, *inputs):
  """Where in the inputs the arrays are that no output of f depends on. Of log-probs and entropy,
  which come together, one is enough; and what comes of a rollout is the same for all."""
  traced = jax.make_jaxpr(f)(*inputs)
  _, read = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.out_avals))
  places = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(inputs)]
  unread = {place for place, is_read in zip(places, read, strict=True) if not is_read}
  pair = {'logprobs': 'entropy', 'entropy': 'logprobs'}
  return {place for place in unread if 'rollout' not in place and (
      (parts := place.rpartition('.'))[0] + '.' + pair.get(parts[2], parts[2])) in unread}


@pytest.mark.parametrize('o', [
    *(pytest.param(Objective(**fields), id=name) for name, fields in GRID.items()),
    *(pytest.param(_objectives(name)[which], id=f'{name}-{which}') for name, which in EVERY)])
def test_what_is_held_for_the_loss_is_what_it_reads(x64, o):
  # What is missing cannot be traced.
  how = dict(model=_model(), chunk_tokens=7)
  batch, heads = _only_what_is_asked_for(
      o, *tabular.batch(o, _cast(), _rollout(), REWARDS, _scorer))
  params, head = _cast().params, _model().head(_cast().params)
  assert not _unread(lambda batch, heads: update.gradient(
      params, batch, heads, jnp.int32(STEP), jax.random.key(8), term=_term(o), **how)[:2],
      batch, heads)
  rows = jax.eval_shape(lambda batch, heads: update.weigh(
      o, batch, 1.0, head, heads, jax.random.key(8), group_size=2, chunk_tokens=7)[0], batch, heads)
  assert not _unread(lambda rows: update.loss_fn(
      params, rows, 1.0, heads, objective=o, **how)[0], rows)


# --- a step: given rows beside the student's, and the metrics of gates and schedules ---


def test_a_step_adds_the_gradient_of_given_rows(x64):
  cast, rollout, key = _cast(), _rollout(), jax.random.key(8)
  o = Objective(shaping='clip(0.5)', window='tokens(0, 3)', anneal='linear(steps=4, to=0.2)',
                local=Local(coef=0.5, gate='untrusted', instead=True))
  beside = Objective(route='direct', support='full', importance='none', divergence='skew_kl(0.1)',
                     distill_coef=0.3)
  order = np.array([5, 4, 3, 0])  # other rows
  written = jax.tree.map(lambda x: x[order], rollout)
  optimizer = optax.sgd(1.0)
  step = quick_jit(functools.partial(
      update.update_fn, model=_model(), optimizer=optimizer, chunk_tokens=7,
      terms=(_term(o), _term(beside, 'given'))))
  batch, heads = _only_what_is_asked_for(o, *tabular.batch(o, cast, rollout, REWARDS, _scorer))
  given = _only_what_is_asked_for(beside, *tabular.batch(
      beside, cast, written, REWARDS[order], _scorer))[0]
  state = TrainState(step=jnp.int32(STEP), params=cast.params,
                     opt_state=optimizer.init(cast.params))
  after, metrics = step(state, (batch, given), heads, None, key)

  losses, slopes = [], {'table': 0.0, 'head': 0.0}
  for objective, rows in ((o, rollout), (beside, written)):
    known, logits = _known(objective, cast, rows, key), tabular.logits(cast.params, rows)
    losses.append(oracle.losses(objective, known, oracle.log_softmax(logits)).sum())
    more = tabular.by_params(oracle.gradient(objective, known, logits), cast.params, rows)
    slopes = {name: slopes[name] + more[name] for name in slopes}
  for name, slope in slopes.items():  # 1e-7: the schedule computes in float32
    np.testing.assert_allclose(cast.params[name] - after.params[name], slope, atol=1e-7)

  known = _known(o, cast, rollout, key)
  mask, counts = known.mask > 0, oracle.counted(o, known)
  untrusted = oracle.local_gate(o, known, None)
  signal = known.chosen(known.teacher - known.student)
  want = {'loss': sum(losses), 'given_loss': losses[1], 'distill_coef': 0.4,
          'counted_rate': counts.sum() / mask.sum(), 'local_rate': untrusted[counts].mean(),
          'shaped_rate': (np.abs(signal[mask]) >= 0.5).mean()}
  for name, value in want.items():
    assert float(metrics[name]) == pytest.approx(value, rel=1e-6), name
  assert metrics['given_lengths'].tolist() == [len(ROWS[b]) for b in order]
  assert int(after.step) == STEP + 1


# --- properties ---


def _divergences():
  """Every divergence, with parameters all over their bounds."""
  for name, f in KINDS['divergence'].functions.items():
    hints = [*choices.parameters(f).values()]
    if not hints:
      yield name
    for bounds in map(choices.bounds, hints):
      yield from (f'{name}({x})' for x in np.linspace(bounds.low, bounds.high, 9).tolist()
                  if x in bounds)


def _may_be_dropped_anywhere():
  """Divergences whose terms may be left out on any support."""
  fields = dict(DIRECT, support='student_top_k(4, tail="drop")')
  for divergence in _divergences():
    try:
      objective_rules.check(Objective(divergence=divergence, **fields))
    except ConfigError as refused:
      assert "tail=\"drop\"" in str(refused)
      continue
    yield divergence


@settings(max_examples=60, deadline=None, derandomize=True)
@given(student=st.floats(-12.0, 0.0), teacher=st.floats(-12.0, 0.0))
def test_terms_that_may_be_dropped_are_never_negative(student, teacher):
  may = list(_may_be_dropped_anywhere())
  assert {text.partition('(')[0] for text in may} == {*KINDS['divergence'].functions} - {
      'forward_kl', 'reverse_kl', 'skew_kl', 'skew_reverse_kl'}
  s, t = np.exp(student), np.exp(teacher)
  for divergence in may:
    with jax.enable_x64(True):
      got = float(Objective(divergence=divergence).term(jnp.float64(student), jnp.float64(teacher)))
    assert got >= -1e-13 * (s + t), divergence  # rounding
    assert got == pytest.approx(oracle.terms(divergence, s, t), rel=1e-6, abs=1e-12), divergence


def test_formulas_of_the_oracle_are_divergences():
  # Its derivatives by complex steps of its functions, and f(1) = 0 and f convex.
  u = np.exp(np.linspace(-3, 3, 41))
  for divergence in _divergences():
    f, slope = oracle.generator(divergence, u)
    stepped = oracle.generator(divergence, u + 1j * oracle.STEP)[0].imag / oracle.STEP
    np.testing.assert_allclose(slope, stepped, rtol=1e-11, atol=1e-11, err_msg=divergence)
    assert abs(oracle.generator(divergence, np.ones(1))[0][0]) < 1e-15
    assert np.all(np.diff(slope) >= -1e-11), divergence


UNREAD = VOCAB - 1  # a token that stands in no row


def _poisoned(batch, cast, value):
  """The batch with a value, NaN or infinite, at every masked place of every array, and a student
  whose hidden states are that on padding; tokens there are others."""
  rollout = batch.rollout
  completion = rollout.mask[:, rollout.prompt_length - 1:]

  def fill(x):
    keep = completion[:, :, None] if x.ndim == 3 else rollout.mask
    return jnp.where(keep > 0, x, value)

  rows = {name: x for name, x in vars(rollout).items()
          if name not in ('mask', 'tokens', 'valid', 'ended', 'prompt_length')}
  tokens = jnp.where(rollout.valid, rollout.tokens, UNREAD)
  params = dict(cast.params, table=cast.params['table'].at[:, UNREAD].set(value))
  return batch.replace(
      rollout=rollout.replace(tokens=tokens, **jax.tree.map(fill, rows)),
      **{name: jax.tree.map(fill, getattr(batch, name))
         for name in ('teacher', 'student', 'reference')}), params


def _same_bits(got, want):
  same = jax.tree.map(functools.partial(jnp.array_equal, equal_nan=True), got, want)
  return [jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(same) if not x]


@every_preset
def test_no_value_at_a_masked_place_reaches_loss_gradient_or_metrics(x64, name, which):
  o, cast = _objectives(name)[which], _cast()
  batch, heads = _only_what_is_asked_for(
      o, *tabular.batch(o, cast, _rollout(), REWARDS, _scorer))
  assert not np.any(np.asarray(batch.rollout.tokens) == UNREAD)

  def run(batch, params):
    return _gradient(o)(params, batch, heads, jnp.int32(STEP), jax.random.key(8))

  want = run(batch, cast.params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(want[:2]))
  for value in (np.nan, np.inf, -np.inf):
    poisoned, params = _poisoned(batch, cast, value)
    assert len(jax.tree.leaves(poisoned)) == len(jax.tree.leaves(batch))
    assert _same_bits(run(poisoned, params), want) == [], value


@functools.lru_cache
def _of_any_reading():
  """One program that reads every per-token array: gates, reference, local term, all of it."""
  return Objective(discount=0.5, reward_coef=0.3, reference_kl='k3(0.2)',
                   token_gate='soft_or(keep=0.7)', extrapolation=1.2,
                   baseline='leave_one_out', local=Local(coef=0.5, gate='untrusted'))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1))
def test_what_stands_in_masked_places_never_reaches_any_term(seed):
  o, rng = _of_any_reading(), np.random.RandomState(seed)
  with jax.enable_x64(True):
    cast, rollout = _cast(), _rollout()
    batch, heads = tabular.batch(o, cast, rollout, REWARDS, _scorer)

    def fill(x):
      other = np.where(rng.rand(*x.shape) < 0.1, np.nan, rng.uniform(-200, 200, x.shape))
      return jnp.where(rollout.mask > 0, x, other)

    def scores(s):
      return s.replace(logprobs=fill(s.logprobs), entropy=fill(s.entropy))

    tokens = jnp.where(rollout.valid, rollout.tokens, rng.randint(0, VOCAB, rollout.tokens.shape))
    other = batch.replace(
        rollout=rollout.replace(
            tokens=tokens.astype(rollout.tokens.dtype),
            sampler_logprobs=fill(rollout.sampler_logprobs),
            policy_offset=fill(rollout.policy_offset)),
        **{name: scores(getattr(batch, name)) for name in ('teacher', 'student', 'reference')})
    want, got = (_gradient(o)(cast.params, *_only_what_is_asked_for(o, b, heads), jnp.int32(STEP),
                              jax.random.key(8)) for b in (batch, other))
    # The same program of the same numbers: not one bit may differ.
    assert _same_bits(got, want) == []
