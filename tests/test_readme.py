"""The README says what is true: its program runs, its test command is the one that CI takes."""

import pathlib
import re

import numpy as np

from opd_jax import config, presets
from opd_jax.models import params

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
PRESETS = 'docs/presets.md'


def _run(heading, monkeypatch, capsys):
  """The names that the program under a heading leaves behind, and the numbers that it prints."""
  monkeypatch.chdir(ROOT)
  section = README.split(f'# {heading}\n')[1]
  program = re.search(r'```python\n(.*?)```', section, re.DOTALL)[1]
  names = {}
  exec(program, names)  # noqa: S102, the README is ours
  return names, [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]


def test_the_algorithm_runs(monkeypatch, capsys):
  names, printed = _run('The algorithm', monkeypatch, capsys)
  assert len(printed) == 3 and np.isfinite(printed).all()
  assert int(names['state'].step) == 3
  # The base is far from the teacher, and 64 samples of one prompt already move it.
  assert printed[0] > 0.1


def test_a_flax_module_learns(monkeypatch, capsys):
  names, printed = _run('A Flax module as student or teacher', monkeypatch, capsys)
  assert len(printed) == 10 and int(names['state'].step) == 10
  assert printed[-1] < 0.9 * printed[0]  # the exact reverse KL to the teacher falls


def test_the_two_commands():
  commands = re.findall(r'^pip install .*$', README, re.MULTILINE)
  assert commands == ['pip install -e . && opd train --config experiments/quickstart.py',
                      "pip install -e '.[test]' && pytest"]
  # What CI runs is cut out of the README by this expression.
  pattern = re.search(r"sed -n 's/\^\\\((.*?)\\\)\$", (ROOT / '.ci' / 'run').read_text())[1]
  assert [c for c in commands if re.fullmatch(pattern, c)] == commands[1:]


def test_every_file_that_is_named_exists():
  for name in re.findall(r'`((?:opd_jax|experiments|tests)/[\w/.]+)', README):
    if 'NAME' not in name and 'MODEL_TYPE' not in name and 'FILE' not in name:
      assert (ROOT / name).exists(), name


def test_the_table_of_presets_is_that_of_the_code():
  command = 'python -c "from opd_jax import presets; print(presets.table())"'
  text = (ROOT / PRESETS).read_text()
  assert presets.table() in text, f'write it again with {command}'
  assert PRESETS in README
  neutral = params.flatten(config.default_config().to_dict())
  for name, preset in presets.PRESETS.items():  # nothing is listed that is not a change
    same = [f for f, value in preset.fields.items() if neutral[f.replace('.', '/')] == value]
    assert not same, name
