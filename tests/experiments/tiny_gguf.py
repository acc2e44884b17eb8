"""A GGUF file of a llama as small as can be, with the fields that llama.cpp's converter writes."""

import gguf
import numpy as np
from tokenizers import pre_tokenizers

LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 20, 32, 64, 4, 2, 8
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<repo_name>']
MERGES = [('1', '2'), ('Ġ', 't'), ('h', 'e'), ('Ġt', 'he')]  # the first one never applies
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map(''.join, MERGES)]
TEMPLATE = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>"
            "system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + m['role'] + '\n' + "
            "m['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
            "{{ '<|im_start|>assistant\n' }}{% endif %}")
# By their GGUF name: the Hugging Face name, the shape, the number of heads whose rows are paired.
MATRICES = {
    'attn_q': ('self_attn.q_proj', (HEADS * HEAD_DIM, WIDTH), HEADS),
    'attn_k': ('self_attn.k_proj', (KV_HEADS * HEAD_DIM, WIDTH), KV_HEADS),
    'attn_v': ('self_attn.v_proj', (KV_HEADS * HEAD_DIM, WIDTH), 0),
    'attn_output': ('self_attn.o_proj', (WIDTH, HEADS * HEAD_DIM), 0),
    'ffn_gate': ('mlp.gate_proj', (HIDDEN, WIDTH), 0),
    'ffn_up': ('mlp.up_proj', (HIDDEN, WIDTH), 0),
    'ffn_down': ('mlp.down_proj', (WIDTH, HIDDEN), 0)}
GAINS = {'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm'}


def q4_1(x):
  """(the bytes of `x` in Q4_1, what they stand for), by the format's definition: for 32 numbers of
  a row a scale d and a minimum m in half precision, then 16 bytes with the first 16 numbers in
  their low and the others in their high halves; a number is d * q + m."""
  blocks = x.reshape(*x.shape[:-1], -1, 32)
  m = blocks.min(-1, keepdims=True).astype(np.float16)
  d = ((blocks.max(-1, keepdims=True) - m) / 15).astype(np.float16)
  q = np.rint((blocks - m.astype(np.float32)) / d.astype(np.float32))
  q = np.clip(q, 0, 15).astype(np.uint8)
  raw = np.concatenate([d.view(np.uint8), m.view(np.uint8), q[..., :16] | q[..., 16:] << 4], -1)
  values = d.astype(np.float32) * q + m.astype(np.float32)
  return raw.reshape(*x.shape[:-1], -1), values.reshape(x.shape)


def in_pairs(x, heads):
  """Rows of queries and keys as llama.cpp wants them: those that rotate together side by side."""
  return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write(path, seed=0, architecture='llama', pre='smollm', more=(), without=()):
  """Writes the file; returns its weights, as they are after rounding, by their Hugging Face names.

  Args:
    path: of the file.
    seed: of the weights.
    architecture, pre: what the file says it is.
    more: names of further tensors.
    without: names of tensors to leave out.
  """
  rng, expected = np.random.default_rng(seed), {}
  w = gguf.GGUFWriter(str(path), architecture)
  w.add_context_length(64)
  w.add_block_count(LAYERS)
  w.add_embedding_length(WIDTH)
  w.add_feed_forward_length(HIDDEN)
  w.add_head_count(HEADS)
  w.add_head_count_kv(KV_HEADS)
  w.add_rope_freq_base(10000.0)
  w.add_rope_dimension_count(HEAD_DIM)
  w.add_layer_norm_rms_eps(1e-5)
  w.add_tokenizer_model('gpt2')
  w.add_tokenizer_pre(pre)
  w.add_token_list(TOKENS)
  w.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
  w.add_token_merges([' '.join(pair) for pair in MERGES])
  w.add_bos_token_id(1)
  w.add_eos_token_id(2)
  w.add_unk_token_id(0)
  w.add_pad_token_id(2)
  w.add_chat_template(TEMPLATE)

  def add(name, x, hf_name, heads=0):
    raw, expected[hf_name] = q4_1(x)
    if name not in without:
      w.add_tensor(name, in_pairs(raw, heads) if heads else raw,
                   raw_dtype=gguf.GGMLQuantizationType.Q4_1)

  def add_gain(name, hf_name):
    expected[hf_name] = rng.uniform(0.5, 1.5, WIDTH).astype(np.float32)
    w.add_tensor(name, expected[hf_name])

  add('token_embd.weight', rng.normal(size=(len(TOKENS), WIDTH)).astype(np.float32),
      'model.embed_tokens.weight')
  add_gain('output_norm.weight', 'model.norm.weight')
  for i in range(LAYERS):
    for name, (hf_name, shape, heads) in MATRICES.items():
      add(f'blk.{i}.{name}.weight', rng.normal(size=shape).astype(np.float32),
          f'model.layers.{i}.{hf_name}.weight', heads)
    for name, hf_name in GAINS.items():
      add_gain(f'blk.{i}.{name}.weight', f'model.layers.{i}.{hf_name}.weight')
  for name in more:
    w.add_tensor(name, np.ones(WIDTH, np.float32))
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return expected
