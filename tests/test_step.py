"""benchmarks/step.py, peers.py and growth.py: what they count, measure and refuse. No peer, no
network; times are only compared with themselves."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / 'benchmarks'))
import growth  # noqa: E402
import peers  # noqa: E402
import step  # noqa: E402
import step_floor  # noqa: E402
import step_loop  # noqa: E402
import step_work  # noqa: E402
import turns  # noqa: E402

from opd_jax.algorithm.objective import Objective  # noqa: E402
from opd_jax.run import flops  # noqa: E402

SIZES = step_work.Sizes('tiny', vocab=64, rows=4, prompt=3, new=5)
FLAGS = ['--shapes', 'tiny', '--vocab', '64', '--rows', '4', '--prompt', '3', '--new', '5']
EXACT = Objective(route='direct', support='full', importance='none')
SMALL = ('compute.microbatch_rows=2', 'compute.chunk_tokens=8')


@pytest.fixture(scope='module')
def work(tmp_path_factory):
  return step_work.make(tmp_path_factory.mktemp('work') / 'tiny', SIZES)


# --- the floor ---


def _forward(width, layers, heads, kv, head, inner, rows, positions, answers, vocab):
  """(body, head) of a forward pass, by hand: 2 a weight and token, 4 a head, pair and number."""
  weights = layers * (2 * width * heads * head + 2 * width * kv * head + 3 * width * inner)
  pairs = positions * (positions + 1) // 2
  body = rows * (2 * weights * positions + 4 * layers * heads * head * pairs)
  return body, rows * answers * 2 * width * vocab


def test_the_operations_are_those_counted_by_hand_and_by_flops():
  student, teacher = (step_work.model_of(SIZES, part) for part in ('student', 'teacher'))
  sizes = (SIZES.rows, SIZES.prompt + SIZES.new - 1, SIZES.new, SIZES.vocab)
  own, own_head = _forward(32, 2, 2, 1, 16, 64, *sizes)
  theirs, their_head = _forward(64, 2, 4, 2, 16, 128, *sizes)
  counts = (SIZES.rows, SIZES.prompt, SIZES.new)
  assert step_floor.phase_flops(student, teacher, EXACT, *counts) == {
      'generate': own + own_head, 'score_teacher': theirs,
      'update': 3 * (own + own_head) + their_head}
  sampled = step_floor.phase_flops(student, teacher, Objective(), *counts)
  assert sampled == {
      'generate': own + own_head, 'score_teacher': theirs + their_head,
      'score_student': own + own_head, 'update': 3 * (own + own_head)}
  # With as many heads as positions it is what the book counts.
  lengths = np.full(SIZES.rows, SIZES.new)
  whole = step_floor.phase_flops(student, teacher, Objective(), SIZES.rows, 1, SIZES.new)
  assert sum(whole.values()) == 5 * flops.forward_flops(student, lengths) + flops.forward_flops(
      teacher, lengths)


def test_the_bytes_of_decoding_are_those_of_its_steps():
  student, teacher = (step_work.model_of(SIZES, part) for part in ('student', 'teacher'))
  moved = step_floor.phase_bytes(student, teacher, Objective(), SIZES.rows, SIZES.prompt, SIZES.new,
                                 itemsize=2)
  # Matrices, norms (two a layer of the width, two of a head), the last one; the head is tied.
  weights = 2 * (2 * 32 * 2 * 16 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32 + 2 * 16) + 32 + 64 * 32
  a_slot = SIZES.rows * 2 * 2 * 1 * 16
  steps = [weights + (a_slot * (SIZES.prompt + n) if n else 0) for n in range(SIZES.new)]
  assert moved['generate'][0] == 2 * sum(steps)
  assert moved['update'][0] == 4 * 8 * weights
  assert moved.keys() == {'generate', 'score_teacher', 'score_student', 'update'}


def test_a_floor_is_the_longer_of_operations_and_bytes():
  machine = {'flops_per_s': {'float32 xla 1x1x1': 10.0, 'float32 numpy 2x2x2': 20.0,
                             'bfloat16 xla 1x1x1': 40.0},
             'bytes_per_s': {'100': 50.0, '1000': 5.0}}
  work = {'generate': 200.0}, {'generate': (100.0, 100)}
  assert step_floor.floors(*work, machine, 'float32')['generate']['floor_s'] == 10.0
  assert step_floor.floors(*work, machine, 'bfloat16')['generate']['floor_s'] == 5.0
  larger = {'generate': (100.0, 101)}  # it does not fit where the small copy is fast
  assert step_floor.floors(work[0], larger, machine, 'bfloat16')['generate'] == {
      'flops': 200.0, 'bytes': 100.0, 'flops_s': 5.0, 'bytes_s': 20.0, 'floor_s': 20.0}
  largest = {'generate': (100.0, 10**6)}
  assert step_floor.floors(work[0], largest, machine, 'float32')['generate']['bytes_s'] == 20.0


# --- a step of the loop ---


class InProcess:
  """A worker without a process: compiled programs are those of the test session."""

  def __init__(self, make_step, clock):
    self._step, self._clock = make_step, clock
    self.about = {'first_step_s': 0.0}

  def step(self):
    with self._clock.phase(turns.STEP):
      self._step()
    return self._clock.take()

  def finish(self):
    return turns.peak_bytes()

  def stop(self):
    pass


def _serve_in_process(monkeypatch):
  def loop_worker(work, settings, threads, log, platform='cpu'):
    clock = turns.Clock()
    return InProcess(step_loop.Step(work, settings, clock).take, clock)

  class Floor(InProcess):
    def step(self):
      return step_floor.measure(['float32'])

  monkeypatch.setattr(step, 'loop_worker', loop_worker)
  monkeypatch.setattr(step.turns, 'Worker', lambda *_: Floor(None, None))
  monkeypatch.setattr(step_floor, 'REPEAT_S', 0.0)
  monkeypatch.setattr(step_floor, 'SHAPES', ((64, 64, 64),))
  monkeypatch.setattr(step_floor, 'COPIES', (2**12, 2**14))


def test_the_json_has_every_phase_with_its_floor(tmp_path, monkeypatch, capsys):
  _serve_in_process(monkeypatch)
  out = tmp_path / 'step.json'
  monkeypatch.setattr(sys, 'argv', [
      'step.py', *FLAGS, '--objective', 'exact', 'sampled', '--dtype', 'float32', '--threads',
      'one', '--steps', '1', '--json', str(out), *(f'--set={field}' for field in SMALL)])
  step.main()
  found = json.loads(out.read_text())
  assert 'xla float32' in capsys.readouterr().out
  assert found['machine']['one']['flops_per_s'].keys() >= {
      'float32 xla 64x64x64', 'float32 numpy 64x64x64'}
  phases = {f['settings']['objective']: f['phases'] for f in found['found']}
  scored = {'generate', 'score_teacher', 'update'}
  assert phases['exact'].keys() == scored | {step.OTHER}
  assert phases['sampled'].keys() == scored | {'score_student', step.OTHER}
  for one in found['found']:
    assert one['peak_bytes'] > 2**20 and len(one['load']) == 2
    assert one['tokens_per_s'][turns.STEP] < one['tokens_per_s']['generate']
    for name, phase in one['phases'].items():
      assert phase['wall_s'] > 0 and phase['cpu_s'] >= 0
      if name != step.OTHER:
        assert phase['floor_s'] > 0 and 0 < phase['share'] <= 1.2, name
    parts = sum(p['wall_s'] for p in one['phases'].values())
    assert np.isclose(parts, one['step']['wall_s'])
    assert 0 < one['step']['share'] <= 1.2


def test_the_loss_that_peers_are_held_to_is_that_of_the_update(work):
  settings = step_loop.Settings(fields=SMALL)
  mine = step_loop.Step(work, settings, turns.Clock())
  tokens, logprobs = jnp.asarray(mine.given), []
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  for part, params in ((mine.parts.student, mine.state.params),
                       (mine.parts.teacher, mine.graders['teacher'].params)):
    hidden, _ = part.model.forward(params, tokens, positions, jnp.ones(tokens.shape, bool), None)
    logits = part.model.head(params).logits(hidden)[:, SIZES.prompt - 1:-1]
    logprobs.append(np.asarray(jax.nn.log_softmax(logits)))
  own, theirs = logprobs
  chosen = np.take_along_axis(own, mine.given[:, SIZES.prompt:, None], -1)
  found = mine.first_update()
  np.testing.assert_allclose(found['loss'], (np.exp(own) * (own - theirs)).sum(-1).mean(),
                             rtol=1e-5)
  np.testing.assert_allclose(found['logprob'], chosen.mean(), rtol=1e-5)


def test_no_answer_ends_early(work):
  # The peers' tokenizer ends texts with a token that the models do not have.
  ends = json.loads((work / 'tokenizer' / 'tokenizer.json').read_text())['model']['vocab']
  assert min(ends['<never>'], ends['<padding>']) >= SIZES.vocab
  mine = step_loop.Step(work, step_loop.Settings(fields=SMALL), turns.Clock())
  lengths = np.asarray(mine.take()['lengths'])
  assert lengths.tolist() == [SIZES.new] * SIZES.rows
  assert step_work.read(work)[0] == SIZES


# --- turns ---

NOISY = '''import sys
sys.path.append(sys.argv[1])
import os, turns
here = turns.Turns()
print('what a library prints')
def step():
  with here.clock.phase('generate'):
    if sys.argv[2:] == ['later']:
      sys.exit('error: no more')
if sys.argv[2:] == ['fail']:
  sys.exit('error: it cannot')
here.serve(step, cores=len(os.sched_getaffinity(0)), threads=os.environ.get('OMP_NUM_THREADS'))
'''


def test_workers_answer_on_one_core_whatever_is_printed(tmp_path):
  (tmp_path / 'noisy.py').write_text(NOISY)
  command = [sys.executable, tmp_path / 'noisy.py', ROOT / 'benchmarks']
  worker = turns.Worker(command, 'one', tmp_path / 'log')
  assert worker.about == {'cores': 1, 'threads': '1'}
  assert worker.step().keys() == {'generate', turns.STEP}
  assert worker.finish() > 2**20
  worker.stop()
  assert 'what a library prints' in (tmp_path / 'log').read_text()
  with pytest.raises(turns.WorkerError, match='it cannot'):
    turns.Worker([*command, 'fail'], 'all', tmp_path / 'log')
  later = turns.Worker([*command, 'later'], 'all', tmp_path / 'log')
  for _ in range(2):
    with pytest.raises(turns.WorkerError, match='no more'):
      later.step()
  later.stop()


# --- the table of the peers ---


def _spent(**phases):
  return {name: [seconds, seconds / 2] for name, seconds in phases.items()}


def test_ratios_are_of_the_same_round():
  ours = [_spent(generate=1.0, update=1.0, step=2.0), _spent(generate=9.0, update=1.0, step=10.0)]
  theirs = [_spent(generate=2.0, update=4.0, step=6.0),
            _spent(generate=27.0, update=2.0, step=30.0)]
  assert peers.ratios(ours, theirs) == {
      name: {'wall': value, 'cpu': value}
      for name, value in (('generate', 2.5), ('update', 3.0), (turns.STEP, 3.0))}
  only = [_spent(generate=2.0, step=2.0), _spent(generate=9.0, step=9.0)]
  assert peers.ratios(ours, only) == {'generate': {'wall': 1.5, 'cpu': 1.5}}


def test_the_table_has_a_row_a_system():
  spent = {peers.OURS: _spent(generate=1.0, score_teacher=1.0, update=2.0, step=4.0),
           'tunix': _spent(generate=2.0, score_teacher=1.0, update=5.0, step=8.0),
           'transformers': _spent(generate=3.0, step=3.0)}
  rounds = {name: [times] for name, times in spent.items()}
  floors = {name: {'floor_s': 0.5} for name in ('generate', 'score_teacher', 'update')}
  lines = peers.table({
      'sizes': dataclasses.asdict(SIZES), 'dtype': 'float32', 'threads': 'one', 'load': [0.0, 1.0],
      'floors': floors, 'machine': {'flops_per_s': {'float32 xla 1x1x1': 1e9},
                                    'bytes_per_s': {'1048576': 1e9}},
      'systems': {name: {
          'peak_bytes': 2**31, 'loss_distance': 0.0, 'medians': turns.medians(rounds[name]),
          'ratios': peers.ratios(rounds[peers.OURS], rounds[name])} for name in rounds}})
  cells = {row[1].strip(): [cell.strip() for cell in row[2:-1]]
           for row in (line.split('|') for line in lines if line.startswith('| '))}
  assert cells['tunix'][:4] == ['2.00', '1.00', '5.00', '8.00']
  assert cells['tunix'][6:10] == ['2.00 (2.00)', '2.50 (2.50)', '2.00 (2.00)', '1.00']
  assert cells['transformers'][3] == '' and cells['transformers'][6] == '3.00 (3.00)'
  assert cells['floor'][3] == '1.50'
  assert len({len(row) for row in cells.values()}) == 1


def test_other_work_is_no_comparison():
  ours = {'reverse_kl': 4.0, 'forward_kl': 5.0}
  near = peers.check_losses('float32', ours, {'trl_gkd': {'reverse_kl': 4.0001}})
  assert 0 < near['trl_gkd'] < 1e-4
  for value in (4.01, float('nan')):
    with pytest.raises(turns.WorkerError, match=rf'trl_gkd.*reverse_kl.*{value}'):
      peers.check_losses('float32', ours, {'trl_gkd': {'reverse_kl': value}})


@pytest.mark.parametrize(('parse', 'flags', 'said'), [
    (step.parse, ['--vocab', '0'], "--vocab.*'0'"), (step.parse, ['--vocab', '2'], '--vocab 2;'),
    (step.parse, ['--dtype', 'float8'], "--dtype.*'float8'"),
    (step.parse, ['--threads', '3'], "--threads.*'3'"),
    (step.parse, ['--platform', 'gpu', '--threads', 'one'], '--threads one'),
    (step.parse, ['--json', 'nowhere/step.json'], 'nowhere'),
    (step.parse, ['--set', 'compute.no_field=1'], 'compute.no_field=1'),
    (step.parse, ['--set', 'compute.microbatch_rows=7'], 'compute.microbatch_rows=7'),
    (peers.parse, ['--only', 'tunix,vllm'], '--only vllm'),
    (growth.parse, ['--only', 'seeds'], '--only.*seeds'),
    (growth.parse, ['--png', 'nowhere/growth.png'], 'nowhere'),
    (peers.parse, ['--only', 'tunix', '--envs', 'nowhere'], 'nowhere.*make_env.py tunix')])
def test_mistakes_are_one_line(parse, flags, said, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as e:
    parse(flags)
  error = capsys.readouterr().err
  assert e.value.code == 2 and error.startswith('error: ') and error.count('\n') == 1
  assert re.search(said, error), error


# --- how it grows ---


def test_exponents_are_those_of_the_powers_and_what_grows_faster_is_marked():
  x = [2.0, 4.0, 16.0]
  assert growth.exponent(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)
  phases = {name: {'exponent': e, 'arithmetic': 1.0} for name, e in (('fast', 1.2), ('slow', 0.7))}
  text = growth.table({'rows': {'x': x, 'phases': phases}})
  assert '| rows, 2 to 16 | fast | 1.20 | 1.00 | faster |' in text
  assert '| rows, 2 to 16 | slow | 0.70 | 1.00 |  |' in text


def test_the_arithmetic_grows_as_it_must():
  def exponents(axis, phase):
    return growth.exponent([growth.place(axis, s) for s in growth.AXES[axis]],
                           [growth.arithmetic(s)[phase] for s in growth.AXES[axis]])

  for phase in ('generate', 'score_teacher', 'update', turns.STEP):
    assert exponents('rows', phase) == pytest.approx(1.0)
    assert 0.7 < exponents('length', phase) < 1.3  # the prompt does not grow; attention does twice
    assert 0.9 < exponents('model', phase) < 1.1  # embeddings are counted and not multiplied
  assert exponents('vocabulary', 'score_teacher') == pytest.approx(0.0)  # its head is in the update
  assert 0.3 < exponents('vocabulary', 'update') < 1.0
