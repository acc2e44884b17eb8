"""The loop with rows that are written in slots."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import reuse
import tiny

from opd_jax import build, config, programs, train
from opd_jax.errors import ConfigError
from opd_jax.models import layout


def test_a_run_in_slots_is_the_run_without(tmp_path):
  runs = {}
  for slots in (0, 8):
    workdir = tmp_path / str(slots)
    reuse.train(tiny.with_models('opd_sampled', steps=2, sample__slots=slots), workdir)
    runs[slots] = [r for r in tiny.rows(workdir) if r['kind'] in ('train', 'eval')]
  fewer = more = 0
  for want, found in zip(runs[0], runs[8], strict=True):
    assert want['length'] == found['length']  # the same answers
    name = 'loss' if want['kind'] == 'train' else 'sampled_accuracy'
    # Logits of batches of another size: float32 roundings, which Adam carries on.
    assert found[name] == pytest.approx(want[name], rel=1e-4)
    if want['kind'] == 'train':
      fewer += want['perf']['decode_useful']
      more += found['perf']['decode_useful']
      assert 0 < want['perf']['decode_useful'] < 1
  assert more > fewer


def test_decoding_is_counted_of_who_wrote_the_rows():
  run = config.parse(tiny.with_models(
      'opd_exact', data__on_policy_fraction=0.5, data__off_policy_source='teacher',
      given__source='dataset', given__split='corpus', given__prompts_per_step=8,
      given__likelihood_coef=0.1))
  made = programs.compile_programs(run, build.open_parts(run))
  streams = {s.name: s for s in made.parts.streams}
  lengths = np.array([9, 9, 1, 1])
  for name in ('own', 'off_policy'):
    assert made.counts(streams[name], lengths, 0)['decode_useful'] == 0.5
    assert made.counts(streams[name], lengths, 2)['decode_useful'] == 1.0
  assert 'decode_useful' not in made.counts(streams['given'], lengths, 0)
  # In parts, of which each ends on its own; the teacher writes in one.
  apart = types.SimpleNamespace(parts=2, mesh=made.parts.mesh)
  made = dataclasses.replace(made, parts=dataclasses.replace(made.parts, apart=apart))
  assert made.counts(streams['own'], lengths, 0)['decode_useful'] == 1.0
  assert made.counts(streams['off_policy'], lengths, 0)['decode_useful'] == 0.5


def test_slots_that_cannot_be_are_refused(tmp_path):
  with pytest.raises(ConfigError, match='sample.slots=-1.*at least 0'):
    train.train(tiny.with_models('opd_sampled', sample__slots=-1), tmp_path)
  run = config.parse(tiny.with_models('opd_sampled', sample__slots=6))
  parts = build.open_parts(run)

  def check(mesh, student):
    build.check_models(run, parts.streams, mesh, None, [student])

  mesh = jax.sharding.AbstractMesh((1, 4, 1, 1, 1), layout.MESH_AXES)
  with pytest.raises(ConfigError, match='sample.slots=6.*a multiple of 4'):
    check(mesh, parts.student)
  fixed = dataclasses.replace(parts.student.model, refill=None)
  with pytest.raises(ConfigError, match='sample.slots=6.*qwen3.*allowed: 0'):
    check(parts.mesh, dataclasses.replace(parts.student, model=fixed))
