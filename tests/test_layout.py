"""What travels on a mesh, and that it changes nothing of what is computed."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import meshed_layout
import meshed_models
import pytest
import tiny

GIB = 2**30
# What may stand beside a part of the vocabulary: the model width, or a part of it. Rows and tokens
# of meshed_layout.ODD are none of these.
WIDTHS = {1, 128, 256, 512, 1024}
VOCABULARY = meshed_layout.QWEN3['vocab_size']


def run_child(module: str, function: str, devices: int):
  """What a function of a module of the tests returns in a process with so many devices."""
  child = (f'import json, sys; sys.path[:0] = sys.argv[1:]; import {module};'
           f'print(json.dumps({module}.{function}()))')
  done = subprocess.run(
      [sys.executable, '-c', child, str(tiny.ROOT / 'tests'), str(tiny.ROOT / 'tests' / 'models')],
      text=True, capture_output=True, timeout=tiny.PATIENCE_S,
      env=tiny.environment(devices=devices))
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(done.stdout)


@pytest.fixture(scope='module')
def traffic():
  return run_child('meshed_layout', 'traffic', devices=8)


def _total(case):
  return sum(size for _, size, _, _ in case['found'])


# Bounds of a program, in GiB of results a device. The formula for `update`, in float32 as the CPU
# moves it: 4 passes, each 2 gathers of the layers' 63M weights and a sum of the 219M gradients, and
# the head once: 5.7. Without constraints these were 18.1, 7.6, 3.95 and 7.7.
@pytest.mark.parametrize(('name', 'most'), [
    ('update', 6.0), ('score', 1.6), ('score with tensor', 0.95), ('sample gathered', 1.1),
    ('sample split', 1.1), ('sample half split', 1.1)])
def test_what_travels_is_the_weights(traffic, name, most):
  assert 0 < _total(traffic[name]) <= most * GIB, sorted(traffic[name]['found'], key=str)


@pytest.mark.parametrize('name', ['update', 'score'])
def test_traffic_does_not_grow_with_the_rows(traffic, name):
  one, two = traffic[name], traffic[f'{name} of twice the rows']
  # But for the embeddings, whose columns are exchanged for rows.
  assert _total(two) < 1.02 * _total(one)


def _with_rows_and_vocabulary(case):
  shapes = [shape for _, _, shapes, _ in case['found'] for shape in shapes
            if any(size >= VOCABULARY // 8 for size in shape)]
  return [shape for shape in shapes
          if math.prod(size for size in shape if size < VOCABULARY // 8) not in WIDTHS]


@pytest.mark.parametrize('name', [
    *(n for n in meshed_layout.CASES if n != 'truncated split'), *meshed_layout.ODD])
def test_nothing_with_rows_and_vocabulary_travels(traffic, name):
  assert traffic[name]['found'] and not _with_rows_and_vocabulary(traffic[name])


def test_logits_that_are_gathered_are_found(traffic):
  assert _with_rows_and_vocabulary(traffic['gathered logits']) == [[72, VOCABULARY]]


def test_the_head_is_gathered_once(traffic):
  gathered = [times for kind, _, shapes, times in traffic['update']['found']
              if kind == 'all-gather' for shape in shapes if max(shape) == VOCABULARY]
  assert gathered == [1]


def test_what_is_laid_out_does_not_move_again(traffic):
  """Of a matrix of the layers, of the embedding or of the head."""
  rows = 16  # of a device, 64 over fsdp=8 without its half that is decode
  moved = [shape for _, _, shapes, times in traffic['sample laid out']['found'] if times == 1
           for shape in shapes if 1024 in shape and math.prod(shape) >= 2**20 and shape[0] != rows]
  assert not moved


@pytest.mark.parametrize('name', ['sample gathered', 'sample split', 'sample half split'])
def test_a_token_costs_two_sums_a_layer(traffic, name):
  """And what the sampler needs of a row, which is narrower: one number a block of the vocabulary,
  and one block."""
  wide = [times for _, _, shapes, times in traffic[name]['found'] if times >= 127
          for shape in shapes if math.prod(shape[1:]) >= 1024]
  layers = 0 if name == 'sample gathered' else 2 * 4 + 1  # and the embedding
  assert len(wide) == layers, wide


def test_truncation_exchanges_columns_for_rows(traffic):
  """Each device gets the logits of its rows, and not of all."""
  wide = [(kind, size / times) for kind, size, shapes, times in traffic['truncated split']['found']
          if times >= 127 and any(max(shape, default=0) >= VOCABULARY // 8 for shape in shapes)]
  assert [kind for kind, _ in wide] == ['all-to-all'], wide
  assert wide[0][1] <= 4 * (64 // 8) * 1.02 * VOCABULARY  # padded by 1 %


@pytest.mark.parametrize('name', ['layout gathered', 'layout split', 'layout half split'])
def test_bytes_of_the_decode_layout(traffic, name):
  # The results have what a device had before, in each of two steps where there are two.
  assert traffic[name]['said'] < _total(traffic[name]) < 1.5 * traffic[name]['said']


@pytest.fixture(scope='module')
def differences():
  return run_child('meshed_models', 'differences', devices=4)


# Sums in another order, of numbers of about 1, with the rounding of the activations' dtype: of
# float32 6e-8, of bfloat16 4e-3, some tens of them in a row.
@pytest.mark.parametrize('case', meshed_models.CASES)
def test_models_compute_the_same_on_a_mesh(differences, case):
  found, short = differences[case], case == 'bfloat16'
  assert found['written'] > 40  # or there would be little to compare
  assert found['tokens'] <= (20 if short else 0)  # a draw may fall on the other side of a token
  for name in ('sampler', 'scores', 'params', 'loss'):
    assert found[name] < (0.1 if short else 2e-5), (name, found)
