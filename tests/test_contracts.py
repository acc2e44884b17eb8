"""What every module must satisfy: layers, purity, the boundary of configs, annotations, length; and
that plug-ins are found by listing their folders.

What every divergence, model family, task and teacher must satisfy is in test_every_divergence.py,
test_every_family.py, test_every_task.py and test_every_teacher.py: a new file is covered there
without an edit.
"""

from __future__ import annotations

import ast
import functools
import pathlib
import re

import jax.numpy as jnp
import jaxtyping
import pytest

import opd_jax
from opd_jax import models, tasks, teachers
from opd_jax.models import nn

PACKAGE = pathlib.Path(opd_jax.__file__).parent
ROOT = PACKAGE.parent
FILES, TESTS = sorted(PACKAGE.rglob('*.py')), sorted((ROOT / 'tests').rglob('*.py'))
each_file = pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(PACKAGE)))

# --- the source: layers, purity, the boundary of configs, annotations, length ---

# Folders, and the files beside them. Each imports from those before it only, and a file of a folder
# from its own folder too: a new file has the rank of its folder.
LAYERS = (
    'types errors', 'models', 'algorithm', 'parallel settings', 'data', 'files', 'tasks teachers',
    'run', 'rules', 'config', 'presets', 'experiment', 'load', 'build', 'programs', 'doctor',
    'train', 'tools', '__main__')
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer.split()}
PURE = ('types', 'models', 'algorithm')
PURE_MAY_IMPORT = {'__future__', 'ast', 'collections', 'dataclasses', 'functools', 'inspect',
                   'itertools', 'math', 're', 'types', 'typing', 'flax', 'jax', 'jaxtyping',
                   'numpy', 'optax', 'opd_jax'}
FLAX = ('flax.struct', 'flax.traverse_util')  # the rest is for Flax modules
COMPILES = ('programs.py', 'run/evaluator.py', 'doctor/lowered.py', 'doctor/rollouts.py',
            'tools/compare_estimators.py', 'tools/compare_models.py')
# Who writes configs or reads them, and who takes one to hand it on to those.
CONFIGS = ('config.py', 'experiment/__init__.py', 'experiment/ablation.py', 'presets.py')
TAKES_CONFIG = ('train.py', 'doctor/examine.py')  # `train` and `command`; and all of tools/
# What a step does, from the loop to the gradient; a choice or a gate is looked up, one at a time.
PATH, PATH_LINES = ('types', 'algorithm', 'programs', 'train'), 3130


@functools.cache
def _tree(file: pathlib.Path) -> ast.Module:
  return ast.parse(file.read_text())


def _name(file: pathlib.Path) -> str:
  return str(file.relative_to(PACKAGE))


def _module(file: pathlib.Path) -> str:
  """The top-level name: 'train' for train.py, 'models' for models/nn.py, '' for __init__.py."""
  parts = file.relative_to(PACKAGE).with_suffix('').parts
  return '' if parts == ('__init__',) else parts[0]


def _imports(file: pathlib.Path) -> list[str]:
  """Every imported name, dotted, those inside functions too."""
  found = []
  for node in ast.walk(_tree(file)):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{file}: relative import'
      found += [f'{node.module}.{alias.name}' for alias in node.names]
  return found


def _functions(file: pathlib.Path) -> list[ast.FunctionDef]:
  return [n for n in ast.walk(_tree(file)) if isinstance(n, ast.FunctionDef)]


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
  called = {node.func.id for node in ast.walk(_tree(file))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
  assert not called & {'open', 'print', 'input', 'exec', 'eval'}


@each_file
def test_only_programs_and_measurements_compile(file):
  text = _tree(file)
  uses = [node.attr for node in ast.walk(text) if isinstance(node, ast.Attribute)
          and node.attr in ('jit', 'pmap', 'pjit')]
  uses += [name for name in _imports(file) if name in ('jax.jit', 'jax.pmap')]
  assert not uses or _name(file) in COMPILES


# What a process holds of an array, and which process it is: everything else asks parallel/hosts.py.
# (`safetensors.read` gives every device its slice; parallel/apart.py moves rows within a process.)
OF_A_PROCESS = {'device_get', 'process_allgather', 'process_index', 'process_count',
                'addressable_data', 'addressable_shards', 'is_fully_addressable',
                'sync_global_devices', 'broadcast_one_to_all'}
# What these make NumPy arrays of is on the host: what `hosts.fetch` has read, lists, files, what is
# to be put on devices, a Flax module's parameters before they are.
NO_DEVICES = (
    'data/examples.py', 'experiment/scaling.py', 'files/answers.py', 'files/factory.py',
    'files/safetensors.py', 'parallel/hosts.py', 'parallel/sharding.py', 'models/flax_module.py',
    'run/flops.py', 'run/texts.py', 'tools/curves.py', 'tools/report.py',
    'tools/gradient_statistics.py', 'doctor/rollouts.py', 'parallel/apart.py',
    'tools/plan/hardware.py', 'tools/plan/phases.py')


@each_file
def test_devices_are_read_through_one_function(file):
  """`np.asarray` of an array that is spread over several hosts raises, and only there."""
  used = {n.attr for n in ast.walk(_tree(file)) if isinstance(n, ast.Attribute)}
  used |= {name.rpartition('.')[2] for name in _imports(file)}
  if _name(file) not in ('parallel/hosts.py', 'parallel/apart.py'):
    assert not used & OF_A_PROCESS
  made = [n.lineno for n in ast.walk(_tree(file)) if isinstance(n, ast.Call)
          and ast.unparse(n.func) in ('np.asarray', 'np.array', 'numpy.asarray', 'numpy.array')]
  assert not made or _name(file) in NO_DEVICES, f'hosts.fetch reads devices; lines {made}'


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
  for node in _tree(file).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != '_':
      yield node.name, node, False
      for inner in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(inner, ast.FunctionDef) and (
            inner.name[0] != '_' or inner.name in ('__init__', '__call__')):
          kinds = [d.id for d in inner.decorator_list if isinstance(d, ast.Name)]
          yield f'{node.name}.{inner.name}', inner, 'property' in kinds


@each_file
def test_public_names_have_docstrings_and_annotations(file):
  assert ast.get_docstring(_tree(file)), 'the module has no docstring'
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


@pytest.mark.parametrize('file', [*FILES, *TESTS], ids=lambda f: str(f.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(file):
  assert len(file.read_text().splitlines()) <= 400


def test_no_folder_has_more_than_12_files():
  folders = [PACKAGE, *(f for f in PACKAGE.rglob('*') if f.is_dir() and f.name != '__pycache__')]
  counts = {f.name: len(list(f.glob('*.py'))) for f in folders}
  assert not {name: n for name, n in counts.items() if n > 12}


def test_the_readmes_map_is_in_the_order_of_imports():
  text = (ROOT / 'README.md').read_text().partition('| path | holds |')[2]
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


def test_a_plug_in_needs_nothing_but_its_file(tmp_path, monkeypatch):
  # Folders are listed when asked, and there is no registry to forget: a file put there is found.
  for package, inside in ((tasks, ''), (teachers, ''), (models, 'families')):
    folder = tmp_path / package.__name__
    (folder / inside).mkdir(parents=True)
    (folder / inside / 'brand_new.py').touch()
    (folder / inside / '_private.py').touch()
    monkeypatch.setattr(package, '__file__', str(folder / '__init__.py'))
    assert 'brand_new' in package.names() and '_private' not in package.names()
