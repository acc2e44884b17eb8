"""Whole inputs for fuzz_inputs.py to damage, each made once in a process: models, configs, a work
directory. Their configs let commands read everything and compute nothing."""

from __future__ import annotations

import contextlib
import functools
import io
import pathlib
import runpy
from typing import Any

import conftest
import jax
from ml_collections import ConfigDict
import numpy as np
import tiny

from opd_jax import experiment, models
from opd_jax.data import prompts as prompts_lib
from opd_jax.doctor.examine import ROLLOUTS
from opd_jax.files import huggingface, peft
from opd_jax.models import lora, params
from opd_jax.tools import pipeline


def _settings(kind: str, **fields: Any) -> ConfigDict:
  """A config whose checks compute nothing."""
  c = tiny.config(kind, steps=2, checkpoint__every_steps=1, eval__problems=2, **fields)
  for name in ROLLOUTS:
    c.doctor[name] = 'off: only reading is looked at'
  return c


@functools.cache
def base() -> pathlib.Path:
  """The folder of all of them."""
  path = tiny.folder() / 'fuzz'
  path.mkdir(exist_ok=True)
  return path


@functools.cache
def config_file(name: str) -> str:
  """The path of a config file: 'plain', 'chat' or 'rows' for one run, 'pipe' for a pipeline."""
  if name == 'chat':
    c = _settings('sft_teacher', data__max_prompt_tokens=1000, data__max_new_tokens=8,
                  student__path=str(model('chat')), teacher__path=str(model('chat')),
                  prompt__template='student')
    c.doctor.templates = c.doctor.truncation = 'off: no matter'
  elif name == 'pipe':
    c = experiment.default_pipeline()
    c.stages = ConfigDict(dict(first=_settings('sft', student__path=str(model('plain')),
                                               student__lora__rank=2)))
    c.order, c.report.methods, c.report.labels = ('first',), ('first',), ('first',)
  else:
    c = _settings('sft', student__path=str(model('plain')))
  return str(tiny.write_config(base() / f'{name}.py', c))


@functools.cache
def model(name: str) -> pathlib.Path:
  """A model's directory: 'plain', 'chat', 'nan', 'shards', 'half', 'adapter' or a family."""
  path = base() / f'model_{name}'
  if name == 'chat':
    return tiny.write_chat_model(path, max_position_embeddings=1024)
  if name in models.names():
    made, alphabet = models.build(conftest.family_config(
        name, conftest.ways_to_tie(name)[0])), prompts_lib.ALPHABET
    huggingface.write_checkpoint(path, made, conftest.sharp_params(made),
                                 prompts_lib.character_tokenizer(alphabet))
    return path
  tokens = prompts_lib.character_tokenizer()
  made = models.build({**tiny.SHAPE, 'vocab_size': len(tokens), 'num_hidden_layers': 1})
  values = conftest.sharp_params(made)
  if name == 'adapter':
    settings = lora.Settings(rank=2, alpha=4.0)
    fresh = params.init_params(lora.adapter_specs(made.specs, settings), jax.random.key(0))
    peft.write_adapter(path, made, fresh, settings, tokens, str(model('plain')))
    return path
  huggingface.write_checkpoint(
      path, made, values, tokens, dtype='bfloat16' if name == 'half' else 'float32',
      max_shard_bytes=12_000 if name == 'shards' else 2**30)
  if name == 'nan':
    file = path / huggingface.WEIGHTS
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    file.write_bytes(data)
  return path


@functools.cache
def workdir() -> pathlib.Path:
  """A pipeline of one finished run with adapters, as `opd train` leaves it."""
  path = base() / 'workdir'
  with contextlib.redirect_stdout(io.StringIO()):
    pipeline.run(read(config_file('pipe')), path)
  return path


def read(file: str) -> ConfigDict:
  """Reads the config of a file."""
  return runpy.run_path(file)['get_config']()
