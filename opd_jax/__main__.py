"""`opd COMMAND`: the console. `opd --help` lists the commands, which are in tools/commands.py."""

from __future__ import annotations

import ast
import atexit
import errno
import functools
import json
import logging
import os
import pathlib
import platform
import sys
import textwrap
import traceback
from typing import Any, NoReturn
import warnings

from opd_jax.tools.commands import COMMANDS, FLAGS, HOSTS

# glibc hands XLA's per-step buffers back to the kernel and faults them in again; these settings
# keep them, in large pages. They only work when set before the process starts.
_MALLOC = {'MALLOC_ARENA_MAX': '1', 'MALLOC_MMAP_MAX_': '0',
           'MALLOC_TRIM_THRESHOLD_': str(2**33), 'MALLOC_TOP_PAD_': str(2**28)}
_LARGE_PAGES = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}  # other tunables may be there


def entry() -> NoReturn:
  """Runs the console command and ends the process, without taking the interpreter down: a thread of
  tensorstore that comes to Python in its last moments aborts the process (seen on a busy machine,
  after 'done:'), and a run that has finished would look like one that failed."""
  try:
    main()
    status = 0
  except SystemExit as e:
    status = e.code
  if not isinstance(status, int | None):  # of a config file
    print(status, file=sys.stderr)
  atexit._run_exitfuncs()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status if isinstance(status, int) else int(status is not None))


def main() -> None:
  """Runs the console command."""
  if hasattr(sys.stdout, 'reconfigure'):  # not every console knows every character
    sys.stdout.reconfigure(errors='backslashreplace')
  from opd_jax.run import console, interrupts
  out = console.make_lasting()
  command, rest = (sys.argv[1:] or [''])[0], sys.argv[2:]
  if command in ('-h', '--help'):
    print(overview())
    sys.exit(check_output('', out, 0))
  if command not in COMMANDS:
    if command:
      print(f'error: command {command!r}; allowed: {list(COMMANDS)}', file=sys.stderr)
    print(overview(), file=sys.stderr)
    sys.exit(2)
  if {'-h', '--help'} & set(rest):
    print(help_of(command))
    sys.exit(check_output('', out, 0))
  # In the loop, Ctrl-C is a checkpoint, see run/interrupts.py.
  text = 'interrupted; the same command ' + (
      'goes on from the newest checkpoint' if command == 'train' else 'begins again')
  interrupts.end_at_once(text)  # until `run_command` has imported all that it needs
  keep_allocations()
  # Before anything imports them: they ask for torch, which is not needed, draw a bar for every file
  # and say twice what an error will say.
  for name, value in (('TRANSFORMERS_VERBOSITY', 'error'), ('DATASETS_VERBOSITY', 'critical'),
                      ('HF_HUB_VERBOSITY', 'error'), ('HF_DATASETS_DISABLE_PROGRESS_BARS', '1')):
    os.environ.setdefault(name, value)
  try:
    from absl import app
    del sys.argv[1]
    app.run(lambda argv: sys.exit(check_output(command, out, dispatch(command, argv))),
            flags_parser=functools.partial(parse_flags, command))
  except KeyboardInterrupt:
    print(text, file=sys.stderr)
    sys.exit(130)


def check_output(command: str, out: Any, status: int) -> int:
  """Flushes the console; where that failed, a run is none the worse, and other commands are: what
  they do is what they print. A reader who has seen enough is no failure.

  Returns:
    The exit status.
  """
  sys.stdout.flush()
  if out.error is None or out.error.errno == errno.EPIPE:
    return status
  trained = command in ('train', 'export')
  print(f'{"WARNING" if trained else "error"}: the console could not be written: '
        f'{out.error.strerror}', file=sys.stderr)
  return status if trained else status or 2


def overview() -> str:
  """Writes the help of `opd` itself."""
  commands = '\n'.join(f'  opd {name:9} {c.does}' for name, c in COMMANDS.items())
  return (f'On-policy distillation of language models in JAX.\n\n{commands}\n\n'
          '`opd COMMAND --help` says what its flags are. To begin with:\n\n'
          f'  {COMMANDS["train"].example}\n')


def help_of(command: str) -> str:
  """Writes the help of a command."""
  c = COMMANDS[command]
  lines = []
  for name in c.flags:
    value, what = FLAGS[name]
    needed = ' (required)' if name in c.required else ''
    lines += [f'  --{name} {value}{needed}', *textwrap.wrap(
        what, 92, initial_indent=' ' * 6, subsequent_indent=' ' * 6)]
  listed = f'\n{experiments()}' if 'config' in c.flags else ''
  return f'opd {command}: {c.does}.\n\n' + '\n'.join(lines) + (
      f'\n\nExample:\n\n  {c.example}\n{listed}')


def experiments() -> str:
  """Lists the experiment files here, or where the package was cloned, with what each one is."""
  cloned = pathlib.Path(__file__).resolve().parent.parent / 'experiments'
  folder = next((f for f in (pathlib.Path('experiments'), cloned) if f.is_dir()), None)
  if folder is None:
    return 'There is no folder experiments/ here.'
  lines = []
  for file in (*sorted(folder.glob('*.py')), *sorted(folder.glob('*/*.py'))):
    text = ast.get_docstring(ast.parse(file.read_bytes())) or ''
    what = ' '.join(text.split('\n\n')[0].split()).partition('. ')[0].rstrip('.')
    lines += textwrap.wrap(f'{file}: {what}', 96, initial_indent='  ', subsequent_indent=' ' * 6)
  return 'Experiments:\n\n' + '\n'.join(lines) + '\n'


def keep_allocations() -> None:
  """Starts this process again with `_MALLOC` and large pages in its environment: on Linux with
  glibc, when JAX will run on the CPU and the user has set nothing of `_MALLOC`."""
  accelerator = any(pathlib.Path('/dev').glob(p) for p in ('nvidia[0-9]*', 'accel[0-9]*', 'vfio/*'))
  if (platform.libc_ver()[0] != 'glibc' or any(name in os.environ for name in _MALLOC)
      or (accelerator and os.environ.get('JAX_PLATFORMS') != 'cpu')):
    return
  os.environ.update(_MALLOC | {n: x for n, x in _LARGE_PAGES.items() if n not in os.environ})
  os.execv(sys.executable, [sys.executable, '-m', 'opd_jax', *sys.argv[1:]])


def define_flags() -> None:
  """Defines every flag of every command."""
  from absl import flags
  from ml_collections import config_flags
  config_flags.DEFINE_config_file('config', None, FLAGS['config'][1], lock_config=True)
  for name in ('workdir', 'stage', 'model', 'output', 'topology', 'json'):
    flags.DEFINE_string(name, None, FLAGS[name][1])
  for name, default in (('teacher', ''), ('format', 'full'), ('dtype', ''), ('changed_inputs', ''),
                        ('coordinator', ''), ('models', '')):
    flags.DEFINE_string(name, default, FLAGS[name][1])
  for name, default in (('step', -1), ('processes', 0), ('process', -1)):
    flags.DEFINE_integer(name, default, FLAGS[name][1])
  flags.DEFINE_float('price', 0.0, FLAGS['price'][1])


def parse_flags(command: str, argv: list[str]) -> list[str]:
  """Parses the command line; a mistake in it, or in the config file, is one line, not a traceback.
  """
  from absl import flags

  from opd_jax.errors import one_line
  from opd_jax.tools import mistakes
  logging.getLogger('absl').setLevel(logging.CRITICAL)  # it warns of what is an error below
  file = mistakes.config_file(argv)
  try:
    if file and pathlib.Path(file).exists() and not pathlib.Path(file).is_file():
      raise OSError('no regular file')  # a pipe would be waited for
    define_flags()  # which reads the command line too
    rest = flags.FLAGS(argv)
    if file is not None and flags.FLAGS['config'].value is None:
      raise TypeError('its get_config returned None')
    missing = [name for name in COMMANDS[command].required if flags.FLAGS[name].value is None]
    if missing:
      print(f'error: {command!r} needs ' + ' and '.join(f'--{n} {FLAGS[n][0]}' for n in missing)
            + f'; for example: {COMMANDS[command].example}', file=sys.stderr)
      if 'config' in missing:
        print(f'\n{experiments()}', file=sys.stderr)
      sys.exit(2)
    if flags.FLAGS['config'].value is not None:
      _ = flags.FLAGS.config.name  # a file that cannot be read is noticed only here
    return rest
  except Exception as e:  # the code of a config file may raise anything
    said = mistakes.explain(command, COMMANDS[command].flags, argv, e)
    print(f'error: {one_line(" ".join(said.split()))}', file=sys.stderr)
  sys.exit(2)


def set_up_jax() -> None:
  """Sets up the compilation cache: a second start of the same programs compiles nothing."""
  import jax

  from opd_jax.errors import one_line
  if not jax.config.jax_compilation_cache_dir:
    root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(root) / 'opd_jax' / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  warnings.formatwarning = lambda message, *where: f'WARNING: {one_line(str(message))}\n'
  # Libraries narrate every file and every missing backend.
  logging.getLogger().setLevel(logging.WARNING)
  # With a traceback for every thread of a save that failed; what it logs as an error, it raises.
  logging.getLogger('absl').setLevel(logging.CRITICAL)


def dispatch(command: str, argv: list[str]) -> int:
  """Runs a command; returns the exit status. Errors of the user's making are one line."""
  from absl import flags

  if len(argv) > 1:
    print(f'error: unexpected arguments {argv[1:]}; allowed: flags as --NAME VALUE',
          file=sys.stderr)
    return 2
  for name in FLAGS:
    if flags.FLAGS[name].present and name not in COMMANDS[command].flags:
      commands = [other for other, c in COMMANDS.items() if name in c.flags]
      print(f'error: --{name} has no effect with {command!r}; allowed: with {commands}',
            file=sys.stderr)
      return 2
    if flags.FLAGS[name].present and flags.FLAGS[name].value == '':
      print(f'error: --{name}=\'\'; allowed: {FLAGS[name][0]}', file=sys.stderr)
      return 2
  set_up_jax()
  from opd_jax.parallel import hosts
  try:
    status = run_command(command, flags.FLAGS)
  except BaseException as e:
    status, text = explain_end(e)
    if status != PREEMPTED:
      hosts.fail(e, foreseen=text is not None)
    if text is None:
      if hosts.count() == 1:
        raise
      traceback.print_exc()
    else:
      print(text, file=sys.stderr)
    if hosts.count() > 1 and status != PREEMPTED:  # nobody comes to where others are waited for
      hosts.end(status)
  hosts.leave()
  return status


PREEMPTED = 143  # what a shell reports for a process that SIGTERM ended


def explain_end(e: BaseException) -> tuple[int, str | None]:
  """Says with what status a command ends that raised this, and in which line; None of what is no
  mistake of the user's and has a traceback."""
  from opd_jax.errors import ConfigError, one_line
  from opd_jax.files.checkpoint import DamagedError
  from opd_jax.parallel.hosts import HostError
  from opd_jax.run.interrupts import PreemptedError
  if isinstance(e, ConfigError | FloatingPointError | DamagedError | HostError):
    return 2, f'error: {one_line(str(e))}'
  if isinstance(e, OSError):  # a disk that is full, a directory that was removed or is read-only
    plain = f'{e.filename}: {e.strerror}' if e.filename is not None else str(e)
    return 2, f'error: {one_line(" ".join(plain.split()))}'
  if isinstance(e, PreemptedError):
    return PREEMPTED, str(e)
  return 1, None


def run_command(command: str, flags: Any) -> int:
  """Runs a command with its flags; returns the exit status."""
  from opd_jax.parallel import hosts, join
  from opd_jax.run import interrupts
  if set(HOSTS) <= set(COMMANDS[command].flags):
    if start := join.find(flags.coordinator, flags.processes, flags.process):
      join.join(start)
      if not hosts.is_primary():
        sys.stdout = open(os.devnull, 'w')  # one of them speaks to the console
      given = {n: flags[n].value for n in COMMANDS[command].flags if n not in ('config', 'process')}
      hosts.require_same({'command': command, **hosts.versions(), **given, 'config': (
          None if flags.config is None else json.loads(flags.config.to_json()))})
    if command != 'export':  # which computes nothing
      join.require_accelerators()
  from opd_jax import config, experiment, train
  from opd_jax.errors import ConfigError
  from opd_jax.tools import evaluate_model, export, pipeline
  interrupts.raise_again()
  c, given = flags.config, flags.workdir
  if '://' in (given or ''):  # to pathlib, a directory here with the name 'gs:'
    raise ConfigError(f'workdir={given!r}; allowed: a directory, for several hosts one that all of '
                      'them have mounted (docs/pods.md)')
  workdir = pathlib.Path(given or experiment.default_workdir(c))
  if command == 'plan':
    from opd_jax.tools.plan import command as plan
    return 0 if plan.command(experiment.pick_stage(c, flags.stage), flags.topology, flags.models,
                             flags.price, flags.json) else 1
  if command != 'train' and c is not None:  # which keeps them
    c = config.pin(c, workdir, keep=False)
  if command == 'train':
    (pipeline.run if experiment.is_pipeline(c) else train.train)(c, workdir)
    print(f'done: {workdir}')
  elif command == 'report':
    pipeline.write_report(c, workdir)
  elif command == 'doctor':
    return 0 if pipeline.examine(c, flags.stage, workdir) else 1
  elif command == 'diagnose':
    pipeline.measure(c, flags.stage, workdir, write=given is not None)
  elif command == 'export':
    step = export.export(workdir, pathlib.Path(flags.output), flags.format, flags.step,
                         flags.dtype, flags.changed_inputs)
    print(f'step {step}: {flags.output}')
  elif command == 'evaluate':
    evaluate_model.evaluate_model(experiment.pick_stage(c, flags.stage), flags.model,
                                  flags.teacher)
  else:
    raise AssertionError(f'{command} is in COMMANDS and does nothing')
  return 0


if __name__ == '__main__':
  entry()
