"""`opd <command>`: the console. Flags live here and nowhere else.

    opd train --config experiments/quickstart.py [--workdir DIR] [--config.FIELD=VALUE ...]
    opd evaluate --config experiments/quickstart.py --stage opd --model DIR [--teacher DIR]
    opd doctor --config experiments/quickstart.py [--stage opd]
    opd diagnose --config experiments/quickstart.py --stage opd [--workdir DIR]
    opd report --config experiments/dense_vs_rl.py:tiny,seeds=3 --workdir DIR
    opd export --workdir runs/quickstart/seed_0/opd --output DIR [--format adapter] [--step N]
"""

from __future__ import annotations

import logging
import os
import pathlib
import platform
import re
import sys

# glibc hands XLA's per-step buffers back to the kernel and faults them in again; these settings
# keep them. They only work when set before the process starts.
_MALLOC = {'MALLOC_ARENA_MAX': '1', 'MALLOC_MMAP_MAX_': '0',
           'MALLOC_TRIM_THRESHOLD_': str(2**33), 'MALLOC_TOP_PAD_': str(2**28)}
COMMANDS = ('train', 'evaluate', 'doctor', 'diagnose', 'report', 'export')
# Flags that only some commands read; with others they would have no effect.
_ONLY = {'stage': ('evaluate', 'doctor', 'diagnose'),
         'model': ('evaluate',), 'teacher': ('evaluate',), 'output': ('export',),
         'format': ('export',), 'step': ('export',), 'dtype': ('export',),
         'config': ('train', 'evaluate', 'doctor', 'diagnose', 'report')}


def main() -> None:
  """Entry point of the console command."""
  if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
    asked = sys.argv[1:2]
    if asked and asked[0] not in ('-h', '--help'):
      print(f'error: command {asked[0]!r}; allowed: {list(COMMANDS)}', file=sys.stderr)
    print(__doc__, file=sys.stderr)
    sys.exit(0 if asked and asked[0] in ('-h', '--help') else 2)
  keep_allocations()
  # Before anything imports them: they ask for torch, which is not needed, draw a bar for every file
  # and say twice what an error will say.
  for name, value in (('TRANSFORMERS_VERBOSITY', 'error'), ('DATASETS_VERBOSITY', 'critical'),
                      ('HF_DATASETS_DISABLE_PROGRESS_BARS', '1')):
    os.environ.setdefault(name, value)
  from absl import app
  command = sys.argv.pop(1)
  define_flags(command)
  app.run(lambda argv: sys.exit(dispatch(command, argv)), flags_parser=parse_flags)


def keep_allocations() -> None:
  """Starts this process again with `_MALLOC` in its environment: on Linux with glibc, when JAX will
  run on the CPU and the user has set none of them."""
  accelerator = any(pathlib.Path('/dev').glob(p) for p in ('nvidia[0-9]*', 'accel[0-9]*', 'vfio/*'))
  if (platform.libc_ver()[0] != 'glibc' or any(name in os.environ for name in _MALLOC)
      or (accelerator and os.environ.get('JAX_PLATFORMS') != 'cpu')):
    return
  os.environ.update(_MALLOC)
  os.execv(sys.executable, [sys.executable, '-m', 'opd_jax', *sys.argv[1:]])


def define_flags(command: str) -> None:
  """Every flag of every command."""
  from absl import flags
  from ml_collections import config_flags
  config_flags.DEFINE_config_file('config', None, 'Experiment config, FILE or FILE:ARGUMENT.',
                                  lock_config=True)
  flags.DEFINE_string('workdir', None, 'Where the run lives; default: runs/EXPERIMENT.')
  flags.DEFINE_string('stage', None, 'evaluate, doctor, diagnose: the stage of a pipeline.')
  flags.DEFINE_string('model', '', 'evaluate: the Hugging Face directory to evaluate.')
  flags.DEFINE_string('teacher', '', 'evaluate: another, to measure the reverse KL to.')
  flags.DEFINE_string('output', None, 'export: the directory to make.')
  flags.DEFINE_string('format', 'full', "export: 'full' or 'adapter'.")
  flags.DEFINE_string('dtype', '', "export: 'float32' or 'bfloat16'; default: as they are kept.")
  flags.DEFINE_integer('step', -1, 'export: of which checkpoint; -1 for the newest.')
  for name in ('config',) if command in _ONLY['config'] else ('workdir', 'output'):
    flags.mark_flag_as_required(name)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; a mistake in it is one line, not a traceback."""
  from absl import flags
  try:
    rest = flags.FLAGS(argv)
    if flags.FLAGS['config'].value is not None:
      _ = flags.FLAGS.config.name  # a file that cannot be read is noticed only here
    return rest
  except (AttributeError, KeyError):
    print(f'error: {unknown_field(argv)}', file=sys.stderr)
  except OSError as e:
    tried = str(e).partition('Attempted')[2] or str(e)
    print('error: --config: ' + ' '.join(tried.split()), file=sys.stderr)
  except (flags.Error, TypeError, ValueError, ImportError) as e:
    # What a config file itself raises arrives as a traceback in the text.
    print(f"error: {re.split(r'(?:Config|Value|Type)Error: ', str(e).strip())[-1]}",
          file=sys.stderr)
  sys.exit(2)


def unknown_field(argv: list[str]) -> str:
  """Which --config.FIELD of the command line does not exist, and what does in its place."""
  import runpy
  words = [word for flag in argv for word in flag.split('=', 1)]
  words = ['--config' if word == '-config' else word for word in words]
  file, _, argument = words[words.index('--config') + 1].partition(':')
  config = runpy.run_path(file)['get_config'](*filter(None, [argument]))
  for word in words:
    path = word.lstrip('-').split('.')
    here = config
    for i, field in enumerate(path[1:] if path[0] == 'config' else [], 1):
      if field not in here:
        group = '.'.join(path[:i])
        return f'{word}: {group} has no field {field!r}; allowed: {sorted(here)}'
      here = here[field]
  return f'the flags {argv[1:]} cannot be read'


def set_up_jax() -> None:
  """The compilation cache: a second start of the same programs compiles nothing."""
  import jax
  if not jax.config.jax_compilation_cache_dir:
    root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(root) / 'opd_jax' / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  # Libraries narrate every file and every missing backend.
  logging.getLogger().setLevel(logging.WARNING)
  logging.getLogger('absl').setLevel(logging.ERROR)


def dispatch(command: str, argv: list[str]) -> int:
  """Runs a command; returns the exit status. Errors of the user's making are one line."""
  from absl import flags

  from opd_jax import config as config_lib
  if len(argv) > 1:
    print(f'error: unexpected arguments {argv[1:]}', file=sys.stderr)
    return 2
  for name, commands in _ONLY.items():
    if flags.FLAGS[name].present and command not in commands:
      print(f'error: --{name} has no effect with {command!r}; allowed: with {list(commands)}',
            file=sys.stderr)
      return 2
  c, given = flags.FLAGS.config, flags.FLAGS.workdir
  workdir = pathlib.Path(given or pathlib.Path('runs') / c.name)
  set_up_jax()
  from opd_jax import build, checkpoint, export, hf, pipeline, report, train
  try:
    if command == 'train':
      (pipeline.run if config_lib.is_pipeline(c) else train.train)(c, workdir)
      print(f'done: {workdir}')
    elif command == 'report':
      report.write(c, workdir)
    elif command == 'doctor':
      return 0 if pipeline.examine(c, flags.FLAGS.stage, workdir) else 1
    elif command == 'diagnose':
      pipeline.measure(c, flags.FLAGS.stage, workdir, write=given is not None)
    elif command == 'export':
      step = export.export(workdir, pathlib.Path(flags.FLAGS.output), flags.FLAGS.format,
                           flags.FLAGS.step, flags.FLAGS.dtype)
      print(f'step {step}: {flags.FLAGS.output}')
    else:
      build.evaluate_model(pipeline.pick_stage(c, flags.FLAGS.stage), flags.FLAGS.model,
                           flags.FLAGS.teacher)
  except (config_lib.ConfigError, FloatingPointError, checkpoint.DamagedError,
          hf.ExportError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  except train.PreemptedError as e:
    print(e, file=sys.stderr)
    return 143  # what a shell reports for a process that SIGTERM ended
  return 0


if __name__ == '__main__':
  main()
