"""Flax modules and configs of them that are refused."""

from __future__ import annotations

import functools

from conftest import quick_jit
from flax import linen, nnx
from flax_modules import (
  CONFIG,
  NNXLM,
  QWEN3,
  VOCAB,
  LinenLM,
  directory,
  inputs,
  make_nan_within,
  make_nnx,
  tied,
)
import jax
import jax.numpy as jnp
import pytest
import tiny

from opd_jax import config as config_lib
from opd_jax import experiment, load, train
from opd_jax.data import prompts as prompts_lib
from opd_jax.models import flax_module


class TwoArguments(linen.Module):
  @linen.compact
  def __call__(self, tokens, valid):
    return linen.Embed(VOCAB, VOCAB)(tokens)


class Averages(linen.Module):
  @linen.compact
  def __call__(self, tokens, positions, valid):
    x = linen.Embed(VOCAB, VOCAB)(tokens)
    return linen.BatchNorm(use_running_average=True)(x)


class NNXDropout(nnx.Module):
  def __init__(self):
    self.embed = nnx.Embed(VOCAB, VOCAB, rngs=nnx.Rngs(0))
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

  def __call__(self, tokens, positions, valid):
    return self.dropout(self.embed(tokens))


def _as_model(module, **options):
  arguments = inputs()
  if isinstance(module, TwoArguments):
    arguments = arguments[:2]
  variables = quick_jit(module.init)(
      {'params': jax.random.key(0), 'dropout': jax.random.key(1)}, *arguments)
  return flax_module.from_linen(module, variables, CONFIG, **options)


@pytest.mark.parametrize('make, parts', [
    (lambda: _as_model(TwoArguments()), ('TypeError', 'allowed', 'positions')),
    (lambda: _as_model(LinenLM(dropout=0.5), head=tied), ('InvalidRngError', 'allowed')),
    (lambda: _as_model(Averages()), ("'batch_stats'", "allowed: ['params']")),
    (lambda: _as_model(LinenLM(), head=None), ('(2, 3, 16)', 'allowed', '(2, 3, 48)', 'head')),
    (lambda: _as_model(LinenLM(), head=lambda p: p['embed']['embedding']),
     ('head', '(48, 16)', 'allowed: (16, 48)')),
    (lambda: _as_model(LinenLM(), head=tied, apply=lambda p, *args: args[0]),
     ('int32 (2, 3)', 'allowed')),
    (lambda: flax_module.from_nnx(NNXDropout(), CONFIG),
     ('dropout/rngs/count', 'RngCount', 'Param')),
    (lambda: flax_module.from_nnx(NNXLM(nnx.Rngs(0), 50), CONFIG), ('(2, 3, 50)', '(2, 3, 48)')),
    (lambda: flax_module.Config(0, 8), ('vocab_size=0', 'allowed')),
], ids=['positions', 'dropout', 'batch_stats', 'hidden', 'head', 'integers', 'nnx_dropout',
        'vocabulary', 'config'])
def test_a_module_that_does_not_fit_is_refused(make, parts):
  with pytest.raises(ValueError) as error:
    make()
  for part in parts:
    assert part in str(error.value)


@pytest.mark.parametrize('wrong, message', [
    (lambda call, t, p, v: call(t, p, jnp.ones_like(v)), 'left'),
    (lambda call, t, p, v: call(t, jnp.broadcast_to(jnp.arange(t.shape[1])[None], t.shape), v),
     'left'),
    (lambda call, t, p, v: call(t, p, v) + jnp.mean(call(t, p, v), axis=1, keepdims=True),
     'behind'),
    (lambda call, t, p, v: call(t, p, v) * jnp.nan, 'finite')],
    ids=['valid', 'positions', 'causal', 'nan'])
def test_a_module_that_reads_what_it_must_not_is_refused(wrong, message):
  module = LinenLM(logits=True)
  variables = quick_jit(module.init)(jax.random.key(0), *inputs())
  model, params = flax_module.from_linen(
      module, variables, CONFIG, apply=lambda p, *arguments: wrong(
          functools.partial(module.apply, {'params': p}), *arguments))
  with pytest.raises(ValueError, match=message):
    flax_module.check(model, params)


def test_a_student_that_is_nan_within_is_refused_and_a_teacher_is_not(tmp_path):
  model, params = make_nan_within(jax.random.key(0), jnp.float32)
  flax_module.check(model, params)  # no logit that anybody reads is NaN
  with pytest.raises(ValueError, match='gradient.*finite'):
    flax_module.check_gradient(model, params)
  factory = 'flax_modules:make_nan_within'
  path = str(directory(tmp_path / 'model', make_nan_within))
  run = config_lib.parse(tiny.config(
      'opd_exact', student__factory=factory, student__path=path, teacher__factory=factory,
      teacher__path=path))
  with pytest.raises(ValueError, match=r'student\.factory=.*gradient.*finite'):
    load.open_flax(run, 'student').read()
  load.open_flax(run, 'teacher').read()


# --- configs ---


@pytest.mark.parametrize('fields, parts', [
    (dict(student__factory='no colon'), ("student.factory='no colon'", 'package.module:function')),
    (dict(student__factory='no_such_package:f'), ("'no_such_package", 'allowed')),
    (dict(student__factory='flax_modules:make_nix'), ("'make_nix'", 'make_nnx')),
    (dict(student__factory='flax_modules:make_nothing'), ('NoneType', '(model, params)')),
    (dict(student__factory='flax_modules:make_without_dtype'), ('(key, dtype)',)),
    (dict(student__factory='flax_modules:make_narrow'), ('63', 'vocab_size', '60')),
    (dict(student__factory='flax_modules:make_float32', compute__dtype='bfloat16'),
     ('float32', "compute.dtype='bfloat16'", "['bfloat16']")),
    (dict(student__factory='flax_modules:make_nnx', compute__remat='layer'),
     ("compute.remat='layer'", "allowed: 'none'")),
    (dict(student__factory='flax_modules:make_nnx', compute__layer_unroll=2),
     ('compute.layer_unroll=2', 'allowed: 1')),
    (dict(student__factory='flax_modules:make_nnx', student__lora__rank=4),
     ('student.lora.rank=4', 'allowed: 0')),
    (dict(student__factory='flax_modules:make_nnx', student__path='qwen3'),
     ("model_type='qwen3'", "allowed: 'flax'")),
    (dict(student__factory='flax_modules:make_linen', student__path='nnx'),
     ('student.path', 'blocks/0/up/kernel')),
    (dict(student__path='nnx'), ("'flax'", 'student.factory')),
    (dict(teacher__factory='flax_modules:make_nnx'),
     ('teacher.factory', "path=''", 'allowed')),
    (dict(teacher__factory='flax_modules:make_nnx', teacher__path='nnx',
          teacher__kind='initial_student'),
     ('teacher.factory', "kind='initial_student'", 'checkpoint')),
    (dict(teacher__factory='flax_modules:make_nnx', teacher__path='other'),
     ('teacher', 'vocabulary')),
    (dict(student__factory='flax_modules:make_acausal'), ('student.factory', 'causal')),
], ids=lambda x: '' if isinstance(x, tuple) else ' '.join(map(str, x.values())))
def test_bad_configs_are_refused(tmp_path, fields, parts):
  fields = dict(fields)
  for name in [n for n in fields if n.endswith('path')]:
    kind = fields[name]
    alphabet = prompts_lib.ALPHABET[::-1] if kind == 'other' else prompts_lib.ALPHABET
    fields[name] = str(QWEN3 if kind == 'qwen3' else directory(
        tmp_path / kind, make_nnx, alphabet=alphabet))
  base = {} if any(n.startswith('teacher') for n in fields) else {'teacher__kind':
                                                                   'initial_student'}
  c = tiny.config('opd_sampled', **{**base, **fields})
  with pytest.raises(config_lib.ConfigError) as error:
    train.train(c, tmp_path / 'run')
  for part in parts:
    assert part in str(error.value)


def test_a_stage_takes_a_foreign_stage_by_the_same_factory():
  c = experiment.default_pipeline()
  first = tiny.config('sft', student__factory='flax_modules:make_nnx')
  second = tiny.config('opd_sampled', student__path='stage:first', teacher__path='stage:first',
                       student__factory='flax_modules:make_nnx')
  c.order, c.report.methods, c.report.labels = ('first', 'second'), ('second',), ('second',)
  c.stages.first, c.stages.second = first, second
  with pytest.raises(config_lib.ConfigError) as error:
    experiment.parse_pipeline(c)
  assert "stages.second.teacher.factory=''" in str(error.value)
  assert "allowed: 'flax_modules:make_nnx'" in str(error.value)
  c.stages.second.teacher.factory = 'flax_modules:make_nnx'
  experiment.parse_pipeline(c)
