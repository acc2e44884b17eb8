"""A console that goes away takes nothing with it."""

import errno
import os
import subprocess
import sys

import tiny

from opd_jax.run import console


def test_all_is_shown_while_all_is_well(tmp_path):
  file = os.open(tmp_path / 'out', os.O_CREAT | os.O_WRONLY)
  stream = console.Lasting(file)
  assert stream.write(b'one') == 3 and stream.error is None
  assert (tmp_path / 'out').read_bytes() == b'one'
  os.close(file)


def test_a_reader_that_has_gone():
  reader, writer = os.pipe()
  os.close(reader)
  stream = console.Lasting(writer)
  for _ in range(3):
    assert stream.write(b'one') == 3
  assert stream.error.errno == errno.EPIPE
  os.close(writer)


def test_a_reader_that_is_slow():
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  stream = console.Lasting(writer)
  for _ in range(30):  # more than the pipe holds
    assert stream.write(b'x' * 4096) > 0
  assert stream.error is None
  os.read(reader, 65536)
  assert stream.write(b'one') == 3
  assert os.read(reader, 65536).endswith(b'one')
  os.close(reader)
  os.close(writer)


CODE = '''
import sys
from rich.console import Console
from opd_jax.run import console
out = console.make_lasting()
for i in range(5000):
  print('a line that fills what a pipe holds')
  Console().print('another')
sys.stdout.flush()
print('reached the end', out.error and out.error.errno, file=sys.stderr)
'''


def test_print_and_rich_write_to_a_full_disk():
  with open('/dev/full', 'w') as full:
    done = subprocess.run([sys.executable, '-c', CODE], stdout=full, stderr=subprocess.PIPE,
                          text=True, env=tiny.environment())
  assert (done.returncode, done.stderr) == (0, f'reached the end {errno.ENOSPC}\n')


def test_print_and_rich_write_to_a_closed_pipe_and_to_nothing():
  done = subprocess.run(f'{sys.executable} -c "$CODE" | head -1', shell=True, text=True,
                        capture_output=True, env=tiny.environment(CODE=CODE))
  assert done.stderr == f'reached the end {errno.EPIPE}\n'
  assert done.stdout == 'a line that fills what a pipe holds\n'
  done = subprocess.run(f'{sys.executable} -c "$CODE" >&-', shell=True, text=True,
                        capture_output=True, env=tiny.environment(CODE=CODE))
  assert done.stderr == 'reached the end None\n'
