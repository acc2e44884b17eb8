"""How much memory a run takes on a device, from shapes."""

from __future__ import annotations

import math
import os

import jax
import numpy as np

from opd_jax.build import Parts
from opd_jax.doctor.finding import FAIL, OK, WARN, Finding
from opd_jax.models import params as params_lib
from opd_jax.parallel import sharding
from opd_jax.settings import Run

GIB = 2**30


def check_memory(run: Run, parts: Parts) -> Finding:
  """Compares bytes a device, by what holds them, with what it has."""
  sizes = memory_estimate(run, parts)
  total, limit = sum(sizes.values()), device_bytes()
  fitted = sizes['activations'] + sizes['scores']  # no reason to refuse a run that may just fit
  detail = ' + '.join(f'{name} {size / GIB:.2f}' for name, size in sizes.items())
  detail = f'{detail} = {total / GIB:.2f} GiB a device ({run.compute.dtype})'
  if limit is None:
    return Finding('memory', WARN, detail + '; the device does not say how much it has')
  detail += f' of {limit / GIB:.1f}'
  if total - fitted / 2 > limit:
    return Finding('memory', FAIL, detail + '; allowed: less, by compute.microbatch_rows, '
                   'compute.chunk_tokens, compute.remat, compute.frozen_dtype, compute.mesh or '
                   'student.lora', 'compute.microbatch_rows')
  return Finding('memory', OK if total < 0.9 * limit else WARN, detail, 'compute.microbatch_rows')


def memory_estimate(run: Run, parts: Parts) -> dict[str, float]:
  """Estimates bytes on one device: weights and moments exactly, the rest from shapes.

  Activations, for the rows of one pass: what each layer keeps for its backward pass, about 16
  widths a token (2 with compute.remat), in the compute dtype. Scores: attention's float32 [rows,
  heads, T, T], 3 a layer for the backward pass (none with compute.remat) and 5 in the layer at
  work. Both are fits to what XLA allocated, good to about a fifth.
  """
  def weights(specs, bytes_each):
    shardings = params_lib.flatten(sharding.param_shardings(specs, parts.mesh))
    return bytes_each * sum(math.prod(shardings[name].shard_shape(spec.shape))
                            for name, spec in params_lib.flatten(specs).items())

  moments = {'adamw': 8, 'sgd': 4 if run.optimizer.b1 else 0}[run.optimizer.name]
  out = {'trained (weights, gradient, moments)': weights(parts.trained_specs, 8 + moments)}
  if parts.adapter is not None:
    out['base'] = weights(parts.student.model.specs, parts.frozen_dtype.itemsize)
  for part in ('teacher', 'reference'):
    loaded = getattr(parts, part)
    itself = loaded is parts.student
    if loaded is not None and not (itself and parts.adapter is not None):  # that shares its base
      out[part] = weights(loaded.model.specs, 4 if itself else parts.frozen_dtype.itemsize)
  shards = sharding.row_shards(parts.mesh)
  rows = run.data.prompts_per_step * run.data.samples_per_prompt
  length = run.data.max_prompt_tokens + run.data.max_new_tokens
  author = parts.teacher if run.data.source == 'teacher' else parts.student

  def cache(model, rows):
    shapes = jax.eval_shape(lambda: model.init_cache(rows, length))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes)) / shards

  # Never at the same time: the run's rows, and those of an evaluation.
  out['cache'] = max(cache(parts.student.model, len(parts.held_out) * run.eval.samples_per_problem),
                     (cache(author.model, rows) if run.data.source != 'dataset' else 0.0)
                     + (cache(parts.teacher.model, rows) if run.sample.teacher_mix else 0.0))
  width = 4 * parts.student.model.config.vocab_size / parts.mesh.shape['tensor']
  out['logits'] = 4 * min(run.compute.chunk_tokens, rows * length) * width
  a_pass = (run.compute.microbatch_rows or rows) * length / shards
  specs = params_lib.flatten(parts.student.model.specs)
  layers = parts.student.model.config.num_hidden_layers
  hidden = max((spec.shape[-1] for name, spec in specs.items() if name.endswith('norm')), default=0)
  keep = 2 if run.compute.remat else 16
  out['activations'] = a_pass * hidden * layers * keep * np.dtype(run.compute.dtype).itemsize
  heads = getattr(parts.student.model.config, 'num_attention_heads', 1) / parts.mesh.shape['tensor']
  out['scores'] = 4 * a_pass * length * heads * (5 if run.compute.remat else 5 + 3 * layers)
  return out


def device_bytes() -> float | None:
  """Reads the memory of one device; on CPUs, the machine's, shared by all fake devices."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() if device.platform != 'cpu' else None
  if stats and 'bytes_limit' in stats:
    return float(stats['bytes_limit'])
  if device.platform == 'cpu':
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / jax.local_device_count()
  return None
