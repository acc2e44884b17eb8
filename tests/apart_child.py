"""Runs with a teacher on devices of its own, for the child of test_apart.py."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict
import tiny

from opd_jax import config, train

# Eight rows a device, and four in each of two parts: with AVX-512, a product with 56 tokens or more
# (these are 40 when prompts are read) has other last bits than one with fewer.
ROWS = dict(data__prompts_per_step=16)
APART = dict(compute__mesh__fsdp=2, compute__teacher_devices=2, compute__teacher_mesh__tensor=2,
             compute__teacher_mesh__fsdp=1, compute__microbatch_rows=4)
WIDE = dict(compute__mesh__fsdp=2, compute__mesh__data=2, compute__microbatch_rows=4)


def configs() -> dict[str, ConfigDict]:
  """The runs by name: each objective with the teacher beside the student, apart, and in parts."""
  out = {}
  for name, kind, fields in (
      ('sampled', 'opd_sampled', {}), ('exact', 'opd_exact', {}),
      ('top_k', 'opd_exact', {'objective__support': 'teacher_top_k(2, tail="bucket")'})):
    for how, compute in (('beside', WIDE), ('apart', APART),
                         ('parts', {**APART, 'compute__pipeline_parts': 2})):
      out[f'{name}_{how}'] = tiny.with_models(kind, **fields, **compute, **ROWS)
  out['teacher_writes'] = tiny.with_models('sft_teacher', **APART)
  return out


def run(folder: str, values: str) -> None:
  """Runs them all."""
  for name, c in json.loads(values).items():
    train.train(config.from_dict(c), pathlib.Path(folder) / name)


def as_json() -> dict[str, Any]:
  """The configs, for the child."""
  return {name: config.to_dict(c) for name, c in configs().items()}
