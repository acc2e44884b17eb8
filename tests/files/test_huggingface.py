"""Checkpoints in and out: what is read and written, how much memory it takes, what is refused.

That every family's table fits its checkpoints is in test_every_family.py; here one family stands
for all. Comparisons with transformers and PEFT run where torch is installed (extra: parity).
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tracemalloc

from conftest import quick_jit, qwen3_config, sharp_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from opd_jax import config, load, models
from opd_jax.algorithm import sample
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface, peft
from opd_jax.files import safetensors as safetensors_lib
from opd_jax.models import lora, params

CONFIG = qwen3_config(vocab_size=64)
MODEL = models.build(CONFIG)
PARAMS = sharp_params(MODEL)
OPTIONS = {'dtype': jnp.float32}
COMMIT = 'ab' * 20
DTYPES = ['float32', 'bfloat16', 'float16']


def assert_same(got, want):
  """Two trees hold the same bits."""
  got, want = params.flatten(got), params.flatten(want)
  assert set(got) == set(want)
  for name in want:
    assert got[name].dtype == want[name].dtype, name
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def cast(tree, *dtypes):
  for dtype in dtypes:
    tree = jax.tree.map(lambda x, d=dtype: np.asarray(x).astype(d), tree)
  return tree


def raw(path):
  """The tensors of a file as they are stored, by name: (dtype's name, shape, bytes)."""
  data = path.read_bytes()
  length = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:8 + length])
  header.pop('__metadata__', None)
  return {name: (t['dtype'], t['shape'], data[8 + length:][slice(*t['data_offsets'])])
          for name, t in header.items()}


def write_raw(path, stored):
  """The inverse of `raw`, which shares no code with the package."""
  header, end = {}, 0
  for name, (dtype, shape, data) in stored.items():
    header[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': [end, end + len(data)]}
    end += len(data)
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text
                   + b''.join(data for _, _, data in stored.values()))


def float32(x):
  x = np.asarray(x, np.float32)
  return 'F32', list(x.shape), x.tobytes()


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
  """The same model in one file and in several, not to be changed."""
  folder = tmp_path_factory.mktemp('originals')
  for name, size in (('single', huggingface.MAX_SHARD_BYTES), ('sharded', 6000)):
    huggingface.write_checkpoint(folder / name, MODEL, PARAMS, prompts_lib.character_tokenizer(),
                        max_shard_bytes=size)
  return folder


@pytest.fixture
def single(originals, tmp_path):
  return pathlib.Path(shutil.copytree(originals / 'single', tmp_path / 'single'))


@pytest.fixture
def sharded(originals, tmp_path):
  return pathlib.Path(shutil.copytree(originals / 'sharded', tmp_path / 'sharded'))


def refusal(error, f, *args, **kwargs):
  with pytest.raises(error) as e:
    f(*args, **kwargs)
  return str(e.value)


def change_json(file, **fields):
  content = json.loads(file.read_text())
  file.write_text(json.dumps({**content, **fields}))


class TestReading:

  @pytest.mark.parametrize('stored', DTYPES)
  @pytest.mark.parametrize('wanted', DTYPES)
  def test_every_dtype_to_every_dtype(self, stored, wanted, tmp_path):
    huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, prompts_lib.character_tokenizer(),
                        dtype=stored)
    assert {t[0] for t in raw(tmp_path / 'x' / huggingface.WEIGHTS).values()} == {
        {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}[stored]}
    assert huggingface.read_config(tmp_path / 'x')['dtype'] == stored
    got = huggingface.read_params(tmp_path / 'x', MODEL, jnp.dtype(wanted))
    assert_same(got, cast(PARAMS, jnp.dtype(stored), jnp.dtype(wanted)))

  def test_what_is_stored_is_what_the_table_says(self, single):
    stored = raw(single / huggingface.WEIGHTS)
    q = np.asarray(PARAMS['layers']['q'])  # [layer, in, heads, width]; [out, in] in the file
    assert stored['model.layers.1.self_attn.q_proj.weight'] == float32(q[1].reshape(16, 24).T)
    assert stored['model.embed_tokens.weight'] == float32(PARAMS['embed'])
    assert stored['lm_head.weight'] == float32(np.asarray(PARAMS['head']).T)

  def test_several_files_hold_what_one_holds(self, originals):
    one, many = originals / 'single', originals / 'sharded'
    files = sorted(many.glob('*.safetensors'))
    assert len(files) > 3 and files[0].name == f'model-00001-of-{len(files):05}.safetensors'
    whole, parts = raw(one / huggingface.WEIGHTS), [raw(f) for f in files]
    assert {k: v for part in parts for k, v in part.items()} == whole
    for part in parts:
      assert sum(len(t[2]) for t in part.values()) <= 6000
    index = json.loads((many / huggingface.INDEX).read_text())
    assert index['metadata']['total_size'] == sum(len(t[2]) for t in whole.values())
    assert index['weight_map'] == {k: f.name for f, p in zip(files, parts, strict=True) for k in p}
    assert_same(huggingface.load(many, OPTIONS).read(), PARAMS)
    assert_same(huggingface.load(one, OPTIONS).read(), PARAMS)

  def test_a_tensor_above_the_limit_is_a_file_of_its_own(self, tmp_path):
    huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, prompts_lib.character_tokenizer(),
                        max_shard_bytes=1)
    assert len(list((tmp_path / 'x').glob('*.safetensors'))) == 2 * 11 + 3
    assert_same(huggingface.read_params(tmp_path / 'x', MODEL), PARAMS)

  def test_opening_reads_no_weights(self, single, monkeypatch):
    def touched(tensor):
      raise AssertionError(f'read {tensor}')

    monkeypatch.setattr(safetensors_lib, 'view', touched)
    loaded = huggingface.load(single, OPTIONS)
    with pytest.raises(AssertionError, match='read'):
      loaded.read()

  def test_tensors_that_are_not_aligned(self, single):
    stored = raw(single / huggingface.WEIGHTS)
    half = np.asarray(PARAMS['final_norm'], jnp.bfloat16)
    for i in range(4):  # whatever the length of the header, one of these is odd
      write_raw(single / huggingface.WEIGHTS, {**stored, 'model.norm.weight': (
          'BF16', [16], half.tobytes())})
      data = (single / huggingface.WEIGHTS).read_bytes()
      length = int.from_bytes(data[:8], 'little')
      (single / huggingface.WEIGHTS).write_bytes(
          (length + i).to_bytes(8, 'little') + data[8:8 + length] + b' ' * i + data[8 + length:])
      got = huggingface.read_params(single, MODEL)
      want = dict(PARAMS, final_norm=np.asarray(half, np.float32))
      assert_same(got, want)

  def test_a_stored_copy_of_a_tied_head(self, tmp_path):
    model = models.build(dict(CONFIG, tie_word_embeddings=True))
    values = sharp_params(model)
    huggingface.write_checkpoint(tmp_path / 'x', model, values, prompts_lib.character_tokenizer())
    file = tmp_path / 'x' / huggingface.WEIGHTS
    stored = raw(file)
    assert 'lm_head.weight' not in stored
    write_raw(file, {**stored, 'lm_head.weight': stored['model.embed_tokens.weight']})
    assert_same(huggingface.load(tmp_path / 'x', OPTIONS).read(), values)
    other = np.asarray(values['embed']) + np.eye(64, 16, dtype=np.float32)
    for head in (other, other[:63]):
      write_raw(file, {**stored, 'lm_head.weight': float32(head)})
      message = refusal(ValueError, huggingface.load(tmp_path / 'x', OPTIONS).read)
      assert 'lm_head.weight differs' in message and 'tie_word_embeddings' in message

  def test_memory_is_the_result_and_less_than_a_tensor(self, tmp_path):
    # NumPy reports what it allocates, which mapped files are not.
    model = models.build(dict(CONFIG, hidden_size=256, intermediate_size=1024, vocab_size=64))
    values = jax.tree.map(
        lambda s: np.ones(s.shape, np.float32), model.specs,
        is_leaf=lambda s: isinstance(s, params.ParamSpec))
    size = sum(x.nbytes for x in jax.tree.leaves(values))
    largest = 1024 * 256 * 4

    def peak(f):
      tracemalloc.start()
      try:
        f()
        return tracemalloc.get_traced_memory()[1]
      finally:
        tracemalloc.stop()

    written = peak(lambda: huggingface.write_checkpoint(
        tmp_path / 'x', model, values, prompts_lib.character_tokenizer()))
    # One tensor, one block of 2^20 marks whether numbers are finite, and the tokenizer.
    assert written < largest + 2**20 + 2**20 < size
    read = peak(lambda: huggingface.read_params(tmp_path / 'x', model))
    assert size <= read < size + largest


CHILD = '''
import sys
sys.path[:0] = sys.argv[1:3]
import conftest
import jax, numpy as np, pathlib
from opd_jax.parallel import sharding
from opd_jax.files import huggingface, safetensors
from opd_jax.models import params
import test_huggingface as t
assert len(jax.devices()) == 4
path, out = pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4])
slices = []
one = safetensors._read_slice
def spy(spec, weights, dtype, index):
  x = one(spec, weights, dtype, index)
  slices.append((spec.hf_name, x.shape))
  return x
safetensors._read_slice = spy
for sizes in (dict(data=1, fsdp=2, tensor=2, expert=1), dict(data=2, fsdp=1, tensor=2, expert=1)):
  mesh = sharding.make_mesh(sizes)
  loaded = huggingface.load(path, t.OPTIONS)
  shardings = sharding.param_shardings(loaded.model.specs, mesh)
  slices.clear()
  got = loaded.read(shardings=shardings)
  t.assert_same(got, t.PARAMS)
  assert jax.tree.map(lambda x: x.sharding, got) == shardings
  for name, spec in params.flatten(loaded.model.specs).items():
    shape = params.flatten(shardings)[name].shard_shape(spec.shape)
    mine = [s for n, s in slices if n == spec.hf_name]
    assert set(mine) == {shape}, (name, mine)  # no device's part is larger than its shard
    parts = np.prod(spec.shape) // np.prod(shape)
    if sizes['data'] == 1 or parts == 1:  # and none is read twice
      assert len(mine) == parts, (name, mine)
  huggingface.write_checkpoint(out / str(sizes['data']), loaded.model, got, loaded.tokenizer)
print('fine')
'''


def test_devices_read_their_own_slices(originals, tmp_path):
  out = subprocess.run(
      [sys.executable, '-c', CHILD, str(tiny.ROOT / 'tests'), str(tiny.ROOT / 'tests' / 'files'),
       str(originals / 'sharded'), str(tmp_path)],
      env=tiny.environment(devices=4), capture_output=True, text=True, timeout=tiny.PATIENCE_S,
      check=False)
  assert out.stdout.splitlines()[-1:] == ['fine'], out.stderr
  want = raw(originals / 'single' / huggingface.WEIGHTS)
  for name in ('1', '2'):  # exported from the mesh
    assert raw(tmp_path / name / huggingface.WEIGHTS) == want


class TestExperts:
  """A table with tensors per layer and expert, and one tensor per expert alone."""

  def specs(self):
    init = jax.nn.initializers.zeros
    return {'layers': {'up': params.ParamSpec(
        (2, 3, 4, 5), ('layer', 'experts', 'embed', 'mlp'), init,
        'l.{layer}.e.{expert}.up', (5, 4), True)},
            'norm': params.ParamSpec((4,), (None,), init, 'norm', (4,))}

  def test_leading_axes_are_layer_then_expert(self, tmp_path):
    specs = self.specs()
    up = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    file = tmp_path / 'x.safetensors'
    stored = {f'l.{i}.e.{j}.up': float32(up[i, j].T) for i in range(2) for j in range(3)}
    write_raw(file, {**stored, 'norm': float32(np.ones(4))})
    found = safetensors_lib.read_header(file)
    safetensors_lib.check(found, specs, 'x')
    got = safetensors_lib.read(specs, found)
    np.testing.assert_array_equal(got['layers']['up'], up)
    index = (slice(1, 2), slice(1, 3), slice(0, 2), slice(None))
    part = safetensors_lib._read_slice(specs['layers']['up'], found, np.dtype(np.float32), index)
    np.testing.assert_array_equal(part, up[index])
    for leaves in (got, jax.tree.map(jnp.asarray, got)):
      plan = safetensors_lib.plan(specs, leaves)
      (again := tmp_path / 'again').unlink(missing_ok=True)
      safetensors_lib.write(again, plan, safetensors_lib.stream(specs, leaves, plan))
      assert raw(again) == raw(file)

  def test_a_missing_expert(self, tmp_path):
    write_raw(tmp_path / 'x', {'l.0.e.0.up': float32(np.ones((5, 4))), 'norm': float32([1, 2, 3])})
    message = refusal(ValueError, safetensors_lib.check,
                      safetensors_lib.read_header(tmp_path / 'x'), self.specs(), 'the file')
    assert "'l.0.e.1.up', 'l.0.e.2.up', 'l.1.e.0.up'" in message
    assert 'norm: (3,) in the file, (4,) expected' in message


class TestDamage:

  def test_truncated(self, single):
    file = single / huggingface.WEIGHTS
    data = file.read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
      file.write_bytes(data[:size])
      message = refusal(ValueError, huggingface.load, single, OPTIONS)
      assert str(file) in message and 'not a whole safetensors file' in message
    file.write_bytes(data + b'x')
    assert str(file) in refusal(ValueError, huggingface.load, single, OPTIONS)
    file.write_bytes((3).to_bytes(8, 'little') + b'{"a' + data)
    assert str(file) in refusal(ValueError, huggingface.load, single, OPTIONS)

  def test_one_of_several_truncated(self, sharded):
    file = sorted(sharded.glob('*.safetensors'))[2]
    file.write_bytes(file.read_bytes()[:-5])
    assert str(file) in refusal(ValueError, huggingface.load, sharded, OPTIONS)

  def test_an_index_that_names_a_missing_file(self, sharded):
    files = sorted(f.name for f in sharded.glob('*.safetensors'))
    (sharded / files[1]).unlink()
    message = refusal(FileNotFoundError, huggingface.load, sharded, OPTIONS)
    assert huggingface.INDEX in message and f"missing: ['{files[1]}']" in message

  def test_an_index_that_is_not_what_the_files_hold(self, sharded):
    index = sharded / huggingface.INDEX
    weight_map = json.loads(index.read_text())['weight_map']
    first, last = weight_map['model.embed_tokens.weight'], weight_map['lm_head.weight']
    assert first != last
    change_json(index, weight_map={**weight_map, 'lm_head.weight': first, 'ghost': last})
    message = refusal(ValueError, huggingface.load, sharded, OPTIONS)
    assert f"lm_head.weight in {last}" in message and "no file has ['ghost']" in message
    # Stored twice: nobody knows which of the two counts.
    change_json(index, weight_map=weight_map)
    twice = {**raw(sharded / last), 'model.embed_tokens.weight': float32(np.zeros((64, 16)))}
    write_raw(sharded / last, twice)
    message = refusal(ValueError, huggingface.load, sharded, OPTIONS)
    assert "several files ['model.embed_tokens.weight']" in message

  @pytest.mark.parametrize('weight_map', [None, [], {'a': 3}, {'a': '../secret.safetensors'}])
  def test_an_index_that_is_none(self, sharded, weight_map):
    change_json(sharded / huggingface.INDEX, weight_map=weight_map)
    assert 'weight_map=' in refusal(ValueError, huggingface.load, sharded, OPTIONS)

  def test_one_file_and_an_index(self, single, sharded):
    shutil.copy(sharded / huggingface.INDEX, single)
    message = refusal(ValueError, huggingface.load, single, OPTIONS)
    assert huggingface.WEIGHTS in message and huggingface.INDEX in message
    assert 'allowed: one of them' in message

  def test_other_weights(self, single):
    (single / huggingface.WEIGHTS).rename(single / 'pytorch_model.bin')
    message = refusal(FileNotFoundError, huggingface.load, single, OPTIONS)
    assert huggingface.WEIGHTS in message and "['pytorch_model.bin']" in message
    assert f"x.from_pretrained('{single}').save_pretrained('NEW')" in message

  def test_a_gguf_file(self, tmp_path, single):
    file = tmp_path / 'model-q4.gguf'
    file.write_bytes(b'GGUF')
    how = f"dict(pretrained_model_name_or_path='{tmp_path}', gguf_file='model-q4.gguf')"
    c = tiny.config('grpo', student__path=str(file))
    with pytest.raises(config.ConfigError, match=r"^student\.path='.*' is a file; allowed") as e:
      config.parse(c)
    assert how in str(e.value)
    message = refusal(FileNotFoundError, huggingface.load, tmp_path, OPTIONS)
    assert how in message and 'config.json is missing' in message
    # A file of the right kind: its directory is what is asked for.
    message = refusal(ValueError, huggingface.load, single / huggingface.WEIGHTS, OPTIONS)
    assert message.endswith('is a file; allowed: a Hugging Face checkpoint directory')

  def test_names_without_their_prefix(self, single):
    stored = raw(single / huggingface.WEIGHTS)
    write_raw(single / huggingface.WEIGHTS,
              {n.removeprefix('model.'): t for n, t in stored.items()})
    message = refusal(ValueError, huggingface.load, single, OPTIONS)
    unmatched, missing = message.split('; missing tensors ')
    assert "'layers.0.mlp.down_proj.weight'" in unmatched and "'norm.weight'" in unmatched
    assert "'model.layers.0.mlp.down_proj.weight'" in missing and 'lm_head' not in message

  def test_two_parameters_that_want_one_tensor(self):
    table = {**MODEL.specs, 'twin': MODEL.specs['final_norm']}
    message = refusal(ValueError, safetensors_lib.check, {}, table, 'here')
    assert "two parameters want ['model.norm.weight']" in message

  @pytest.mark.parametrize('dtype', ['F8_E4M3', 'I8', 'F64'])
  def test_a_dtype_that_is_none(self, single, dtype):
    stored = raw(single / huggingface.WEIGHTS)
    data = bytes(16 * (8 if dtype == 'F64' else 1))
    write_raw(single / huggingface.WEIGHTS, {**stored, 'model.norm.weight': (dtype, [16], data)})
    message = refusal(ValueError, huggingface.load, single, OPTIONS)
    assert f'model.norm.weight: {dtype}' in message and "['F32', 'BF16', 'F16']" in message

  @pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
  @pytest.mark.parametrize('stored', DTYPES)
  def test_numbers_that_are_none(self, single, stored, value):
    name = 'model.layers.1.mlp.up_proj.weight'
    bad = np.ones((20, 16), jnp.dtype(stored))
    bad[13, 5] = value
    code = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}[stored]
    file = single / huggingface.WEIGHTS
    write_raw(file, {**raw(file), name: (code, [20, 16], bad.tobytes())})
    loaded = huggingface.load(single, OPTIONS)  # opening reads no weights
    for dtype in (jnp.float32, jnp.bfloat16):
      message = refusal(ValueError, loaded.read, dtype)
      assert f'{name} has NaN or infinity' in message and str(file) in message

  def test_a_number_too_large_for_the_dtype(self, single):
    file = single / huggingface.WEIGHTS
    write_raw(file, {**raw(file), 'model.norm.weight': float32(np.full(16, 1e6))})
    loaded = huggingface.load(single, OPTIONS)
    loaded.read()
    assert '(as float16)' in refusal(ValueError, loaded.read, jnp.float16)

  @pytest.mark.parametrize(('content', 'parts'), [
      ('{"model_type": "gpt17"}', ("model_type='gpt17'", 'qwen3')),
      ('{"hidden_size": 4}', ('model_type=None', 'qwen3')),
      ('{"model_type": ', ('config.json', 'no JSON')),
      ('[1]', ('config.json', 'a list', 'a JSON object')),
      (json.dumps({**CONFIG, 'quantization_config': {'quant_method': 'fp8'}}),
       ('quantization_config', "'fp8'", 'bfloat16')),
  ])
  def test_config_json(self, single, content, parts):
    (single / 'config.json').write_text(content)
    message = refusal(ValueError, huggingface.load, single, OPTIONS)
    assert all(part in message for part in (str(single), *parts)), message

  def test_no_config_json(self, single):
    (single / 'config.json').unlink()
    assert 'config.json is missing' in refusal(FileNotFoundError, huggingface.load, single, OPTIONS)


class TestHub:

  @pytest.fixture
  def cache(self, originals, tmp_path, monkeypatch):
    """A hub cache with one commit of one repository."""
    constants = pytest.importorskip('huggingface_hub').constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    shutil.copytree(originals / 'sharded',
                    tmp_path / 'hub' / 'models--acme--tiny' / 'snapshots' / COMMIT)
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'hub'

  def test_a_commit_in_the_cache(self, cache):
    assert_same(huggingface.load('acme/tiny', OPTIONS, COMMIT).read(), PARAMS)

  def test_student_and_teacher_of_a_config(self, cache):
    c = tiny.config('opd_sampled', student__path='acme/tiny', student__revision=COMMIT,
                    teacher__path='acme/tiny', teacher__revision=COMMIT)
    run = config.parse(c)
    student = load.open_student(run)
    assert_same(student.read(), PARAMS)
    assert_same(load.open_teacher(run, student).read(), PARAMS)

  def test_a_commit_that_is_not_there(self, cache):
    message = refusal(ValueError, huggingface.load, 'acme/tiny', OPTIONS, 'cd' * 20)
    assert "path='acme/tiny'" in message and 'cd' * 20 in message and 'cannot be fetched' in message

  @pytest.mark.parametrize('revision', ['', 'main', 'v1.0', COMMIT[:7], COMMIT.upper()])
  def test_a_revision_that_pins_nothing(self, cache, revision):
    message = refusal(ValueError, huggingface.load, 'acme/tiny', OPTIONS, revision)
    assert f'revision={revision!r}' in message and '40 hex digits' in message

  def test_a_revision_of_a_directory(self, single):
    message = refusal(ValueError, huggingface.load, single, OPTIONS, COMMIT)
    assert f'revision={COMMIT!r} has no effect' in message

  @pytest.mark.parametrize('path', ['nowhere', '/no/where', 'a/b/c', '../x'])
  def test_a_path_that_is_neither(self, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(ValueError, huggingface.load, path, OPTIONS, COMMIT)
    assert f"path='{path}' is not a directory" in message and 'organization/name' in message


class TestExport:

  def test_stop_tokens_and_chat_template(self, tmp_path):
    characters = prompts_lib.character_tokenizer()
    characters.chat_template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, characters, stop_tokens=(7, 5))
    generation = json.loads((tmp_path / 'x' / 'generation_config.json').read_text())
    assert generation == {'eos_token_id': [1, 5, 7], 'pad_token_id': 0}
    loaded = huggingface.load(tmp_path / 'x', OPTIONS)
    assert loaded.tokenizer.chat_template == characters.chat_template
    text = loaded.tokenizer.apply_chat_template(
        [{'role': 'user', 'content': '1+1'}], tokenize=False)
    assert text == '1+1;'
    huggingface.write_checkpoint(tmp_path / 'y', MODEL, PARAMS, characters)
    generation = json.loads((tmp_path / 'y' / 'generation_config.json').read_text())
    assert generation['eos_token_id'] == 1

  def test_the_tokenizer_is_written_for_transformers_4_and_5(self, tmp_path):
    # Version 4 knows no class TokenizersBackend, and a list of extra_special_tokens is an error
    # there; that it reads what is written here is for tests/transformers4.py, run by .ci/run.
    tokens = tiny.chat_tokenizer(bos=True)
    tokens.add_special_tokens({'extra_special_tokens': ['<|tool|>', '<|call|>']})
    huggingface.save_tokenizer(tmp_path, tokens)
    written = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    assert written['tokenizer_class'] == 'PreTrainedTokenizerFast'
    assert written['additional_special_tokens'] == ['<|tool|>', '<|call|>']
    assert not {'extra_special_tokens', 'backend'} & set(written)
    loaded, text = prompts_lib.load(tmp_path), '<|tool|> what is 1+2?\n'
    assert loaded.all_special_ids == tokens.all_special_ids
    assert loaded(text)['input_ids'] == tokens(text)['input_ids']
    assert loaded.chat_template == tokens.chat_template

  @pytest.mark.parametrize('model', ['base', 'teacher'])
  def test_the_shipped_models_are_too(self, model):
    folder = tiny.ROOT / 'experiments' / 'assets' / model
    tokens = json.loads((folder / 'tokenizer_config.json').read_text())
    assert tokens['tokenizer_class'] == 'PreTrainedTokenizerFast' and 'backend' not in tokens
    written = json.loads((folder / 'config.json').read_text())
    assert written['rope_theta'] == 100.0 and 'rope_parameters' not in written
    characters = prompts_lib.character_tokenizer()
    assert prompts_lib.same_vocabulary(prompts_lib.load(folder), characters)

  def test_how_the_input_samples_is_kept(self, single, tmp_path):
    file = single / 'generation_config.json'
    change_json(file, temperature=0.6, top_p=0.95, top_k=20, do_sample=True, max_length=7)
    loaded = huggingface.load(single, OPTIONS)
    huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, loaded.tokenizer, stop_tokens=(5,),
                                 sampling=loaded.sampling)
    assert json.loads((tmp_path / 'x' / 'generation_config.json').read_text()) == {
        'temperature': 0.6, 'top_p': 0.95, 'top_k': 20, 'do_sample': True, 'eos_token_id': [1, 5],
        'pad_token_id': 0}
    file.unlink()
    assert huggingface.load(single, OPTIONS).sampling == {}

  @pytest.mark.parametrize('kind', ['directory', 'file', 'dangling link'])
  def test_onto_something_that_exists(self, tmp_path, monkeypatch, kind):
    path = tmp_path / 'x'
    {'directory': path.mkdir, 'file': path.touch,
     'dangling link': lambda: path.symlink_to(tmp_path / 'nowhere')}[kind]()
    monkeypatch.setattr(safetensors_lib, 'stream', None)  # refused before any work
    for export in (lambda: huggingface.write_checkpoint(path, MODEL, PARAMS,
                                               prompts_lib.character_tokenizer()),
                   lambda: peft.write_adapter(path, MODEL, adapters(SETTINGS), SETTINGS,
                                              prompts_lib.character_tokenizer(), '')):
      with pytest.raises(FileExistsError, match='x exists already; allowed'):
        export()
    assert [p.name for p in tmp_path.iterdir()] == ['x']

  def test_a_full_disk_leaves_nothing_behind(self, tmp_path, monkeypatch):
    room = 20000  # bytes; the weights are more

    class Full:  # what a file system without space does in the middle of a write
      def __init__(self, file):
        self.file, self.left = file, room

      def __enter__(self):
        return self

      def __exit__(self, *exc):
        self.file.close()

      def write(self, data):
        data = bytes(memoryview(data))
        self.file.write(data[:self.left])
        self.left -= len(data)
        if self.left < 0:
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = []

    def limited(file, mode):
      opened.append(file)
      return Full(open(file, mode))

    monkeypatch.setattr(safetensors_lib, 'open', limited, raising=False)
    with pytest.raises(huggingface.ExportError, match='No space left') as e:
      huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, prompts_lib.character_tokenizer())
    assert opened and str(tmp_path / 'x') in str(e.value) and '\n' not in str(e.value)
    assert not list(tmp_path.iterdir())

  def test_a_disk_that_is_full_when_the_tokenizer_is_saved(self, tmp_path):
    class Broken(type(prompts_lib.character_tokenizer())):
      def save_pretrained(self, *args, **kwargs):
        raise Exception('No space left on device (os error 28)')  # what its Rust side raises

    broken = prompts_lib.character_tokenizer()
    broken.__class__ = Broken
    for write in (lambda: huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, broken),
                  lambda: peft.write_adapter(tmp_path / 'x', MODEL, adapters(SETTINGS), SETTINGS,
                                             broken, '')):
      with pytest.raises(huggingface.ExportError, match='x could not be written.*No space left'):
        write()
      assert not list(tmp_path.iterdir())

  def test_a_directory_that_cannot_be_made(self, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(huggingface.ExportError, match='could not be written'):
      huggingface.write_checkpoint(tmp_path / 'file' / 'x', MODEL, PARAMS,
                                   prompts_lib.character_tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ['file']

  def test_what_an_interrupted_export_left_is_replaced(self, tmp_path):
    (tmp_path / '.x.partial').mkdir()
    (tmp_path / '.x.partial' / 'junk').touch()
    huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, prompts_lib.character_tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ['x'] and not (tmp_path / 'x' / 'junk').exists()

  def test_parameters_that_cannot_be_written(self, tmp_path):
    def write(values, **options):
      return refusal(ValueError, huggingface.write_checkpoint, tmp_path / 'x', MODEL, values,
                     prompts_lib.character_tokenizer(), **options)

    nan = dict(PARAMS, embed=PARAMS['embed'].at[3, 4].set(jnp.nan))
    assert 'model.embed_tokens.weight has NaN' in write(nan)
    large = dict(PARAMS, embed=PARAMS['embed'].at[3, 4].set(1e6))
    assert 'infinity (as float16)' in write(large, dtype='float16')
    assert "['head']" in write({k: v for k, v in PARAMS.items() if k != 'head'})
    assert 'allowed: shape (64, 16)' in write(dict(PARAMS, embed=PARAMS['embed'][:5]))
    assert 'int8' in write(PARAMS, dtype='int8') and 'max_shard_bytes=0' in write(
        PARAMS, max_shard_bytes=0)
    assert not list(tmp_path.iterdir())

  def test_adapters_are_merged(self, tmp_path):
    joined = lora.join(lora.Frozen(PARAMS, SETTINGS.scale), adapters(SETTINGS))
    huggingface.write_checkpoint(tmp_path / 'x', MODEL, joined, prompts_lib.character_tokenizer())
    got = params.flatten(huggingface.read_params(tmp_path / 'x', MODEL))
    for name, want in params.flatten(lora.merge_all(joined)).items():
      # Sums over a rank of 2 in one order or another: one rounding of float32.
      np.testing.assert_allclose(got[name], want, rtol=1e-6, atol=1e-7, err_msg=name)
    changed = [n for n in got if not np.array_equal(got[n], params.flatten(PARAMS)[n])]
    assert changed == ['layers/q', 'layers/v']


SETTINGS = lora.Settings(rank=2, alpha=3.0, targets='layers/(q|v)')


def adapters(settings, seed=1):
  """Adapters with nothing left at zero."""
  specs = lora.adapter_specs(MODEL.specs, settings)
  rng = np.random.RandomState(seed)
  return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), specs,
                      is_leaf=lambda s: isinstance(s, params.ParamSpec))


@pytest.fixture
def adapter(tmp_path):
  peft.write_adapter(tmp_path / 'adapter', MODEL, adapters(SETTINGS), SETTINGS,
                     prompts_lib.character_tokenizer(), 'acme/base')
  return tmp_path / 'adapter'


class TestAdapters:

  @pytest.mark.parametrize(('targets', 'read_as'), [
      ('all', 'all'), ('attention', 'attention'), ('layers/(q|k|v|o)', 'attention'),
      ('mlp', 'mlp'), ('layers/(q|v)', r'layers/q|layers/v'), ('layers/o', 'layers/o')])
  def test_there_and_back(self, tmp_path, targets, read_as):
    settings = lora.Settings(rank=3, alpha=4.5, targets=targets)
    values = adapters(settings)
    peft.write_adapter(tmp_path / 'x', MODEL, values, settings,
                       prompts_lib.character_tokenizer(), '')
    again, read = peft.read_adapter(tmp_path / 'x', MODEL)
    assert again == dataclasses.replace(settings, targets=read_as)
    assert_same(read(), jax.tree.map(np.asarray, values))
    assert_same(read(jnp.bfloat16), cast(values, jnp.bfloat16))
    assert prompts_lib.load(tmp_path / 'x').get_vocab() == (
        prompts_lib.character_tokenizer().get_vocab())

  def test_files(self, adapter):
    config = json.loads((adapter / peft.CONFIG).read_text())
    assert config['target_modules'] == ['q_proj', 'v_proj'] and config['r'] == 2
    assert config['lora_alpha'] == 3 and config['base_model_name_or_path'] == 'acme/base'
    stored = raw(adapter / peft.WEIGHTS)
    assert len(stored) == 2 * 2 * 2
    q = adapters(SETTINGS)['layers']['q']
    name = 'base_model.model.model.layers.1.self_attn.q_proj'
    assert stored[f'{name}.lora_A.weight'] == float32(q['a'][1].T)
    assert stored[f'{name}.lora_B.weight'] == float32(q['b'][1].reshape(2, 24).T)

  @pytest.mark.parametrize('changes', [
      dict(num_hidden_layers=3), dict(num_hidden_layers=1), dict(hidden_size=32),
      dict(num_attention_heads=4)], ids=str)
  def test_another_base(self, adapter, changes):
    base = models.build(dict(CONFIG, **changes))
    message = refusal(ValueError, peft.read_adapter, adapter, base)
    assert str(adapter / peft.WEIGHTS) in message and 'q_proj' in message

  def test_modules_of_another_base(self, adapter):
    file = adapter / peft.WEIGHTS
    write_raw(file, {n.replace('self_attn', 'attn'): t for n, t in raw(file).items()})
    message = refusal(ValueError, peft.read_adapter, adapter, MODEL)
    assert 'not for this qwen3' in message and 'layers.0.attn.q_proj' in message
    assert 'layers/gate' in message

  def test_the_name_of_another_base_is_a_warning(self, adapter, recwarn):
    peft.read_adapter(adapter, MODEL, base_name='models/base')
    peft.read_adapter(adapter, MODEL)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="made for 'acme/base'.*put on 'models/other'"):
      peft.read_adapter(adapter, MODEL, base_name='models/other')

  @pytest.mark.parametrize(('field', 'value'), [
      ('peft_type', 'IA3'), ('peft_type', None), ('task_type', 'SEQ_CLS'), ('bias', 'lora_only'),
      ('use_rslora', True), ('use_dora', True), ('modules_to_save', ['lm_head']),
      ('rank_pattern', {'q_proj': 4}), ('alpha_pattern', {'q_proj': 4}), ('fan_in_fan_out', True),
      ('lora_bias', True), ('layers_to_transform', [0]), ('target_parameters', ['experts']),
      ('trainable_token_indices', [3]), ('init_lora_weights', 'pissa'), ('of_the_future', {'a': 1}),
      ('r', 0), ('r', 2.5), ('r', True), ('lora_alpha', 'much'), ('lora_alpha', -1),
      ('target_modules', ['q_proj'])])
  def test_other_methods(self, adapter, field, value):
    change_json(adapter / peft.CONFIG, **{field: value})
    message = refusal(ValueError, peft.read_adapter, adapter, MODEL)
    assert f'{field}={value!r}' in message and 'allowed' in message

  def test_another_rank(self, adapter):
    change_json(adapter / peft.CONFIG, r=4)
    message = refusal(ValueError, peft.read_adapter, adapter, MODEL)
    assert 'r=4' in message and '(2, 16) in the file, (4, 16) expected' in message

  def test_damage(self, adapter):
    file = adapter / peft.WEIGHTS
    stored = raw(file)
    first = next(iter(stored))
    write_raw(file, {n: t for n, t in stored.items() if n != first})
    assert f"missing tensors ['{first}']" in refusal(ValueError, peft.read_adapter, adapter, MODEL)
    write_raw(file, {**stored, first: ('F32', stored[first][1], b'\xff' * len(stored[first][2]))})
    _, read = peft.read_adapter(adapter, MODEL)
    assert f'{first} has NaN' in refusal(ValueError, read)
    file.write_bytes(file.read_bytes()[:-1])
    assert 'whole safetensors file' in refusal(ValueError, peft.read_adapter, adapter, MODEL)
    file.unlink()
    assert file.name in refusal(FileNotFoundError, peft.read_adapter, adapter, MODEL)
    (adapter / peft.CONFIG).unlink()
    assert peft.CONFIG in refusal(FileNotFoundError, peft.read_adapter, adapter, MODEL)


# --- against transformers and PEFT ---

TOKENS = np.random.RandomState(3).randint(0, 64, (2, 11)).astype(np.int32)
# Of the largest logit. Both sides compute in float32 with two layers; 1e-6 is usual.
LIMIT = 1e-5


def logits(values):
  def run(values):
    valid = jnp.ones(TOKENS.shape, bool)
    hidden, _ = MODEL.forward(values, jnp.asarray(TOKENS), sample.positions_of(valid), valid, None)
    return MODEL.head(values).logits(hidden)

  return np.asarray(quick_jit(run)(jax.tree.map(jnp.asarray, values)))


def error(got, want):
  return np.abs(got - want).max() / np.abs(want).max()


def torch_logits(model):
  import torch
  with torch.no_grad():
    return model.eval()(input_ids=torch.tensor(TOKENS).long()).logits.numpy()


def opened(path):
  """The model as any user of transformers opens it."""
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32, attn_implementation='eager', output_loading_info=True)
  assert not any(report[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), report
  return model


class TestAgainstTransformers:

  @pytest.mark.parametrize('name', ['single', 'sharded'])
  def test_a_full_export_has_the_same_logits(self, originals, name):
    pytest.importorskip('torch')
    model = opened(originals / name)
    assert error(logits(PARAMS), torch_logits(model)) < LIMIT
    transformers = pytest.importorskip('transformers')
    assert transformers.AutoTokenizer.from_pretrained(originals / name)('1+1')['input_ids'] == (
        prompts_lib.character_tokenizer()('1+1')['input_ids'])

  def test_every_stop_token_ends_a_generation(self, tmp_path):
    pytest.importorskip('torch')
    huggingface.write_checkpoint(tmp_path / 'x', MODEL, PARAMS, prompts_lib.character_tokenizer(),
                        stop_tokens=(5, 7))
    assert opened(tmp_path / 'x').generation_config.eos_token_id == [1, 5, 7]

  def test_its_own_sharded_bfloat16_is_read_exactly(self, originals, tmp_path):
    torch = pytest.importorskip('torch')
    model = opened(originals / 'single').to(torch.bfloat16)
    model.save_pretrained(tmp_path / 'x', max_shard_size='8KB')
    prompts_lib.character_tokenizer().save_pretrained(tmp_path / 'x')
    assert (tmp_path / 'x' / huggingface.INDEX).exists()
    assert_same(huggingface.load(tmp_path / 'x', OPTIONS).read(),
                cast(PARAMS, jnp.bfloat16, np.float32))

  @pytest.mark.parametrize('targets', ['all', 'layers/(q|v)'])
  def test_an_adapter_opens_in_peft_with_the_same_logits(self, originals, tmp_path, targets):
    library = pytest.importorskip('peft')
    settings = lora.Settings(rank=2, alpha=3.0, targets=targets)
    values = adapters(settings)
    peft.write_adapter(tmp_path / 'x', MODEL, values, settings, prompts_lib.character_tokenizer(),
                       str(originals / 'single'))
    model = library.PeftModel.from_pretrained(opened(originals / 'single'), tmp_path / 'x')
    joined = lora.join(lora.Frozen(PARAMS, settings.scale), values)
    want = torch_logits(model)
    assert error(logits(PARAMS), want) > 0.05  # the adapter does something
    assert error(logits(joined), want) < LIMIT
    huggingface.write_checkpoint(tmp_path / 'merged', MODEL, joined,
                                 prompts_lib.character_tokenizer())
    assert error(torch_logits(opened(tmp_path / 'merged')), want) < LIMIT

  @pytest.mark.parametrize(('modules', 'targets'), [
      (['q_proj', 'v_proj'], 'layers/q|layers/v'), ('all-linear', 'all'),
      (r'.*\.(gate|up|down)_proj', 'mlp')])
  def test_an_adapter_that_peft_made(self, originals, tmp_path, modules, targets):
    library, torch = pytest.importorskip('peft'), pytest.importorskip('torch')
    torch.manual_seed(0)
    model = library.get_peft_model(opened(originals / 'single'), library.LoraConfig(
        r=3, lora_alpha=5, target_modules=modules, task_type='CAUSAL_LM', lora_dropout=0.1))
    with torch.no_grad():
      for name, parameter in model.named_parameters():
        if 'lora_' in name:
          parameter.normal_()
    model.save_pretrained(tmp_path / 'x')
    settings, read = peft.read_adapter(tmp_path / 'x', MODEL, str(originals / 'single'))
    assert settings == lora.Settings(rank=3, alpha=5.0, targets=targets)
    joined = lora.join(lora.Frozen(PARAMS, settings.scale), jax.tree.map(jnp.asarray, read()))
    assert error(logits(joined), torch_logits(model)) < LIMIT
