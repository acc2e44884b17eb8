"""What every module, divergence, model family, task and teacher must satisfy.

Plug-ins are found by listing their folders, or the functions of `divergences.py`: a new file is
covered here without an edit.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from conftest import family_config, left_padded, quick_jit, sharp_params, ways_to_tie
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import opd_jax
from opd_jax import models, tasks, teachers
from opd_jax.algorithm import sample, score
from opd_jax.algorithm.objective import KINDS, Objective
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface
from opd_jax.models import nn
from opd_jax.models import params as params_lib
from opd_jax.parallel import sharding
from opd_jax.types import UNUSED_LOGIT

PACKAGE = pathlib.Path(opd_jax.__file__).parent
FILES = sorted(PACKAGE.rglob('*.py'))
each_file = pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(PACKAGE)))

# --- the source: layers, purity, the boundary of configs, annotations, length ---

# Folders, and the files beside them. Each imports from those before it only, and a file of a folder
# from its own folder too: a new file has the rank of its folder.
LAYERS = (
    'types errors', 'models', 'algorithm', 'parallel settings', 'data', 'files', 'tasks teachers',
    'run', 'rules', 'config', 'experiment presets', 'load', 'build', 'doctor', 'programs', 'train',
    'tools', '__main__')
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer.split()}
PURE = ('types', 'models', 'algorithm')
PURE_MAY_IMPORT = {'__future__', 'ast', 'collections', 'dataclasses', 'functools', 'inspect',
                   'itertools', 'math', 're', 'types', 'typing', 'flax', 'jax', 'jaxtyping',
                   'numpy', 'optax', 'opd_jax'}
FLAX = ('flax.struct', 'flax.traverse_util')  # the rest is for Flax modules
COMPILES = ('programs.py', 'doctor/rollouts.py', 'tools/compare_estimators.py',
            'tools/compare_models.py')
# Who writes configs or reads them, and who takes one to hand it on to those.
CONFIGS = ('config.py', 'experiment.py', 'presets.py')
TAKES_CONFIG = ('train.py', 'doctor/examine.py')  # `train` and `command`; and all of tools/
# What a step does, from the loop to the gradient; a choice or a gate is looked up, one at a time.
PATH, PATH_LINES = ('types', 'algorithm', 'programs', 'train'), 2600


def _name(file: pathlib.Path) -> str:
  return str(file.relative_to(PACKAGE))


def _module(file: pathlib.Path) -> str:
  """The top-level name: 'train' for train.py, 'models' for models/nn.py, '' for __init__.py."""
  parts = file.relative_to(PACKAGE).with_suffix('').parts
  return '' if parts == ('__init__',) else parts[0]


def _imports(file: pathlib.Path) -> list[str]:
  """Every imported name, dotted, those inside functions too."""
  found = []
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{file}: relative import'
      found += [f'{node.module}.{alias.name}' for alias in node.names]
  return found


def _functions(file: pathlib.Path) -> list[ast.FunctionDef]:
  return [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]


def _arguments(node: ast.FunctionDef) -> list[ast.arg]:
  a = node.args
  return [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]


@each_file
def test_imports_go_one_way(file):
  own = _module(file)
  assert own == '' or own in RANK, f'{own} is new: give it a place in LAYERS'
  inside = {name.split('.')[1] for name in _imports(file) if name.startswith('opd_jax.')}
  if own == '':  # the package's front door offers the pure functions and loads nothing else
    assert inside <= set(PURE)
    return
  wrong = {name for name in inside if name not in RANK or RANK[name] >= RANK[own]}
  if file.parent != PACKAGE:
    wrong -= {own}
  assert not wrong, f'{own} may not import {sorted(wrong)}'


@pytest.mark.parametrize('file', [f for f in FILES if _module(f) in PURE], ids=_name)
def test_pure_modules_do_no_input_or_output(file):
  allowed = set(PURE_MAY_IMPORT)
  if file.name == '__init__.py':  # finds the files of its folder by name
    allowed |= {'importlib', 'pathlib'}
  imported = _imports(file)
  assert {name.split('.')[0] for name in imported} <= allowed
  if file.name != 'flax_module.py':
    assert {name for name in imported if name.startswith('flax')} <= set(FLAX)
  called = {node.func.id for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
  assert not called & {'open', 'print', 'input', 'exec', 'eval'}


@each_file
def test_only_programs_and_measurements_compile(file):
  text = ast.parse(file.read_text())
  uses = [node.attr for node in ast.walk(text) if isinstance(node, ast.Attribute)
          and node.attr in ('jit', 'pmap', 'pjit')]
  uses += [name for name in _imports(file) if name in ('jax.jit', 'jax.pmap')]
  assert not uses or _name(file) in COMPILES


@pytest.mark.parametrize('file', [f for f in FILES if _name(f) not in CONFIGS], ids=_name)
def test_configs_are_read_in_one_place(file):
  """Elsewhere a ConfigDict is only handed on, by an entry point, to who parses it."""
  takes = [f for f in _functions(file)
           if any(a.annotation and 'ConfigDict' in ast.unparse(a.annotation)
                  for a in _arguments(f))]
  if _module(file) == 'tools' or _name(file) in TAKES_CONFIG:
    if _module(file) != 'tools':
      assert [f.name for f in takes] in (['train'], ['command'])
  else:
    assert not any(name.endswith('ConfigDict') for name in _imports(file)) and not takes
  for function in takes:
    names = {a.arg for a in _arguments(function)
             if a.annotation and 'ConfigDict' in ast.unparse(a.annotation)}
    nodes = list(ast.walk(function))
    handed_on = {id(a) for call in nodes if isinstance(call, ast.Call)
                 for a in (*call.args, *(k.value for k in call.keywords))}
    read = [n.lineno for n in nodes if isinstance(n, ast.Name) and n.id in names
            and isinstance(n.ctx, ast.Load) and id(n) not in handed_on]
    assert not read, f'{function.name} reads a config itself, in lines {read}'


def _public(file: pathlib.Path):
  """(qualified name, node, is a property) of public functions, classes and their methods."""
  for node in ast.parse(file.read_text()).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != '_':
      yield node.name, node, False
      for inner in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(inner, ast.FunctionDef) and (
            inner.name[0] != '_' or inner.name in ('__init__', '__call__')):
          kinds = [d.id for d in inner.decorator_list if isinstance(d, ast.Name)]
          yield f'{node.name}.{inner.name}', inner, 'property' in kinds


@each_file
def test_public_names_have_docstrings_and_annotations(file):
  assert ast.get_docstring(ast.parse(file.read_text())), 'the module has no docstring'
  bare, loose = [], []
  for name, node, is_property in _public(file):
    # A property may speak by its name, and what a class is made with by the class's docstring.
    if not ast.get_docstring(node) and not is_property and not name.endswith('__init__'):
      bare.append(name)
    if isinstance(node, ast.FunctionDef):
      loose += [f'{name}({arg.arg})' for arg in _arguments(node)
                if arg.annotation is None and arg.arg not in ('self', 'cls')]
      if node.returns is None and not name.endswith('__init__'):
        loose.append(f'{name} -> ?')
  assert not bare, f'without docstring: {bare}'
  assert not loose, f'without annotation: {loose}'


# Words that end as a verb does, and are none.
NO_VERBS = {'Always', 'Batches', 'Examples', 'Gradients', 'Ids', 'Its', 'Lengths', 'Less', 'Logits',
            'Logprobs', 'Losses', 'Masks', 'Metrics', 'Models', 'Options', 'Parameters', 'Parts',
            'Positions', 'Prompts', 'Rates', 'Rewards', 'Rows', 'Shapes', 'Steps', 'Texts', 'This',
            'Tokens', 'Values', 'Weights'}


@each_file
def test_public_functions_say_what_they_do(file):
  """The first word of a docstring is a verb, 'Reads'; a choice begins with its equation."""
  others = {}
  if file.parent.name in ('choices', 'gates') and file.stem != '__init__' or (
      file.stem == 'divergences'):
    return  # see test_choices.py
  for name, node, is_property in _public(file):
    if isinstance(node, ast.FunctionDef) and not is_property and not name.endswith('__init__'):
      first = (ast.get_docstring(node) or '-').split(maxsplit=1)[0].rstrip(',')
      if not re.fullmatch('[A-Z][a-z]+s', first) or first in NO_VERBS:
        others[name] = first
  assert not others


@each_file
def test_no_function_is_longer_than_60_lines(file):
  long = {}
  for node in _functions(file):
    # Without the docstring: nobody should have to cut an explanation to fit.
    body = node.body[1:] if ast.get_docstring(node) else node.body
    lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
    if (_name(file), node.name) == ('train.py', 'train'):  # all of it: it is read as one text
      lines = node.end_lineno - node.lineno + 1
    if lines > 60:
      long[node.name] = lines
  assert not long


@each_file
def test_no_file_is_longer_than_400_lines(file):
  assert len(file.read_text().splitlines()) <= 400


def test_no_folder_has_more_than_12_files():
  folders = [PACKAGE, *(f for f in PACKAGE.rglob('*') if f.is_dir() and f.name != '__pycache__')]
  counts = {f.name: len(list(f.glob('*.py'))) for f in folders}
  assert not {name: n for name, n in counts.items() if n > 12}


def test_the_readmes_map_is_in_the_order_of_imports():
  text = (PACKAGE.parent / 'README.md').read_text().partition('| path | holds |')[2]
  first = [line.split('|')[1] for line in text.split('\n\n')[0].splitlines()[2:]]
  listed = [[name for name in re.findall(r'`opd_jax/(\w+)', cell)] for cell in first]
  assert {name for names in listed for name in names} == set(RANK)
  ranks = [RANK[name] for names in listed for name in names]
  assert ranks == sorted(ranks), listed


def test_the_path_of_a_step_is_short():
  lines = {_name(f): len(f.read_text().splitlines()) for f in FILES if _module(f) in PATH
           and not ({'choices', 'gates'} & set(f.parts) and f.name != '__init__.py')}
  assert sum(lines.values()) < PATH_LINES, lines


def test_the_checks_of_the_suite_are_on():
  # conftest.py turns both on; without them, many tests here would pass on wrong shapes.
  with pytest.raises(jaxtyping.TypeCheckError):
    nn.rms_norm(jnp.ones((2, 3)), jnp.ones(4), 1e-6)
  with pytest.raises(ValueError, match='rank_promotion'):
    jnp.ones((2, 3)) + jnp.ones(3)


# --- divergences ---

EVERY = [text.replace('(alpha)', f'({alpha})') for text in KINDS['divergence'].names
         for alpha in ((0.1, 0.5) if '(' in text else (0.0,))]
each_divergence = pytest.mark.parametrize('name', EVERY)


def _logits(*shape, seed=0, scale=2.0):
  return scale * np.random.RandomState(seed).standard_normal(shape)


def _divergence(name, support='full'):
  return Objective(divergence=name, support=support).over_support


@each_divergence
def test_divergence_is_zero_at_equality_and_positive_elsewhere(x64, name):
  divergence = _divergence(name)
  p = jax.nn.log_softmax(jnp.asarray(_logits(200, 11)))
  q = jax.nn.log_softmax(jnp.asarray(_logits(200, 11, seed=1)))
  assert divergence(p, q).shape == (200,)
  np.testing.assert_allclose(divergence(p, p), 0.0, atol=1e-14)  # float64 sums of 11 terms
  assert np.all(np.asarray(divergence(p, q)) > 1e-4)


@each_divergence
def test_divergence_gradient_equals_finite_differences(x64, name):
  divergence = _divergence(name)
  teacher = jax.nn.log_softmax(jnp.asarray(_logits(3, 5, seed=1)))
  logits = _logits(3, 5)

  def total(logits):
    return jnp.sum(divergence(jax.nn.log_softmax(logits), teacher) * jnp.array([1.0, -2.0, 0.5]))

  grad, value = quick_jit(jax.grad(total))(jnp.asarray(logits)), quick_jit(total)
  for i, j in np.ndindex(*logits.shape):
    step = np.zeros_like(logits)
    step[i, j] = 1e-5
    slope = float(value(logits + step) - value(logits - step)) / 2e-5
    # Central differences: 1e-10 from the third derivative, 1e-11 from rounding.
    assert float(grad[i, j]) == pytest.approx(slope, abs=1e-8)


@each_divergence
@pytest.mark.parametrize('tail', ['', 'renormalize', 'bucket'])
def test_divergence_has_no_nan_at_extreme_logits(name, tail):
  support = f'union_top_k(2, {tail!r})' if tail else 'full'
  one_hot = [[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0], [80.0, -80.0, 80.0],
             [0.0, 1.0, UNUSED_LOGIT]]
  pairs = jnp.asarray([(a, b) for a in one_hot for b in one_hot], jnp.float32)
  # A token that is in nobody's vocabulary is in neither's.
  pairs = pairs.at[:, :, 2].set(jnp.where(jnp.any(pairs == UNUSED_LOGIT, (1, 2))[:, None],
                                          UNUSED_LOGIT, pairs[:, :, 2]))

  def total(logits):
    student, teacher = jax.nn.log_softmax(logits), jax.nn.log_softmax(pairs[:, 1])
    return jnp.sum(_divergence(name, support)(student, teacher))

  value, grad = jax.value_and_grad(total)(pairs[:, 0])
  assert np.isfinite(value) and np.all(np.isfinite(grad))


# --- model families ---


@dataclasses.dataclass(frozen=True)
class Family:
  """A tiny model of a family, its parameters, and a batch with left padding."""

  config: dict
  model: models.Model
  params: dict
  tokens: jax.Array
  valid: jax.Array

  def build(self, **options):
    return models.build(self.config, **options)

  def hidden(self, model, params, tokens=None, valid=None):
    """Final hidden states without a cache."""
    tokens = self.tokens if tokens is None else tokens
    valid = self.valid if valid is None else valid
    return quick_jit(lambda p, t, v: model.forward(p, t, sample.positions_of(v), v, None)[0])(
        params, tokens, valid)


PROMPTS = [[5, 9, 1, 2, 8, 30, 31, 60, 7], [7, 3, 3, 8], [1, 2, 30, 41, 17, 17]]
WIDTH = 10


# Each family once, with an untied head where it has one; what a tied head changes is code that all
# share, and tried on one of them.
CASES = [(f, ways_to_tie(f)[0]) for f in models.names()] + [('qwen3', True)]


@pytest.fixture(scope='module', params=CASES,
                ids=lambda p: f'{p[0]}-{"tied" if p[1] else "untied"}')
def family(request):
  config = family_config(*request.param)
  model = models.build(config)
  batch = left_padded(PROMPTS, WIDTH)
  return Family(config, model, sharp_params(model), batch.tokens, batch.valid)


def _real(x, valid):
  return np.asarray(x, np.float32)[np.asarray(valid)]


# float32 rounding through two layers, hidden states of order 3, in programs that sum in another
# order. A wrong mask, position or layer changes hidden states by 0.1 and more.
FLOAT32 = dict(atol=3e-5)


def test_families_are_found_by_listing_the_folder():
  assert models.names() == sorted(
      f.stem for f in (PACKAGE / 'models' / 'families').glob('*.py') if f.stem[0] != '_')
  with pytest.raises(ValueError) as error:
    models.build({'model_type': 'gpt17'})
  assert "'gpt17'" in str(error.value) and str(models.names()) in str(error.value)


def test_init_follows_the_table(family):
  specs = params_lib.flatten(family.model.specs)
  init = quick_jit(functools.partial(params_lib.init_params, family.model.specs))
  one, same, other = (params_lib.flatten(init(jax.random.key(s))) for s in (0, 0, 1))
  abstract = params_lib.flatten(params_lib.abstract_params(family.model.specs))
  assert set(one) == set(abstract) == set(specs)
  hf_names, seen = [], []
  for name, spec in specs.items():
    assert one[name].shape == abstract[name].shape == spec.shape
    assert one[name].dtype == abstract[name].dtype == jnp.float32
    assert np.all(np.isfinite(one[name]))
    assert set(spec.axes) <= set(sharding.RULES), f'{name}: sharding.py has no rule for an axis'
    sharding.partition_spec(spec.axes)  # and no two axes collide
    assert jnp.array_equal(one[name], same[name])
    if spec.matmul:  # random, of a size that keeps the scale of its input, and not drawn twice
      assert not jnp.array_equal(one[name], other[name])
      gain = float(jnp.std(one[name])) * np.sqrt(spec.hf_shape[-1])
      assert 0.2 < gain < 2, name
      values = np.ravel(one[name])[:8]
      assert not any(np.allclose(values / np.std(values), v) for v in seen), name
      seen.append(values / np.std(values))
    hf_names.append(spec.hf_name)
  assert len(set(hf_names)) == len(hf_names)
  count = sum(x.size for x in one.values())
  assert params_lib.count_params(family.model.specs) == count
  multiplied = params_lib.count_params(family.model.specs, matmul_only=True)
  # The head multiplies every token, tied or not; the look-up of an untied embedding does not.
  assert family.model.head(params_lib.unflatten(one)).matrix.shape == (16, 64)
  assert multiplied == sum(one[n].size * s.matmul for n, s in specs.items())
  assert multiplied >= 16 * 64


def test_left_padding_changes_nothing_at_real_positions(family):
  padded = family.hidden(family.model, family.params)
  for b, prompt in enumerate(PROMPTS):
    tokens = jnp.asarray([prompt], jnp.int32)
    alone = family.hidden(family.model, family.params, tokens, jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(padded[b, WIDTH - len(prompt):], alone[0], **FLOAT32)
  # What stands in the padding does not matter either, not by one bit.
  other = jnp.where(family.valid, family.tokens, 63)
  again = family.hidden(family.model, family.params, other)
  np.testing.assert_array_equal(_real(again, family.valid), _real(padded, family.valid))


def test_a_position_sees_what_is_before_it_and_nothing_after(family):
  base = np.asarray(family.hidden(family.model, family.params))
  place = 6
  changed = np.asarray(family.hidden(
      family.model, family.params, family.tokens.at[:, place].set(50)))
  before = np.asarray(family.valid)[:, :place]  # what a padding position holds is nobody's business
  np.testing.assert_array_equal(changed[:, :place][before], base[:, :place][before])
  assert np.all(np.abs(changed[:, place + 1:] - base[:, place + 1:]).max(axis=(1, 2)) > 1e-2)


@pytest.mark.parametrize('unrolled', [False, True])
def test_prefill_and_decode_with_a_cache_equal_the_full_forward(family, unrolled):
  model = family.model
  prefill = 7

  def cached(params, tokens, valid):
    if unrolled:
      params = model.unstack(params)
    positions = sample.positions_of(valid)
    cache, out = model.init_cache(len(PROMPTS), WIDTH + 2), []  # two slots stay empty
    for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, WIDTH))]:
      hidden, cache = model.forward(params, tokens[:, start:end], positions[:, start:end],
                                    valid[:, start:end], cache)
      out.append(hidden)
    return jnp.concatenate(out, axis=1)

  want = family.hidden(model, family.params)
  got = quick_jit(cached)(family.params, family.tokens, family.valid)
  np.testing.assert_allclose(_real(got, family.valid), _real(want, family.valid), **FLOAT32)


def test_scan_over_layers_equals_layers_one_by_one(family):
  scanned = family.hidden(family.model, family.params)
  unstacked = family.model.unstack(family.params)
  assert isinstance(unstacked['layers'], tuple) and len(unstacked['layers']) == 2
  np.testing.assert_allclose(_real(family.hidden(family.model, unstacked), family.valid),
                             _real(scanned, family.valid), **FLOAT32)


@pytest.mark.parametrize('options', [dict(remat=True), dict(layer_unroll=2)], ids=str)
def test_how_layers_are_computed_changes_no_value_and_no_gradient(family, options):
  def loss(model):
    def run(params):
      hidden, _ = model.forward(params, family.tokens, sample.positions_of(family.valid),
                                family.valid, None)
      logprobs = jax.nn.log_softmax(model.head(params).logits(hidden))
      picked = jnp.take_along_axis(logprobs[:, :-1], family.tokens[:, 1:, None], axis=-1)[..., 0]
      return jnp.sum(jnp.where(family.valid[:, :-1], picked, 0.0))
    return quick_jit(jax.value_and_grad(run))(family.params)

  (value, grads), (same, again) = loss(family.model), loss(family.build(**options))
  assert float(value) == pytest.approx(float(same), rel=1e-6)
  scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
  assert scale > 0.1
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * scale)  # float32 sums in another order


def _dtypes(family, model):
  """Of the factors of all matrix products of a forward pass, and of everything in it."""
  factors, everything = set(), set()

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      dtypes = [str(v.aval.dtype) for v in equation.invars if hasattr(v.aval, 'dtype')]
      everything.update(dtypes)
      if equation.primitive.name in ('dot_general', 'ragged_dot_general'):
        factors.update(dtypes[:2])  # a ragged product has group sizes beside its factors
      for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, 'eqns')):
        inner = getattr(value, 'jaxpr', value)
        if hasattr(inner, 'eqns'):
          walk(inner)

  positions = sample.positions_of(family.valid)
  walk(jax.make_jaxpr(lambda params: model.forward(
      params, family.tokens, positions, family.valid, None))(family.params).jaxpr)
  return factors, everything


def test_float32_is_float32_everywhere_and_bfloat16_is_close(family):
  factors, everything = _dtypes(family, family.model)
  assert factors == {'float32'} and everything <= {'float32', 'int32', 'bool'}
  half = family.build(dtype=jnp.bfloat16)
  assert _dtypes(family, half)[0] == {'bfloat16'}  # every product is a bfloat16 product
  hidden = family.hidden(half, family.params)
  assert hidden.dtype == jnp.bfloat16
  want = family.hidden(family.model, family.params)

  def logprobs(hidden):
    return score.log_softmax(hidden.reshape(-1, 16), family.model.head(family.params), 1.0)

  got, exact = logprobs(hidden), logprobs(want)
  assert got.dtype == jnp.float32
  difference = np.abs(np.asarray(got - exact)).reshape(*family.tokens.shape, -1)[
      np.asarray(family.valid)]
  if 'layers/router' in params_lib.flatten(family.model.specs):
    # Where two experts are nearly equal for a token, rounding may pick the other one, and the
    # token's logits jump: two of the 19 tokens may.
    difference = difference[np.argsort(difference.max(axis=-1))[:-2]]
  # bfloat16 has 8 bits, 0.4 % a rounding; logits reach 10 here and pass two layers.
  assert difference.max() < 0.3 and difference.mean() < 0.05


def test_config_json_goes_both_ways(family):
  written = json.loads(json.dumps(family.model.to_hf()))
  assert models.build(written).config == family.model.config
  assert written['model_type'] == family.model.family == family.config['model_type']
  import transformers
  opened = transformers.AutoConfig.for_model(**written).to_dict()
  for name, value in family.config.items():
    if name in written and name not in ('architectures', 'dtype'):
      assert opened[name] == value, name
  # Nested, transformers before 5 would pass over theta without a word, and take its default.
  assert written['rope_theta'] == family.model.config.rope_theta
  assert 'rope_scaling' in written and 'rope_parameters' not in written
  assert opened['rope_parameters'] == family.config['rope_parameters']
  missing = {k: v for k, v in family.config.items() if k != 'hidden_size'}
  with pytest.raises(ValueError, match='hidden_size'):
    models.build(missing)


@pytest.fixture
def saved(family, tmp_path):
  huggingface.write_checkpoint(tmp_path / 'model', family.model, family.params,
                      prompts_lib.character_tokenizer())
  return tmp_path / 'model'


def test_checkpoint_round_trip_is_exact(family, saved):
  loaded = huggingface.load(saved, {'dtype': jnp.float32})
  assert loaded.model.config == family.model.config
  assert prompts_lib.same_vocabulary(loaded.tokenizer, prompts_lib.character_tokenizer())
  want = params_lib.flatten(family.params)
  got = params_lib.flatten(loaded.read())
  assert list(got) == list(want)
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)
  with pytest.raises(FileExistsError, match='model'):
    huggingface.write_checkpoint(saved, family.model, family.params, loaded.tokenizer)


def test_tensors_that_do_not_match_raise_by_name(family, saved):
  file = saved / huggingface.WEIGHTS
  tensors = load_file(file)
  first, last = min(tensors), max(tensors)

  def refusal(changed):
    save_file(changed, file)
    with pytest.raises(ValueError) as error:
      huggingface.read_params(saved, family.model)
    return str(error.value)

  message = refusal({k: v for k, v in tensors.items() if k != first})
  assert f"missing tensors ['{first}']" in message and 'unmatched tensors []' in message
  message = refusal({**tensors, 'model.bogus.weight': np.zeros(3, np.float32)})
  assert "unmatched tensors ['model.bogus.weight']" in message and 'missing tensors []' in message
  message = refusal({**tensors, last: np.zeros((3, 5), np.float32)})
  assert f'{last}: (3, 5) in the file, {tensors[last].shape} expected' in message
  # A transposed square matrix cannot be told, but another order of the same size can.
  two = next(k for k, v in tensors.items() if v.ndim == 2 and v.shape[0] != v.shape[1])
  assert two in refusal({**tensors, two: np.ascontiguousarray(tensors[two].T)})
  file.unlink()
  with pytest.raises(FileNotFoundError, match=huggingface.WEIGHTS):
    huggingface.read_params(saved, family.model)


def test_a_bfloat16_checkpoint_is_read_exactly(family, saved):
  from safetensors.flax import load_file as load_jax
  from safetensors.flax import save_file as save_jax
  half = {k: v.astype(jnp.bfloat16) for k, v in load_jax(saved / huggingface.WEIGHTS).items()}
  save_jax(half, saved / huggingface.WEIGHTS)
  got = huggingface.read_params(saved, family.model)
  want = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16), np.float32), family.params)
  same = jax.tree.map(lambda a, b: a.dtype == np.float32 and np.array_equal(a, b), got, want)
  assert all(jax.tree.leaves(same))


def test_a_stored_copy_of_a_tied_head_is_accepted_and_anything_else_is_not(family, saved):
  if not family.config['tie_word_embeddings']:
    pytest.skip('the head is not tied')
  tensors = load_file(saved / huggingface.WEIGHTS)
  embedding = tensors['model.embed_tokens.weight']
  save_file({**tensors, 'lm_head.weight': embedding.copy()}, saved / huggingface.WEIGHTS)
  huggingface.read_params(saved, family.model)
  save_file({**tensors, 'lm_head.weight': embedding + 1}, saved / huggingface.WEIGHTS)
  with pytest.raises(ValueError, match=r'lm_head\.weight differs'):
    huggingface.read_params(saved, family.model)


# --- tasks ---


def _small_options(task, folder):
  """The defaults with a few dozen examples a split, or the task's own example."""
  if hasattr(task, 'example_options'):
    return tasks.options(task, task.example_options(folder))
  sizes = {f.name: 60 for f in dataclasses.fields(task.Options) if f.name.endswith('_examples')}
  return tasks.options(task, sizes)


def _digest(name):
  """What a task's eval split holds, as a string that any process must reproduce."""
  task = tasks.get(name)
  with tempfile.TemporaryDirectory() as folder:
    rows = task.load('eval', _small_options(task, pathlib.Path(folder))).to_list()
  return json.dumps(rows, sort_keys=True, default=str)


@pytest.mark.parametrize('name', tasks.names())
def test_task(name, tmp_path):
  task = tasks.get(name)
  options = _small_options(task, tmp_path)
  splits = {split: task.load(split, options) for split in ('eval', 'train')}
  prompts = {split: [task.prompt(row) for row in rows] for split, rows in splits.items()}
  for split, texts in prompts.items():
    assert len(texts) > 0 and all(isinstance(t, str) and t for t in texts)
    assert task.load(split, options).to_list() == splits[split].to_list(), 'not deterministic'
  assert not set(prompts['eval']) & set(prompts['train']), 'training on held-out problems'
  rng = np.random.RandomState(0)
  for row in splits['eval'].select(range(20)):
    for text in ('', '#', 'no answer', '#12', ''.join(map(chr, rng.randint(32, 127, 40)))):
      reward = task.grade(row, text)
      assert isinstance(reward, float) and 0.0 <= reward <= 1.0
    assert task.grade(row, '') < 1.0, 'saying nothing is worth the full reward'
  with pytest.raises(ValueError, match=r"^split='no_such_split'; allowed: \["):
    task.load('no_such_split', options)
  with pytest.raises(ValueError, match='no_such_knob') as error:
    tasks.options(task, {'no_such_knob': 1})
  assert all(f.name in str(error.value) for f in dataclasses.fields(task.Options))
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(options, dataclasses.fields(options)[0].name, None)


@pytest.mark.parametrize('name', tasks.names())
def test_a_corpus_has_completions_and_no_held_out_problem(name, tmp_path):
  task = tasks.get(name)
  options = _small_options(task, tmp_path)
  try:
    corpus = task.load('corpus', options)
  except ValueError:
    pytest.skip('no corpus split')
  held_out = {task.prompt(row) for row in task.load('eval', options)}
  rows = corpus.to_list()
  assert rows and not held_out & {task.prompt(row) for row in rows}
  assert all(isinstance(row['completion'], str) for row in rows)
  # With the default options the corpus shows how to do it: full reward for its own text.
  assert max(task.grade(row, row['completion']) for row in rows) == 1.0


def test_tasks_are_the_same_in_every_process():
  # String hashing is random from process to process: a generator seeded by hash() would show here.
  code = ('import test_contracts as t, json; '
          'print(json.dumps({n: t._digest(n) for n in t.tasks.names()}))')
  out = subprocess.run(
      [sys.executable, '-c', code], check=True, capture_output=True, text=True,
      cwd=pathlib.Path(__file__).parent, env={**os.environ, 'PYTHONHASHSEED': '7'}).stdout
  assert json.loads(out.splitlines()[-1]) == {name: _digest(name) for name in tasks.names()}


def test_tasks_are_found_by_listing_the_folder():
  assert tasks.names() == sorted(
      f.stem for f in (PACKAGE / 'tasks').glob('*.py') if f.stem[0] != '_')
  with pytest.raises(ValueError) as error:
    tasks.get('chess')
  assert "task.name='chess'" in str(error.value) and str(tasks.names()) in str(error.value)


# --- teachers ---


def test_teachers_are_found_by_listing_the_folder():
  files = sorted(f.stem for f in (PACKAGE / 'teachers').glob('*.py') if f.stem != '__init__')
  assert teachers.names() == [teachers.NONE, *files]
  for kind in ('oracle', teachers.NONE):
    with pytest.raises(ValueError) as error:
      teachers.load(kind, '', None, {})
    message = str(error.value)
    assert f'teacher.kind={kind!r}' in message and str(teachers.names()) in message


@pytest.mark.parametrize('kind', [n for n in teachers.names() if n != teachers.NONE])
def test_teacher(kind, tmp_path):
  characters = prompts_lib.character_tokenizer()
  made = []
  for seed, tied in ((0, False), (1, True)):
    model = models.build(family_config('qwen3', tied))
    path = tmp_path / str(seed)
    huggingface.write_checkpoint(path, model, sharp_params(model, seed), characters)
    made.append(huggingface.load(path, {'dtype': jnp.float32}))
  student = made[0]
  before = student.read()
  # A kind reads a directory, or refuses one: then it must say so, and do without.
  loaded = {}
  for path in (str(tmp_path / '1'), ''):
    try:
      loaded[path] = teachers.load(kind, path, student, {'dtype': jnp.float32})
    except ValueError as error:
      assert 'teacher.path' in str(error) and 'allowed' in str(error)
  assert loaded, 'neither a directory nor an empty path is accepted'
  for teacher in loaded.values():
    assert isinstance(teacher, huggingface.LoadedModel)
    shapes = params_lib.abstract_params(teacher.model.specs)
    assert jax.tree.map(jnp.shape, teacher.read()) == jax.tree.map(lambda s: s.shape, shapes)
    assert prompts_lib.same_vocabulary(teacher.tokenizer, characters)
    tokens = jnp.asarray([[5, 6, 7]], jnp.int32)
    params = jax.tree.map(jnp.asarray, teacher.read())
    hidden, _ = teacher.model.forward(params, tokens, jnp.arange(3)[None], jnp.ones((1, 3), bool),
                                      None)
    logits = teacher.model.head(params).logits(hidden)
    assert logits.shape == (1, 3, student.model.config.vocab_size)
    assert float(jnp.std(logits)) > 0.1  # it has an opinion
  if (path := str(tmp_path / '1')) in loaded:  # and it is the one in the directory
    same = jax.tree.map(np.array_equal, loaded[path].read(), made[1].read())
    assert all(jax.tree.leaves(same))
  after = jax.tree.map(np.array_equal, student.read(), before)
  assert all(jax.tree.leaves(after)), 'loading a teacher changed the student'


def test_a_plug_in_needs_nothing_but_its_file(tmp_path, monkeypatch):
  # Folders are listed when asked, and there is no registry to forget: a file put there is found.
  for package, inside in ((tasks, ''), (teachers, ''), (models, 'families')):
    folder = tmp_path / package.__name__
    (folder / inside).mkdir(parents=True)
    (folder / inside / 'brand_new.py').touch()
    (folder / inside / '_private.py').touch()
    monkeypatch.setattr(package, '__file__', str(folder / '__init__.py'))
    assert 'brand_new' in package.names() and '_private' not in package.names()
