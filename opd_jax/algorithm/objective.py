"""What the student is trained towards: the fields of `config.objective`.

The loss that they describe is in `update.py`; what the value of a field does is said by the
function that it names (`choices`); which combinations mean something, in `rules/objective.py`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from opd_jax.algorithm import choices, divergences, support
from opd_jax.algorithm.choices import (
  Choice,
  Kind,
  baselines,
  estimators,
  importance,
  references,
  returns,
  reward_baselines,
  schedules,
  shapings,
  signals,
  supports,
)
from opd_jax.algorithm.gates import local as local_gates
from opd_jax.algorithm.gates import rows as row_gates
from opd_jax.algorithm.gates import tokens as token_gates
from opd_jax.algorithm.gates import windows
from opd_jax.types import Wants

ROUTES = ('policy_gradient', 'direct')
ADVANTAGES = ('kept', 'recomputed')
REDUCTIONS = ('token_mean', 'sequence_mean')
STUDENT_LOGPROBS = ('rescored', 'sampler')

SCORES = ('student_logprobs', 'student_entropy', 'teacher_logprobs', 'teacher_entropy')
GATE = ('mask', 'rewards', *SCORES, 'over_vocabulary')
# Of each field that names a function: where those are, and what they may take.
KINDS = {
    'divergence': Kind(divergences, ('student', 'teacher'), optional=False),
    'support': Kind(supports, ('f', 'student', 'teacher'), optional=False),
    'estimator': Kind(estimators, ('log_u',)),
    'anneal': Kind(schedules, ('coef', 'step')),
    'reference_kl': Kind(references, ('student', 'reference', 'log_u')),
    'signal': Kind(signals, ('weight', 'own', 'theirs'), optional=False),
    'shaping': Kind(shapings, ('signal', 'own', 'theirs')),
    'returns': Kind(returns, ('total', 'signal', 'mask'), optional=False),
    'baseline': Kind(baselines, ('values', 'mask', 'group_size', 'divergence')),
    'reward_baseline': Kind(reward_baselines, ('rewards',)),
    'importance': Kind(importance, ('logprobs', 'advantage', 'logratio', 'policy_logratio')),
    'window': Kind(windows, ('mask',)),
    'row_gate': Kind(row_gates, GATE),
    'token_gate': Kind(token_gates, GATE)}
LOCAL_KINDS = {
    'divergence': KINDS['divergence'], 'support': KINDS['support'],
    'gate': Kind(local_gates, (*GATE, 'own_logprobs', 'advantage', 'noise'))}


class HasDivergence:
  """A part of an objective: its choices, among them a divergence over a support."""

  KINDS: ClassVar[dict[str, Kind]]

  def choice(self, field: str) -> Choice:
    """Reads the choice of a field."""
    return choices.parse(self.KINDS[field], getattr(self, field))

  @property
  def term(self) -> support.Term:
    """One term of the divergence."""
    choice = self.choice('divergence')
    return lambda student, teacher: choice(dict(student=student, teacher=teacher))

  def over_support(self, student: Float[Array, 'n V'], teacher: Float[Array, 'n V']
                   ) -> Float[Array, 'n']:
    """Sums the divergence over the support."""
    return self.choice('support')(dict(f=self.term, student=student, teacher=teacher))


@dataclasses.dataclass(frozen=True)
class Local(HasDivergence):
  """A second distillation term on the same rows, distill_coef * coef * D(p_S, p_T), differentiated
  over a support of several tokens at the tokens that its gate selects.

  A policy gradient says of the token that was drawn that it is bad; this says what would be good.

  Attributes:
    coef: its weight beside the first term; 0 for none.
    divergence, support: as in `Objective`; not 'sampled'.
    gate: at which of the tokens that count (`gates/local.py`); 'none' for all.
    instead: where the gate selects, in place of the policy gradient of distillation rather than
      beside it.
  """

  coef: float = 0.0
  divergence: str = 'forward_kl'
  support: str = 'full'
  gate: str = 'none'
  instead: bool = False

  KINDS: ClassVar[dict[str, Kind]] = LOCAL_KINDS


@dataclasses.dataclass(frozen=True)
class Objective(HasDivergence):
  """What the student is trained towards. `rules/objective.py` refuses what makes no sense.

  A default means 'not in use' wherever there is something to be used, and a field away from its
  default that nothing would read is refused. Where a module is named, its functions are the values
  of the field, with their parameters: 'two_sided(0.5, 2)'.

  Attributes:
    route: 'policy_gradient' (score function, detached advantage) or 'direct' (differentiate the
      divergence through the student's log-probs); of the distillation term.
    divergence: see `divergences.py`.
    support: 'sampled' (the token the student drew), 'full' (exact, the whole vocabulary), or the
      most likely tokens, 'teacher_top_k(16, tail="bucket")'; see `choices/supports.py`.
    estimator: with route 'direct' and support 'sampled', what is differentiated at the sampled
      token: 'k2' for the reverse KL, 'k3' for the forward KL (`choices/estimators.py`).
    distill_coef, reward_coef, likelihood_coef: the weights of the three terms of A_t (`update.py`).
    anneal: how distill_coef goes on; see `choices/schedules.py`.
    local: a second distillation term.
    reference_kl: adds coef * KL(p_S || p_ref), p_ref the model of `config.reference`, 'full(0.01)';
      see `choices/references.py`.
    extrapolation: lambda of ExOPD (2026, arXiv 2602.12125): the teacher is p_T^lambda
      p_ref^(1 - lambda), normalized where the loss sees the vocabulary. At a sampled token of the
      reverse KL it is not: the constant has no expectation there, and with a discount the return is
      that of the paper's rewards. 1 is the teacher itself, at which gates look whatever it is.
    signal: what the teacher says of a token; see `choices/signals.py`.
    shaping: of that signal, 'clip(5)'; see `choices/shapings.py`.
    discount: gamma of the return of per-token distillation rewards. 0 is the paper's choice: each
      token answers for itself only; 1 is the gradient of the sequence-level reverse KL. Tokens
      that a gate leaves out keep their part in the returns of earlier ones.
    returns: from which token on; see `choices/returns.py`.
    advantages: 'kept' from before the first of several updates on a batch, or 'recomputed' by the
      student of each update (AsyncOPD, 2026, arXiv 2606.24143; one forward pass each).
    baseline: subtracted from the returns; see `choices/baselines.py`.
    reward_baseline: subtracted from a row's reward; see `choices/reward_baselines.py`.
    importance: rho, 'truncated(5)'; see `choices/importance.py`. 'none' is rho = 1 with log p in
      its place.
    window: which places of a completion count, 'tokens(start=0, count=128)'; see
      `gates/windows.py`. The window comes first, then row_gate, then token_gate, each of what the
      ones before leave.
    row_gate: which rows count; see `gates/rows.py`.
    token_gate: which tokens count, 'soft_or(keep=0.2)'; see `gates/tokens.py`.
    reduction: 'token_mean' over the global batch, or 'sequence_mean' (rows weigh the same).
    student_logprobs: where log p_S in the advantage comes from: 'rescored' by the program that
      scored the teacher (self-distillation is then an exact fixed point; one more forward pass),
      or the 'sampler' (free; off by its rounding).
    temperature: of the student's distribution and of the reference's; the loop sets it to the
      sampler's.
    teacher_temperature: of the teacher's distribution (for a teacher equal to the student to be a
      fixed point, the two must be equal).
  """

  route: str = 'policy_gradient'
  divergence: str = 'reverse_kl'
  support: str = 'sampled'
  estimator: str = 'none'
  distill_coef: float = 1.0
  reward_coef: float = 0.0
  likelihood_coef: float = 0.0
  anneal: str = 'none'
  local: Local = Local()
  reference_kl: str = 'none'
  extrapolation: float = 1.0
  signal: str = 'teacher'
  shaping: str = 'none'
  discount: float = 0.0
  returns: str = 'inclusive'
  advantages: str = 'kept'
  baseline: str = 'none'
  reward_baseline: str = 'none'
  importance: str = 'ratio'
  window: str = 'none'
  row_gate: str = 'none'
  token_gate: str = 'none'
  reduction: str = 'token_mean'
  student_logprobs: str = 'rescored'
  temperature: float = 1.0
  teacher_temperature: float = 1.0

  KINDS: ClassVar[dict[str, Kind]] = KINDS

  @property
  def needs_teacher(self) -> bool:
    return self.distill_coef != 0.0 or self.anneal != 'none'

  @property
  def exact_baseline(self) -> bool:
    """Whether the baseline is subtracted in the loss, which sees the vocabulary."""
    return 'divergence' in self.choice('baseline').inputs

  @property
  def needs_hidden_in_loss(self) -> bool:
    """Whether the loss looks at the teacher's whole vocabulary."""
    return self.needs_teacher and (self.support != 'sampled' or self.exact_baseline
                                   or self.local.coef != 0.0)

  @property
  def teachers_top_k(self) -> int:
    """How many of the teacher's most likely tokens are all that is looked at of its vocabulary; 0
    where more is, or nothing."""
    more = (self.exact_baseline or self.local.coef or self.extrapolation != 1.0
            or 'over_vocabulary' in self.gate_inputs or not self.needs_hidden_in_loss)
    return 0 if more or not self.support.startswith('teacher_top_k') else (
        self.choice('support').top_k)

  @property
  def rescored_baseline(self) -> bool:
    """Whether the loss takes the exact baseline of the student that was scored."""
    return (self.needs_teacher and self.exact_baseline
            and self.student_logprobs == 'rescored')

  @property
  def gate_inputs(self) -> set[str]:
    """What the gates take of a batch."""
    return {*self.choice('row_gate').inputs, *self.choice('token_gate').inputs,
            *self.local.choice('gate').inputs}

  def extra_heads(self, updates: int, student_passes: int) -> dict[str, int]:
    """Says how often each model's head is applied to its hidden states beyond once in each forward
    pass that scores: for the log-probs, and in each of so many updates by the loss and by a gate.
    """
    asked, gate = wants(self), 'over_vocabulary' in self.gate_inputs
    uses = {'teacher': self.needs_hidden_in_loss + gate,
            'student': self.rescored_baseline + gate,
            'reference': int(asked['reference'].hidden)}
    passes = {'teacher': 1, 'student': student_passes, 'reference': 1}
    return {name: max(updates * n + (asked[name].logprobs - 1) * passes[name], 0)
            for name, n in uses.items()}

  @property
  def gated(self) -> bool:
    """Whether some of the tokens that the student chose do not count."""
    return (self.window, self.row_gate, self.token_gate) != ('none', 'none', 'none')

  @property
  def needs_rewards(self) -> bool:
    return self.reward_coef != 0.0 or 'rewards' in self.gate_inputs

  @property
  def has_signal(self) -> bool:
    """Whether the teacher's word is a policy gradient's advantage."""
    return self.needs_teacher and self.route == 'policy_gradient'

  @property
  def has_policy_gradient(self) -> bool:
    """Whether any term of the loss goes through A_t."""
    return self.has_signal or self.reward_coef != 0.0 or self.likelihood_coef != 0.0


def wants(o: Objective) -> dict[str, Wants]:
  """Says what must be known of 'teacher', 'student' and 'reference' before the loss.

  Gates, signals and returns take log-probs and entropies; the vocabulary is seen through hidden
  states, by the loss or by a gate. A model of whom nothing is wanted is not asked.
  """
  gates, reference = o.gate_inputs, o.choice('reference_kl').inputs
  over_vocabulary, extrapolates = 'over_vocabulary' in gates, o.extrapolation != 1.0
  signal = o.has_signal and o.student_logprobs == 'rescored'
  teacher = Wants(
      logprobs=o.support == 'sampled' or bool(gates & {'teacher_logprobs', 'teacher_entropy'}),
      hidden=o.needs_hidden_in_loss or over_vocabulary)
  return {
      'teacher': teacher if o.needs_teacher else Wants(),
      'student': Wants(
          logprobs=signal or bool(gates & {'student_logprobs', 'student_entropy'}),
          hidden=o.rescored_baseline or over_vocabulary),
      'reference': Wants(
          logprobs='log_u' in reference or extrapolates and o.support == 'sampled',
          hidden='reference' in reference or extrapolates and o.needs_hidden_in_loss)}


def top_ks(o: Objective) -> dict[str, int]:
  """Lists, for each field, the most tokens of the vocabulary that its choice counts."""
  parts = (('', o), ('local.', o.local))
  return {f'{prefix}{field}': part.choice(field).top_k
          for prefix, part in parts for field in part.KINDS}
