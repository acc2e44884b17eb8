"""What the student is trained towards: the fields of `config.objective`, and which of their
combinations mean something.

The loss that they describe is in `update.py`, the weight of each token in `credit.py`, divergences
over a support in `estimators.py`.
"""

from __future__ import annotations

import dataclasses

from opd_jax.algorithm import support as support_lib
from opd_jax.types import Wants

ROUTES = ('policy_gradient', 'direct')
ESTIMATORS = ('none', *support_lib.DIRECT_SAMPLED)
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
  def term(self) -> support_lib.Term:
    """One term of the divergence."""
    return support_lib.term(self.divergence, self.divergence_alpha)


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
  def has_signal(self) -> bool:
    """Whether the teacher's word is a policy gradient's advantage."""
    return self.needs_teacher and self.route == 'policy_gradient'

  @property
  def has_policy_gradient(self) -> bool:
    """Whether any term of the loss goes through A_t."""
    return self.has_signal or self.reward_coef != 0.0 or self.likelihood_coef != 0.0

  @property
  def term(self) -> support_lib.Term:
    """One term of the divergence."""
    return support_lib.term(self.divergence, self.divergence_alpha)


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
