"""Host memory while a checkpoint is read and written, on one device and on four.

    python benchmarks/import_memory.py

Writes a bfloat16 checkpoint of more than 2 GiB in several files to a temporary folder, and reads it
as float32 in a fresh process each: on one CPU device, and on four (fsdp=2, tensor=2). Printed are
the peak of anonymous memory (RssAnon, sampled) above what the process had before it read a weight,
and what is promised: the parameters of the local devices, which for CPU devices lie in host memory
too, and one tensor. Mapped pages of the file (RssFile), which the kernel can drop at any time, are
printed apart. Then the parameters are exported again, as float32; what that takes above the
parameters is printed last. Linux only. About two minutes and 6 GiB of memory.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import models
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface
from opd_jax.models import params
from opd_jax.parallel import sharding

CONFIG = dict(
    model_type='qwen3', vocab_size=32768, hidden_size=2048, intermediate_size=8192,
    num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False, max_position_embeddings=4096)
MESHES = {1: dict(data=1, fsdp=1, tensor=1, expert=1), 4: dict(data=1, fsdp=2, tensor=2, expert=1)}
MIB = 2**20
SAMPLE_S = 0.005


def make(path: pathlib.Path) -> None:
  """Writes the checkpoint, from arrays that take no memory."""
  model = models.build(CONFIG)
  values = {name: np.broadcast_to(np.float32(1 / (i + 2)), spec.shape)
            for i, (name, spec) in enumerate(params.flatten(model.specs).items())}
  huggingface.write_checkpoint(path, model, params.unflatten(values),
                               prompts_lib.character_tokenizer(),
                               dtype=jnp.bfloat16, max_shard_bytes=2**29)


def memory() -> dict[str, int]:
  """RssAnon and RssFile of this process, in bytes."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  fields = dict(line.split(':', 1) for line in lines)
  return {name: int(fields[name].split()[0]) * 1024 for name in ('RssAnon', 'RssFile')}


def peak_during(work: Callable[[], Any]) -> tuple[Any, dict[str, int], float]:
  """Result of `work`, the most memory above what there was before, and the seconds it took."""
  before = peak = memory()
  done = threading.Event()

  def sample():
    nonlocal peak
    while not done.wait(SAMPLE_S):
      now = memory()
      peak = {name: max(peak[name], now[name]) for name in now}

  thread = threading.Thread(target=sample)
  thread.start()
  began = time.perf_counter()
  result = work()
  seconds = time.perf_counter() - began
  done.set()
  thread.join()
  return result, {name: peak[name] - before[name] for name in peak}, seconds


def measure(path: str, devices: int) -> dict[str, float]:
  """Reads the checkpoint, and returns sizes in MiB and the time in seconds."""
  mesh = sharding.make_mesh(MESHES[devices])
  loaded = huggingface.load(path, {'dtype': jnp.float32})
  shardings = sharding.param_shardings(loaded.model.specs, mesh)
  for device in jax.devices():
    jax.device_put(0, device).block_until_ready()  # whatever starts up, starts up now
  values, peak, seconds = peak_during(lambda: loaded.read(shardings=shardings))
  _, export, _ = peak_during(lambda: huggingface.write_checkpoint(
      f'{path}_{devices}', loaded.model, values, loaded.tokenizer))
  leaves = jax.tree.leaves(values)
  shards = sum(s.data.nbytes for x in leaves for s in x.addressable_shards)
  stored = huggingface.find_tensors(path).values()
  largest = max(int(np.prod(t.shape)) * 2 for t in stored)
  return {
      'devices': devices, 'file': sum(int(np.prod(t.shape)) * 2 for t in stored) / MIB,
      'local_shards': shards / MIB, 'largest_tensor': largest / MIB,
      'promised': (shards + largest) / MIB,
      'peak_anonymous': peak['RssAnon'] / MIB, 'peak_mapped': peak['RssFile'] / MIB,
      'seconds': seconds, 'export_peak_anonymous': export['RssAnon'] / MIB}


def main() -> None:
  """Makes the checkpoint and measures each number of devices in a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'model'
    make(path)
    for devices in MESHES:
      flags = f'--xla_force_host_platform_device_count={devices}'
      env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags,
             'TRANSFORMERS_VERBOSITY': 'error'}
      out = subprocess.run([sys.executable, __file__, str(path), str(devices)], env=env, check=True,
                           capture_output=True, text=True).stdout
      row = json.loads(out.splitlines()[-1])
      print('  '.join(f'{k} {v:.0f} MiB' if k not in ('devices', 'seconds') else f'{k} {v:.1f}'
                      for k, v in row.items()), flush=True)


if __name__ == '__main__':
  if len(sys.argv) == 3:
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
  else:
    main()
