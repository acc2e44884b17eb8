"""What files contain, as digests: an input is what it contains, not what it is called.

Of weights, the header and a sample of every tensor: training, merging or rounding changes nearly
all numbers of a tensor, so that a few blocks of it tell, and the gigabytes between them need not be
read. Everything else (data sets, tokenizers, configs) is read whole.
"""

from __future__ import annotations

from collections.abc import Mapping
import fnmatch
import hashlib
import itertools
import os
import pathlib

from opd_jax.files import huggingface, peft
from opd_jax.files import safetensors as safetensors_lib

Digests = dict[str, str]  # by the name of the file
BLOCK_BYTES, BLOCKS = 4096, 4  # of each tensor: its beginning, its end, and evenly between


def of_file(file: pathlib.Path) -> str:
  """Computes the digest of a whole file."""
  with open(file, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def of_weights(file: pathlib.Path) -> str:
  """Computes the digest of a safetensors file: its size, its header, BLOCKS blocks of each tensor.
  """
  try:
    header = safetensors_lib.read_header(file)
  except ValueError:  # damaged: for those who read it to say
    return of_file(file)
  size = file.stat().st_size
  places = [*sorted(tensor.offset for tensor in header.values()), size]  # without gaps
  out = hashlib.sha256(f'{size}'.encode())
  with open(file, 'rb') as f:
    out.update(f.read(places[0]))
    for start, end in itertools.pairwise(places):
      last = max(end - start - BLOCK_BYTES, 0)
      for place in sorted({last * i // (BLOCKS - 1) for i in range(BLOCKS)}):
        f.seek(start + place)
        out.update(f.read(min(BLOCK_BYTES, end - start)))
  return out.hexdigest()


def of_model(folder: str | os.PathLike[str]) -> Digests:
  """Computes the digests of the files that a model's directory, or an adapter's, is read from."""
  wanted = (*huggingface.FETCHED, peft.CONFIG, peft.WEIGHTS)
  return {p.name: of_weights(p) if p.suffix == '.safetensors' else of_file(p)
          for p in sorted(pathlib.Path(folder).iterdir())
          if p.is_file() and any(fnmatch.fnmatch(p.name, pattern) for pattern in wanted)}


def of_data(path: str | os.PathLike[str]) -> Digests:
  """Computes the digests of a data set: of a file, or of all files of a folder but hidden ones, of
  which no reader takes any."""
  path = pathlib.Path(path)
  if path.is_file():
    return {path.name: of_file(path)}
  files = {p.relative_to(path): p for p in sorted(path.rglob('*')) if p.is_file()}
  return {str(name): of_file(p) for name, p in files.items()
          if not any(part.startswith('.') for part in name.parts)}


def changes(before: Mapping[str, Digests], now: Mapping[str, Digests]) -> list[str]:
  """Lists 'field: FILE what became of it' for all that differs between two sets of inputs."""
  out = []
  for field in sorted({*before, *now}):
    old, new = before.get(field, {}), now.get(field, {})
    out += [f'{field}: {name} ' + ('is new' if name not in old else 'is gone' if name not in new
                                   else 'has changed')
            for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
  return out
