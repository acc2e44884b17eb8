"""Named objectives of the literature: for each, the fields that make a config that method.

A preset says what the student is trained towards and on what, not how fast: learning rates, batch
sizes and lengths stay as they are. `apply` sets its fields over the neutral objective. What a paper
does beyond these fields is said in `omits`. Numbers in `headline` are the papers' own.

Cells are in the terms of the survey by Song & Zheng (2026, arXiv 2604.00626): feedback signal
(logits, outcomes, self-play), teacher access (white-box, black-box, none), granularity (token,
sequence, hybrid).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from opd_jax import config as config_lib
from opd_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Preset:
  """A method.

  Attributes:
    paper: name, year and where to find it.
    signal, access, granularity: its cell of the taxonomy.
    equation: what is minimized (or the gradient, where that is what the paper gives).
    fields: {'group.field': value}, all that differs from `config.default_config`.
    headline: the paper's own main number.
    omits: what the paper or its official code has besides, and these fields do not.
    note: what else somebody who compares should know.
  """

  paper: str
  signal: str
  access: str
  granularity: str
  equation: str
  fields: dict[str, Any]
  headline: str
  omits: str = ''
  note: str = ''


def _fields(**groups: dict[str, Any]) -> dict[str, Any]:
  return {f'{group.replace("__", ".")}.{name}': value
          for group, values in groups.items() for name, value in values.items()}


def _direct(divergence: str = 'reverse_kl', **more: Any) -> dict[str, Any]:
  """The objective fields of an exact divergence, differentiated."""
  named = dict(divergence=divergence) if divergence != 'reverse_kl' else {}
  return dict(route='direct', support='full', importance='none') | named | more


WHITE = dict(signal='logits', access='white-box')
OUTCOME = dict(signal='outcomes', access='none')

PRESETS: dict[str, Preset] = {
    'opd': Preset(
        'On-Policy Distillation (Thinking Machines Lab 2025)', **WHITE, granularity='token',
        equation='-rho_t (log p_T - log p_S)(y_t), discount 0', fields={},
        headline='AIME 24 70 % in 150 steps, 9-30x less compute than SFT to it; RL in 7-10x fewer '
                 'steps'),
    'opd_exact': Preset(
        'the expectation of opd, e.g. arXiv 2605.11182', **WHITE, granularity='token',
        equation='sum_v p_S (log p_S - log p_T)', fields=_fields(objective=_direct()),
        headline='–'),
    'gkd': Preset(
        'GKD (Agarwal et al. 2023, arXiv 2306.13649)', **WHITE, granularity='token',
        equation='JSD_b(p_T, p_S), b = 0.5, on a share lambda = 0.5 of own samples',
        fields=_fields(objective=_direct('jensen_shannon(0.5)'),
                       data=dict(on_policy_fraction=0.5, off_policy_source='teacher')),
        headline="2.1x / 1.7x / 1.9x the gain of baseline KD on XSum / WMT / GSM8K"),
    'warm_start': Preset(
        'the supervised start of e.g. arXiv 2604.13016, by the exact divergence', **WHITE,
        granularity='token',
        equation='KL(p_T || p_S) for 20 steps on text of the teacher, then on own samples',
        fields=_fields(objective=_direct('forward_kl'),
                       data=dict(warm_steps=20, off_policy_source='teacher')),
        headline='–',
        note='the forward KL holds the student to the whole of p_T: where the student begins far '
             "off, jensen_shannon(0.5) collapses too (docs/results.md)"),
    'minillm': Preset(
        'MiniLLM (Gu et al. 2023, arXiv 2306.08543)', **WHITE, granularity='sequence',
        equation='KL(p_S || p_T)_t exactly - rho_t mean_{k>t} r_k, r = log p_T - log p_S, samples '
                 'of 0.2 p_T + 0.8 p_S',
        fields=_fields(objective=dict(discount=1.0, returns='later_mean'),
                       objective__local=dict(coef=1.0, divergence='reverse_kl'),
                       sample=dict(teacher_mix=0.2)),
        headline='ROUGE-L 27.7 on Dolly against 24.5 SFT and 25.2 KD (re-run by a third party)',
        omits="the ratio on the exact term; of its official code: advantages whitened over the "
              "batch; PPO's clip of the ratio p_S / p_mix at every update, of 4 epochs; rewards "
              "divided by 0.5 and clipped at 100; cross-entropy on its text, with the tokens there "
              "(given.likelihood_coef) and with the teacher's distribution (given.distill_coef, "
              "forward_kl)",
        note='the return of a token begins with the next one, as in its paper: the exact term has '
             'its own; that of the official code begins with the token, by the number of tokens '
             'from it on'),
    'distillm': Preset(
        'DistiLLM (Ko et al. 2024, arXiv 2402.03898)', **WHITE, granularity='token',
        equation='KL(p_T || a p_T + (1 - a) p_S), a = 0.1, half of the batches off-policy',
        fields=_fields(objective=_direct('skew_kl(0.1)'),
                       data=dict(on_policy_fraction=0.5, off_policy_source='teacher')),
        headline='up to 4.3x faster than on-policy KD',
        omits='the replay buffer and its adaptive schedule; 1 - kd_ratio of the cross-entropy of '
              'the rows',
        note="its other rows are the data set's own answers, here the teacher's; "
             "data.off_policy_source='dataset' takes those of the task"),
    'distillm2': Preset(
        'DistiLLM-2 (Ko et al. 2025, arXiv 2503.07067)', **WHITE, granularity='token',
        equation='SRKL_a on own samples + SKL_a on teacher samples, a = 0.1',
        fields=_fields(objective=_direct('skew_reverse_kl(0.1)'),
                       given=dict(source='teacher', prompts_per_step=64, distill_coef=1.0,
                                  divergence='skew_kl(0.1)')),
        headline='AlpacaEval win rate 73.7, HumanEval 42.7 (Qwen2.5-1.5B)',
        omits='a per sample; the student detached in the SRKL mixture'),
    'vopd': Preset(
        'vOPD (2026, arXiv 2605.07865)', **WHITE, granularity='token',
        equation='-rho_t (log p_T - log p_S + KL(p_S || p_T))(y_t)',
        fields=_fields(objective=dict(baseline='exact')),
        headline='matches full-vocabulary reverse KL at the cost of one token'),
    'opd_plus': Preset(
        'OPD+ (2026, arXiv 2606.01039)', **WHITE, granularity='token',
        equation='-rho_t w(u), w = -f(u) + u f\'(u), of the Jensen-Shannon divergence',
        fields=_fields(objective=dict(divergence='jensen_shannon(0.5)')),
        headline='mathematics 48.9 (JSD+) and 46.4 (FKL+) against 38.4 SFT'),
    'power_opd': Preset(
        'PowerOPD (2026, arXiv 2606.17199)', **WHITE, granularity='token',
        equation='-rho_t (p_T^a - p_S^a)(y_t), a = 1',
        fields=_fields(objective=dict(shaping='power(1)')),
        headline='+6.4 Avg@8 over opd, 59 % less time'),
    'log_opd': Preset(
        'Demystifying OPD (2026, arXiv 2607.13399)', **WHITE, granularity='token',
        equation='-rho_t sign(x) log(1 + |x|), x = log p_T - log p_S',
        fields=_fields(objective=dict(shaping='log')),
        headline='30.4 against 28.1 of opd (1.7B, GRPO teacher of its size)'),
    'eopd': Preset(
        'EOPD (2026, arXiv 2603.07079)', **WHITE, granularity='token',
        equation='opd + KL(p_T || p_S) over the teacher\'s top 16 where H(p_T) > 0.8',
        fields=_fields(objective__local=dict(
            coef=1.0, support='teacher_top_k(16, tail="drop")', gate='teacher_entropy(0.8)')),
        headline='Pass@8 +1.4 / +2.4 / +5.1 (0.6B / 1.7B / 4B)',
        note='not at rest where the student is the teacher: a forward KL over 16 tokens falls as '
             'mass moves into them'),
    'tropd': Preset(
        'TrOPD (2026, arXiv 2606.01249)', **WHITE, granularity='token',
        equation='opd where trusted, with probability min(p_T / p_S, 1); else KL(p_T || p_S) over '
                 'the teacher\'s top 16',
        fields=_fields(objective__local=dict(
            coef=1.0, support='teacher_top_k(16, tail="drop")', gate='untrusted', instead=True)),
        headline='49.9 against 46.8 of opd (DeepSeek-R1-Distill-1.5B)',
        omits='prefixes that the teacher wrote'),
    'aopd': Preset(
        'AOPD (2026, arXiv 2605.06387)', **WHITE, granularity='token',
        equation='opd where its advantage is positive, else KL(p_T || p_S)',
        fields=_fields(objective__local=dict(coef=1.0, gate='negative', instead=True)),
        headline='+4.1 (strong start) and +8.3 (weak start) over opd'),
    'exopd': Preset(
        'G-OPD / ExOPD (2026, arXiv 2602.12125)', **WHITE, granularity='token',
        equation='-rho_t (l log p_T + (1 - l) log p_ref - log p_S)(y_t), l = 1.25',
        fields=_fields(objective=dict(extrapolation=1.25, importance='truncated(5)'),
                       reference=dict(kind='initial_student')),
        headline='students above their domain teachers'),
    'stable_opd': Preset(
        'StableOPD (2026, arXiv 2604.08527)', **WHITE, granularity='token',
        equation='opd + 0.01 KL(p_S || p_ref) - 0.1 log p_S(golden data)',
        fields=_fields(objective=dict(reference_kl='full(0.01)'),
                       reference=dict(kind='initial_student'),
                       given=dict(source='dataset', prompts_per_step=16, likelihood_coef=0.1)),
        headline='+7.2 %, no collapse into truncated completions',
        omits='its trigger on repetitions'),
    'kdrl': Preset(
        'KDRL (2025, arXiv 2506.02208)', signal='outcomes', access='white-box',
        granularity='sequence', equation='GRPO + b k2(p_S, p_T), b from 5e-3 to 1e-3',
        fields=_fields(
            objective=dict(route='direct', estimator='k2', importance='ppo_clip(0.2)',
                           distill_coef=5e-3, anneal='linear(steps=80, to=1e-3)',
                           reward_coef=1.0, reward_baseline='group_mean_std'),
            data=dict(samples_per_prompt=4)),
        headline='both together above either alone',
        omits="GRPO's mean within rows; verl's dual clip (clip_ratio_c) of negative advantages"),
    'rg_opd': Preset(
        'RG-OPD (2026, arXiv 2607.04037)', signal='outcomes', access='white-box',
        granularity='hybrid',
        equation='KL(p_S || p_T) over the student\'s top 50 and a tail bucket, on rows where '
                 'teacher and verifier agree',
        fields=_fields(objective=_direct(support='student_top_k(50, tail="bucket")',
                                         row_gate='reward_agrees')),
        headline='–'),
    'lsm': Preset(
        'Revisiting OPD (2026, arXiv 2603.25562)', **WHITE, granularity='token',
        equation='sum over the teacher\'s top 32 of p_S (log p_S - log p_T), both renormalized',
        fields=_fields(objective=_direct(support='teacher_top_k(32, tail="renormalize")'),
                       sample=dict(top_p=0.9)),
        headline='41.5 against 36.4 of opd (Qwen2.5-7B), 97.7 on ALFWorld',
        omits='its mask of special tokens'),
    'mopd': Preset(
        'MOPD (2026, arXiv 2606.30406), its per-token form', **WHITE, granularity='token',
        equation='-rho_t clip(log p_T - log p_S, -5, 5)(y_t)',
        fields=_fields(objective=dict(shaping='clip(5)')),
        headline='normalized score .937 against .882 of mixed RL (several teachers)',
        omits='routing each prompt to the teacher of its domain'),
    'mopd_top_k': Preset(
        'MOPD (2026, arXiv 2606.30406), its top-k form', **WHITE, granularity='token',
        equation='sum over the teacher\'s top 64 of p_S log(p_S / p_T) - p_S + p_T',
        fields=_fields(objective=_direct('alpha_divergence(0)',
                                         support='teacher_top_k(64, tail="drop")')),
        headline='.909 where the per-token form has .937; collapses with a distant teacher'),
    'fixed_negative': Preset(
        'a control arm (2026, arXiv 2608.31046)', **WHITE, granularity='token',
        equation='rho_t where p_T(y_t) < p_S(y_t), else 0',
        fields=_fields(objective=dict(signal='fixed_negative')), headline='–'),
    'sft': Preset(
        'supervised fine-tuning', signal='outcomes', access='black-box', granularity='sequence',
        equation='-log p_S(y_t), y of the dataset',
        fields=_fields(objective=dict(distill_coef=0.0, likelihood_coef=1.0, importance='none'),
                       data=dict(source='dataset')),
        headline='AIME 24 60 % with 400 k prompts (Thinking Machines Lab 2025)'),
    'seq_kd': Preset(
        'SeqKD (Kim & Rush 2016, arXiv 1606.07947)', signal='outcomes', access='black-box',
        granularity='sequence', equation='-log p_S(y_t), y written by the teacher',
        fields=_fields(objective=dict(distill_coef=0.0, likelihood_coef=1.0, importance='none'),
                       data=dict(source='teacher')),
        headline='–', omits='beam search'),
    'grpo': Preset(
        'GRPO (Shao et al. 2024, arXiv 2402.03300)', **OUTCOME, granularity='sequence',
        equation='-min(rho_t A, clip(rho_t) A), A = (r - mean) / std of the group',
        fields=_fields(objective=dict(
            distill_coef=0.0, reward_coef=1.0, reward_baseline='group_mean_std',
            importance='ppo_clip(0.2)'), data=dict(samples_per_prompt=4)),
        headline='GSM8K 82.9 to 88.2 (DeepSeekMath 7B)',
        omits="its KL term (reference_kl), its mean within rows (reduction='sequence_mean'); "
              "verl's dual clip (clip_ratio_c) of negative advantages",
        note="the sample's standard deviation, as in TRL, verl and Tunix"),
    'reinforce': Preset(
        'REINFORCE with a group mean (Williams 1992)', **OUTCOME, granularity='sequence',
        equation='-rho_t (r - mean of the group)',
        fields=_fields(objective=dict(distill_coef=0.0, reward_coef=1.0,
                                      reward_baseline='group_mean'),
                       data=dict(samples_per_prompt=4)),
        headline='–'),
}


def apply(c: ConfigDict, name: str) -> ConfigDict:
  """Makes `c` the method called `name`, in place, and returns it.

  Every group that a preset may set returns to its default first, so that nothing of an earlier
  method is left: objective (but for its temperature, reduction and student_logprobs), reference,
  given, the samples' teacher_mix and truncation, and who writes the rows. The rows of a batch stay
  as many: with several samples a prompt there are fewer prompts; and at least half of the steps are
  the student's own. What needs a teacher, or the student's own rows, goes with them.

  Raises:
    ConfigError: there is no such preset; lists those there are.
  """
  if name not in PRESETS:
    raise ConfigError(f'preset={name!r}; allowed: {sorted(PRESETS)}')
  preset, neutral = PRESETS[name], config_lib.default_config()
  rows = c.data.prompts_per_step * c.data.samples_per_prompt
  kept = {'reduction': c.objective.reduction}
  if preset.access == 'white-box':
    kept['teacher_temperature'] = c.objective.teacher_temperature
  if 'objective.distill_coef' not in preset.fields and 'objective.route' not in preset.fields:
    kept['student_logprobs'] = c.objective.student_logprobs
  for group in ('objective', 'reference', 'given'):
    c[group] = neutral[group]
  c.objective.update(kept)
  for group, fields in (('sample', ('top_p', 'top_k', 'teacher_mix')), ('data', (
      'source', 'on_policy_fraction', 'off_policy_source', 'warm_steps', 'samples_per_prompt'))):
    for field in fields:
      c[group][field] = neutral[group][field]
  for path, value in preset.fields.items():
    *groups, field = path.split('.')
    here = c
    for group in groups:
      here = here[group]
    here[field] = value
  c.data.prompts_per_step = max(1, rows // c.data.samples_per_prompt)
  c.data.warm_steps = min(c.data.warm_steps, c.steps // 2)
  if preset.access == 'none':
    c.teacher, c.sample.stop = neutral.teacher, neutral.sample.stop
  if c.data.source != 'student':
    c.log.max_sampler_gap = neutral.log.max_sampler_gap
  return c


def table() -> str:
  """Shows all of them as a Markdown table."""
  lines = ['| preset | paper | cell | per token | fields | headline of the paper |',
           '|---|---|---|---|---|---|']
  for name, p in PRESETS.items():
    fields = ', '.join(f'{k.removeprefix("objective.")}={v!r}' for k, v in p.fields.items())
    cell = f'{p.signal}, {p.access}, {p.granularity}'
    paper = (p.paper + (f' (left out: {p.omits})' if p.omits else '')
             + (f' (note: {p.note})' if p.note else ''))
    equation = p.equation.replace('|', '\\|')
    row = (f'`{name}`', paper, cell, equation, f'`{fields}`' if fields else '–', p.headline)
    lines.append('| ' + ' | '.join(row) + ' |')
  return '\n'.join(lines) + '\n'
