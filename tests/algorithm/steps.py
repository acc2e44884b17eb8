"""One update of a small model on a ragged batch: what the tests of the objective share.

A `Case` is a transformer where positions, attention or rounding matter, and otherwise a table
(tabular.py), whose programs compile in a third of the time.
"""

from __future__ import annotations

import dataclasses
import functools

from conftest import make_rollout, numpy_rows, quick_jit, qwen3_config, sharp_params
import jax
import jax.numpy as jnp
import numpy as np
import optax
from oracle_divergences import log_softmax
import tabular

from opd_jax import models
from opd_jax.algorithm import objective as objective_lib
from opd_jax.algorithm import sample, score, update
from opd_jax.algorithm.objective import KINDS, Objective
from opd_jax.algorithm.update import Term
from opd_jax.run import optim
from opd_jax.types import Batch, Heads, Model, Params, Rollout, TrainState, Wants

LOGPROBS = Wants(logprobs=True)
SGD = optax.sgd(1.0)  # the step it takes is the gradient
EXACT = Objective(route='direct', support='full', importance='none')
SAMPLED = Objective()
SFT = Objective(distill_coef=0.0, likelihood_coef=1.0, importance='none')
GRPO = Objective(distill_coef=0.0, reward_coef=1.0, reward_baseline='group_mean_std',
                 importance='ppo_clip(0.2)')
CLIP = 0.2  # of GRPO
OBJECTIVES = {
    'exact': EXACT,
    'exact_forward_kl': dataclasses.replace(EXACT, divergence='forward_kl', temperature=0.8,
                                            teacher_temperature=1.3),
    'exact_by_sequence': dataclasses.replace(EXACT, reduction='sequence_mean', distill_coef=0.7),
    'sampled': dataclasses.replace(SAMPLED, temperature=0.8, teacher_temperature=1.3),
    'sampled_discounted': dataclasses.replace(SAMPLED, discount=0.7, distill_coef=0.5,
                                              student_logprobs='sampler'),
    'grpo_by_sequence': dataclasses.replace(GRPO, reward_baseline='group_mean',
                                            importance='ppo_clip(0.1)', reduction='sequence_mean'),
}
ALPHA = 0.3
DIVERGENCES = [text.replace('(alpha)', f'({ALPHA})') for text in KINDS['divergence'].names]

# float64 rounds at 1e-16; some hundred operations and 42 rows leave far more than 1e-10 of room,
# and any error of the formulas is of order one.
ORACLE = 1e-10

SMALL = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1, head_dim=4)
WIDER = dict(SMALL, hidden_size=12, tie_word_embeddings=True)  # a teacher of another shape

VOCAB = 11
PROMPTS = [[5, 9, 1, 2], [5, 9, 1, 2], [7], [7], [3, 3, 8], [3, 3, 8]]  # in groups of two
ROWS = [[3, 1, 4, 1, 0], [9, 0], [6, 5, 3, 8, 9], [7, 9, 0], [0], [8, 6, 2, 6, 4]]
REWARDS = np.array([1.0, 0.0, 0.25, 1.0, 0.0, 0.0])


# --- programs: one for all tests with the same settings ---


@functools.cache
def transformer(wide: bool, dtype_name: str, vocab: int = VOCAB) -> Model:
  """A student, or a wider teacher."""
  return models.build(qwen3_config(vocab_size=vocab, **(WIDER if wide else SMALL)),
                      dtype=jnp.dtype(dtype_name))


@functools.cache
def table(wide: bool, vocab: int = VOCAB, max_len: int = 10) -> Model:
  """A student, or a wider teacher, of which nothing depends on its parameters' dtype."""
  return tabular.model(vocab, max_len, 9 if wide else 6)


@functools.cache
def step(model, objective, *, optimizer=SGD, group_size=1, microbatch_rows=0):
  """The compiled update. Chunks of 7 tokens, so that a batch is some chunks and a ragged one."""
  return quick_jit(functools.partial(
      _of_one_batch, model=model, optimizer=optimizer, chunk_tokens=7,
      term=Term('own', objective, group_size, microbatch_rows=microbatch_rows)))


def _of_one_batch(state, batch, heads, *, term, **how):
  return update.update_fn(state, (batch,), heads, terms=(term,), **how)


@functools.cache
def scorer(model, temperature=1.0, wants=LOGPROBS, jit=quick_jit):
  """The compiled scoring."""
  return jit(functools.partial(
      score.teacher_logprob_fn, model=model, temperature=temperature, wants=wants,
      chunk_tokens=1000, microbatch_rows=0))


@functools.cache
def adam():
  """The optimizer of a run."""
  return optim.make_optimizer('adamw', optax.constant_schedule(1e-3), b1=0.9, b2=0.95, eps=1e-8,
                              weight_decay=0.0, clip_norm=1.0)


@functools.cache
def sampler(model):
  """Compiled as the train loop compiles it."""
  return jax.jit(functools.partial(
      sample.sample_fn, model=model, max_new_tokens=8, temperature=1.0, top_p=1.0, top_k=0,
      stop_tokens=(4,), pad_token=0))


def new_state(params: Params, optimizer: optax.GradientTransformation = SGD) -> TrainState:
  """At the first step."""
  return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))


# --- comparisons ---


def difference(before, after):
  """The gradient, if `before` is a step of SGD older than `after`."""
  return jax.tree.map(jnp.subtract, before, after)


def vector(tree) -> np.ndarray:
  """All numbers of a tree."""
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def relative_error(got, want) -> float:
  """The distance between two trees, over the length of the second."""
  got, want = vector(got), vector(want)
  return np.linalg.norm(got - want) / np.linalg.norm(want)


# --- batches ---


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """A ragged batch with everything that any objective asks for."""

  student: Model
  params: Params
  teacher: Model
  teacher_params: Params
  rollout: Rollout


def numpy_log_rows(model: Model, params: Params, rollout: Rollout,
                   temperature: float) -> np.ndarray:
  """log p(. | prefix) of every prediction, [B, T-1, V]; in NumPy."""
  if model.family == 'table':
    return log_softmax(tabular.logits(params, rollout) / temperature)
  return numpy_rows(model, params, rollout, temperature)


@functools.cache
def transformer_case(dtype_name: str) -> Case:
  """Two transformers."""
  student, teacher = (transformer(wide, dtype_name) for wide in (False, True))
  return _case(student, sharp_params(student, 0, jnp.dtype(dtype_name)),
               teacher, sharp_params(teacher, 1, jnp.dtype(dtype_name)), dtype_name)


@functools.cache
def table_case(dtype_name: str) -> Case:
  """Two tables."""
  student, teacher = table(False), table(True)
  return _case(student, tabular.random_params(student, 0, jnp.dtype(dtype_name)),
               teacher, tabular.random_params(teacher, 1, jnp.dtype(dtype_name)), dtype_name)


def _case(student, params, teacher, teacher_params, dtype):
  rng = np.random.RandomState(0)
  rollout = make_rollout(PROMPTS, ROWS, prompt_width=5, room=5, dtype=jnp.dtype(dtype))
  chosen = numpy_log_rows(student, params, rollout, 1.0)
  tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
  behaviour, mass = np.zeros(mask.shape), -rng.rand(*mask.shape) * mask
  for b, t in np.argwhere(mask):
    # An older policy, ratios to it from 0.6 to 1.6, so that some are clipped; and truncated, so
    # that what the sampler reports is larger.
    older = chosen[b, t, tokens[b, t + 1]] + 0.25 * rng.standard_normal()
    behaviour[b, t] = older - mass[b, t]
  return Case(student, params, teacher, teacher_params, rollout.replace(
      sampler_logprobs=jnp.asarray(behaviour, dtype), policy_offset=jnp.asarray(mass, dtype)))


def inputs(o: Objective, case: Case) -> tuple[Batch, Heads]:
  """The arguments of `update_fn` after the state."""
  teacher = student = head = None
  asked = objective_lib.wants(o)
  if asked['teacher']:
    teacher = scorer(case.teacher, o.teacher_temperature, asked['teacher'])(
        case.teacher_params, case.rollout)
    head = case.teacher.head(case.teacher_params) if asked['teacher'].hidden else None
  if asked['student']:
    student = scorer(case.student, o.temperature, asked['student'])(case.params, case.rollout)
  rewards = jnp.asarray(REWARDS, case.rollout.mask.dtype) if o.needs_rewards else None
  return Batch(case.rollout, teacher, student, rewards=rewards), Heads(head)
