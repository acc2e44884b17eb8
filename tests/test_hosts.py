"""Two and four processes on this machine as one run: started, stopped, killed, resumed, refused.

Processes are those of the console command, each with devices of its own, and talk over gloo. What a
run computes does not depend on how many processes hold its devices, but for the order in which
floating-point numbers are summed.
"""

import json
import re
import shutil
import signal
import time

from ml_collections import ConfigDict
import numpy as np
import pytest
import several
import tiny

from opd_jax import experiment
from opd_jax.doctor import rollouts
from opd_jax.files import workdir as workdir_lib

STEPS = 9
# float32 sums in another order: about 1e-7 of relative rounding each, which nine steps of Adam may
# enlarge; the weights, relative to the distance that they have moved.
RELATIVE, OF_THE_DISTANCE = 1e-4, 1e-2


@pytest.fixture(scope='module')
def launcher(tmp_path_factory):
  with several.Launcher(tmp_path_factory.mktemp('hosts')) as launcher:
    yield launcher


def write_command(launcher, name, c):
  """The arguments of `opd` for a run, but for its work directory."""
  return 'train', '--config', tiny.write_config(launcher.folder / f'{name}.py', c), '--workdir'


@pytest.fixture(scope='module')
def straight(launcher):
  """(work directory, what became of each process) of a run that two processes made, which SLURM
  started, on 2 x 2 devices; all that a run can have is in it."""
  command = write_command(launcher, 'opd', distillation())
  workdir = launcher.folder / 'straight'
  job = dict(SLURM_JOB_ID='7', SLURM_STEP_NODELIST='localhost', SLURM_NTASKS='2',
             SLURM_STEP_TASKS_PER_NODE='2', JAX_COORDINATOR_PORT=str(several.free_port()))
  done = [launcher.start(*command, workdir, SLURM_PROCID=i, SLURM_LOCALID=i, **job) for i in '01']
  done = [p.finish() for p in done]
  assert [p.returncode for p in done] == [0, 0], [p.stderr for p in done]
  return workdir, done


@pytest.fixture(scope='module')
def single(launcher):
  """The work directory of the same run by one process with all devices."""
  command = write_command(launcher, 'opd', distillation())
  done = launcher.start(*command, launcher.folder / 'single', devices=4).finish()
  assert done.returncode == 0, done.stderr
  return launcher.folder / 'single'


def distillation():
  return tiny.with_models('opd_sampled', steps=4, eval__every_steps=2, compute__microbatch_rows=4)


@pytest.fixture(scope='module')
def command(launcher):
  """The arguments of a run of few programs, for what is about processes and files."""
  c = tiny.with_models('sft', steps=STEPS, checkpoint__every_steps=3, checkpoint__keep_latest=3)
  without_checks(c)
  return write_command(launcher, 'run', c)


def without_checks(c):
  for name in rollouts.__dict__:
    if name.startswith('check_'):
      c.doctor[name.removeprefix('check_')] = 'off: its program is compiled in other tests'


@pytest.fixture(scope='module')
def whole(launcher, command):
  """The work directory of that run by two processes, which nothing interrupted."""
  done = launcher.run(2, *command, launcher.folder / 'whole')
  assert [p.returncode for p in done] == [0, 0], [p.stderr for p in done]
  return launcher.folder / 'whole'


def start_held(launcher, command, workdir, where, count=2, devices=2):
  """The processes of a run that waits at a place, in its first process, and the file to remove."""
  marker = workdir.with_suffix('.held')
  out = [launcher.start(*command, workdir, *flags, devices=devices,
                        hold=(where, marker) if i == 0 else None)
         for i, flags in enumerate(several.flags(count))]
  tiny.wait_until(marker.exists)
  return out, marker


def assert_same_run(workdir, other):
  tiny.assert_same_bits(*(tiny.read_checkpoint(w, STEPS) for w in (workdir, other)))
  assert tiny.rows(workdir, timing=False) == tiny.rows(other, timing=False)
  a, b = tiny.load_export(workdir), tiny.load_export(other)
  assert all(a[name].tobytes() == b[name].tobytes() for name in b)


class TestTrain:

  def test_metrics_are_those_of_one_process(self, straight, single):
    for kind in ('train', 'eval'):
      rows = zip(tiny.rows(straight[0], kind), tiny.rows(single, kind), strict=True)
      for a, b in rows:
        assert a['step'] == b['step'] and a['flops'] == b['flops']
        assert a.get('text') == b.get('text') and a['length'] == b['length']
        for name in {'loss', 'grad_norm', 'reverse_kl', 'entropy_student', 'sampled_accuracy',
                     'greedy_accuracy'} & a.keys():
          assert a[name] == pytest.approx(b[name], rel=RELATIVE), (kind, a['step'], name)

  def test_weights_are_those_of_one_process(self, straight, single):
    before = tiny.load_export(tiny.student().parent)
    a, b = tiny.load_export(straight[0]), tiny.load_export(single)
    for name in before:
      moved = np.linalg.norm(b[name] - before[name])
      assert moved > 0 and np.linalg.norm(a[name] - b[name]) < OF_THE_DISTANCE * moved, name

  def test_one_process_writes_and_speaks(self, straight):
    workdir, (first, second) = straight
    assert [r['step'] for r in tiny.rows(workdir, 'train')] == [1, 2, 3, 4]
    assert len(list((workdir / 'tensorboard').iterdir())) == 1
    assert 'done: ' in first.stdout and 'step 4/4' in first.stdout
    assert (second.stdout, first.stderr, second.stderr) == ('', '', '')
    names = {p.name for p in workdir.iterdir()}
    assert not [n for n in names if 'partial' in n] and workdir_lib.EXPORT in names

  def test_each_function_is_compiled_once(self, straight):
    assert {r['perf']['compiles'] for r in tiny.rows(straight[0], 'train')} == {4}  # one lays out


class TestStopped:

  def test_a_signal_to_one_stops_all_and_they_go_on_to_the_same_bits(
      self, launcher, command, whole):
    workdir = launcher.folder / 'stopped'
    processes, marker = start_held(launcher, command, workdir, 'row:5')
    processes[1].kill(signal.SIGTERM)
    marker.unlink()
    done = [p.finish() for p in processes]
    assert [p.returncode for p in done] == [143, 143], [p.stderr for p in done]
    said = [re.search(r'interrupted at step (\d+), which is saved', p.stderr)[1] for p in done]
    assert said[0] == said[1] and all('Traceback' not in p.stderr for p in done)
    assert tiny.checkpoint_steps(workdir)[-1] == int(said[0]) < STEPS
    assert tiny.rows(workdir, 'train')[-1]['step'] == int(said[0])

    # One process cannot read its part of the newest, and the other can: it must not go on from it,
    # nor wait.
    newest = workdir / 'checkpoints' / said[0] / 'state'
    parts = list(newest.rglob('ocdbt.process_1/d/*'))
    assert parts
    for part in parts:
      part.write_bytes(b'')
    done = launcher.run(2, *command, workdir)
    assert [p.returncode for p in done] == [0, 0], [p.stderr for p in done]
    assert f'WARNING: the checkpoint of step {said[0]} is damaged' in done[0].stderr
    assert (workdir / 'damaged' / said[0]).is_dir()
    assert 'resumed from the checkpoint of step 6' in done[0].stdout
    assert_same_run(workdir, whole)


class TestStoppedBeforeTheFirstStep:

  def test_what_the_teacher_has_written_is_kept(self, launcher):
    c = tiny.with_models('sft_teacher', data__teacher_answers='fixed', data__limit=30,
                         data__prompts_per_step=8, steps=1, checkpoint__every_steps=1)
    without_checks(c)
    command, file = write_command(launcher, 'answers', c), workdir_lib.ANSWERS.format('own')
    done = launcher.run(2, *command, launcher.folder / 'answered')
    assert [p.returncode for p in done] == [0, 0], [p.stderr for p in done]
    whole = (launcher.folder / 'answered' / file).read_bytes()

    workdir = launcher.folder / 'unanswered'
    partial = workdir / f'{file}.partial'
    processes, marker = start_held(launcher, command, workdir, 'answers:1')
    processes[1].kill(signal.SIGTERM)
    marker.unlink()
    done = [p.finish() for p in processes]
    assert [p.returncode for p in done] == [143, 143], [p.stderr for p in done]
    said = {int(re.search(r'had written (\d+) of 30 answers', p.stderr)[1]) for p in done}
    assert said < {8, 16} and len(said) == 1, said
    assert len(partial.read_bytes().splitlines()) == said.pop()

    processes, marker = start_held(launcher, command, workdir, 'answers:1')
    begun = len(partial.read_bytes().splitlines())
    processes[0].kill()
    [p.finish() for p in processes]
    assert len(partial.read_bytes().splitlines()) == begun and whole.startswith(
        partial.read_bytes())
    marker.unlink()
    done = launcher.run(2, *command, workdir)
    assert [p.returncode for p in done] == [0, 0], [p.stderr for p in done]
    assert (workdir / file).read_bytes() == whole and not partial.exists()
    assert tiny.rows(workdir, timing=False) == tiny.rows(launcher.folder / 'answered', timing=False)


class TestDied:

  @pytest.mark.parametrize(('victim', 'count', 'devices'), [(2, 4, 1), (0, 2, 2)])
  def test_a_process_that_is_killed_ends_the_others_with_its_name(
      self, victim, count, devices, launcher, command):
    workdir = launcher.folder / f'killed{victim}'
    processes, marker = start_held(launcher, command, workdir, 'row:5', count, devices)
    tiny.wait_until(lambda: 3 in tiny.checkpoint_steps(workdir))
    began = time.monotonic()
    processes[victim].kill()
    marker.unlink()
    name = f'error: process {victim} of {count} '
    done = [p.finish(until=name) for p in processes]
    assert time.monotonic() - began < 60  # with the seconds in which it is agreed on
    assert all(p.returncode for p in done)
    for p in done:  # one line, and none of the pages of C++
      assert re.fullmatch(name + r'\(.+, pid \d+\) has died\n', p.stderr), p.stderr

  # Each after the kill that left its directory.
  @pytest.mark.parametrize(('victim', 'count', 'devices', 'mesh'), [
      (2, 2, 2, ()), (0, 1, 4, ('--config.compute.mesh.fsdp=2', '--config.compute.mesh.tensor=2'))])
  def test_others_go_on_from_there(self, victim, count, devices, mesh, launcher, command, whole):
    workdir = launcher.folder / f'killed{victim}'
    if not workdir.exists():
      pytest.skip('the test before has not run')
    done = launcher.run(count, *command, workdir, *mesh, devices=devices)
    assert [p.returncode for p in done] == [0] * count, [p.stderr for p in done]
    # What is restored has the checksums of every bit that was saved, or it would not be.
    assert 'resumed from the checkpoint of step 3' in done[0].stdout
    rows = zip(tiny.rows(workdir, 'train'), tiny.rows(whole, 'train'), strict=True)
    assert all(a['loss'] == pytest.approx(b['loss'], rel=RELATIVE) for a, b in rows)
    if count == 2:  # the same mesh, and gloo sums over devices in the same order
      assert_same_run(workdir, whole)

  def test_a_write_that_fails_on_the_first_one_ends_the_others(self, launcher, command):
    workdir = launcher.folder / 'removed'
    processes, marker = start_held(launcher, command, workdir, 'row:2')
    shutil.rmtree(workdir)
    marker.unlink()
    first, second = [p.finish() for p in processes]
    assert (first.returncode, second.returncode) == (2, 2)
    assert re.fullmatch(r'error: .*removed.*\n', first.stderr), first.stderr
    assert re.fullmatch(r'error: process 0 of 2 .*removed.*\n', second.stderr), second.stderr


@pytest.fixture(scope='module')
def pipeline(launcher):
  """(config file, work directory) of two stages by two processes: adapters that reinforcement
  learning trains, and supervised learning from what came out."""
  c = experiment.default_pipeline()
  c.name, c.order = 'hosts', ('rl', 'after')
  rl = tiny.with_models('grpo', steps=3, student__lora__rank=4, optimizer__learning_rate=1e-2)
  after = tiny.config('sft', steps=2, student__path='stage:rl')
  c.stages = ConfigDict(dict(rl=rl, after=after))
  c.report.methods, c.report.labels, c.report.teacher = ('after',), ('after',), ''
  file, workdir = tiny.write_config(launcher.folder / 'pipeline.py', c), launcher.folder / 'pipe'
  done = launcher.run(2, 'train', '--config', file, '--workdir', workdir)
  assert [p.returncode for p in done] == [0, 0], [p.stderr for p in done]
  return file, workdir


class TestCommands:

  def test_a_pipeline_with_a_verifier_and_adapters(self, pipeline):
    workdir = pipeline[1]
    assert all((workdir / name).exists() for name in ('report.md', 'report.json', 'curves.png'))
    rows = tiny.rows(workdir / 'seed_0' / 'rl', 'train')
    assert len(rows) == 3 and all(0.0 < r['reward'] < 1.0 and r['grad_norm'] > 0.0 for r in rows)
    assert json.loads((workdir / 'seed_0' / 'after' / 'result.json').read_text())['steps'] == 2

  def test_exports_and_evaluations_are_those_of_one_process(self, pipeline, launcher):
    file, workdir = pipeline
    stage, out = workdir / 'seed_0' / 'rl', {}
    for count in (2, 1):
      folder = launcher.folder / f'exported{count}'
      done = launcher.run(count, 'export', '--workdir', stage, '--output', folder, '--format',
                          'adapter', devices=4 // count)
      assert [p.returncode for p in done] == [0] * count, [p.stderr for p in done]
      done = launcher.run(count, 'evaluate', '--config', file, '--stage', 'rl', '--model',
                          stage / 'export', devices=4 // count)
      assert [p.returncode for p in done] == [0] * count, [p.stderr for p in done]
      out[count] = (folder / 'adapter_model.safetensors').read_bytes(), done[0].stdout
      assert all(p.stdout == '' for p in done[1:])
    assert out[1] == out[2]
