"""`opd plan`: programs from config.json alone, what they take, and settings that fit."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import rich.console
import tiny

from opd_jax import build, config, programs
from opd_jax.algorithm import slots as slots_lib
from opd_jax.data.streams import OWN
from opd_jax.doctor import lowered, memory
from opd_jax.errors import ConfigError
from opd_jax.run import flops
from opd_jax.tools.plan import command, hardware, hlo, nearest, phases, shapes

ONE = 'gpu:1xh100'
# What the update of a run takes of a slice, and what XLA says of it.
UPDATE = '''
import json, sys
from opd_jax import config
from opd_jax.doctor import lowered, memory
from opd_jax.tools.plan import hardware, phases, shapes
values, folder = json.loads(sys.stdin.read())
topology = hardware.parse('v5p:2x2x1')
devices = hardware.devices(topology)
run = shapes.parse(config.from_dict(values), folder)
programs = phases.open_programs(run, topology, devices)
there = lowered.resident(programs)
update = lowered.calls(run, programs, there)['update']
compiled = update.compile()
found = memory.memory_of(update, compiled, there)
print(json.dumps(dict(total=found.total, teacher=found.resident['teacher'],
                      peak=compiled.memory_analysis().peak_memory_in_bytes)))
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """What `--models` names: two models, of each only the config.json, and a config."""
  path = tmp_path_factory.mktemp('models')
  values = {**tiny.SHAPE, 'vocab_size': 64}
  for name, shape in (('tiny/student', {}), ('teacher', {'num_hidden_layers': 3})):
    (path / name).mkdir(parents=True)
    (path / name / 'config.json').write_text(json.dumps({**values, **shape}))
  tiny.write_config(path / 'one.py', _config())
  return path


def _config(kind='opd_exact', **fields):
  return tiny.config(kind, **dict(student__path='tiny/student', teacher__path='tiny/teacher',
                                  compute__microbatch_rows=16) | fields)


def _run(folder, *args, **fields):
  return shapes.parse(_config(*args, **fields), str(folder))


def _limit(monkeypatch, size):
  """A chip with so many bytes."""
  chip = dataclasses.replace(hardware.CHIPS['h100'], hbm_bytes=size)
  monkeypatch.setitem(hardware.CHIPS, 'h100', chip)


class TestShapes:

  def test_a_model_is_a_config_json(self, folder):
    run = _run(folder)
    assert run.student.path == str(folder / 'tiny' / 'student')
    assert run.teacher.path == str(folder / 'teacher')  # without its organization
    parts = shapes.open_parts(run, jax.devices())
    assert [m.model.config.num_hidden_layers for m in (parts.student, parts.teacher)] == [2, 3]
    with pytest.raises(TypeError):
      parts.read_trained()  # there is nothing to read

  @pytest.mark.parametrize('fields', [
      {}, dict(student__lora__rank=2), dict(teacher__kind='initial_student', teacher__path='')])
  def test_programs_are_those_of_a_start(self, folder, fields, tmp_path):
    """The same shapes, program by program, as with weights, tokenizers and data."""
    run = _run(folder, **fields)
    planned = programs.compile_programs(run, shapes.open_parts(run, jax.devices()))
    real = dict(student__path=str(tiny.write_model(tmp_path / 'student')))
    if run.teacher.path:
      real['teacher__path'] = str(tiny.write_model(tmp_path / 'teacher', num_hidden_layers=3))
    run = config.parse(tiny.override(_config(**fields), **real))
    started = programs.compile_programs(run, build.open_parts(run))
    one, other = ({name: jax.tree.map(lambda x: (x.shape, x.dtype), (call.args, call.keywords))
                   for name, call in lowered.calls(run, made, lowered.resident(made)).items()}
                  for made in (planned, started))
    assert one == other and {'sample', 'score teacher', 'update', 'evaluate compare'} <= set(one)

  @pytest.mark.parametrize(('fields', 'match'), [
      (dict(compute__mesh__fsdp=3), r"compute\.mesh=.*'fsdp': 3.*needs 3 devices; allowed"),
      (dict(teacher__path='tiny/nobody'), r"teacher\.path='tiny/nobody'.*allowed.*--models"),
      (dict(data__max_new_tokens=60), r'data\.max_prompt_tokens=5.*max_new_tokens=60.*at most 32'),
      (dict(teacher__factory='a.b:c'), r"teacher\.factory='a\.b:c'.*allowed: ''")])
  def test_what_a_start_would_refuse(self, folder, fields, match):
    with pytest.raises(ConfigError, match=match):
      shapes.open_parts(_run(folder, **fields), jax.devices())

  def test_a_topology_that_the_mesh_does_not_fit(self, folder):
    run, two = _run(folder, compute__mesh__fsdp=1), [*jax.devices()] * 2
    with pytest.raises(ConfigError, match=r'compute\.mesh=.*needs 1 devices; allowed.*2'):
      shapes.open_parts(run, two)


@pytest.fixture(scope='module')
def plan(folder):
  return command.make(_run(folder), hardware.parse(ONE), price=3.6)


class TestPlan:

  def test_a_phase_a_row(self, plan):
    assert [p.name for p in plan.phases] == ['sample', 'score teacher', 'update']
    assert all(p.times == 1 for p in plan.phases) and plan.fits and not plan.tries
    tokens = {p.name: p.tokens for p in plan.phases}
    assert tokens == {'sample': 32 * 6, 'score teacher': 32 * 11, 'update': 32 * 11}
    for p in plan.phases:
      assert p.roofline_s == max(p.seconds.values()) > 0 and not p.traffic
      # What XLA gets has the products of the jaxpr, loops and all. Of the sampler's loop, which
      # begins with the second token, its condition has the number of tokens.
      assert p.flops <= p.device_flops <= (1.2 if p.name == 'sample' else 1.0) * p.flops

  def test_flops_are_those_of_the_formula(self, plan):
    """run/flops.py against the programs: but for the masked half of attention, for the head, which
    sees completions only, and for the last token, which predicts nothing."""
    parts = phases.open_programs(plan.run, plan.topology, jax.devices()).parts
    rows, room, length = 32, 6, 10

    def forward(model):
      c, lengths = model.config, np.full(rows, length)
      masked = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * (
          rows * length * (length - 1) / 2)
      return flops.forward_flops(model, lengths) - flops.head_flops(model, lengths) + masked

    student, teacher = parts.student.model, parts.teacher.model
    heads = flops.head_flops(student, np.full(rows, room))
    found = {p.name: p.flops for p in plan.phases}
    assert found['score teacher'] == forward(teacher)
    # Three forwards of the student, and the teacher's head once.
    assert found['update'] == 3 * (forward(student) + heads) + heads

  def test_bytes_are_those_of_the_arrays(self, plan):
    update = plan.phases[-1]
    count = sum(x.size for x in jax.tree.leaves(phases.open_programs(
        plan.run, plan.topology, jax.devices()).state.params))
    assert update.memory.resident['weights'] == 4 * count
    assert update.hbm_bytes > 2 * 12 * count  # weights and moments, read and written
    sample = plan.phases[0]
    keys_and_values = 32 * 11 * 2 * 2 * 2 * 8 * 4  # rows, slots, two, layers, heads, width, bytes
    assert keys_and_values < sample.cache_bytes < 1.01 * keys_and_values  # and what is valid

  def test_the_sum(self, plan):
    s = plan.summary()
    step = sum(p.roofline_s for p in plan.phases)
    assert s['step_s'] == pytest.approx(step)
    assert s['chip_hours'] == pytest.approx(step * plan.run.steps / 3600)
    assert s['cost_usd'] == pytest.approx(3.6 * s['chip_hours'])
    assert s['model_flops_utilization'] == pytest.approx(plan.model_flops.total / step / 494e12)
    assert sum(s['model_flops_by_part'].values()) == s['model_flops_per_step']
    assert 0 < s['model_flops_utilization'] < 1

  def test_experts_that_are_not_used_cost_nothing(self, folder, tmp_path):
    """XLA's CPU multiplies by all of them; what is asked for is what counts."""
    values = {**tiny.SHAPE, 'vocab_size': 64, 'model_type': 'qwen3_moe', 'num_experts': 8,
              'num_experts_per_tok': 2, 'moe_intermediate_size': 16, 'norm_topk_prob': True}
    (tmp_path / 'teacher').mkdir()
    (tmp_path / 'teacher' / 'config.json').write_text(json.dumps(values))
    run, one = _run(folder, teacher__path=str(tmp_path / 'teacher')), hardware.parse(ONE)
    made = phases.open_programs(run, one, jax.devices())
    score, = phases.measure(run, made, one, ('score teacher',))
    assert score.device_flops == score.flops
    model = made.parts.teacher.model
    lengths = np.full(32, 10)
    formula = flops.forward_flops(model, lengths) - flops.head_flops(model, lengths)
    assert formula < score.flops < 1.2 * formula

  def test_slots_are_passes_of_so_many_rows(self, folder):
    found = {}
    for slots in (0, 8):
      run, topology = _run(folder, sample__slots=slots), hardware.parse(ONE)
      made = phases.open_programs(run, topology, jax.devices())
      found[slots], = phases.measure(run, made, topology, only=('sample',))
    assert (found[0].times, found[8].times) == (1.0, 4.0)
    assert 4 * found[8].cache_bytes == pytest.approx(found[0].cache_bytes, rel=1e-3)
    assert 4 * found[8].flops == pytest.approx(found[0].flops)

  def test_a_cache_that_grows_is_counted_once(self, folder, monkeypatch):
    run, topology = _run(folder, data__max_new_tokens=20), hardware.parse(ONE)
    found = []
    for long in (512, 20):
      monkeypatch.setattr(slots_lib, 'LONG', long)
      made = phases.open_programs(run, topology, jax.devices())
      phase, = phases.measure(run, made, topology, only=('sample',))
      found.append((phase.flops, phase.device_flops))
    # Less attention: half of the rows' places on average, and the same matrices.
    assert 0.8 < found[1][0] / found[0][0] < 1.0
    assert found[1][1] == pytest.approx(found[1][0], rel=1e-6)

  def test_streams_count_by_their_share(self, folder):
    run = _run(folder, data__off_policy_source='teacher', data__on_policy_fraction=0.25,
               optimizer__updates_per_batch=1)
    made = phases.open_programs(run, hardware.parse(ONE), jax.devices())
    times = {p.name: p.times for p in phases.measure(run, made, hardware.parse(ONE))}
    assert times == {'sample': 0.25, 'score teacher': 0.25, 'off_policy sample': 0.75,
                     'off_policy score teacher': 0.75, 'update': 0.25, 'off_policy update': 0.75}
    own = _run(folder, optimizer__updates_per_batch=1)
    alone = command.model_flops(own, phases.open_programs(own, hardware.parse(ONE), jax.devices()))
    # A quarter of its own rows; the others differ in that the larger teacher writes them.
    assert command.model_flops(run, made) == dataclasses.replace(
        alone, student_sampling=0.25 * alone.student_sampling,
        teacher_sampling=0.75 * alone.teacher_scoring)

  def test_what_is_done_for_each_update(self, folder):
    own = types.SimpleNamespace(name=OWN, steps=(0.0, 0.25), fixed=False, prompts=8,
                                objective=types.SimpleNamespace(advantages='recomputed'))
    other = types.SimpleNamespace(**vars(own) | {'name': 'other', 'steps': (0.25, 1.0)})
    programs = types.SimpleNamespace(parts=types.SimpleNamespace(streams=[own, other]))
    run = _run(folder, steps=10, data__limit=20, optimizer__updates_per_batch=3)
    expected = {'sample': 0.25, 'score teacher': 0.25, 'score student': 0.75, 'update': 0.75,
                'other sample': 0.75, 'other score student': 0.75, 'other update': 2.25}
    assert {name: phases._times(run, programs, name) for name in expected} == expected
    own.fixed = True  # 20 examples in batches of 8, once in a run of 10 steps
    assert [phases._times(run, programs, x) for x in ('sample', 'score teacher')] == [0.3, 0.25]

  def test_every_byte_is_counted_once(self, folder, monkeypatch):
    run, one = _run(folder), hardware.parse(ONE)
    made = phases.open_programs(run, one, jax.devices())
    size = sum(x.nbytes for x in map(
        lambda x: np.empty(x.shape, x.dtype), jax.tree.leaves(made.state.params)))

    def bytes_with(*counts):
      monkeypatch.setattr(hlo, 'count', lambda *_: hlo.Counts(0.0, *counts))
      return phases.measure(run, made, one, ('update',))[0].hbm_bytes

    whole = bytes_with(0.0, [])
    assert 2 * 3 * size < whole < 2.5 * 3 * size  # weights and moments, in and out; few rows
    # A result is written and read.
    assert bytes_with(5e9, [hlo.Collective('all-gather', (0,), 1e9, 3)]) == whole + 5e9 + 6e9


class TestNearest:

  def test_smaller_passes_come_before_other_meshes(self, folder):
    run = _run(folder, data__prompts_per_step=64)
    found = list(nearest.candidates(run, 8))
    # 8 rows a shard.
    assert found[:2] == [{'compute.remat': 'layer'}, {'compute.microbatch_rows': 4}]
    assert found[-1]['compute.mesh.tensor'] == 8 and found[-1]['compute.dtype'] == 'bfloat16'
    changed = nearest.change(run, found[-1]).compute
    assert (changed.remat, changed.dtype, changed.mesh.tensor) == ('layer', 'bfloat16', 8)
    assert changed.microbatch_rows == 1

  def test_what_fits_is_found_by_compiling(self, folder, monkeypatch):
    run, one = _run(folder, compute__microbatch_rows=0), hardware.parse(ONE)
    plan = command.make(run, one)
    update = plan.phases[-1].memory.total
    others = max(p.memory.total for p in plan.phases[:-1])
    _limit(monkeypatch, max(others, 0.8 * update) + 1)
    plan = command.make(run, one)
    assert not plan.fits and plan.tries[-1].fits
    assert all(not t.fits for t in plan.tries[:-1]) and len(plan.tries) <= nearest.TRIES
    # It holds what it says.
    better = command.make(nearest.change(run, plan.tries[-1].settings), one, tries=0)
    assert better.phases[-1].fits(one)
    assert better.phases[-1].memory.total == plan.tries[-1].worst_bytes
    assert '--config.compute.' in plan.tries[-1].describe()

  def test_tries_are_bounded(self, folder, monkeypatch):
    run, one = _run(folder), hardware.parse(ONE)
    _limit(monkeypatch, 1.0)
    plan = command.make(run, one, tries=2)
    assert len(plan.tries) == 2 and not any(t.fits for t in plan.tries)

  def test_a_compiler_that_refuses(self, folder, monkeypatch):
    compile_it = lowered.Call.compile

    def full(self, options=None):
      compile_it(self, options)  # XLA writes the partitioned module before it finds out
      raise jax.errors.JaxRuntimeError(
          'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 151.79G of 95.73G hbm. '
          'Exceeded hbm capacity by 56.06G.')

    monkeypatch.setattr(lowered.Call, 'compile', full)
    assert phases._said('RESOURCE_EXHAUSTED: the total memory required for HLO temporaries '
                        '(240.00G) exceeds available HBM (30.75G).') == (
                            'needs 240.00G of 30.75G, 209.25G too much')
    plan = command.make(_run(folder), hardware.parse(ONE), tries=1)
    assert not plan.fits and plan.phases[-1].memory is None
    assert plan.phases[-1].refused == 'needs 151.79G of 95.73G, 56.06G too much'
    assert plan.phases[-1].roofline_s > 0  # what it does is known all the same


class TestCommand:

  @pytest.mark.parametrize(('args', 'said'), [
      (('MODELS', float('nan'), None), '--price=nan'), (('MODELS', -4.0, None), '--price=-4'),
      (('/nowhere', 0.0, None), "--models='/nowhere'"),
      (('MODELS', 0.0, '/nowhere/plan.json'), "--json='/nowhere/plan.json'"),
      (('MODELS', 0.0, '/'), "--json='/'")])
  def test_what_cannot_be_is_said_before_anything_is_compiled(
      self, args, said, folder, monkeypatch):
    monkeypatch.setattr(command, 'make', None)
    models, price, file = args
    with pytest.raises(ConfigError, match=f'{said}.*allowed'):
      command.command(_config(), ONE, models.replace('MODELS', str(folder)), price, file)

  def test_numbers_can_be_read(self, plan):
    out = io.StringIO()
    console = rich.console.Console(file=out, width=200)
    plan = dataclasses.replace(plan, price=3e9)
    command.show(plan, console)
    s = plan.summary()
    text = out.getvalue()
    assert f'{s["answer_tokens_per_s"]:,.0f} answer tokens/s' in text and 'e+' not in text
    assert f'{s["cost_usd"]:,.2f} USD' in text

  def test_on_eight_gpus(self, folder, tmp_path):
    done = tiny.opd('plan', '--config', folder / 'one.py', '--topology', 'gpu:8xh100', '--models',
                    folder, '--json', tmp_path / 'plan.json', '--price', 2,
                    '--config.compute.mesh.tensor=2', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for text in ('score teacher', 'NVLink', 'fits', 'tokens/s', 'chip-hours', 'USD', 'roofline'):
      assert text in done.stdout
    plan = json.loads((tmp_path / 'plan.json').read_text())
    assert plan['fits'] and plan['chips'] == 8 and plan['mesh']['tensor'] == 2
    traffic = {p['name']: {t['axes'] for t in p['traffic']} for p in plan['phases']}
    assert all('tensor' in axes for axes in traffic.values())
    for t in (t for p in plan['phases'] for t in p['traffic']):
      assert t['seconds'] == pytest.approx(t['sent_bytes'] / 450e9 + 15e-6 * t['count'])
    cache = next(p['cache_bytes'] for p in plan['phases'] if p['name'] == 'sample')
    # By rows over four, by key/value heads over two; and of each slot whether it is valid.
    assert 1.0 < cache / (32 * 11 * 2 * 2 * 2 * 8 * 4 / 8) < 1.02
    assert plan['chip_hours'] == pytest.approx(8 * plan['step_s'] * plan['steps'] / 3600)
    assert not (tmp_path / 'runs').exists()

  def test_refusals(self, folder, tmp_path):
    for args, part in ((('--topology', 'v5q:2x2'), "--topology='v5q:2x2'; allowed"),
                       ((), "'plan' needs --topology"),
                       (('--topology', 'gpu:2xh100', '--config.compute.mesh.fsdp=3'),
                        'compute.mesh=')):
      done = tiny.opd('plan', '--config', folder / 'one.py', '--models', folder, *args,
                      cwd=tmp_path)
      assert done.returncode == 2 and part in done.stderr.splitlines()[0]


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs the extra plan')
class TestTpus:
  """Compiled by libtpu, on a machine that has none, in processes of their own: it takes none of the
  flags that XLA has for CPUs."""

  def test_a_device_is_a_chip(self):
    names = ['v4:2x2x1', 'v5e:4x4', 'v5p:2x2x1', 'v6e:2x4']
    code = 'import sys; from opd_jax.tools.plan import hardware\n' + (
        'for t in map(hardware.parse, sys.argv[1:]): assert len(hardware.devices(t)) == t.chips, t')
    done = subprocess.run([sys.executable, '-c', code, *names], text=True, capture_output=True,
                          env=tiny.environment(), timeout=tiny.PATIENCE_S)
    assert done.returncode == 0, done.stderr[-3000:]

  def test_a_slice(self, folder, tmp_path):
    done = tiny.opd('plan', '--config', folder / 'one.py', '--topology', 'v5p:2x2x1', '--models',
                    folder, '--json', tmp_path / 'plan.json', '--config.compute.mesh.tensor=2',
                    cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads((tmp_path / 'plan.json').read_text())
    assert plan['fits'] and plan['mesh']['tensor'] == 2
    for p in plan['phases']:
      assert {t['link'] for t in p['traffic']} == {'ICI'}
      assert p['device_flops'] >= p['flops'] / 4

  def test_what_the_formula_was_wrong_about(self, tmp_path):
    """The update of a 0.6B on four v5p, of which a formula said 16.1 GiB and XLA 5.8."""
    (tmp_path / 'q').mkdir()
    (tmp_path / 'q' / 'config.json').write_text(json.dumps(dict(
        tiny.SHAPE, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, intermediate_size=3072, tie_word_embeddings=True,
        rope_theta=1e6, max_position_embeddings=40960, vocab_size=151936)))
    c = tiny.config('opd_sampled', student__path='q', teacher__path='q', compute__dtype='bfloat16',
                    compute__remat='layer', compute__microbatch_rows=2, data__prompts_per_step=64,
                    data__max_prompt_tokens=512, data__max_new_tokens=1024)
    done = subprocess.run([sys.executable, '-c', UPDATE], text=True, capture_output=True,
                          input=json.dumps([config.to_dict(c), str(tmp_path)]),
                          env=tiny.environment(), timeout=tiny.PATIENCE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # XLA's peak has all but the teacher among the arguments.
    assert found['total'] == pytest.approx(found['peak'] + found['teacher'], rel=0.25)
    assert found['total'] < 8 * memory.GIB
    assert found['teacher'] == pytest.approx(2 * 596e6 / 4, rel=0.01)
