"""Opening models and reading their weights: which field an error names."""

from __future__ import annotations

import jax
import pytest
import tiny

from opd_jax import config, load, models
from opd_jax.errors import ConfigError
from opd_jax.models import layout


def test_a_path_that_looks_like_a_field_is_still_named(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'student.v1').mkdir()
  (tmp_path / 'student.v1' / 'config.json').write_text('[]')
  run = config.parse(tiny.config('sft', student__path='student.v1'))
  with pytest.raises(ConfigError, match=r"^student\.path='student\.v1': student\.v1/config\.json"):
    load.open_student(run)


def test_what_is_said_already_is_not_said_again():
  with pytest.raises(ConfigError, match="^teacher.kind='x'; allowed: 'y'$"):
    with load.naming("teacher.path='p'", 'a directory'):
      raise ValueError("teacher.kind='x'; allowed: 'y'")
  with pytest.raises(ConfigError, match="^teacher.path='p': no such file; allowed: a directory$"):
    with load.naming("teacher.path='p'", 'a directory'):
      raise FileNotFoundError('no such file')


def test_a_mesh_that_does_not_fit_is_not_blamed_on_the_weights():
  model = models.build({**tiny.SHAPE, 'vocab_size': 64})
  mesh = jax.sharding.AbstractMesh((1, 1, 1, 7, 1), layout.MESH_AXES)
  with pytest.raises(ValueError, match=r'^compute\.mesh\.tensor=7'):
    load.read('student.path', None, model.specs, 'float32', mesh)
