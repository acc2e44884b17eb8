"""The fuzz test in short: whole inputs work, and damaged ones of each kind are no failures."""

import os

import fuzz
import fuzz_inputs
import fuzz_wholes
import pytest

# Looping templates take seconds, and a work directory has to be trained first: `.ci/run` has more.
CASES = {'weights': 12, 'config': 8, 'tokenizer': 12, 'data': 16, 'command': 12, 'template': 3}


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
  monkeypatch.setenv('MALLOC_ARENA_MAX', '1')  # fuzz.command sets it


@pytest.mark.parametrize('name', ['plain', 'chat'])
def test_what_is_whole_works(name):
  status, out, err = fuzz.command(['doctor', f'--config={fuzz_wholes.config_file(name)}'])
  assert fuzz.judge(['doctor'], (), status, out, err) == (fuzz.WORKS, ''), (out, err)


@pytest.mark.parametrize('kind', list(CASES))
def test_damaged_inputs(kind):
  here, outcomes = os.getcwd(), [fuzz.run(kind, 0, n) for n in range(CASES[kind])]
  assert not [o for o in outcomes if o.verdict == fuzz.FAILURE]
  assert any(o.verdict == fuzz.REFUSED for o in outcomes)
  assert os.getcwd() == here


def test_every_kind_is_here_or_needs_training():
  assert set(fuzz_inputs.KINDS) - set(CASES) == {'workdir'}


@pytest.mark.parametrize(('status', 'err', 'verdict'), [
    (0, '', fuzz.WORKS), (0, 'WARNING: old\n', fuzz.WORKS), (0, 'odd\n', fuzz.FAILURE),
    (2, "error: steps=0; allowed: at least 1\n", fuzz.REFUSED),
    (2, "WARNING: old\nerror: steps=0; allowed: at least 1\n", fuzz.REFUSED),
    (2, 'error: steps=0\n', fuzz.FAILURE), (2, 'error: no; allowed: yes\n', fuzz.FAILURE),
    (2, 'error: steps=0; allowed: at least 1\nmore\n', fuzz.FAILURE), (2, '', fuzz.FAILURE),
    (2, f'error: steps=0; allowed: {"x" * 4000}\n', fuzz.FAILURE), (1, '', fuzz.FAILURE),
    (3, 'error: steps=0; allowed: at least 1\n', fuzz.FAILURE), (None, '', fuzz.FAILURE),
    (2, 'Traceback (most recent call last):\n', fuzz.FAILURE)])
def test_what_counts_as_what(status, err, verdict):
  assert fuzz.judge(['train'], (), status, '', err)[0] == verdict


def test_what_does_not_end_is_a_failure(monkeypatch, tmp_path):
  (tmp_path / 'loop.py').write_text('def get_config():\n  while True:\n    pass\n')
  monkeypatch.setattr(fuzz, 'CPU_S', 0.5)
  status, out, err = fuzz.command(['train', f'--config={tmp_path / "loop.py"}'])
  verdict, said = fuzz.judge(['train'], (), status, out, err)
  assert verdict == fuzz.FAILURE and 'HangError' in said and 'loop.py' in said
