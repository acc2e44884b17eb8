"""Import, on-policy distillation and export at the size of Qwen3-0.6B, as a user runs them.

    python benchmarks/real_size.py

Makes two checkpoints of random weights (bfloat16, Qwen3-0.6B's config.json figures, a tokenizer of
151669 tokens with a chat template, 1.2 GB each) in a temporary folder, runs `opd doctor`, then `opd
train` (rank-32 adapters, exact full-vocabulary reverse KL, 2 steps of 4 x 48 tokens) and `opd
export` on them, each in a process of its own, and prints wall time and peak memory of each. From
random weights nothing is learned: this is about sizes.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tokenizers
from tokenizers import decoders, pre_tokenizers
import transformers

from opd_jax import models
from opd_jax.files import huggingface
from opd_jax.models import params

ROOT = pathlib.Path(__file__).resolve().parent.parent
QWEN3_06B = dict(
    model_type='qwen3', vocab_size=151936, hidden_size=1024, intermediate_size=3072,
    num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, max_position_embeddings=40960)
TOKENS = 151669  # so that the vocabulary is padded, as the original's is
STEPS = 2
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """Bytes, and made-up words that no text has, up to TOKENS."""
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = [f'word{i}' for i in range(TOKENS - len(special) - len(letters))]
  vocab = {t: i for i, t in enumerate([*letters, *words, *special])}
  inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[]))
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  out = transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner, eos_token='<|im_end|>', pad_token='<|endoftext|>',
      additional_special_tokens=['<|im_start|>'])
  out.chat_template = TEMPLATE
  return out


def make_checkpoint(path: pathlib.Path, seed: int) -> None:
  """Random weights, wide enough that the next token is not uniform."""
  model = models.build(QWEN3_06B, vocab_in_use=TOKENS)
  rng, values = np.random.default_rng(seed), {}
  for name, spec in params.flatten(model.specs).items():
    if len(spec.hf_shape) == 1:
      values[name] = np.ones(spec.shape, ml_dtypes.bfloat16)
    else:
      std = 3.0 if name == 'embed' else 1.0
      draw = rng.standard_normal(spec.shape, np.float32)
      values[name] = (draw * (std * spec.hf_shape[-1]**-0.5)).astype(ml_dtypes.bfloat16)
  huggingface.write_checkpoint(path, model, params.unflatten(values), make_tokenizer())


def run(name: str, *command: object) -> None:
  """Runs `opd` and prints its wall time and peak resident memory."""
  start = time.perf_counter()
  process = subprocess.Popen([sys.executable, '-m', 'opd_jax', *map(str, command)],
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  text = process.stdout.read()
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  print(text)
  print(f'== {name}: exit {process.returncode}, {time.perf_counter() - start:.0f} s, peak '
        f'{usage.ru_maxrss / 2**20:.1f} GiB', flush=True)
  if process.returncode:
    sys.exit(process.returncode)


def main() -> None:
  """Everything, in a folder that is removed at the end."""
  jax.config.update('jax_platforms', 'cpu')
  assert jnp.zeros(1).devices()
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    start = time.perf_counter()
    for seed, name in enumerate(('student', 'teacher')):
      make_checkpoint(folder / name, seed)
    (folder / 'prompts.jsonl').write_text(''.join(
        json.dumps({'problem': f'What is {a} + {b}?', 'answer': str(a + b)}) + '\n'
        for a in range(8) for b in range(8)))
    print(f'== two checkpoints made in {time.perf_counter() - start:.0f} s', flush=True)
    experiment = ROOT / 'experiments' / 'checkpoints.py'
    config = ['--config', experiment, *(f'--config.{flag}' for flag in (
        f'student.path={folder / "student"}', f'teacher.path={folder / "teacher"}',
        f'task.options.source={folder / "prompts.jsonl"}', 'task.options.holdout_examples=4',
        f'steps={STEPS}', 'data.prompts_per_step=4', 'data.max_prompt_tokens=64',
        'data.max_new_tokens=48', 'eval.problems=2', 'eval.samples_per_problem=1', 'eval.pass_k=1',
        'compute.microbatch_rows=2', 'compute.chunk_tokens=64', 'doctor.rollouts=2',
        'optimizer.warmup_steps=0', 'doctor.max_reverse_kl=30.0'))]
    run('opd doctor', 'doctor', *config)
    run(f'opd train, {STEPS} steps', 'train', *config, '--workdir', folder / 'run')
    run('opd export', 'export', '--workdir', folder / 'run', '--output', folder / 'out')
    files = sorted((folder / 'out').iterdir())
    print({f.name: f.stat().st_size for f in files})


if __name__ == '__main__':
  main()
