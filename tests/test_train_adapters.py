"""Runs that train adapters: what is trained, saved, exported, shared and refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reuse
import tiny

from opd_jax import build, config
from opd_jax.files import huggingface
from opd_jax.files import workdir as workdir_lib
from opd_jax.models import lora, params
from opd_jax.tools import export


def make(kind, **fields):
  return tiny.with_models(kind, **{**dict(student__lora__rank=4, student__lora__alpha=8.0,
                                          optimizer__learning_rate=1e-2), **fields})


@pytest.mark.parametrize('kind', ['opd_sampled', 'opd_exact'])
def test_only_adapters_are_trained_and_checkpointed(kind, tmp_path):
  c = make(kind)
  reuse.train(c, tmp_path)
  saved = tiny.read_checkpoint(tmp_path, c.steps)
  names = {name.split('][')[-1].strip("']") for name in saved if "['params']" in name}
  assert names == {'a', 'b'}
  moments = [name for name in saved if "['mu']" in name or "['nu']" in name]
  assert len(moments) == 2 * sum("['params']" in name for name in saved)
  assert all(name.endswith(("['a']", "['b']")) for name in moments)
  # Both halves have moved: b from zero, and then a.
  b = [x for name, x in saved.items() if "['params']" in name and name.endswith("['b']")]
  assert all(np.abs(x).max() > 0 for x in b)


def test_the_export_is_the_base_with_the_adapters_added(tmp_path):
  c = make('opd_exact')
  reuse.train(c, tmp_path)
  base = params.flatten(huggingface.load(c.student.path, {}).read())
  merged = tiny.load_export(tmp_path)
  saved = tiny.read_checkpoint(tmp_path, c.steps)
  for name, weight in base.items():
    parts = name.split('/')
    key = "['params']" + ''.join(f"['{p}']" for p in parts)
    if f"{key}['a']" not in saved:
      np.testing.assert_array_equal(merged[name], weight, err_msg=name)
      continue
    for layer in range(weight.shape[0]):
      a, b = (np.asarray(saved[f"{key}['{part}']"][layer], np.float64) for part in 'ab')
      delta = (a.reshape(-1, 4) @ b.reshape(4, -1)).reshape(weight[layer].shape)
      # float32: weights of order 1
      np.testing.assert_allclose(merged[name][layer], weight[layer] + 2.0 * delta, atol=1e-6)
      assert np.abs(delta).max() > 1e-3


def test_the_export_of_a_bfloat16_base_is_the_student_that_was_evaluated(tmp_path, capsys):
  c = make('opd_exact', compute__frozen_dtype='bfloat16', steps=2)
  c.student.path = str(shutil.copytree(c.student.path, tmp_path / 'base'))
  generation = tmp_path / 'base' / 'generation_config.json'
  generation.write_text(json.dumps({'temperature': 0.6, **json.loads(generation.read_text())}))
  kl = reuse.train(c, tmp_path / 'run')['export_kl']
  # Merged in float32 it is the student; in bfloat16 most of two steps' update is rounded away.
  assert abs(kl['float32']) < 1e-6 < 3e-6 < kl['bfloat16']
  said = [x for x in capsys.readouterr().out.splitlines() if 'export in float32: KL' in x]
  assert len(said) == 1 and f"in bfloat16 {kl['bfloat16']:.1e}" in said[0]
  base = params.flatten(huggingface.load(c.student.path, {}).read(jnp.bfloat16))
  saved, whole = tiny.read_checkpoint(tmp_path / 'run', 2), tiny.load_export(tmp_path / 'run')
  assert export.export(tmp_path / 'run', tmp_path / 'half', 'full', -1, 'bfloat16') == 2
  assert f"export in bfloat16: KL {kl['bfloat16']:.1e}" in capsys.readouterr().out
  for folder in (tmp_path / 'run' / 'export', tmp_path / 'half'):
    assert huggingface.load(folder, {}).sampling == {'temperature': 0.6}
  half = params.flatten(huggingface.load(tmp_path / 'half', {}).read())
  for part in ('q', 'down'):
    a, b = (np.asarray(saved[f"['params']['layers']['{part}']['{x}']"], np.float64) for x in 'ab')
    name = f'layers/{part}'
    delta = 2.0 * np.einsum('lir,lro->lio', a.reshape(2, -1, 4), b.reshape(2, 4, -1))
    got = whole[name] - base[name].astype(np.float64)
    assert np.abs(got - delta.reshape(got.shape)).max() < 1e-3 * np.abs(delta).max()
    np.testing.assert_array_equal(half[name], whole[name].astype(ml_dtypes.bfloat16), name)
  # Merged into another base, it would be a model that nobody has evaluated.
  shutil.copy(tiny.teacher() / huggingface.WEIGHTS, tmp_path / 'base')
  with pytest.raises(config.ConfigError, match=r'student\.path.*model\.safetensors.*allowed'):
    export.export(tmp_path / 'run', tmp_path / 'other', 'full', -1)
  assert not (tmp_path / 'other').exists()
  export.export(tmp_path / 'run', tmp_path / 'other', 'adapter', -1, changed_inputs='a test')
  assert 'model.safetensors' in capsys.readouterr().err
  written = workdir_lib.read_origin(tmp_path / 'run' / 'adapter')
  assert written == workdir_lib.read_origin(tmp_path / 'run' / 'export')
  assert written['inputs'] != workdir_lib.read_origin(tmp_path / 'other')['inputs']


def test_a_run_starts_from_the_adapter_that_another_left(tmp_path):
  c = make('opd_exact')
  first = reuse.train(c, tmp_path / 'one')
  again = tiny.with_models('opd_exact', student__lora__path=str(tmp_path / 'one' / 'adapter'))
  second = reuse.train(again, tmp_path / 'two')
  for name in ('reverse_kl', 'sampled_accuracy'):
    assert second['before'][name] == pytest.approx(first['after'][name], rel=1e-5)


def test_resume_is_bit_exact(tmp_path):
  c = make('opd_sampled')
  reuse.train(c, tmp_path / 'whole')
  shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
  shutil.rmtree(tmp_path / 'cut' / 'checkpoints' / '6')
  for done in ('result.json', 'export', 'adapter'):
    target = tmp_path / 'cut' / done
    target.unlink() if target.is_file() else shutil.rmtree(target)
  reuse.train(c, tmp_path / 'cut')
  tiny.assert_same_bits(tiny.read_checkpoint(tmp_path / 'whole', 6),
                        tiny.read_checkpoint(tmp_path / 'cut', 6))


def test_a_student_that_teaches_itself_shares_its_base(tmp_path):
  c = make('opd_sampled', teacher__kind='initial_student', teacher__path='')
  parts = build.open_parts(config.parse(c))
  frozen = parts.read_base()
  teacher = params.flatten(parts.read_frozen('teacher', frozen))
  for name, leaf in params.flatten(frozen.base).items():
    mine = teacher[name].base if isinstance(teacher[name], lora.LoRA) else teacher[name]
    assert mine is leaf, name  # the same array, not a copy
  result = reuse.train(c, tmp_path)
  assert result['after']['reverse_kl'] == 0.0
  for row in tiny.rows(tmp_path, 'train'):
    assert row['loss'] == row['grad_norm'] == row['update_norm'] == 0.0


def test_the_base_is_kept_in_bfloat16_and_adapters_in_float32():
  parts = build.open_parts(config.parse(make('opd_sampled', compute__frozen_dtype='bfloat16')))
  base, trained = parts.read_base().base, parts.read_trained()
  assert {str(x.dtype) for x in jax.tree.leaves(base)} == {'bfloat16'}
  assert {str(x.dtype) for x in jax.tree.leaves(trained)} == {'float32'}


@pytest.mark.parametrize(('fields', 'parts'), [
    (dict(student__lora__rank=-1), ('student.lora.rank=-1',)),
    (dict(student__lora__rank=0), ('student.lora.alpha=8.0', 'student.lora.rank=0')),
    (dict(student__lora__targets='layers/gates'), ("student.lora.targets='layers/gates'",
                                                   'layers/gate')),
    (dict(student__lora__targets='('), ("student.lora.targets='('")),
    (dict(student__lora__targets='embed'), ("student.lora.targets='embed'",)),
    (dict(student__lora__alpha=0.0), ('student.lora.alpha=0.0',)),
    (dict(student__lora__path='nowhere'), ("student.lora.path='nowhere'",)),
    (dict(checkpoint__export='adaptor'), ("checkpoint.export='adaptor'",)),
    (dict(compute__frozen_dtype='int8'), ("compute.frozen_dtype='int8'",)),
])
def test_refused(fields, parts, tmp_path):
  with pytest.raises(config.ConfigError) as e:
    reuse.train(make('opd_sampled', **fields), tmp_path / 'run')
  assert all(part in str(e.value) for part in (*parts, 'allowed')), str(e.value)


def test_only_the_adapter_is_left_where_that_is_asked_for(tmp_path):
  reuse.train(make('opd_exact', steps=1, checkpoint__export='adapter'), tmp_path)
  assert (tmp_path / 'adapter' / 'adapter_config.json').exists()
  assert not (tmp_path / 'export').exists()
  with pytest.raises(config.ConfigError, match="checkpoint.export='adapter'.*allowed"):
    reuse.train(tiny.config('sft', checkpoint__export='adapter'), tmp_path / 'other')
