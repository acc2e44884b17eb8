"""Does a test fail for every error that one could make in the loss? A script, not a test.

Each mutation changes one node of the syntax tree of one file of opd_jax/algorithm/ in a copy of the
package: a sign, an operator, a comparison, a constant, a minimum, a stopped gradient, the branches
of a choice. Then some test of the loss must fail. Code may be moved and written differently without
an edit here.

  python tests/mutate_loss.py                     all of them: hours
  python tests/mutate_loss.py --sample 60         a draw; --seed S for another one
  python tests/mutate_loss.py --only gates.py     those whose name has this text
  python tests/mutate_loss.py --list              what there is

It prints killed or survived for each, and exits with the number that survived.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import pathlib
import random
import shutil
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PURE = ROOT / 'opd_jax' / 'algorithm'
# The sampler and what is only reported have tests of their own, which look at other things.
LEFT_OUT = ('sample.py', 'metrics.py')
TESTS = ('test_choices.py', 'test_oracle.py', 'test_oracle_presets.py', 'test_signals.py',
         'test_vocabulary.py', 'test_score.py', 'test_update.py', 'test_update_properties.py',
         'test_fixed_point.py', 'test_divergences.py', 'test_expectations.py',
         'test_enumeration.py')
# What changes nothing, or nothing but a message, with the reason; by (function, before, after).
EQUIVALENT: dict[tuple[str, str, str], str] = {}

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
         ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Eq: ast.NotEq,
         ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And}
CALLS = {'minimum': 'maximum', 'maximum': 'minimum', 'ceil': 'floor', 'any': 'all', 'exp': 'log',
         'sum': 'max', 'mean': 'sum', 'log1p': 'expm1', 'expm1': 'log1p', 'cumsum': 'negative'}


def variants(node: ast.AST) -> list[ast.AST]:
  """What may stand in the place of a node."""
  def swapped(field, value):
    other = copy.copy(node)
    setattr(other, field, value)
    return other

  if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
    return [swapped('op', SWAPS[type(node.op)]())]
  if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
    return [swapped('ops', [SWAPS[type(node.ops[0])](), *node.ops[1:]])]
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
    return [node.operand]
  if isinstance(node, ast.IfExp):
    return [node.body, node.orelse]
  if isinstance(node, ast.Constant) and type(node.value) is float:
    return [swapped('value', 2.0 * node.value + 1.0)]
  if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
    name = node.func.attr
    if name == 'stop_gradient':
      return [node.args[0]]
    if name == 'where' and len(node.args) == 3:
      condition, yes, no = node.args
      return [swapped('args', [condition, no, yes]), yes]
    if name in CALLS:
      func = copy.copy(node.func)
      func.attr = CALLS[name]
      return [swapped('func', func)]
  return []


def sites(tree: ast.Module) -> list[tuple[str, ast.AST, ast.AST]]:
  """(function, node, what takes its place) for every mutation of a file; annotations, defaults and
  docstrings are left alone."""
  out = []

  def walk(node, function):
    for new in variants(node):
      out.append((function, node, new))
    if isinstance(node, ast.FunctionDef):
      for statement in node.body:
        walk(statement, node.name)
      return
    for child in ast.iter_child_nodes(node):
      if not isinstance(child, ast.arguments):
        walk(child, function)

  for statement in tree.body:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
      walk(statement, statement.name)
  return out


class Replace(ast.NodeTransformer):
  """Puts a node in the place of another."""

  def __init__(self, old: ast.AST, new: ast.AST):
    self.old, self.new = old, new

  def visit(self, node: ast.AST) -> ast.AST:
    return self.new if node is self.old else super().visit(node)


def mutations() -> list[tuple[str, str, str]]:
  """(name, file, mutated source) of each; a name says file, function, before and after."""
  out = []
  for path in sorted(PURE.rglob('*.py')):
    if path.name in LEFT_OUT:
      continue
    for index, (function, old, _) in enumerate(sites(ast.parse(path.read_text()))):
      del old
      tree = ast.parse(path.read_text())
      _, old, new = sites(tree)[index]
      key = function, ast.unparse(old), ast.unparse(new)
      if key not in EQUIVALENT:
        file = str(path.relative_to(ROOT))
        mutated = ast.unparse(ast.fix_missing_locations(Replace(old, new).visit(tree)))
        out.append((f'{path.name} {function}: {key[1]} -> {key[2]}', file, mutated))
  return out


def run(folder: str, file: str, source: str) -> int:
  """In a child process: the exit status of the tests, with the mutated file in place."""
  shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(
      '.git', '__pycache__', '.pytest_cache', 'shared', 'runs'))
  (pathlib.Path(folder) / file).write_text(source)
  os.chdir(folder)
  os.environ['PYTHONPATH'] = folder  # for what the tests start
  sys.path[:1] = [folder]  # the first was this file's folder
  with open('output', 'w') as output:
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    tests = [t for t in (f'tests/algorithm/{name}' for name in TESTS) if os.path.exists(t)]
    return pytest.main(['-n', '0', '-x', '-q', *tests])


def start(file: str, source: str, folder: str) -> int:
  """The process id of a fork that tests a mutation: nothing heavy is imported again."""
  sys.stdout.flush()
  child = os.fork()
  if not child:
    status = 3
    try:
      status = run(folder, file, source)
    finally:
      os._exit(status)
  return child


def main() -> int:
  """See the top of this file."""
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--sample', type=int, default=0)
  flags.add_argument('--seed', type=int, default=0)
  flags.add_argument('--only', default='')
  flags.add_argument('--processes', type=int, default=2)
  flags.add_argument('--list', action='store_true')
  given = flags.parse_args()
  chosen = [m for m in mutations() if given.only in m[0]]
  if given.sample:
    chosen = random.Random(given.seed).sample(chosen, min(given.sample, len(chosen)))
  if not chosen:
    raise ValueError(f'--only {given.only!r} names no mutation; allowed: a part of a name (--list)')
  if given.list:
    print(*(name for name, _, _ in chosen), f'{len(chosen)} mutations', sep='\n')
    return 0
  # What takes long to import and does not depend on the package: the forks have it already.
  for name in ('jax', 'flax', 'optax', 'transformers', 'hypothesis', 'beartype'):
    importlib.import_module(name)
  count, running = 0, {}
  while chosen or running:
    if chosen and len(running) < given.processes:
      folder = tempfile.TemporaryDirectory()
      name, file, source = chosen.pop(0)
      running[start(file, source, folder.name)] = name, folder
      continue
    child, status = os.wait()
    name, folder = running.pop(child)
    status = os.waitstatus_to_exitcode(status)
    if status in (3, 4, 5):  # nothing collected, or no such test
      raise RuntimeError(f'{name}: {(pathlib.Path(folder.name) / "output").read_text()[-2000:]}')
    folder.cleanup()
    count += status == 0
    print('killed  ' if status else 'SURVIVED', name, flush=True)
  print(f'{count} survived')
  return count


if __name__ == '__main__':
  sys.exit(main())
