"""Command lines of `opd`, each in a child of one process that has imported everything already:
starting Python and JAX for every one would take longer than all that they do."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import tiny

FORKS = '''
import json, os, sys
import opd_jax.__main__, opd_jax.tools.pipeline
from absl import app, flags
from ml_collections import config_flags
for i, args in enumerate(json.load(sys.stdin)):
  child = os.fork()
  if not child:
    for fd, name in ((1, f"{i}.out"), (2, f"{i}.err")):
      os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.argv, status = ["opd", *args], 99  # main() always exits by itself
    try:
      opd_jax.__main__.main()
    except SystemExit as e:
      status = e.code
    except BaseException:
      sys.excepthook(*sys.exc_info())
      status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without tearing down what it shares with its parent, which takes seconds
  with open(f"{i}.status", "w") as f:
    f.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
'''


def run(lines: list[str], cwd: pathlib.Path) -> dict[str, subprocess.CompletedProcess[str]]:
  """What became of every command line, one after the other."""
  subprocess.run([sys.executable, '-c', FORKS], cwd=cwd, text=True, check=True, capture_output=True,
                 input=json.dumps([line.split() for line in lines]), env=tiny.environment(),
                 timeout=tiny.PATIENCE_S)
  done = {}
  for i, line in enumerate(lines):
    out, err, status = ((cwd / f'{i}.{name}').read_text() for name in ('out', 'err', 'status'))
    done[line] = subprocess.CompletedProcess(line, int(status), out, err)
  return done


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
  """A failure that says all of `parts` in one line on stderr."""
  assert done.returncode == 2, (done.returncode, done.stderr)
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
  for part in parts:
    assert part in done.stderr, f'{part!r} is not in {done.stderr}'
