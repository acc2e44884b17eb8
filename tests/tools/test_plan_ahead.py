"""What libtpu allocates, known before it has written code."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import pytest
import tiny

from opd_jax import config
from opd_jax.tools.plan import ahead, hardware, phases, shapes

# As libtpu writes it, shortened: memory of other colors is not the chip's.
ASSIGNMENT = '''BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <5 reduce_sum.2 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 2048, page 0, parameter 0, shape |bf16[1,2560,2048]| at ShapeIndex {}:
allocation 2: size 4096, page 0, parameter 1, shape |f32[8]| at ShapeIndex {}, maybe-live-out:
allocation 3: size 10240, page 0, output shape is |f32[1,2560]|, maybe-live-out:
allocation 4: size 256, color 15, page 0, preallocated-temp:
allocation 5: size 65536, page 0, preallocated-temp:
 value: <30 lt.3 @0> (size=512,offset=49152): pred[]{:T(512)}
'''
BOTH = '''
import dataclasses, json, sys, tempfile
from opd_jax import config
from opd_jax.tools.plan import ahead, hardware, phases, shapes
if __name__ == '__main__':
  run = shapes.parse(config.from_dict(json.load(sys.stdin)), '')
  topology = hardware.parse('v5p:2x2x1')
  out = {}
  for name in ('sample', 'update'):
    with tempfile.TemporaryDirectory() as folder:
      early = ahead.allocate(phases.open_call, (run, topology, name), folder, lambda _: True)
    call = phases.open_call(run, topology, name)
    stats = call.compile().memory_analysis()
    out[name] = [(getattr(early, f.name), getattr(stats, f.name))
                 for f in dataclasses.fields(ahead.Allocated)]
  print(json.dumps(out))
'''


def _values(path):
  for name in ('student', 'teacher'):
    (path / name).mkdir()
    (path / name / 'config.json').write_text(json.dumps({**tiny.SHAPE, 'vocab_size': 64}))
  return tiny.config('opd_exact', student__path=str(path / 'student'),
                     teacher__path=str(path / 'teacher'), compute__microbatch_rows=16)


def test_what_was_allocated_is_read_once_it_is_whole(tmp_path):
  (tmp_path / 'm.after_optimizations-buffer-assignment.txt').write_text(ASSIGNMENT)
  assert ahead.read(str(tmp_path)) is None  # it may yet be written
  (tmp_path / 'm.after_optimizations_after_buffer_assignment.txt').touch()
  assert ahead.read(str(tmp_path)) == ahead.Allocated(65536, 10240 + 4096, 4096)


def test_a_process_of_its_own_says_the_same(tmp_path):
  """Of a compiler that writes no such files, here the CPU's, what it says in the end."""
  run, one = shapes.parse(_values(tmp_path), ''), hardware.parse('gpu:1xh100')
  (tmp_path / 'written').mkdir()
  found = ahead.allocate(phases.open_call, (run, one, 'update'), str(tmp_path / 'written'),
                         lambda _: False)
  stats = phases.open_call(run, one, 'update').compile().memory_analysis()
  assert found == ahead.Allocated(*(getattr(stats, f.name) for f in dataclasses.fields(found)))
  assert list((tmp_path / 'written').glob('*.txt'))


def test_what_the_compiler_refuses_is_raised_here(tmp_path):
  with pytest.raises(jax.errors.JaxRuntimeError, match='RESOURCE_EXHAUSTED'):
    ahead.allocate(_refuse, (), str(tmp_path), lambda _: True)
  with pytest.raises(RuntimeError, match='ended with status 1'):
    ahead.allocate(_fail, (), str(tmp_path), lambda _: True)


def _refuse():
  raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 2G of 1G')


def _fail():
  raise KeyError('update')


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs the extra plan')
def test_tpus_hold_what_was_known_before_the_code(tmp_path):
  done = subprocess.run([sys.executable, '-c', BOTH], text=True, capture_output=True,
                        input=json.dumps(config.to_dict(_values(tmp_path))),
                        env=tiny.environment(), timeout=tiny.PATIENCE_S)
  assert done.returncode == 0, done.stderr[-3000:]
  for sizes in json.loads(done.stdout.splitlines()[-1]).values():
    *same, (none, code) = sizes
    assert none == 0 < code
    for early, late in same:
      assert early == pytest.approx(late, rel=0.01, abs=4096)
