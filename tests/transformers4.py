"""What an export says, read by transformers 4 as by transformers 5. For .ci/run: two environments.

    python tests/transformers4.py write DIR      # with opd_jax: a directory of every family, and
                                                 # what is expected of them in expected.json
    V4/bin/python tests/transformers4.py read DIR    # with `transformers>=4.57,<5` and nothing else
"""

import json
import os
import pathlib
import sys

os.environ['HF_HUB_OFFLINE'] = '1'
ASSETS = pathlib.Path(__file__).parent.parent / 'experiments' / 'assets'
TEXTS = ['12+34=', ' is  it 5? ', '#a-b*c;']
CHAT = [{'role': 'user', 'content': 'what is 1+2?'}, {'role': 'assistant', 'content': '3'}]


def seen_by_transformers(path):
  """What is read of a directory, by whichever version is installed."""
  import transformers
  # For qwen2, version 5 takes that family's own class, whatever tokenizer_config.json says.
  tokens = transformers.PreTrainedTokenizerFast.from_pretrained(path)
  if transformers.__version__.startswith('4.'):
    automatic = transformers.AutoTokenizer.from_pretrained(path)
    assert type(automatic) is transformers.PreTrainedTokenizerFast, type(automatic)
    assert automatic.get_vocab() == tokens.get_vocab()
    tokens = automatic
  config = transformers.AutoConfig.from_pretrained(path)
  generation = transformers.GenerationConfig.from_pretrained(path)
  written = json.loads((pathlib.Path(path) / 'generation_config.json').read_text())
  return {
      'ids': [tokens(text)['input_ids'] for text in TEXTS],
      'text': [tokens.decode(tokens(text)['input_ids'], skip_special_tokens=True)
               for text in TEXTS],
      'special': sorted(tokens.all_special_tokens),
      'named': [tokens.bos_token_id, tokens.eos_token_id, tokens.pad_token_id],
      'chat': tokens.apply_chat_template(CHAT, tokenize=False) if tokens.chat_template else None,
      'config': {name: getattr(config, name) for name in (
          'model_type', 'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers',
          'num_attention_heads', 'num_key_value_heads', 'max_position_embeddings',
          'tie_word_embeddings')},
      'theta': getattr(config, 'rope_theta', None) or config.rope_parameters,
      'generation': {name: getattr(generation, name) for name in sorted(written)}}


def write(folder):
  """Exports of every family with three tokenizers, and what transformers 5 reads of them."""
  from conftest import family_config, sharp_params, ways_to_tie  # before opd_jax
  import tiny

  from opd_jax import models
  from opd_jax.data import prompts
  from opd_jax.files import huggingface

  more = tiny.chat_tokenizer(bos=True)
  more.add_special_tokens({'extra_special_tokens': ['<|tool|>', '<|call|>']})
  tokenizers = {'characters': prompts.character_tokenizer(), 'chat': tiny.chat_tokenizer(),
                'more': more}
  for family in models.names():
    config = family_config(family, ways_to_tie(family)[0])
    for name, tokens in tokenizers.items():
      model = models.build({**config, 'vocab_size': 320})
      huggingface.write_checkpoint(
          folder / f'{family}-{name}', model, sharp_params(model), tokens,
          sampling={'do_sample': True, 'temperature': 0.6, 'top_p': 0.95, 'top_k': 20})
  found = {str(path): seen_by_transformers(path)
           for path in (*sorted(folder.iterdir()), ASSETS / 'base', ASSETS / 'teacher')}
  for path, seen in found.items():  # version 4 has the base beside the other parameters
    seen['theta'] = json.loads((pathlib.Path(path) / 'config.json').read_text())['rope_theta']
  (folder / 'expected.json').write_text(json.dumps(found))


def read(folder):
  """Compares what version 4 reads with that."""
  import transformers
  assert transformers.__version__.startswith('4.'), transformers.__version__
  expected = json.loads((folder / 'expected.json').read_text())
  for path, want in expected.items():
    got = seen_by_transformers(pathlib.Path(path))
    assert got == want, (path, {k: (got[k], want[k]) for k in want if got[k] != want[k]})
  print(f'transformers {transformers.__version__} reads {len(expected)} directories as version 5')


if __name__ == '__main__':
  {'write': write, 'read': read}[sys.argv[1]](pathlib.Path(sys.argv[2]))
