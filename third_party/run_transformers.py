"""A worker (benchmarks/turns.py) that generates with transformers on the work of step_work.py.

    python third_party/run_transformers.py WORK CACHE float32|bfloat16

CACHE is a `cache_implementation`, such as 'static', or 'default'.
"""

from __future__ import annotations

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT / 'benchmarks')

import torch  # noqa: E402
import transformers  # noqa: E402
import turns  # noqa: E402


def main() -> None:
  """Serves generations."""
  work, cache, dtype = pathlib.Path(sys.argv[1]), *sys.argv[2:]
  here = turns.Turns()
  imports = turns.peak_bytes()
  sizes = json.loads((work / 'work.json').read_text())
  model = transformers.AutoModelForCausalLM.from_pretrained(
      work / 'student', dtype=getattr(torch, dtype)).eval()
  ids, prompt = torch.tensor(sizes['tokens']), sizes['prompt']
  with torch.no_grad():
    logprobs = model(ids).logits[:, prompt - 1:-1].float().log_softmax(-1)
    loss = -float(logprobs.gather(-1, ids[:, prompt:, None]).mean())
  del logprobs
  never = transformers.AutoTokenizer.from_pretrained(work / 'tokenizer').eos_token_id
  settings = transformers.GenerationConfig(
      max_new_tokens=sizes['new'], do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
      eos_token_id=never, pad_token_id=never,
      cache_implementation=None if cache == 'default' else cache)

  def generate():
    with here.clock.phase('generate'), torch.no_grad():
      out = model.generate(ids[:, :prompt], attention_mask=torch.ones_like(ids[:, :prompt]),
                           generation_config=settings)
    assert out.shape == ids.shape, out.shape

  here.serve(generate, losses={'negative_logprob': loss}, import_bytes=imports,
             threads=torch.get_num_threads(),
             versions={m.__name__: m.__version__ for m in (torch, transformers)})


if __name__ == '__main__':
  main()
