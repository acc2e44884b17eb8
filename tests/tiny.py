"""Tiny runs, checkpoints and processes that the tests of the loop share.

One shape of model and of batch for nearly every run, so that the compilation cache of the test
session serves most programs after the first run that needs them.

As a script it is the console command with a hold in it, see `_held_command`.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
import contextlib
import functools
import io
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import reuse

from opd_jax import config as config_lib
from opd_jax import models
from opd_jax.algorithm.objective import Objective
from opd_jax.data import prompts as prompts_lib
from opd_jax.data import streams
from opd_jax.files import huggingface
from opd_jax.files import workdir as workdir_lib
from opd_jax.models import params

ROOT = pathlib.Path(__file__).parent.parent
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=100.0,
             tie_word_embeddings=False, max_position_embeddings=32, model_type='qwen3')
KINDS = ('sft', 'sft_teacher', 'grpo', 'opd_sampled', 'opd_exact')
# A child that hangs must not hang the test run, and only that should meet this limit: on a machine
# whose cores many shared, children that were well needed more than five minutes.
PATIENCE_S = 1800


def config(kind: str, **fields: Any) -> ConfigDict:
  """A run of a kind in `KINDS`, of a fresh student and without a teacher's path where it needs one.

  `fields` are set by their dotted name with '__' for the dot: `optimizer__learning_rate=1.0`.
  """
  c = config_lib.default_config()
  c.name, c.steps = kind, 6
  c.student.fresh = ConfigDict(SHAPE)
  c.task = config_lib.task_config(
      'arithmetic', operations=(1,), eval_operations=1, operand_max=2, train_examples=64,
      eval_examples=16, corpus_examples=256, clean=0.0, direct=1.0)
  c.data.prompts_per_step, c.data.max_prompt_tokens, c.data.max_new_tokens = 32, 5, 6
  c.eval.problems, c.eval.samples_per_problem = 16, 2  # the rows of a batch: the same program
  c.checkpoint.every_steps, c.log.transcripts, c.log.plain_every_steps = 3, 1, 1000
  # The rate is part of the compiled update: two of them, so that runs share programs.
  c.optimizer.learning_rate = 1e-2 if kind.startswith('sft') else 1e-3
  if kind in ('sft', 'sft_teacher'):
    c.objective.distill_coef, c.objective.likelihood_coef = 0.0, 1.0
    c.objective.importance = 'none'
    c.data.source, c.data.split = ('dataset', 'corpus') if kind == 'sft' else ('teacher', 'train')
  elif kind == 'grpo':
    c.data.prompts_per_step, c.data.samples_per_prompt = 8, 4
    c.objective.distill_coef, c.objective.reward_coef = 0.0, 1.0
    c.objective.reward_baseline = 'group_mean_std'
    c.objective.importance = 'ppo_clip(0.2)'
  elif kind == 'opd_exact':
    c.objective.route, c.objective.support, c.objective.importance = 'direct', 'full', 'none'
  else:
    assert kind == 'opd_sampled', kind
  if kind == 'sft_teacher' or kind.startswith('opd'):
    c.teacher.kind = 'checkpoint'
  override(c, **fields)
  if c.student.path or c.student.factory:  # then nothing reads it
    c.student.fresh = config_lib.default_config().student.fresh
  return c


def override(c: ConfigDict, **fields: Any) -> ConfigDict:
  """Sets fields named with '__' for the dot."""
  for name, value in fields.items():
    *groups, last = name.split('__')
    setattr(functools.reduce(lambda group, part: group[part], groups, c), last, value)
  return c


def with_models(kind: str, **fields: Any) -> ConfigDict:
  """`config` from the trained student, with the trained teacher where the kind has one."""
  c = config(kind, student__path=str(student()))
  if c.teacher.kind == 'checkpoint':
    c.teacher.path = str(teacher())
  return override(c, **fields)


def objective_of(c: ConfigDict, source: str = '') -> Objective:
  """The objective of a config for rows that `source` writes; '' for the config's own."""
  run = config_lib.parse(c)
  return streams.objective_of(run, source or run.data.source)


@functools.cache
def folder() -> pathlib.Path:
  """A directory for what several tests use, removed when the tests end."""
  path = pathlib.Path(tempfile.mkdtemp(prefix='opd_jax_tests_'))
  atexit.register(shutil.rmtree, path, ignore_errors=True)
  return path


def _trained(name: str, steps: int) -> pathlib.Path:
  workdir = folder() / name
  with contextlib.redirect_stdout(io.StringIO()):
    reuse.train(config('sft', name=name, steps=steps, checkpoint__every_steps=steps), workdir)
  return workdir / workdir_lib.EXPORT


@functools.cache
def student() -> pathlib.Path:
  """A model that gets some problems right."""
  return _trained('student', 60)


@functools.cache
def teacher() -> pathlib.Path:
  """One that gets more of them right, of the same shape."""
  return _trained('teacher', 250)


def write_model(path: pathlib.Path, seed: int = 0, alphabet: str = prompts_lib.ALPHABET,
                **shape: Any) -> pathlib.Path:
  """A Hugging Face directory with random weights."""
  characters = prompts_lib.character_tokenizer(alphabet)
  model = models.build({**SHAPE, 'vocab_size': len(characters), **shape})
  values = jax.device_get(params.init_params(model.specs, jax.random.key(seed)))
  huggingface.write_checkpoint(path, model, values, characters)
  return path


# A template like those of today's models: a switch for thinking, turns that end with a token of
# their own, and a system message only where there is one.
CHAT = (
    "{%- for m in messages %}{{ '<|turn|>' + m['role'] + '\\n' + m['content'] + '<|over|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '<|quiet|>' }}{%- endif %}"
    "{%- endif %}")


def chat_tokenizer(template: str | None = CHAT, bos: bool = False) -> Any:
  """A byte-level BPE tokenizer of 280 learned tokens, and special tokens above them: what ends a
  turn is not EOS. With `bos` it puts one before every text that it encodes by itself."""
  import tokenizers
  import transformers
  inner = tokenizers.Tokenizer(tokenizers.models.BPE())
  inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = tokenizers.decoders.ByteLevel()
  inner.train_from_iterator(
      ['What is nine plus five? user assistant system answer is 0 1 2 3 4'] * 4,
      tokenizers.trainers.BpeTrainer(
          vocab_size=280, show_progress=False,
          initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  inner.add_special_tokens(['<|end|>', '<|begin|>', '<|turn|>', '<|over|>', '<|quiet|>'])
  if bos:
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single='<|begin|> $A', special_tokens=[('<|begin|>', inner.token_to_id('<|begin|>'))])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner, eos_token='<|end|>', bos_token='<|begin|>', chat_template=template,
      clean_up_tokenization_spaces=False)


def write_chat_model(path: pathlib.Path, seed: int = 0, template: str | None = CHAT,
                     bos: bool = False, **shape: Any) -> pathlib.Path:
  """Random weights with `chat_tokenizer`: a padded vocabulary, and a generation_config.json that
  ends turns too."""
  from conftest import sharp_params
  tokens = chat_tokenizer(template, bos)
  model = models.build({**SHAPE, 'vocab_size': 320, 'max_position_embeddings': 128, **shape})
  huggingface.write_checkpoint(path, model, sharp_params(model, seed), tokens)
  ends = tokens.convert_tokens_to_ids(['<|over|>', '<|end|>'])
  (path / 'generation_config.json').write_text(json.dumps({'eos_token_id': ends}))
  return path


def write_jsonl(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
  """One row a line."""
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def rows(workdir: pathlib.Path, kind: str | None = None, timing: bool = True
         ) -> list[dict[str, Any]]:
  """metrics.jsonl, strictly; without 'perf', which is of the process, where timing=False."""
  out = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  out = [r for r in out if kind in (None, r['kind'])]
  return out if timing else [{k: v for k, v in r.items() if k != 'perf'} for r in out]


def stamps(workdir: pathlib.Path) -> dict[pathlib.Path, int]:
  """When each file of a directory was last written, hidden ones left out."""
  return {p: p.stat().st_mtime_ns for p in workdir.rglob('*')
          if p.is_file() and not p.name.startswith('.')}


def checkpoint_steps(workdir: pathlib.Path) -> list[int]:
  """The steps whose checkpoint has its final name."""
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit())


def read_checkpoint(workdir: pathlib.Path, step: int) -> dict[str, Any]:
  """Every array of a checkpoint by path, read with orbax alone, and the host item under 'host'."""
  import orbax.checkpoint as ocp
  path = workdir.resolve() / 'checkpoints' / str(step)
  reader, here = ocp.StandardCheckpointer(), jax.sharding.SingleDeviceSharding(jax.devices()[0])
  tree = reader.restore(path / 'state', jax.tree.map(  # on however many devices it was written
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
      reader.metadata(path / 'state').item_metadata.tree))
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  assert len(leaves) > 10, 'a checkpoint without parameters compares equal to anything'
  out = {jax.tree_util.keystr(where): np.asarray(leaf) for where, leaf in leaves}
  return out | {'host': json.loads((path / 'host' / 'metadata').read_text())}


def assert_same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
  """Two results of `read_checkpoint` are equal, bit for bit."""
  assert a.keys() == b.keys()
  assert a['host'] == b['host']
  for name in a.keys() - {'host'}:
    assert a[name].dtype == b[name].dtype, name
    # Bytes, not ==: NaN would differ from itself, and 0.0 would equal -0.0.
    assert a[name].tobytes() == b[name].tobytes(), name


def load_export(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """The parameters of a run's final model by path."""
  return params.flatten(huggingface.load(workdir / workdir_lib.EXPORT, {}).read())


def write_config(path: pathlib.Path, c: ConfigDict) -> pathlib.Path:
  """A config file whose get_config returns `c`."""
  # ConfigDict's own JSON loses tuples, so the values are written as Python.
  path.write_text(f'''from ml_collections import ConfigDict

VALUES = {c.to_dict()!r}


def get_config():
  return ConfigDict(VALUES)
''')
  return path


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
  """For child processes, with so many CPU devices. The rest, conftest.py has put into the
  environment of all."""
  out = dict(os.environ, JAX_NUMPY_RANK_PROMOTION='raise',
             MALLOC_ARENA_MAX='1')  # set by the user: the launcher leaves the allocator alone
  out['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [out.get('PYTHONPATH')])])
  out['XLA_FLAGS'] += f' --xla_force_host_platform_device_count={devices}'
  return out | extra


def opd(*args: Any, cwd: pathlib.Path, **extra: str) -> subprocess.CompletedProcess[str]:
  """Runs `python -m opd_jax` to its end."""
  return subprocess.run([sys.executable, '-m', 'opd_jax', *map(str, args)], cwd=cwd, text=True,
                        capture_output=True, timeout=PATIENCE_S, env=environment(**extra))


def wait_until(condition: Callable[[], bool]) -> None:
  """Polls until it holds."""
  deadline = time.monotonic() + PATIENCE_S
  while not condition():
    assert time.monotonic() < deadline, 'waited in vain'
    time.sleep(0.02)


class Held:
  """A console command in a process of its own that stops at a chosen point and waits there.

  As a context manager it kills the process at the end, whatever happened.
  """

  def __init__(self, where: str, *args: Any, cwd: pathlib.Path, prefix: tuple[str, ...] = ()):
    """`prefix` is a command that runs the command."""
    self._marker = cwd / 'held'
    self.process = subprocess.Popen(
        [*prefix, sys.executable, str(ROOT / 'tests' / 'tiny.py'), where, str(self._marker),
         *map(str, args)],
        cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())

  def __enter__(self) -> Held:
    wait_until(lambda: self._marker.exists() or self.process.poll() is not None)
    if not self._marker.exists():
      out, err = self.process.communicate()
      raise AssertionError(f'never came to the hold: {out[-2000:]}{err[-4000:]}')
    return self

  def release(self) -> None:
    """Lets it go on."""
    self._marker.unlink()

  def finish(self) -> tuple[int, str, str]:
    """Waits for the end; (exit status, stdout, stderr)."""
    out, err = self.process.communicate(timeout=PATIENCE_S)
    return self.process.returncode, out, err

  def __exit__(self, *exc: Any) -> None:
    if self.process.poll() is None:
      self.process.kill()
    self.process.communicate()


def _held_command() -> None:
  """`python tiny.py WHERE MARKER COMMAND...`: runs COMMAND with `hold_at`."""
  signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal: nohup has it ignored
  hold_at(sys.argv[1], pathlib.Path(sys.argv[2]))
  del sys.argv[1:3]
  from opd_jax import __main__
  __main__.entry()


def hold_at(where: str, marker: pathlib.Path) -> None:
  """Lets this process, on reaching a place, create `marker` and wait until it is gone. The place is
  'row:N' (the metrics of step N have just been written), 'commit:N' (the checkpoint of step N is
  complete but for its final name) or 'answers:N' (the teacher has written the N-th block that this
  process has it write)."""
  what, step = where.split(':')

  def hold():
    marker.touch()
    while marker.exists():
      time.sleep(0.01)

  if what == 'row':
    from opd_jax.run import metrics
    write = metrics.Writer.write

    def held_write(self, kind, at, values):
      write(self, kind, at, values)
      if (kind, at) == ('train', int(step)):
        hold()

    metrics.Writer.write = held_write
  elif what == 'answers':
    from opd_jax.files import answers
    write_answers, numbers = answers.write, itertools.count(1)

    def held_answers(*args):
      write_answers(*args)
      if next(numbers) == int(step):
        hold()

    answers.write = held_answers
  else:
    rename = os.rename

    def held_rename(source, target, **options):
      if pathlib.Path(target).parts[-2:] == ('checkpoints', step):
        hold()
      rename(source, target, **options)

    os.rename = held_rename


if __name__ == '__main__':
  _held_command()
