"""The doctor's question to the compiler: what a program takes, and that asking costs nothing."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys

import apart_child
import jax
import numpy as np
import pytest
import tiny

from opd_jax import build, config, load, programs, train
from opd_jax.data.streams import OWN
from opd_jax.doctor import examine, lowered, memory, rollouts
from opd_jax.doctor.finding import FAIL, OK, SKIPPED, WARN
from opd_jax.types import Batch, Heads

GOOD = dict(steps=1, eval__problems=16)
PROGRAMS = ('sample_fn', 'teacher_logprob_fn', 'update_fn', 'row_sums')
BESIDE = dict(given__source='dataset', given__split='corpus', given__prompts_per_step=16,
              given__likelihood_coef=0.1, data__off_policy_source='teacher',
              data__on_policy_fraction=0.5)
# What a run of two steps does, in a process with so many devices, and how much memory it had.
CHILD = '''
import json, logging, pathlib, resource, sys
sys.path.insert(0, sys.argv[1])
import jax
from opd_jax import config, train
from opd_jax.doctor import examine, lowered, memory
lines, settled, stays = [], [], {}
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger('jax').addHandler(handler)
check = examine.COMPILED['memory']
def spy(run, programs, *how):
  out = check(run, programs, *how)
  settled.append(len(lines))
  there = lowered.resident(programs)
  stays.update({name: sorted(memory.resident_bytes(there, call.mesh))
                for name, call in lowered.calls(run, programs, there).items()})
  return out
examine.COMPILED['memory'] = spy
jax.config.update('jax_log_compiles', True)
train.train(config.from_dict(json.loads(sys.stdin.read())), pathlib.Path(sys.argv[2]))
print(json.dumps([lines[:settled[0]], lines[settled[0]:], stays]))
'''


def _open(c):
  run = config.parse(c)
  parts = build.open_parts(run)
  return run, programs.compile_programs(run, parts)


def _looked_at(c):
  """(resident, {program: its call}) of a config."""
  run, made = _open(c)
  there = lowered.resident(made)
  return there, lowered.calls(run, made, there)


@pytest.fixture
def log_compiles():
  """Of all threads, which jax.log_compiles() is not."""
  jax.config.update('jax_log_compiles', True)
  yield
  jax.config.update('jax_log_compiles', False)


def _compiled(lines):
  return [name for line in lines for name in re.findall(r'Finished XLA compilation of jit\((\w+)\)',
                                                        line) if name in PROGRAMS]


@pytest.mark.parametrize(('kind', 'fields'), [
    ('opd_exact', {}), ('opd_exact', dict(student__lora__rank=2)), ('grpo', {}), ('sft', {}),
    ('opd_exact', BESIDE)])
def test_a_start_compiles_nothing_twice(kind, fields, tmp_path, caplog, monkeypatch, log_compiles):
  looked_at, check = [], examine.COMPILED['memory']

  def spy(run, made, *how):
    with caplog.at_level(logging.WARNING, 'jax'):
      out = check(run, made, *how)
    looked_at.extend(_compiled(r.getMessage() for r in caplog.records))
    caplog.clear()
    return out

  monkeypatch.setitem(examine.COMPILED, 'memory', spy)
  c = tiny.with_models(kind, **{**GOOD, **fields})
  if fields is BESIDE:
    c.steps = 4  # both kinds of step
  with caplog.at_level(logging.WARNING, 'jax'):
    train.train(c, tmp_path)
    later = _compiled(r.getMessage() for r in caplog.records)
  # After the check, adapters have their export measured, by another sampler than the run's.
  assert len(looked_at) >= (3 if kind == 'sft' else 4) and 'update_fn' in looked_at
  assert not later


def test_nor_on_a_mesh_with_tied_embeddings(tmp_path):
  path = tiny.write_model(tiny.folder() / 'tied', 1, tie_word_embeddings=True)
  c = tiny.config('opd_exact', **GOOD, teacher__path=str(path), doctor__support='off: random',
                  doctor__uniform_teacher='off: random')
  c.student.fresh.tie_word_embeddings = True
  c.compute.mesh.fsdp, c.compute.mesh.tensor, c.compute.microbatch_rows = 2, 2, 16
  looked_at, later, _ = _on_four_devices(c, tmp_path)
  assert len(looked_at) == 6 and not later


def test_nor_with_a_teacher_on_devices_of_its_own(tmp_path):
  """What it does for an evaluation is looked at, too, and each keeps to its own memory."""
  c = apart_child.configs()['exact_apart']  # of which test_apart.py has the programs compiled
  c.steps = 1
  for name in (n.removeprefix('check_') for n in rollouts.__dict__ if n.startswith('check_')):
    c.doctor[name] = 'off: its program is another'
  looked_at, later, stays = _on_four_devices(c, tmp_path)
  assert looked_at.count('teacher_logprob_fn') == 2 and not later
  assert stays['evaluate see'] == stays['score teacher'] == ['teacher']
  assert stays['update'] == stays['evaluate compare'] == ['heads', 'optimizer', 'weights']


def _on_four_devices(c, tmp_path):
  """(what the check compiled, what was compiled after it, what stays during each program)."""
  done = subprocess.run(
      [sys.executable, '-c', CHILD, str(tiny.ROOT / 'tests'), str(tmp_path / 'run')], text=True,
      input=json.dumps(config.to_dict(c)), capture_output=True, timeout=tiny.PATIENCE_S,
      env=tiny.environment(devices=4))
  assert done.returncode == 0, done.stderr[-4000:]
  looked_at, later, stays = json.loads(done.stdout.splitlines()[-1])
  return _compiled(looked_at), _compiled(later), stays


@pytest.mark.parametrize('fields', [{}, dict(student__lora__rank=2), dict(
    student__lora__rank=2, compute__frozen_dtype='bfloat16', teacher__kind='initial_student',
    teacher__path='')])
def test_what_stays_is_that_of_the_arrays(fields):
  run, made = _open(tiny.with_models('opd_exact', **GOOD, **fields))
  there = memory.resident_bytes(lowered.resident(made), made.parts.mesh)
  base = made.parts.read_base()
  graders = made.connect(base)
  state = made.init(made.parts.read_trained())
  arrays = {id(x): x.nbytes for x in jax.tree.leaves(
      (state, base, graders['teacher'].params, made.heads(graders)))}
  assert sum(there.values()) == sum(arrays.values())
  assert ('teacher' in there) == (fields.get('teacher__kind') != 'initial_student'
                                  or there['teacher'] < there['base'])
  assert 'heads' not in there  # they are the teacher's own, tied or not


def test_what_a_program_takes_is_what_it_is_called_with():
  """Shapes stand for the arrays of a step, to the byte."""
  c = tiny.with_models('opd_exact', **GOOD)
  run, made = _open(c)
  there = lowered.resident(made)
  calls = lowered.calls(run, made, there)
  stream = made.parts.streams[0]
  graders = made.connect(None)
  state = made.init(made.parts.read_trained())
  indices = np.arange(stream.rows)
  with jax.set_mesh(made.parts.mesh):
    rollout, = made.write(stream, state.params, graders, indices, load.fold_in(
        jax.random.key(0), 0, 0))
    batch = made.grade(stream, state.params, graders, indices, [rollout])
  for name, args in (('score teacher', (graders['teacher'].params, rollout)), ('update', (
      state, (batch,), made.heads(graders), None, load.fold_in(jax.random.key(0), 0, 0)))):
    expected = [(x.shape, x.dtype) for x in jax.tree.leaves(calls[name].args)]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(args)] == expected
  update = calls['update'].compile()
  found = memory.memory_of(calls['update'], update, there)
  # The update has everything but the teacher among its arguments.
  held = found.total - found.resident['teacher']
  stats = update.memory_analysis()
  assert held == pytest.approx(
      stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
      - stats.alias_size_in_bytes, rel=0.01)


def test_more_rows_in_a_pass_take_more():
  """Of the very programs of the run, and not of a formula."""
  temporaries = {}
  for rows in (8, 32):
    there, calls = _looked_at(tiny.with_models('opd_exact', **GOOD, compute__microbatch_rows=rows))
    update = calls['update']
    temporaries[rows] = memory.memory_of(update, update.compile(), there).temporaries
  assert 1.5 * temporaries[8] < temporaries[32]


def test_every_stream_is_looked_at():
  _, calls = _looked_at(tiny.with_models('opd_exact', **GOOD, **BESIDE))
  assert {name for name in calls if not name.startswith('evaluate')} == {
      'sample', 'score teacher', 'off_policy sample', 'off_policy score teacher', 'update',
      'off_policy update'}
  update = calls['update'].args[1]
  assert [b.rollout.tokens.shape[0] for b in update] == [32, 16]  # with the rows beside it
  assert isinstance(update[1], Batch) and update[1].teacher is None
  assert isinstance(calls['update'].args[2], Heads)


def test_what_is_compiled_for_a_look_allocates_the_same(monkeypatch):
  run, made = _open(tiny.with_models('opd_exact', **GOOD))
  there, compiled = lowered.resident(made), []
  calls = lowered.calls(run, made, there)
  for name in ('sample', 'score teacher', 'update', 'evaluate greedy'):
    looked, run_later = (memory.memory_of(calls[name], calls[name].compile(options), there)
                         for options in (lowered.look_options(), None))
    assert looked.temporaries == pytest.approx(run_later.temporaries, rel=0.01), name
  monkeypatch.setattr(lowered.Call, 'begin', lambda self, options: (
      lambda: compiled.append(options)))
  monkeypatch.setattr(memory, 'memory_of', lambda *args: memory.Memory({}, 0.0, 1.0, 0.0))
  for look, expected in ((True, lowered.look_options()), (False, None)):
    said = []
    memory.check_memory(run, made, said.append, look=look)
    assert said == [f'compiling: {name}' for name in (
        lowered.for_a_look(calls, short=True) if look else calls)]
    assert compiled == [expected] * len(said)
    compiled.clear()


@pytest.mark.parametrize(('fields', 'left'), [  # of 32 rows a step
    (dict(eval__problems=4), {'sample'}),
    (dict(eval__samples_per_problem=4), {'evaluate sample'}),
    (dict(eval__samples_per_problem=4, sample__top_k=4, eval__top_k=8),
     {'sample', 'evaluate sample'}),
    (dict(eval__problems=4, eval__top_k=4), {'sample', 'evaluate sample'})])
def test_no_sampler_is_looked_at_beside_one_that_takes_as_much(fields, left):
  run, made = _open(tiny.with_models('opd_exact', **{**GOOD, **fields}))
  there = lowered.resident(made)
  calls = lowered.calls(run, made, there)
  kept = lowered.for_a_look(calls, short=False)
  samplers = {name for name in calls if name.endswith(('sample', 'greedy'))}
  assert set(kept) - samplers == set(calls) - samplers
  assert set(kept) & samplers == left
  assert all(kept[name] is calls[name] for name in kept)  # what the run calls, where it is kept
  found = {name: memory.memory_of(call, call.compile(lowered.look_options()), there).total
           for name, call in calls.items() if name in samplers}
  assert max(found.values()) == max(found[name] for name in left)


def test_the_last_two_lengths_of_a_cache_allocate_as_much_as_all(tmp_path):
  path = tiny.write_model(tmp_path / 'model', max_position_embeddings=1024)
  c = tiny.config('opd_exact', student__path=str(path), teacher__path=str(path), **GOOD)
  c.data.max_new_tokens, c.eval.max_new_tokens = 512, 8
  run, made = _open(c)
  there = lowered.resident(made)
  calls = lowered.calls(run, made, there)
  short = lowered.for_a_look(calls, short=True)['sample']
  loops = [call.text().count(' while(') for call in (calls['sample'], short)]
  assert loops[1] < loops[0]
  all_of_them, two = (memory.memory_of(call, call.compile(lowered.look_options()), there)
                      for call in (calls['sample'], short))
  assert two.total == pytest.approx(all_of_them.total, rel=0.01)


class TestRefusal:

  def test_it_comes_before_a_weight_is_read(self, tmp_path, monkeypatch):
    c = tiny.with_models('opd_sampled', **GOOD)
    monkeypatch.setattr(memory, 'device_bytes', lambda: 1000.0)
    monkeypatch.setattr(load, 'read', lambda *args: pytest.fail('a weight was read'))
    with pytest.raises(config.ConfigError, match=r'compute\.microbatch_rows=0.*memory.*allowed'):
      train.train(c, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()

  def test_the_largest_program_decides(self, monkeypatch):
    run, made = _open(tiny.with_models('opd_sampled', **GOOD))
    there = lowered.resident(made)
    found = {name: memory.memory_of(call, call.compile(), there).total
             for name, call in lowered.calls(run, made, there).items()}
    for share, status in ((0.99, FAIL), (1.05, WARN), (1.2, OK)):
      monkeypatch.setattr(memory, 'device_bytes', lambda s=share: s * max(found.values()))
      finding = memory.check_memory(run, made, print)
      assert (finding.status, finding.field) == (status, 'compute.microbatch_rows')
      assert finding.detail.startswith(f'{max(found, key=found.get)}: weights ')

  def test_a_compiler_that_knows_the_device_refuses_by_itself(self, monkeypatch):
    run, made = _open(tiny.with_models('opd_sampled', **GOOD))

    def full():
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 151.79G of 95.73G')

    monkeypatch.setattr(lowered.Call, 'begin', lambda *args: full)
    finding = memory.check_memory(run, made, print)
    assert finding.status == FAIL and '151.79G' in finding.detail

  def test_nothing_is_compiled_for_a_run_that_is_refused_anyway(self, monkeypatch):
    c = tiny.with_models('opd_sampled', **GOOD, optimizer__name='sgd', optimizer__b2=0.5)
    run, made = _open(c)
    monkeypatch.setattr(lowered.Call, 'begin', lambda *args: pytest.fail('compiled'))
    found = {f.check: f.status for f in examine.examine(run, made)}
    assert (found['unused_options'], found['memory']) == (FAIL, SKIPPED)


def test_the_names_say_what_the_loop_calls():
  run, made = _open(tiny.with_models('opd_sampled', **GOOD))
  calls = lowered.calls(run, made, lowered.resident(made))
  assert calls['sample'].program is made.writers[OWN]
  assert calls['update'].program is made.updates[OWN,]
  assert calls['evaluate compare'].program is made.evaluator.compare
