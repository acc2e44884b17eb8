"""A teacher on devices of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import apart_child
import jax.numpy as jnp
import numpy as np
import pytest
import several
import tiny

from opd_jax import config
from opd_jax.algorithm import score, support
from opd_jax.algorithm.objective import Objective
from opd_jax.errors import ConfigError
from opd_jax.models import params as params_lib
from opd_jax.parallel import apart
from opd_jax.types import Wants

CHILD = ('import sys; sys.path.insert(0, sys.argv[1]); import apart_child;'
         'apart_child.run(sys.argv[2], sys.stdin.read())')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """The folder with all runs of `apart_child`, by one process with four devices."""
  folder = tmp_path_factory.mktemp('apart')
  done = subprocess.run(
      [sys.executable, '-c', CHILD, str(tiny.ROOT / 'tests'), str(folder)], text=True,
      input=json.dumps(apart_child.as_json()), capture_output=True, timeout=tiny.PATIENCE_S,
      env=tiny.environment(devices=4))
  assert done.returncode == 0, done.stderr[-4000:]
  (folder / 'said').write_text(done.stdout)
  return folder


def _rows(folder, kind):
  return [{name: x for name, x in row.items() if name != 'perf'}
          for row in tiny.rows(folder, kind)]


@pytest.mark.parametrize('name', ['sampled', 'exact', 'top_k'])
def test_the_run_is_that_of_a_teacher_beside_the_student(runs, name):
  """Up to the rounding of another mesh; see test_mesh.py for the tolerance."""
  beside, far = runs / f'{name}_beside', runs / f'{name}_apart'
  for a, b in zip(tiny.rows(beside, 'train'), tiny.rows(far, 'train'), strict=True):
    assert a['length'] == b['length']
    for value in ('loss', 'grad_norm', 'reverse_kl', 'entropy_teacher', 'entropy_student'):
      if value in a:
        assert b[value] == pytest.approx(a[value], rel=1e-4), (a['step'], value)
  for a, b in zip(tiny.rows(beside, 'eval'), tiny.rows(far, 'eval'), strict=True):
    assert a['sampled_accuracy'] == b['sampled_accuracy']
    assert b['reverse_kl'] == pytest.approx(a['reverse_kl'], rel=1e-4)


@pytest.mark.parametrize('name', ['sampled', 'exact', 'top_k'])
def test_parts_are_the_same_bits(runs, name):
  whole, parts = runs / f'{name}_apart', runs / f'{name}_parts'
  assert _rows(whole, 'train') == _rows(parts, 'train')
  a, b = (params_lib.flatten(tiny.load_export(folder)) for folder in (whole, parts))
  assert all(np.array_equal(a[leaf], b[leaf]) for leaf in a)


def test_a_teacher_apart_writes(runs):
  assert [row['step'] for row in tiny.rows(runs / 'teacher_writes', 'train')] == list(range(1, 7))


@pytest.mark.parametrize(('run', 'back'), [
    ('sampled_apart', 'log-probs'), ('exact_apart', 'hidden states'),
    ('top_k_parts', '2 most likely tokens')])
def test_the_log_says_what_comes_back(runs, run, back):
  said = [line for line in (runs / 'said').read_text().splitlines() if 'devices of its own' in line]
  apart_runs = [name for name in apart_child.configs() if not name.endswith('beside')]
  assert back in said[apart_runs.index(run)], said


def test_two_processes_give_a_device_each(runs, tmp_path):
  """Rows go over within a process, through its memory; four parts, of 2 rows a device."""
  c = apart_child.configs()['exact_parts']
  c.steps, c.compute.mesh.fsdp, c.compute.pipeline_parts = 3, -1, 4
  c.compute.teacher_mesh.fsdp, c.compute.teacher_mesh.tensor = 2, 1
  with several.Launcher(tmp_path) as launcher:
    done = launcher.run(2, 'train', '--config', tiny.write_config(tmp_path / 'apart.py', c),
                        '--workdir', tmp_path / 'run')
  assert [p.returncode for p in done] == [0, 0], [p.stderr for p in done]
  assert 'on 2 devices of its own' in done[0].stdout
  for a, b in zip(tiny.rows(runs / 'exact_apart', 'train'), tiny.rows(tmp_path / 'run', 'train'),
                  strict=False):
    assert b['loss'] == pytest.approx(a['loss'], rel=1e-4) and a['length'] == b['length']


class TestLeast:
  """What comes back is what takes the fewest bytes, of what is enough."""

  def test_hidden_states_where_they_are_fewer(self):
    hidden = Wants(hidden=True)
    assert apart.least(hidden, 16, 1024, 2) == Wants(logprobs=True, top_k=16)
    assert apart.least(hidden, 16, 64, 2) == hidden  # 128 bytes, against 140
    assert apart.least(hidden, 0, 1024, 2) == hidden
    assert apart.least(Wants(logprobs=True), 16, 1024, 2) == Wants(logprobs=True)

  @pytest.mark.parametrize(('fields', 'k'), [
      (dict(support='teacher_top_k(5, tail="drop")'), 5), (dict(support='full'), 0), (dict(), 0),
      (dict(support='student_top_k(5, tail="drop")'), 0),
      (dict(support='union(5, tail="drop")'), 0),
      (dict(support='teacher_top_k(5, tail="drop")', extrapolation=1.5), 0),
      (dict(support='teacher_top_k(5, tail="drop")',
            token_gate='teachability(keep=0.5, top_k=3)'), 0)])
  def test_the_teachers_top_k_is_enough(self, fields, k):
    assert Objective(route='direct', importance='none', **fields).teachers_top_k == k


def test_spread_top_keeps_what_a_support_looks_at():
  rng = np.random.default_rng(0)
  whole = jnp.asarray(rng.standard_normal((4, 50)))
  whole = whole - jnp.log(jnp.sum(jnp.exp(whole), axis=1, keepdims=True))
  values, tokens = support.top_k(whole, 6)
  spread = support.spread_top(tokens, values, support.rest_of(whole, tokens), 50, 50)
  # float32, sums of 50 numbers below 1
  np.testing.assert_allclose(np.exp(spread).sum(axis=1), 1.0, rtol=1e-6)
  np.testing.assert_array_equal(score.pick(spread, tokens[:, 3]), values[:, 3])
  np.testing.assert_array_equal(support.top_k(spread, 6)[1], tokens)
  np.testing.assert_allclose(support.rest_of(spread, tokens), support.rest_of(whole, tokens),
                             rtol=1e-6)


class TestDevices:

  @staticmethod
  def devices(*counts):
    return [types.SimpleNamespace(process_index=i, id=f'{i}.{j}')
            for i, n in enumerate(counts) for j in range(n)]

  def test_every_process_gives_its_share(self):
    ours, theirs = apart.split_devices(self.devices(4, 4), 6)
    assert [d.id for d in ours] == ['0.0', '1.0']
    assert [d.id for d in theirs] == ['0.1', '0.2', '0.3', '1.1', '1.2', '1.3']

  @pytest.mark.parametrize('count', [3, 8, 9])
  def test_refused(self, count):
    with pytest.raises(ValueError, match=rf'compute\.teacher_devices={count}\b.*allowed.*\b2\b'):
      apart.split_devices(self.devices(4, 4), count)


@pytest.mark.parametrize(('fields', 'named'), [
    (dict(compute__pipeline_parts=2), r'compute\.pipeline_parts=2.*compute\.teacher_devices=0'),
    (dict(compute__teacher_mesh__tensor=2), r'compute\.teacher_mesh\.tensor=2'),
    (dict(compute__teacher_devices=2, teacher__kind='initial_student', teacher__path=''),
     r"compute\.teacher_devices=2.*teacher\.kind='initial_student'"),
    (dict(compute__teacher_devices=2, sample__teacher_mix=0.5),
     r'compute\.teacher_devices=2.*sample\.teacher_mix=0\.5')])
def test_settings_without_sense_are_refused(fields, named):
  with pytest.raises(ConfigError, match=named):
    config.parse(tiny.config('opd_sampled', **{'teacher__path': 'somewhere', **fields}))
