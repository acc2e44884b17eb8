"""Makes tests/data/qwen3_reference.npz: logits of transformers' Qwen3ForCausalLM, for the check
that runs without torch (test_parity.py). In an environment with the `parity` extra:

    python tests/make_reference.py

Weights and tokens are not stored: `tensors` and `inputs` make them again from NumPy's legacy
generator, whose streams are frozen. The names and shapes are those of transformers' own state dict,
written out, so that they do not come from the table under test.
"""

from __future__ import annotations

import pathlib
import tempfile

import numpy as np

FILE = pathlib.Path(__file__).parent / 'data' / 'qwen3_reference.npz'

_COMMON = dict(
    model_type='qwen3', vocab_size=40, hidden_size=24, intermediate_size=28, num_hidden_layers=3,
    rms_norm_eps=1e-6, max_position_embeddings=64, hidden_act='silu', attention_bias=False)
# Grouped queries with an untied head; one key head and a tied embedding, with another theta.
CONFIGS = {
    'grouped_untied': dict(
        _COMMON, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
        tie_word_embeddings=False, rope_parameters=dict(rope_type='default', rope_theta=1e4)),
    'single_tied': dict(
        _COMMON, num_attention_heads=3, num_key_value_heads=1, head_dim=12,
        tie_word_embeddings=True, rope_parameters=dict(rope_type='default', rope_theta=50.0)),
}


def tensors(config: dict) -> dict[str, np.ndarray]:
  """A checkpoint's tensors by their Hugging Face names, float32, from a fixed seed."""
  d, f, v = config['hidden_size'], config['intermediate_size'], config['vocab_size']
  n, k, h = config['num_attention_heads'], config['num_key_value_heads'], config['head_dim']
  shapes = {'model.embed_tokens.weight': (v, d)}
  for i in range(config['num_hidden_layers']):
    layer = {
        'input_layernorm': (d,), 'self_attn.q_proj': (n * h, d), 'self_attn.k_proj': (k * h, d),
        'self_attn.v_proj': (k * h, d), 'self_attn.o_proj': (d, n * h), 'self_attn.q_norm': (h,),
        'self_attn.k_norm': (h,), 'post_attention_layernorm': (d,), 'mlp.gate_proj': (f, d),
        'mlp.up_proj': (f, d), 'mlp.down_proj': (d, f)}
    shapes |= {f'model.layers.{i}.{name}.weight': shape for name, shape in layer.items()}
  shapes['model.norm.weight'] = (d,)
  if not config['tie_word_embeddings']:
    shapes['lm_head.weight'] = (v, d)
  rng = np.random.RandomState(0)
  out = {}
  for name, shape in shapes.items():
    x = rng.standard_normal(shape)
    # Gains away from 1, and matrices large enough that every layer shows in the logits.
    out[name] = (1 + 0.3 * x if len(shape) == 1 else 1.5 * x / shape[1]**0.5).astype(np.float32)
  return out


def inputs() -> tuple[np.ndarray, np.ndarray]:
  """Tokens int32 [3, 12] and valid bool [3, 12]: no, some and much padding on the left."""
  tokens = np.random.RandomState(1).randint(0, 40, (3, 12)).astype(np.int32)
  valid = np.arange(12)[None] >= np.array([[0], [3], [9]])
  return tokens, valid


def main() -> None:
  """Writes FILE."""
  from safetensors.numpy import save_file
  import torch
  import transformers

  tokens, valid = inputs()
  logits = {}
  for name, config in CONFIGS.items():
    with tempfile.TemporaryDirectory() as folder:
      save_file(tensors(config), f'{folder}/model.safetensors', metadata={'format': 'pt'})
      transformers.Qwen3Config(**config).save_pretrained(folder)
      model, report = transformers.Qwen3ForCausalLM.from_pretrained(
          folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True)
    if report['missing_keys'] or report['unexpected_keys'] or report['mismatched_keys']:
      raise ValueError(f'{name}: {report}')
    with torch.no_grad():
      logits[name] = model(input_ids=torch.tensor(tokens).long(),
                           attention_mask=torch.tensor(valid).long()).logits.numpy()
  FILE.parent.mkdir(exist_ok=True)
  versions = f'transformers {transformers.__version__}, torch {torch.__version__}'
  np.savez_compressed(FILE, made_by=versions, **logits)
  print(f'{FILE}: {FILE.stat().st_size} bytes, {versions}')


if __name__ == '__main__':
  main()
