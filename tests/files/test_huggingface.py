"""Checkpoints that are read: what comes out, in how much memory, on several devices, from the hub.

That every family's table fits its checkpoints is in test_every_family.py; here one family stands
for all. (Damaged ones: test_huggingface_damage.py. What is written: test_huggingface_export.py.)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc

from checkpoints import (
  COMMIT,
  CONFIG,
  DTYPES,
  MODEL,
  OPTIONS,
  PARAMS,
  assert_same,
  cast,
  copy_of,
  float32,
  raw,
  refusal,
  write_originals,
  write_raw,
)
from conftest import sharp_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from opd_jax import config, load, models
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface
from opd_jax.files import safetensors as safetensors_lib
from opd_jax.models import params


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
  return write_originals(tmp_path_factory.mktemp('originals'))


@pytest.fixture
def single(originals, tmp_path):
  return copy_of(originals / 'single', tmp_path)


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
      assert 'lm_head.weight' in message and 'tie_word_embeddings' in message

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
import checkpoints as t
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
    assert "path='acme/tiny'" in message and 'cd' * 20 in message

  @pytest.mark.parametrize('revision', ['', 'main', 'v1.0', COMMIT[:7], COMMIT.upper()])
  def test_a_revision_that_pins_nothing(self, cache, revision):
    message = refusal(ValueError, huggingface.load, 'acme/tiny', OPTIONS, revision)
    assert f'revision={revision!r}' in message and 'allowed' in message

  def test_a_revision_of_a_directory(self, single):
    message = refusal(ValueError, huggingface.load, single, OPTIONS, COMMIT)
    assert f'revision={COMMIT!r}' in message and 'allowed' in message

  @pytest.mark.parametrize('path', ['nowhere', '/no/where', 'a/b/c', '../x'])
  def test_a_path_that_is_neither(self, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(ValueError, huggingface.load, path, OPTIONS, COMMIT)
    assert f"path='{path}'" in message and 'organization/name' in message
