"""Makes tests/references/<family>_reference.npz: logits of transformers' own models, for the check
that runs without torch (test_parity.py). In an environment with the `parity` extra:

    python tests/make_reference.py [family ...]

Weights and tokens are not stored: `tensors` and `inputs` make them again from NumPy's legacy
generator, whose streams are frozen. The names and shapes of the tensors are those that transformers
itself writes into a checkpoint, so that they do not come from the table under test.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / 'references'

_COMMON = dict(
    vocab_size=64, hidden_size=24, intermediate_size=28, num_hidden_layers=3, rms_norm_eps=1e-6,
    max_position_embeddings=64)
# Head width times heads is above, equal to and below the model width.
_GROUPED = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8)
_FULL = dict(num_attention_heads=4, num_key_value_heads=4, head_dim=6)
_SINGLE = dict(num_attention_heads=3, num_key_value_heads=1, head_dim=6)
_UNTIED, _TIED = dict(tie_word_embeddings=False), dict(tie_word_embeddings=True)


def _rope(theta: float, **more: Any) -> dict[str, Any]:
  return {'rope_parameters': dict(dict(rope_type='default', rope_theta=theta), **more)}


_LLAMA3 = dict(rope_type='llama3', factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16)
_EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12)
_GEMMA3 = dict(sliding_window=5, query_pre_attn_scalar=10)

# What to try of each family. One without an entry is tried at transformers' defaults.
VARIANTS = {
    'qwen3': {
        'grouped_untied': dict(**_GROUPED, **_UNTIED, **_rope(1e4)),
        'full_tied': dict(**_FULL, **_TIED, **_rope(500.0)),
        'single_tied': dict(**_SINGLE, **_TIED, **_rope(50.0))},
    'qwen2': {
        'grouped_untied': dict(**_GROUPED, **_UNTIED, **_rope(1e4)),
        'derived_head_dim_tied': dict(
            num_attention_heads=4, num_key_value_heads=2, **_TIED, **_rope(50.0))},
    'llama': {
        'plain_tied': dict(num_attention_heads=4, num_key_value_heads=4, **_TIED, **_rope(50.0)),
        'linear_untied': dict(**_SINGLE, **_UNTIED, **_rope(50.0, rope_type='linear', factor=3.0)),
        'llama3_untied': dict(**_GROUPED, **_UNTIED, **_rope(50.0, **_LLAMA3))},
    'mistral': {
        'window_untied': dict(sliding_window=5, **_GROUPED, **_UNTIED, **_rope(1e4)),
        'everything_tied': dict(sliding_window=None, **_SINGLE, **_TIED, **_rope(50.0))},
    'qwen3_moe': {
        'grouped_untied': dict(norm_topk_prob=True, **_EXPERTS, **_GROUPED, **_UNTIED,
                               **_rope(1e4)),
        'single_tied': dict(norm_topk_prob=False, **_EXPERTS, **_SINGLE, **_TIED, **_rope(50.0))},
    'gemma2': {
        'bounded': dict(sliding_window=5, query_pre_attn_scalar=10, attn_logit_softcapping=2.0,
                        final_logit_softcapping=3.0, **_GROUPED, **_rope(1e4)),
        'unbounded': dict(sliding_window=4, query_pre_attn_scalar=20, attn_logit_softcapping=None,
                          final_logit_softcapping=None, **_SINGLE, **_rope(50.0))},
    'gemma3_text': {
        'pattern': dict(sliding_window_pattern=2, rope_theta=1e4, rope_local_base_freq=50.0,
                        rope_scaling=dict(rope_type='linear', factor=4.0), **_GEMMA3, **_GROUPED),
        'layer_types': dict(
            layer_types=['full_attention', 'sliding_attention', 'sliding_attention'],
            final_logit_softcapping=3.0, **_GEMMA3, **_SINGLE)},
}
DEFAULT = {'default': dict(**_GROUPED)}


def file(family: str) -> pathlib.Path:
  """Where the logits of a family are."""
  return FOLDER / f'{family}_reference.npz'


def fields(family: str, variant: str) -> dict[str, Any]:
  """The config.json fields of one model to try."""
  return {**_COMMON, **VARIANTS.get(family, DEFAULT)[variant]}


def tensors(layout: dict[str, tuple[list[int], float]]) -> dict[str, np.ndarray]:
  """A checkpoint's tensors by name, float32, from a fixed seed; `layout` has their shapes, and the
  value at which a vector starts out."""
  rng, out = np.random.RandomState(0), {}
  for name, (shape, start) in sorted(layout.items()):
    x = rng.standard_normal(shape)
    # Vectors away from where they start, and matrices large enough that every layer shows.
    x = start + 0.3 * x if len(shape) == 1 else 1.5 * x / shape[-1]**0.5
    out[name] = x.astype(np.float32)
  return out


def inputs() -> tuple[np.ndarray, np.ndarray]:
  """Tokens int32 [3, 12] and valid bool [3, 12]: no, some and much padding on the left."""
  tokens = np.random.RandomState(1).randint(0, 64, (3, 12)).astype(np.int32)
  valid = np.arange(12)[None] >= np.array([[0], [3], [9]])
  return tokens, valid


def excerpt(logits: np.ndarray) -> np.ndarray:
  """What is kept of logits for `inputs`: every fourth word, at real positions. What is wrong before
  the head shows in all words."""
  return np.asarray(logits)[inputs()[1]][:, ::4]


def make(family: str, variant: str, folder: pathlib.Path) -> tuple[Any, dict[str, Any]]:
  """transformers' model with the weights of `tensors`, saved by transformers in `folder`; and the
  layout of that checkpoint."""
  from safetensors.numpy import load_file, save_file
  import torch
  import transformers
  config = transformers.AutoConfig.for_model(family, **fields(family, variant))
  transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
  saved = load_file(folder / 'model.safetensors')
  layout = {name: (list(x.shape), float(x.flat[0]) if x.ndim == 1 else 0.0)
            for name, x in saved.items()}
  save_file(tensors(layout), folder / 'model.safetensors', metadata={'format': 'pt'})
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True)
  if report['missing_keys'] or report['unexpected_keys'] or report['mismatched_keys']:
    raise ValueError(f'{family} {variant}: {report}')
  return model.eval(), layout


def logits(model: Any, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
  """transformers' logits [B, S, V]."""
  import torch
  with torch.no_grad():
    return model(input_ids=torch.tensor(tokens).long(),
                 attention_mask=torch.tensor(valid).long()).logits.numpy()


def main() -> None:
  """Writes the files."""
  import torch
  import transformers
  versions = f'transformers {transformers.__version__}, torch {torch.__version__}'
  for family in sys.argv[1:] or VARIANTS:
    out = {}
    for variant in VARIANTS.get(family, DEFAULT):
      with tempfile.TemporaryDirectory() as folder:
        model, layout = make(family, variant, pathlib.Path(folder))
        out[f'{variant}/config'] = (pathlib.Path(folder) / 'config.json').read_text()
        out[f'{variant}/layout'] = json.dumps(layout)
        out[f'{variant}/logits'] = excerpt(logits(model, *inputs()))
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(file(family), made_by=versions, **out)
    print(f'{file(family)}: {file(family).stat().st_size} bytes, {versions}')


if __name__ == '__main__':
  main()
