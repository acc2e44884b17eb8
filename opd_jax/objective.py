"""What the student is trained towards: the fields of `config.objective`, and which of their
combinations mean something.

The loss that they describe is in `update.py`, the weight of each token in `credit.py`, divergences
over a support in `estimators.py`.
"""

from __future__ import annotations

import dataclasses
import math

from opd_jax import divergences, estimators
from opd_jax.types import Wants

ROUTES = ('policy_gradient', 'direct')
ESTIMATORS = ('none', *estimators.DIRECT_SAMPLED)
SIGNALS = ('teacher', 'fixed_negative')
SHAPINGS = ('none', 'clip', 'log', 'power')
BASELINES = ('none', 'exact', 'batch_mean', 'leave_one_out')
REWARD_BASELINES = ('none', 'group_mean', 'group_mean_std')
IMPORTANCE = ('none', 'ratio', 'truncated', 'two_sided', 'ppo_clip')
TOKEN_GATES = ('none', 'student_entropy', 'teacher_entropy', 'divergence', 'soft_or',
               'teachability')
ROW_GATES = ('none', 'correct', 'wrong', 'reward_agrees', 'teacher_likelihood')
LOCAL_GATES = ('none', 'teacher_entropy', 'untrusted', 'negative')
RETURNS = ('inclusive', 'later', 'later_mean')
REFERENCE_ESTIMATORS = ('none', 'k2', 'k3', 'full')
ADVANTAGES = ('kept', 'recomputed')
REDUCTIONS = ('token_mean', 'sequence_mean')
STUDENT_LOGPROBS = ('rescored', 'sampler')


@dataclasses.dataclass(frozen=True)
class Local:
  """A second distillation term on the same rows, distill_coef * coef * D(p_S, p_T), differentiated
  over a support of several tokens at the tokens that its gate selects.

  A policy gradient says of the token that was drawn that it is bad; this says what would be good.

  Attributes:
    coef: its weight beside the first term; 0 for none.
    divergence, divergence_alpha, support, top_k, tail: as in `Objective`; not 'sampled'.
    gate: at which of the tokens that count: 'none' for all; 'teacher_entropy' where that is above
      `entropy` nats (EOPD, 2026, arXiv 2603.07079); 'untrusted' with probability
      1 - min(p_T / p_S, 1) of the token drawn (TrOPD, 2026, arXiv 2606.01249); 'negative' where the
      advantage of distillation (rewards apart) is at most 0 (AOPD, 2026, arXiv 2605.06387).
    entropy: of that gate, nats; 0 without it.
    instead: where the gate selects, in place of the policy gradient of distillation rather than
      beside it.
  """

  coef: float = 0.0
  divergence: str = 'forward_kl'
  divergence_alpha: float = 0.0
  support: str = 'full'
  top_k: int = 0
  tail: str = 'none'
  gate: str = 'none'
  entropy: float = 0.0
  instead: bool = False

  @property
  def term(self) -> estimators.Term:
    """One term of the divergence."""
    return estimators.term(self.divergence, self.divergence_alpha)


@dataclasses.dataclass(frozen=True)
class Objective:
  """What the student is trained towards. `check_objective` refuses what makes no sense.

  A default means 'not in use' wherever there is something to be used, and a field away from its
  default that nothing would read is refused.

  Attributes:
    route: 'policy_gradient' (score function, detached advantage) or 'direct' (differentiate the
      divergence through the student's log-probs); of the distillation term.
    divergence: name of a function in `divergences.py`.
    divergence_alpha: its parameter, where it has one; 0 where not.
    support: 'sampled' (the token the student drew), 'full' (exact, the whole vocabulary), or the
      'teacher_top_k', 'student_top_k' or 'union_top_k' most likely tokens.
    top_k: how many; 0 without.
    tail: what becomes of the tokens outside a top-k support (`estimators.on_support`): 'drop',
      'renormalize', 'bucket' or 'stop_gradient'; 'none' without.
    estimator: with route 'direct' and support 'sampled', what is differentiated at the sampled
      token: 'k2' for the reverse KL, 'k3' for the forward KL; 'none' without.
    distill_coef, reward_coef, likelihood_coef: the weights of the three terms of A_t (`update.py`).
    anneal_steps, final_distill_coef: distill_coef goes linearly to the latter over so many gradient
      steps (KDRL, 2025, arXiv 2506.02208), and stays there; 0, 0 for never.
    local: a second distillation term.
    reference_coef, reference_estimator: adds reference_coef * KL(p_S || p_ref), p_ref the model of
      `config.reference`: 'full' over the vocabulary, or at the sampled token by 'k2' (the same
      gradient in expectation) or 'k3' (GRPO's; its gradient is that of the forward KL). 0, 'none'
      without.
    extrapolation: lambda of ExOPD (2026, arXiv 2602.12125): the teacher is p_T^lambda
      p_ref^(1 - lambda), normalized where the loss sees the vocabulary. At a sampled token of the
      reverse KL it is not: the constant has no expectation there, and with a discount the return is
      that of the paper's rewards. 1 is the teacher itself, at which gates look whatever it is.
    signal: 'teacher', or 'fixed_negative', a control: -1 on every token that the teacher finds less
      likely than the student does, 0 on the others (2026, arXiv 2608.31046).
    shaping: of the per-token signal x: 'clip' to +-c, 'log' for sign(x) log(1 + |x|) (Demystifying
      OPD, 2026, arXiv 2607.13399), 'power' for p_T^a - p_S^a in its place (PowerOPD, 2026, arXiv
      2606.17199).
    shaping_scale: c or a; 0 without.
    discount: gamma of the return of per-token distillation rewards. 0 is the paper's choice: each
      token answers for itself only; 1 is the gradient of the sequence-level reverse KL. Tokens
      that a gate leaves out keep their part in the returns of earlier ones.
    returns: 'inclusive', from the token's own reward on; 'later', from the next one on, for what
      its own exact term `local` leaves (MiniLLM, 2023, arXiv 2306.08543, eq. 3); 'later_mean', that
      by the number of later tokens (MiniLLM's length normalization, eq. 5).
    advantages: 'kept' from before the first of several updates on a batch, or 'recomputed' by the
      student of each update (AsyncOPD, 2026, arXiv 2606.24143; one forward pass each).
    baseline: subtracted from the signal: its exact mean over the student's next token, which is
      minus the reverse KL (vOPD, 2026, arXiv 2605.07865; needs the full vocabulary once), the mean
      over the batch (biased by a token's own share in it), or over the other samples of the same
      prompt. Whether one lowers the variance of the gradient depends on the models: measure it.
      The mean of the gradient stays only where ratios are not bounded and samples not cut by top-p
      or top-k.
    reward_baseline: subtracted from a row's reward: nothing, the mean of its group, or the mean
      and then a division by the group's standard deviation (GRPO, Shao et al. 2024); 'none' without
      a reward.
    importance: rho = 1 with log p in its place ('none'), p_S / p_sampler ('ratio'), that held at
      most at ratio_high and detached ('truncated', TIS), that with tokens outside
      ratio_low..ratio_high left out ('two_sided', IcePop), or PPO's pessimistic clip ('ppo_clip').
      The last two compare with the sampler's policy before top-p and top-k: how far it moved.
    clip_epsilon: of 'ppo_clip'; 0 without it.
    ratio_low, ratio_high: of 'truncated' and 'two_sided'; 0 without.
    token_gate: keeps the share token_keep of the batch's tokens with the most student entropy,
      teacher entropy, |log p_T - log p_S|, or the soft-or of student entropy and that (TIP, 2026,
      arXiv 2604.14084), or 'teachability', KL(p_S || p_T) times the teacher's mass on the student's
      token_top_k most likely tokens (TA-OPD, 2026, arXiv 2605.26844). The two of the soft-or are
      relative to their largest values; ties with the last one kept are kept. Tokens that are left
      out do not count in means either, but they do in baselines. The window comes first, then
      row_gate, then token_gate, each of what the ones before leave.
    token_keep: that share; 1 without a gate.
    token_top_k: of 'teachability'; 0 without.
    window_start, window_tokens: only this many tokens of a completion count, from this place on
      (ESR, 2026, arXiv 2605.27028); 0, 0 for all.
    row_gate: keeps rows whose reward is 1 ('correct') or is not ('wrong'), those on which teacher
      and verifier agree ('reward_agrees': correct and likelier by the teacher than by the student,
      or wrong and less likely; RG-OPD, 2026, arXiv 2607.04037), or the share row_keep with the
      highest mean log-prob by the teacher (FiRe, 2026, arXiv 2606.02684).
    row_keep: that share; 1 without.
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
  divergence_alpha: float = 0.0
  support: str = 'sampled'
  top_k: int = 0
  tail: str = 'none'
  estimator: str = 'none'
  distill_coef: float = 1.0
  reward_coef: float = 0.0
  likelihood_coef: float = 0.0
  anneal_steps: int = 0
  final_distill_coef: float = 0.0
  local: Local = Local()
  reference_coef: float = 0.0
  reference_estimator: str = 'none'
  extrapolation: float = 1.0
  signal: str = 'teacher'
  shaping: str = 'none'
  shaping_scale: float = 0.0
  discount: float = 0.0
  returns: str = 'inclusive'
  advantages: str = 'kept'
  baseline: str = 'none'
  reward_baseline: str = 'none'
  importance: str = 'ratio'
  clip_epsilon: float = 0.0
  ratio_low: float = 0.0
  ratio_high: float = 0.0
  token_gate: str = 'none'
  token_keep: float = 1.0
  token_top_k: int = 0
  window_start: int = 0
  window_tokens: int = 0
  row_gate: str = 'none'
  row_keep: float = 1.0
  reduction: str = 'token_mean'
  student_logprobs: str = 'rescored'
  temperature: float = 1.0
  teacher_temperature: float = 1.0

  @property
  def needs_teacher(self) -> bool:
    return self.distill_coef != 0.0 or self.final_distill_coef != 0.0

  @property
  def needs_hidden_in_loss(self) -> bool:
    """Whether the loss looks at the teacher's whole vocabulary."""
    return self.needs_teacher and (self.support != 'sampled' or self.baseline == 'exact'
                                   or self.local.coef != 0.0)

  @property
  def rescored_baseline(self) -> bool:
    """Whether the loss takes the exact baseline of the student that was scored."""
    return (self.needs_teacher and self.baseline == 'exact'
            and self.student_logprobs == 'rescored')

  @property
  def extra_heads(self) -> dict[str, int]:
    """How often each model's head is applied to its hidden states beyond once in each forward pass:
    for the log-probs, in the loss, by a gate."""
    asked, teachable = wants(self), self.token_gate == 'teachability'
    uses = {'teacher': self.needs_hidden_in_loss + teachable,
            'student': self.rescored_baseline + teachable,
            'reference': int(asked['reference'].hidden)}
    return {name: max(asked[name].logprobs + n - 1, 0) for name, n in uses.items()}

  @property
  def gated(self) -> bool:
    """Whether some of the tokens that the student chose do not count."""
    return bool(self.window_tokens) or (self.token_gate, self.row_gate) != ('none', 'none')

  @property
  def needs_rewards(self) -> bool:
    return self.reward_coef != 0.0 or self.row_gate in ('correct', 'wrong', 'reward_agrees')

  @property
  def has_policy_gradient(self) -> bool:
    """Whether any term of the loss goes through A_t."""
    distil = self.needs_teacher and self.route == 'policy_gradient'
    return distil or self.reward_coef != 0.0 or self.likelihood_coef != 0.0

  @property
  def term(self) -> estimators.Term:
    """One term of the divergence."""
    return estimators.term(self.divergence, self.divergence_alpha)


def wants(o: Objective) -> dict[str, Wants]:
  """Says what must be known of 'teacher', 'student' and 'reference' before the loss.

  Gates, signals and returns take log-probs and entropies; the vocabulary is seen through hidden
  states, by the loss or by a gate. A model of whom nothing is wanted is not asked.
  """
  gates = {o.token_gate, o.row_gate, o.local.gate}
  teachable = o.token_gate == 'teachability'
  signal = o.needs_teacher and o.route == 'policy_gradient' and o.student_logprobs == 'rescored'
  extrapolates = o.extrapolation != 1.0
  teacher = Wants(
      logprobs=o.support == 'sampled' or bool(gates & {
          'teacher_entropy', 'divergence', 'soft_or', 'teacher_likelihood', 'reward_agrees'}),
      hidden=o.needs_hidden_in_loss or teachable)
  return {
      'teacher': teacher if o.needs_teacher else Wants(),
      'student': Wants(
          logprobs=signal or bool(gates & {
              'student_entropy', 'divergence', 'soft_or', 'reward_agrees'}),
          hidden=o.rescored_baseline or teachable),
      'reference': Wants(
          logprobs=(o.reference_estimator in ('k2', 'k3')
                    or extrapolates and o.support == 'sampled'),
          hidden=o.reference_estimator == 'full' or extrapolates and o.needs_hidden_in_loss)}


def check_objective(o: Objective) -> None:
  """Refuses unknown names and combinations that cannot mean what they say.

  Raises:
    ValueError: names the field, the value, what is allowed, and why.
  """
  for name, allowed in (
      ('route', ROUTES), ('support', estimators.SUPPORTS), ('importance', IMPORTANCE),
      ('reward_baseline', REWARD_BASELINES), ('reduction', REDUCTIONS),
      ('student_logprobs', STUDENT_LOGPROBS), ('divergence', estimators.names()),
      ('tail', estimators.TAILS), ('estimator', ESTIMATORS), ('signal', SIGNALS),
      ('shaping', SHAPINGS), ('baseline', BASELINES), ('token_gate', TOKEN_GATES),
      ('row_gate', ROW_GATES), ('returns', RETURNS), ('advantages', ADVANTAGES),
      ('reference_estimator', REFERENCE_ESTIMATORS)):
    if getattr(o, name) not in allowed:
      raise ValueError(f'objective.{name}={getattr(o, name)!r}; allowed: {list(allowed)}')
  if not 0.0 <= o.discount <= 1.0:
    raise ValueError(f'objective.discount={o.discount}; allowed: 0 to 1')
  for name in ('temperature', 'teacher_temperature'):
    if not 0.0 < getattr(o, name) < math.inf:  # NaN is neither
      raise ValueError(f'objective.{name}={getattr(o, name)}; allowed: above 0 (at 0 the '
                       'distribution is a point mass and has no KL divergence), and finite')
  for name in ('distill_coef', 'reward_coef', 'likelihood_coef', 'final_distill_coef',
               'reference_coef'):
    if not 0.0 <= getattr(o, name) < math.inf:
      raise ValueError(f'objective.{name}={getattr(o, name)}; allowed: at least 0, and finite')
  if not (o.needs_teacher or o.reward_coef or o.likelihood_coef):
    raise ValueError('objective.distill_coef, reward_coef and likelihood_coef are all 0: there is '
                     'nothing to train towards; allowed: at least one other than 0')
  if o.reward_baseline != 'none' and not o.reward_coef:
    raise ValueError(f'objective.reward_baseline={o.reward_baseline!r} has no effect with '
                     "objective.reward_coef=0; allowed: 'none'")
  _check_importance(o)
  _check_gates(o)
  _check_reference(o)
  if o.anneal_steps < 0 or o.anneal_steps and o.distill_coef == o.final_distill_coef:
    raise ValueError(f'objective.anneal_steps={o.anneal_steps} with distill_coef={o.distill_coef}, '
                     f'final_distill_coef={o.final_distill_coef}; allowed: at least 1 with two '
                     'coefficients that differ, or 0')
  if not o.anneal_steps:
    _refuse_unread(o, 'objective.anneal_steps=0', 'final_distill_coef')
  if o.needs_teacher:
    _check_distillation(o)
    _check_local(o)
    return
  _refuse_unread(o, 'objective.distill_coef=0', 'route', 'divergence', 'divergence_alpha',
                 'support', 'top_k', 'tail', 'estimator', 'signal', 'shaping', 'shaping_scale',
                 'discount', 'returns', 'baseline', 'local', 'extrapolation')
  if not wants(o)['student']:
    _refuse_unread(o, 'nothing that the student scores', 'advantages')


def _refuse_unread(o: Objective, why: str, *names: str) -> None:
  for name in names:
    value, default = getattr(o, name), getattr(Objective, name)
    if value != default:
      raise ValueError(f'objective.{name}={value!r} has no effect with {why}; allowed: {default!r}')


def _check_importance(o):
  if not 0.0 <= o.clip_epsilon < math.inf or (o.clip_epsilon > 0.0) != (o.importance == 'ppo_clip'):
    raise ValueError(f'objective.clip_epsilon={o.clip_epsilon} with objective.importance='
                     f"{o.importance!r}; allowed: above 0 with 'ppo_clip', 0 without")
  low, high = o.ratio_low, o.ratio_high
  if o.importance == 'two_sided':
    fine = 0.0 < low < 1.0 < high < math.inf
  elif o.importance == 'truncated':
    fine = low == 0.0 and 1.0 <= high < math.inf
  else:
    fine = low == high == 0.0
  if not fine:
    raise ValueError(
        f'objective.ratio_low={low}, ratio_high={high} with objective.importance={o.importance!r}; '
        "allowed: low below 1 below high with 'two_sided', 0 and at least 1 with 'truncated', 0 "
        'and 0 without')


def _check_gates(o):
  for gate, keep in (('token_gate', 'token_keep'), ('row_gate', 'row_keep')):
    share, wanted = getattr(o, keep), getattr(o, gate) not in (
        'none', 'correct', 'wrong', 'reward_agrees')
    if not (0.0 < share < 1.0 if wanted else share == 1.0):
      raise ValueError(f'objective.{keep}={share} with objective.{gate}={getattr(o, gate)!r}; '
                       f'allowed: {"above 0 and below 1" if wanted else "1"}')
  if o.window_start < 0 or o.window_tokens < 0 or (o.window_start and not o.window_tokens):
    raise ValueError(f'objective.window_start={o.window_start}, window_tokens={o.window_tokens}; '
                     'allowed: a start of at least 0 and at least one token, or 0 and 0 for all')
  if (o.token_top_k > 0) != (o.token_gate == 'teachability') or o.token_top_k < 0:
    raise ValueError(f'objective.token_top_k={o.token_top_k} with objective.token_gate='
                     f"{o.token_gate!r}; allowed: at least 1 with 'teachability', 0 without")
  asks_teacher = (o.token_gate not in ('none', 'student_entropy')
                  or o.row_gate in ('teacher_likelihood', 'reward_agrees'))
  if asks_teacher and not o.needs_teacher:
    raise ValueError(f'objective.token_gate={o.token_gate!r}, row_gate={o.row_gate!r} with '
                     'objective.distill_coef=0: there is no teacher to ask; allowed: a gate that '
                     'needs none')


def _check_reference(o):
  if (o.reference_coef > 0.0) != (o.reference_estimator != 'none'):
    raise ValueError(f'objective.reference_coef={o.reference_coef} with reference_estimator='
                     f"{o.reference_estimator!r}; allowed: above 0 with 'k2', 'k3' or 'full', 0 "
                     "with 'none'")
  if not 0.0 < o.extrapolation < math.inf:
    raise ValueError(f'objective.extrapolation={o.extrapolation}; allowed: above 0, and finite')
  if o.extrapolation != 1.0 and (o.support == 'sampled' and o.divergence != 'reverse_kl'
                                 or o.shaping != 'none' or o.signal == 'fixed_negative'
                                 or o.local.gate == 'negative'):
    raise ValueError(
        f'objective.extrapolation={o.extrapolation} with support={o.support!r}, divergence='
        f'{o.divergence!r}, shaping={o.shaping!r}, signal={o.signal!r}, local.gate='
        f'{o.local.gate!r}: at one token the extrapolated teacher is known up to a constant, which '
        "only the log-ratio forgives; allowed: 'reverse_kl' without shaping, 'fixed_negative' and "
        "'negative', or another support")


def _check_local(o):
  local = o.local
  if not 0.0 <= local.coef < math.inf:
    raise ValueError(f'objective.local.coef={local.coef}; allowed: at least 0, and finite')
  if not local.coef:
    for field in dataclasses.fields(Local):
      if getattr(local, field.name) != field.default:
        raise ValueError(f'objective.local.{field.name}={getattr(local, field.name)!r} has no '
                         f'effect with objective.local.coef=0; allowed: {field.default!r}')
    return
  for name, allowed in (('divergence', estimators.names()), ('tail', estimators.TAILS),
                        ('support', estimators.SUPPORTS[1:]), ('gate', LOCAL_GATES)):
    if getattr(local, name) not in allowed:
      raise ValueError(f'objective.local.{name}={getattr(local, name)!r}; allowed: '
                       f'{list(allowed)}')
  _check_divergence(local, 'objective.local.')
  if not (0.0 < local.entropy < math.inf if local.gate == 'teacher_entropy'
          else local.entropy == 0.0):
    raise ValueError(f'objective.local.entropy={local.entropy} with objective.local.gate='
                     f"{local.gate!r}; allowed: above 0 with 'teacher_entropy', 0 without")
  if o.route == 'direct' and (local.instead or local.gate in ('untrusted', 'negative')):
    raise ValueError(f'objective.local.gate={local.gate!r}, instead={local.instead} with objective.'
                     "route='direct', which has no advantage; allowed: 'none' or 'teacher_entropy',"
                     " and False, or route='policy_gradient'")
  if local.gate == 'negative' and o.baseline == 'exact':
    raise ValueError("objective.local.gate='negative' with objective.baseline='exact': it is "
                     'subtracted in the loss, after the gate has looked at the advantage; allowed: '
                     'another gate, or another baseline')
  if local.instead and o.baseline == 'exact':
    raise ValueError("objective.local.instead=True with objective.baseline='exact', which is "
                     'subtracted at every token; allowed: False, or another baseline')
  if local.instead and local.gate == 'none':
    raise ValueError("objective.local.instead=True with objective.local.gate='none' leaves no "
                     "policy gradient; allowed: route='direct' without a local term, or a gate")


def _check_distillation(o):
  _check_divergence(o, 'objective.')
  _check_signal(o)
  if o.route == 'direct' and o.support == 'sampled':
    unbiased = [k for k, name in estimators.DIRECT_SAMPLED.items() if name == o.divergence]
    if o.estimator not in unbiased:
      raise ValueError(
          "objective.route='direct' with objective.support='sampled', divergence="
          f'{o.divergence!r}, estimator={o.estimator!r}: differentiating that at the sampled token '
          'does not estimate the gradient (log p_S - log p_T itself has expectation zero, so '
          f'nothing would be learned); allowed: estimator in {unbiased} for this divergence, '
          "route='policy_gradient', or support='full'")
  elif o.estimator != 'none':
    raise ValueError(f'objective.estimator={o.estimator!r} has no effect with objective.route='
                     f"{o.route!r}, support={o.support!r}; allowed: 'none'")
  if o.route == 'policy_gradient' and o.support != 'sampled':
    raise ValueError(
        f"objective.route='policy_gradient' with objective.support={o.support!r}: a divergence "
        'over several tokens used as a scalar advantage names no direction to move in; '
        "allowed: route='direct', or support='sampled'")
  if o.importance != 'none' and not o.has_policy_gradient:
    raise ValueError(f'objective.importance={o.importance!r} has no effect: no term of the loss is '
                     "a policy gradient; allowed: 'none'")


def _check_signal(o):
  if o.route == 'direct':
    _refuse_unread(o, "route='direct', which has no advantage", 'discount', 'returns', 'signal',
                   'shaping', 'shaping_scale', 'baseline')
    if not wants(o)['student']:
      _refuse_unread(o, 'nothing that the student scores', 'advantages')
    return
  if not (0.0 < o.shaping_scale < math.inf if o.shaping in ('clip', 'power')
          else o.shaping_scale == 0.0):
    raise ValueError(f'objective.shaping_scale={o.shaping_scale} with objective.shaping='
                     f"{o.shaping!r}; allowed: above 0 with 'clip' and 'power', 0 without")
  if o.shaping == 'power' and o.divergence != 'reverse_kl':
    raise ValueError(f"objective.shaping='power' with objective.divergence={o.divergence!r}: it "
                     "takes the place of the reverse KL's log-ratio; allowed: 'reverse_kl'")
  if o.signal == 'fixed_negative':
    _refuse_unread(o, "objective.signal='fixed_negative'", 'divergence', 'divergence_alpha',
                   'shaping', 'shaping_scale')
  if o.discount and o.signal == 'teacher' and o.divergence != 'reverse_kl':
    raise ValueError(f'objective.discount={o.discount} with objective.divergence={o.divergence!r}: '
                     'the score-function weight of a later token is no reward for this one (of the '
                     "forward KL, u - 1, the mean is zero: noise); allowed: 0, or 'reverse_kl'")
  if o.returns != 'inclusive' and not o.discount:
    raise ValueError(f'objective.returns={o.returns!r} with objective.discount=0: later tokens '
                     "count for nothing; allowed: a discount above 0, or 'inclusive'")
  if o.advantages == 'recomputed' and o.student_logprobs == 'sampler':
    raise ValueError("objective.advantages='recomputed' has no effect with objective."
                     "student_logprobs='sampler'; allowed: 'kept', or 'rescored'")
  exact_mean = (o.divergence == 'reverse_kl' and o.signal == 'teacher' and o.shaping == 'none'
                and not o.discount and o.extrapolation == 1.0)
  if o.baseline == 'exact' and not exact_mean:
    raise ValueError(
        f"objective.baseline='exact' with divergence={o.divergence!r}, signal={o.signal!r}, "
        f'shaping={o.shaping!r}, discount={o.discount}, extrapolation={o.extrapolation}: minus the '
        "reverse KL is the mean of the plain log-ratio only; allowed: 'reverse_kl', 'teacher', "
        "'none', 0 and 1, or another baseline")


def _check_divergence(o, group):
  low, high, ends = divergences.ALPHAS.get(o.divergence, (0.0, 0.0, True))
  inside = low <= o.divergence_alpha <= high if ends else low < o.divergence_alpha < high
  if not inside:
    allowed = ('0, since it has no parameter' if low == high else f'{low} to {high}' + (
        '' if ends else ", the ends excluded, where it vanishes ('scaled_jensen_shannon' has the "
        'two KL divergences there)' if o.divergence == 'jensen_shannon' else ', the ends excluded'))
    raise ValueError(f'{group}divergence_alpha={o.divergence_alpha} with divergence='
                     f'{o.divergence!r}; allowed: {allowed}')
  if not o.support.endswith('top_k'):
    for name, neutral in (('top_k', 0), ('tail', 'none')):
      if getattr(o, name) != neutral:
        raise ValueError(f'{group}{name}={getattr(o, name)!r} has no effect with support='
                         f'{o.support!r}; allowed: {neutral!r}')
    return
  if o.top_k < 1:
    raise ValueError(f'{group}top_k={o.top_k} with support={o.support!r}; allowed: at least 1')
  if o.tail == 'none':
    raise ValueError(f"{group}tail='none' with support={o.support!r}; allowed: "
                     f'{[t for t in estimators.TAILS if t != "none"]}')
  if o.tail == 'renormalize' and o.top_k == 1 and o.support != 'union_top_k':
    raise ValueError(f"{group}tail='renormalize' with {group}top_k=1: one token with mass 1 "
                     "has no divergence to lower; allowed: top_k of at least 2, or tail='bucket'")
  if o.tail == 'drop' and not _may_drop(o):
    raise ValueError(
        f"{group}tail='drop' with divergence={o.divergence!r}, support={o.support!r}: the "
        "divergence falls as the student's mass leaves the support, which ends in collapse (Many "
        "Faces of OPD, arXiv 2605.11182); allowed: 'renormalize', 'bucket' (for reverse_kl "
        "'stop_gradient'), forward_kl or skew_kl on a support that has the teacher's tokens, or a "
        'divergence without negative terms (alpha_divergence with alpha 0 is the reverse KL '
        'corrected to be one)')
  if o.tail == 'stop_gradient' and o.divergence != 'reverse_kl':
    raise ValueError(f"{group}tail='stop_gradient' with divergence={o.divergence!r}; allowed: "
                     "divergence='reverse_kl', or another tail")


def _may_drop(o):
  """Whether what a top-k support leaves out may simply be left out."""
  ends = o.divergence == 'scaled_jensen_shannon' and o.divergence_alpha in (0.0, 1.0)
  name = ('forward_kl', 'reverse_kl')[int(o.divergence_alpha)] if ends else o.divergence
  if name in ('forward_kl', 'skew_kl'):  # they only ever push mass into the support
    return o.support != 'student_top_k'
  # Of the others, each term alone is at least 0, and least where the two are equal.
  return name not in ('reverse_kl', 'skew_reverse_kl')
