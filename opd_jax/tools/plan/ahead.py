"""What libtpu allocates for a program, without the code: nine tenths of the time that it takes to
compile one go into the kernels' instructions, which no plan reads, after all memory is divided."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import multiprocessing
from multiprocessing.connection import Connection
import os
import pathlib
import re
import threading
from typing import Any

import jax

from opd_jax.doctor.lowered import Call
from opd_jax.tools.plan import hlo

LOOK_S = 0.2
# Of each allocation in device memory (others have a color) its size and what it is for.
_ALLOCATION = re.compile(r'^allocation \d+: size (\d+), (?!color)(.*)$', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Allocated:
  """What a device holds of a program, by the names that `memory_analysis` has for it."""

  temp_size_in_bytes: int
  output_size_in_bytes: int
  alias_size_in_bytes: int
  generated_code_size_in_bytes: int = 0  # not known yet


def read(folder: str) -> Allocated | None:
  """Reads what a compiler that was given `hlo.options(folder)` has allocated; None before that."""
  # The next that it writes is there: the text before it is whole.
  if not list(pathlib.Path(folder).glob('*after_optimizations_after_buffer_assignment.txt')):
    return None
  file, = pathlib.Path(folder).glob('*after_optimizations-buffer-assignment.txt')
  found = [(int(size), what) for size, what in _ALLOCATION.findall(file.read_text())]
  results = [(size, 'parameter' in what) for size, what in found if 'maybe-live-out' in what]
  return Allocated(sum(size for size, what in found if 'preallocated-temp' in what),
                   sum(size for size, _ in results), sum(size for size, old in results if old))


def allocate(make: Callable[..., Call], args: tuple[Any, ...], folder: str,
             enough: Callable[[Allocated], bool]) -> Allocated:
  """Compiles a program in a process of its own, which ends as soon as its memory is known.

  The process imports the main module again, as `multiprocessing` does: a script that plans needs
  its `if __name__ == '__main__'`.

  Args:
    make: of `args`, the program; a function of a module.
    args: can be pickled; the last is the program's name.
    folder: takes what the compiler writes out.
    enough: of what is allocated, whether that answers; else the program is compiled to its end.

  Returns:
    what is allocated, with the code only where the program was compiled to its end.

  Raises:
    jax.errors.JaxRuntimeError: the compiler's.
    RuntimeError: the process ended without a word, for example for want of memory.
  """
  context = multiprocessing.get_context('spawn')
  ours, theirs = context.Pipe(duplex=False)
  child = context.Process(target=_compile, args=(make, args, folder, theirs), daemon=True)
  child.start()
  theirs.close()
  try:
    found = None
    while not ours.poll(LOOK_S if found is None else None):
      found = read(folder)
      if found is not None and enough(found):
        return found
    try:
      sizes, said = ours.recv()
    except EOFError:
      child.join()
      raise RuntimeError(
          f'compiling {args[-1:]} for TPUs ended with status {child.exitcode}; allowed: a machine '
          'with memory for it (status -9: it was killed)') from None
  finally:
    child.kill()
    child.join()
  if sizes is None:
    raise jax.errors.JaxRuntimeError(said)
  return Allocated(*sizes)


def _compile(make: Callable[..., Call], args: tuple[Any, ...], folder: str, out: Connection
             ) -> None:
  """Sends the sizes that `Allocated` has of the program, or what the compiler said instead."""
  threading.Thread(target=_end_with_the_parent, daemon=True).start()
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    stats = make(*args).compile(hlo.options(folder)).memory_analysis()
  except jax.errors.JaxRuntimeError as e:
    out.send((None, str(e)))
  else:
    out.send((tuple(getattr(stats, f.name) for f in dataclasses.fields(Allocated)), ''))


def _end_with_the_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)  # the compiler cannot be asked to stop
