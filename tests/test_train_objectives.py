"""Runs of other objectives, and of rows that others than the student write."""

import contextlib
import functools
import io
import shutil

import numpy as np
import pytest
import reuse
import tiny

from opd_jax import build, config
from opd_jax.data import streams
from opd_jax.files import workdir as workdir_lib


@pytest.mark.parametrize('fields', [
    dict(route='direct', support='union_top_k(4, tail="bucket")', importance='none',
         divergence='jensen_shannon(0.5)'),
    dict(route='direct', estimator='k2', importance='none'),
    dict(baseline='exact', token_gate='soft_or(keep=0.5)'),
    dict(shaping='power(1)', baseline='leave_one_out', importance='truncated(2)'),
    dict(route='direct', support='full', importance='none', divergence='forward_kl',
         row_gate='wrong', window='tokens(0, 3)'),
], ids=['top_k', 'k2', 'exact_baseline', 'power', 'gates'])
def test_other_objectives_lower_the_reverse_kl(tmp_path, fields):
  c = tiny.with_models('opd_sampled', steps=40, data__samples_per_prompt=2,
                       data__prompts_per_step=64, optimizer__learning_rate=1e-3,
                       **{f'objective__{name}': value for name, value in fields.items()})
  reuse.train(c, tmp_path)
  rows = tiny.rows(tmp_path, 'train')
  # On the student's own samples of the training problems, some of which it learns by heart: to a
  # fourth in the runs seen. On other problems it depends on how the two models came out.
  kl = [r['reverse_kl'] for r in rows]
  assert np.mean(kl[-10:]) < 0.5 * np.mean(kl[:5])
  assert ('counted_rate' in rows[0]) == any('gate' in f or 'window' in f for f in fields)
  assert all(0 < r.get('counted_rate', 1) <= 1 for r in rows)


# --- who writes the rows, and what else a step looks at ---

# Both draw in every step: which batches are the student's, and which tokens are trusted.
MIXED = dict(
    steps=8, objective__divergence='jensen_shannon(0.5)',
    data__on_policy_fraction=0.5, data__off_policy_source='teacher', given__source='dataset',
    given__split='corpus', given__prompts_per_step=8, given__likelihood_coef=0.1)
UNTRUSTED = dict(
    steps=8, reference__kind='initial_student', objective__reference_kl='k2(0.1)',
    objective__local__coef=1.0, objective__local__support='teacher_top_k(4, tail="drop")',
    objective__local__gate='untrusted', objective__local__instead=True)


@functools.cache
def mixed():
  """(config, work directory) of a run of each."""
  out = []
  for kind, fields in (('opd_exact', MIXED), ('opd_sampled', UNTRUSTED)):
    c = tiny.with_models(kind, checkpoint__every_steps=4, checkpoint__keep_latest=4, **fields)
    workdir = tiny.folder() / f'mixed_{kind}'
    with contextlib.redirect_stdout(io.StringIO()):
      reuse.train(c, workdir, anew=True)
    out.append((c, workdir))
  return out


def test_the_student_writes_nothing_in_the_first_steps(tmp_path):
  c = tiny.with_models('opd_exact', steps=5, data__warm_steps=3, data__off_policy_source='teacher',
                       given__source='dataset', given__split='corpus', given__prompts_per_step=8,
                       given__likelihood_coef=0.1)
  reuse.train(c, tmp_path)
  rows = tiny.rows(tmp_path, 'train')
  # Only on its own samples is there a reverse KL, and a text to look at; the others go on.
  assert ['reverse_kl' in r for r in rows] == [False] * 3 + [True] * 2
  assert ['text' in r for r in rows] == [False] * 3 + [True] * 2
  assert all('given_loss' in r for r in rows)
  assert [r['step'] for r in rows] == [1, 2, 3, 4, 5]


def test_batches_are_the_students_or_not_as_seed_and_step_say():
  c, workdir = mixed()[0]
  rows = tiny.rows(workdir, 'train')
  mine = [streams.step_draw(c.seed, step) < 0.5 for step in range(c.steps)]
  assert 2 <= sum(mine) <= 6  # or nothing is tested
  assert ['gap_max' in r for r in rows] == mine == ['reverse_kl' in r for r in rows]
  # Sampler and update of both kinds, one scorer of the teacher for both (they ask the same of it),
  # and nothing compiled twice.
  assert rows[-1]['perf']['compiles'] == 5
  assert all(r['gap_max'] < 1e-4 for r in rows if 'gap_max' in r)
  # Rows beside, other ones in every step: what they add to the loss, and that their tokens cost.
  # (That they add their gradient is in test_oracle.py.)
  assert rows[0]['given_loss'] == pytest.approx(-0.1 * rows[0]['given_logprob'], rel=1e-5)
  assert 0 < rows[0]['given_loss'] < rows[0]['loss']
  parts = build.open_parts(config.parse(c))
  spent = {stream.name: parts.counter(updates=1).stream(stream, np.full(32, 8.0)).total
           for stream in parts.streams}
  assert 0 < spent[streams.GIVEN] < spent[streams.OWN]


def test_a_reference_and_a_random_gate():
  c, workdir = mixed()[1]
  rows = tiny.rows(workdir, 'train')
  # The student has not moved: what is left is the square of the rounding between two programs.
  assert rows[0]['reference_kl'] < 1e-12
  assert all(r['reference_kl'] > 1e-9 for r in rows[1:])
  rates = [r['local_rate'] for r in rows]
  assert len(set(rates)) > 4 and all(0.0 < rate < 1.0 for rate in rates)
  # The reference has the student's programs, and the teacher too.
  assert rows[-1]['perf']['compiles'] == 3


@pytest.mark.parametrize('which', [0, 1], ids=['mixed', 'untrusted'])
def test_mixed_runs_resume_to_the_same_bits(which, tmp_path):
  c, workdir = mixed()[which]
  again = tmp_path / 'again'
  shutil.copytree(workdir, again)
  for name in (workdir_lib.RESULT, workdir_lib.EXPORT, 'checkpoints/8'):
    path = again / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  with contextlib.redirect_stdout(io.StringIO()) as out:
    reuse.train(c, again)
  assert 'resumed from the checkpoint of step 4' in out.getvalue()
  tiny.assert_same_bits(tiny.read_checkpoint(workdir, 8), tiny.read_checkpoint(again, 8))
  assert tiny.rows(workdir, timing=False) == tiny.rows(again, timing=False)


def test_samples_of_a_mixture_with_the_teacher(tmp_path):
  c = tiny.with_models('opd_sampled', sample__teacher_mix=0.5, objective__discount=1.0,
                       objective__returns='later_mean', objective__local__coef=1.0,
                       objective__local__divergence='reverse_kl')
  reuse.train(c, tmp_path / 'mixed')
  rows = tiny.rows(tmp_path / 'mixed', 'train')
  # The student's own log-probs of the mixture's tokens are still the scorer's, and p_S / p_mix is
  # at most 1 / (1 - 0.5).
  assert all(r['gap_max'] < 1e-4 for r in rows)
  assert all(0.0 <= r['ratio_min'] < 0.5 and 1.0 < r['ratio_max'] <= 2.0 + 1e-4 for r in rows)
  reuse.train(tiny.with_models('opd_sampled', steps=1), tmp_path / 'plain')
  plain = tiny.rows(tmp_path / 'plain', 'train')
  # The teacher writes too, which makes the tokens likelier by it, and decodes beside the student.
  assert rows[0]['reverse_kl'] < plain[0]['reverse_kl']
  mixed, alone = (r[0]['flops'] for r in (rows, plain))
  # Of the same shape, and it decodes what the other grades.
  assert alone['student_sampling'] == pytest.approx(alone['teacher_scoring'])
  assert alone['teacher_sampling'] == 0.0
  # Two decode; the teacher's head is applied again for the exact term.
  assert mixed['teacher_sampling'] == pytest.approx(mixed['student_sampling'])
  assert 1.0 < mixed['teacher_scoring'] / mixed['student_sampling'] < 1.4


def test_advantages_are_recomputed_and_coefficients_annealed(tmp_path):
  fields = dict(steps=2, optimizer__updates_per_batch=2,
                objective__anneal='linear(steps=4, to=0.2)')
  runs = {}
  for kept in ('kept', 'recomputed'):
    c = tiny.with_models('opd_sampled', objective__advantages=kept, **fields)
    reuse.train(c, tmp_path / kept)
    runs[kept] = tiny.rows(tmp_path / kept, 'train')
  # Of the second of two updates, at gradient steps 1 and 3 of 4.
  assert [r['distill_coef'] for r in runs['kept']] == pytest.approx([0.8, 0.4])
  scored, trained = ([r[0]['flops'][part] for r in runs.values()]
                     for part in ('student_scoring', 'student_training'))
  # Two updates of 3 forward passes, and one or two scores.
  assert scored[1] / scored[0] == pytest.approx(2) and trained[0] == trained[1]
  assert trained[0] / scored[0] == pytest.approx(6)
  assert runs['kept'][0]['loss'] != runs['recomputed'][0]['loss']


# --- evaluations with another room than training ---


def test_evaluations_have_a_room_of_their_own(tmp_path):
  c = tiny.with_models('opd_exact', data__max_new_tokens=2, eval__max_new_tokens=6, steps=2,
                       doctor__truncation='off: cut on purpose')
  result = reuse.train(c, tmp_path)
  # An answer is '#', digits and what ends it: none fits two tokens, and nearly all fit six.
  assert all(row['truncation_rate'] == 1.0 for row in tiny.rows(tmp_path, 'train'))
  assert all(row['length'] == 2.0 for row in tiny.rows(tmp_path, 'train'))
  assert result['after']['length'] > 2.5 and result['after']['truncation_rate'] < 0.5
  assert result['after']['reverse_kl'] > 0


def test_a_room_that_no_model_has_is_refused():
  c = tiny.with_models('opd_exact', eval__max_new_tokens=60)
  with pytest.raises(ValueError, match=r'eval\.max_new_tokens=60.*together at most 32'):
    build.open_parts(config.parse(c))
