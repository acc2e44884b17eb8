"""Weights in other forms, and the command that makes safetensors of them."""

from __future__ import annotations

import pathlib

# Commands that write safetensors of other weights, run with transformers 5.24. That one saves
# what it reads of a GGUF file only if it is told to dequantize it.
_OF_PICKLED = (
    'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "[x.from_pretrained('{folder}').save_pretrained('NEW') for x in (M, T)]\"")
_OF_GGUF = (
    'python -c "from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig; '
    "f = dict(pretrained_model_name_or_path='{folder}', gguf_file='{file}'); "
    'c = GgufConfig(dequantize=True); '
    "AutoModelForCausalLM.from_pretrained(**f, quantization_config=c).save_pretrained('NEW'); "
    "AutoTokenizer.from_pretrained(**f).save_pretrained('NEW')\"")


def how_to_convert(path: pathlib.Path) -> str:
  """Says how to convert weights in another format, in a file or a directory; '' without any."""
  files = [path] if path.is_file() else sorted(path.glob('*'))
  gguf = next((f for f in files if f.suffix == '.gguf'), None)
  if gguf:
    how = _OF_GGUF.format(folder=gguf.parent, file=gguf.name)
    return (', such as the one that the GGUF file (which is often quantized) was made of, or what '
            f'this writes, with torch and gguf installed: {how}')
  pickled = next((f for f in files if f.suffix in ('.bin', '.pt', '.pth')), None)
  if pickled:
    how = _OF_PICKLED.format(folder=pickled.parent)
    return f', such as what this writes, with torch installed: {how}'
  return ''
