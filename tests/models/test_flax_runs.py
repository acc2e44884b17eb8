"""Runs whose models a factory makes."""

from __future__ import annotations

import json

from flax_modules import QWEN3, directory, inputs, make_linen, make_nnx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
import tiny

from opd_jax import build, load, train
from opd_jax import config as config_lib
from opd_jax.files import huggingface
from opd_jax.files import workdir as workdir_lib
from opd_jax.models import params as params_lib
from opd_jax.tools import evaluate_model
from opd_jax.tools import export as export_lib


def test_a_run_with_foreign_models_exports_what_loads_again(tmp_path):
  teacher = directory(tmp_path / 'teacher', make_linen)
  c = tiny.config('opd_exact', steps=2, student__factory='flax_modules:make_nnx',
                  teacher__factory='flax_modules:make_linen', teacher__path=str(teacher))
  result = train.train(c, tmp_path / 'run')
  assert result['after']['reverse_kl'] < result['before']['reverse_kl']
  assert result['flops']['student_training'] > 0
  for row in tiny.rows(tmp_path / 'run', 'train'):
    assert row['gap_max'] < 1e-4
    assert row['perf']['compiles'] == 3  # sample, score, update: once each
  export = tmp_path / 'run' / workdir_lib.EXPORT
  written = json.loads((export / 'config.json').read_text())
  assert written['model_type'] == 'flax' and written['vocab_size'] == 64
  assert 'factory' in written['note'] and 'flax_modules' not in str(written)
  # So does `opd export`, from the run's checkpoint.
  assert export_lib.export(tmp_path / 'run', tmp_path / 'exported', 'full', -1) == 2
  weights = [(folder / huggingface.WEIGHTS).read_bytes() for folder in (
      tmp_path / 'exported', export)]
  assert weights[0] == weights[1]
  # Loading the directory again gives the tensors in it, in the module's tree.
  c = tiny.config('sft', student__path=str(export), student__factory='flax_modules:make_nnx')
  again = load.open_student(config_lib.parse(c))
  got, tensors = params_lib.flatten(again.read()), load_file(export / huggingface.WEIGHTS)
  assert got.keys() == tensors.keys() and 'blocks/0/up/kernel' in got
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(got[name], tensor, err_msg=name)
  run = config_lib.parse(tiny.override(c, student__path=''))
  fresh = load.open_student(run).read()
  assert not np.array_equal(fresh['out']['kernel'], got['out/kernel'])  # the run moved it
  # And `opd evaluate` opens it by the config's factory, a Qwen3 directory beside it without.
  assert evaluate_model.open_directory(run, 'student', str(export)).model.family == 'flax'
  assert evaluate_model.open_directory(run, 'student', str(QWEN3)).model.family == 'qwen3'


def test_self_distillation_of_a_foreign_model_is_graded_by_one_program(tmp_path):
  path = str(directory(tmp_path / 'model', make_nnx))
  same = tiny.config('opd_sampled', student__factory='flax_modules:make_nnx',
                     teacher__factory='flax_modules:make_nnx', student__path=path,
                     teacher__path=path)
  parts = build.open_parts(config_lib.parse(same))
  assert parts.teacher is not parts.student and parts.runs_students_programs(parts.teacher)
  other = load.open_student(config_lib.parse(tiny.override(
      same, student__factory='flax_modules:make_linen', student__path='')))
  assert not parts.runs_students_programs(other)


def test_the_factory_computes_in_the_runs_dtype_from_the_runs_seed():
  c = tiny.config('opd_sampled', student__factory='flax_modules:make_nnx',
                  teacher__kind='initial_student', compute__dtype='bfloat16')
  loaded = load.open_student(config_lib.parse(c))
  params = loaded.read()  # with what rounding does to the checks of padding and order
  assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype('float32')}
  hidden, _ = loaded.model.forward(params, *inputs(), None)
  assert hidden.dtype == jnp.bfloat16
  other = load.open_student(config_lib.parse(tiny.override(c, seed=1))).read()
  assert not np.array_equal(params['embed']['embedding'], other['embed']['embedding'])
