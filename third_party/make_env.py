"""Makes the environment of a peer: a virtual environment with what its file here lists.

    python third_party/make_env.py trl --folder runs/peers      (or tunix, or transformers)
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import venv

HERE = pathlib.Path(__file__).resolve().parent
FOLDER = HERE.parent / 'runs' / 'peers'


def names() -> list[str]:
  """Lists the environments there are: a file of requirements each."""
  return sorted(p.stem for p in HERE.glob('*.txt'))


def python_of(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Says where the interpreter of an environment is, or will be."""
  return folder / name / 'bin' / 'python'


def main() -> None:
  """Makes what is asked for."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
  parser.add_argument('names', nargs='+', choices=names())
  parser.add_argument('--folder', type=pathlib.Path, default=FOLDER)
  args = parser.parse_args()
  for name in args.names:
    venv.create(args.folder / name, with_pip=True)
    done = subprocess.run([python_of(args.folder, name), '-m', 'pip', 'install', '-q', '-r',
                           HERE / f'{name}.txt'])
    if done.returncode:
      sys.exit(f'error: pip ended with status {done.returncode}')
    print(f'{name}: {args.folder / name}')


if __name__ == '__main__':
  main()
