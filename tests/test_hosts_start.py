"""How several processes find each other, and what is refused before any of them computes."""

import concurrent.futures
import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
import types

from jax._src.clusters import cloud_tpu_cluster
import pytest
import several
import tiny

from opd_jax import __main__, config
from opd_jax.errors import ConfigError
from opd_jax.parallel import hosts, join

SLURM = {'SLURM_JOB_ID': '4242', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '2', 'SLURM_LOCALID': '0',
         'SLURM_STEP_NODELIST': 'gpu[07-10]', 'SLURM_STEP_TASKS_PER_NODE': '1(x4)'}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
  """An environment that says nothing of other processes, wherever the tests run."""
  for name in (*join.SIGNS, *SLURM, 'TPU_WORKER_ID', 'OMPI_MCA_orte_hnp_uri',
               'JAX_COORDINATOR_PORT', 'KUBERNETES_SERVICE_HOST', 'SLURM_GPUS_ON_NODE'):
    monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch, values):
  for name, value in values.items():
    monkeypatch.setenv(name, value)


class TestFind:

  def test_flags(self):
    assert join.find('', 0, -1) is None
    assert join.find('', 1, -1) is None
    assert join.find('a:1', 1, 0) is None
    found = join.find('10.0.0.1:1234', 2, 1)
    assert (found.address, found.processes, found.process) == ('10.0.0.1:1234', 2, 1)
    assert found.local_devices is None

  @pytest.mark.parametrize(('flags', 'field'), [
      (('a:1', 0, -1), r"\['processes', 'process'\]"), (('', 2, 0), r"\['coordinator'\]"),
      (('a:1', 2, -1), r"\['process'\]"), (('a', 2, 0), "coordinator='a'"),
      (('a:99999', 2, 0), "coordinator='a:99999'"), (('a:1', 2, 2), 'process=2'),
      (('a:1', 2, -2), 'process=-2'), (('', -3, -1), 'processes=-3'),
      (('', 1, 1), r"\['coordinator'\]"), (('a:0', 2, 0), "coordinator='a:0'")])
  def test_flags_that_do_not_fit(self, flags, field):
    with pytest.raises(ConfigError, match=f'{field}.*allowed'):
      join.find(*flags)

  def test_slurm(self, monkeypatch):
    set_all(monkeypatch, SLURM)
    found = join.find('', 0, -1)
    assert found.address.startswith('gpu07:') and (found.processes, found.process) == (4, 2)
    assert found.local_devices is None  # alone on its node: all GPUs of it
    set_all(monkeypatch, {'SLURM_STEP_TASKS_PER_NODE': '2(x2)', 'SLURM_LOCALID': '1'})
    assert join.find('', 0, -1).local_devices == (1,)  # a GPU for each task
    assert join.find('', 1, -1) is None  # alone, on purpose
    monkeypatch.setenv('SLURM_NTASKS', '1')
    assert join.find('', 0, -1) is None

  def test_gpus_that_no_task_would_take(self, monkeypatch):
    set_all(monkeypatch, SLURM | {'SLURM_GPUS_ON_NODE': '8'})
    assert join.find('', 0, -1).local_devices is None
    monkeypatch.setenv('SLURM_STEP_TASKS_PER_NODE', '2(x2)')
    with pytest.raises(ConfigError, match=r"SLURM_GPUS_ON_NODE='8'.*'2\(x2\)'.*allowed"):
      join.find('', 0, -1)
    monkeypatch.setenv('SLURM_STEP_TASKS_PER_NODE', '8(x2)')
    assert join.find('', 0, -1).local_devices == (0,)

  @pytest.mark.parametrize(('name', 'value'), [
      ('JAX_COORDINATOR_PORT', 'abc'), ('JAX_COORDINATOR_PORT', '99999'),
      ('OPD_JOIN_TIMEOUT_S', 'soon'), ('OPD_JOIN_TIMEOUT_S', '-1')])
  def test_what_is_no_number(self, name, value, monkeypatch):
    set_all(monkeypatch, SLURM | {name: value})
    with pytest.raises(ConfigError, match=f'{value}.*allowed'):
      join.find('', 0, -1)

  @pytest.mark.parametrize('value', ['long', '0', 'nan'])
  def test_a_silence_that_is_no_time(self, value, monkeypatch):
    monkeypatch.setenv('OPD_SILENT_S', value)
    with pytest.raises(ConfigError, match=f"OPD_SILENT_S='{value}'.*allowed"):
      join.join(join.Start('localhost:1', 2, 1))

  @pytest.mark.parametrize(('chips', 'gpu', 'extra'), [(4, False, 'tpu'), (0, True, 'cuda')])
  def test_accelerators_that_jax_cannot_use(self, chips, gpu, extra, monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(join.hardware_utils, 'num_available_tpu_chips_and_device_id',
                        lambda: (chips, None))
    monkeypatch.setattr(join.hardware_utils, 'has_visible_nvidia_gpu', lambda: gpu)
    join.require_accelerators()  # JAX_PLATFORMS=cpu, as all tests
    platforms = join.jax.config.jax_platforms
    assert join.jax.default_backend() == 'cpu'
    try:
      join.jax.config.update('jax_platforms', '')
      with pytest.raises(ConfigError, match=rf"JAX_PLATFORMS=''.*allowed.*opd_jax\[{extra}\]"):
        join.require_accelerators()
      monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '-1')
      join.require_accelerators()
    finally:
      join.jax.config.update('jax_platforms', platforms)

  @pytest.mark.parametrize('command', ['train', 'doctor', 'diagnose', 'evaluate'])
  def test_commands_that_compute_ask_for_them(self, command, monkeypatch):
    monkeypatch.setattr(join, 'require_accelerators', lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      __main__.run_command(command, types.SimpleNamespace(coordinator='', processes=0, process=-1))

  @pytest.mark.parametrize(('sign', 'value'), [
      ('SLURM_NTASKS', '4'), ('TPU_WORKER_HOSTNAMES', 'a,b'), ('OMPI_COMM_WORLD_SIZE', '2')])
  def test_others_that_nobody_joins_are_refused(self, sign, value, monkeypatch):
    monkeypatch.setenv(sign, value)  # as in a batch script without srun, or without libtpu
    with pytest.raises(ConfigError, match=f"{sign}='{value}'.*allowed.*--processes=1"):
      join.find('', 0, -1)
    assert join.find('', 1, -1) is None

  def test_cloud_tpu(self, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
    monkeypatch.setattr(cloud_tpu_cluster.socket, 'gethostbyname', lambda name: '10.0.0.1')
    set_all(monkeypatch, {'TPU_WORKER_HOSTNAMES': 't0,t1', 'TPU_WORKER_ID': '1',
                          'MEGASCALE_NUM_SLICES': '2', 'MEGASCALE_SLICE_ID': '1',
                          'MEGASCALE_COORDINATOR_ADDRESS': 'first'})
    found = join.find('', 0, -1)
    assert (found.address, found.processes, found.process) == ('first:8482', 4, 3)
    assert found.local_devices is None


class TestSame:

  def give(self, monkeypatch, *facts):
    monkeypatch.setattr(hosts, 'exchange', lambda mine: [dict(hosts._leaves(f, '')) for f in facts])
    monkeypatch.setattr(hosts._STATE, 'names', ['first', 'second', 'third'])
    hosts.require_same(facts[0])

  def test_equal(self, monkeypatch):
    self.give(monkeypatch, *[{'a': {'b': 1}, 'code': 'x'}] * 3)

  @pytest.mark.parametrize(('other', 'said'), [
      ({'a': {'b': 2}, 'code': 'x'}, 'a.b=1 on first, third and 2 on second'),
      ({'a': {'b': 1}, 'code': 'y'}, 'code="x" on first, third and "y" on second'),
      ({'a': {}, 'code': 'x'}, 'a.b=1 on first, third and nothing on second')])
  def test_another(self, other, said, monkeypatch):
    one = {'a': {'b': 1}, 'code': 'x'}
    with pytest.raises(ConfigError, match=re.escape(said) + '.*allowed'):
      self.give(monkeypatch, one, other, one)

  def test_the_code_is_a_part_of_it(self, tmp_path, monkeypatch):
    shutil.copytree(tiny.ROOT / 'opd_jax', tmp_path / 'opd_jax')
    monkeypatch.setattr(hosts, '__file__', str(tmp_path / 'opd_jax' / 'parallel' / 'hosts.py'))
    before = hosts.versions()
    with (tmp_path / 'opd_jax' / 'train.py').open('a') as f:
      f.write('# changed\n')
    after = hosts.versions()
    assert before['code'] != after.pop('code') and before.keys() > after.keys()
    assert 'jax' in after and all(before[name] == value for name, value in after.items())


@pytest.fixture(scope='module')
def launcher(tmp_path_factory):
  with several.Launcher(tmp_path_factory.mktemp('starts')) as launcher:
    yield launcher


def write(folder, name='run', **fields):
  return tiny.write_config(folder / f'{name}.py', tiny.config('sft', steps=2, **fields))


def one_line(done, *parts):
  assert done.returncode == 2, done.stderr
  assert re.fullmatch('error: .*\n', done.stderr), done.stderr
  assert all(part in done.stderr for part in parts), done.stderr


class TestRefused:

  def test_a_coordinator_that_is_not_there(self, launcher):
    command = 'train', '--config', write(launcher.folder), '--workdir', launcher.folder / 'nobody'
    flags = several.flags(2)
    where = flags[0][0].partition('=')[2]
    alone, other = (launcher.start(*command, *own, OPD_JOIN_TIMEOUT_S='2').finish()
                    for own in (flags[0], several.flags(2)[1]))
    one_line(alone, f"coordinator='{where}'", '2 s', 'not [1]')
    one_line(other, "coordinator='127.0.0.1:", 'process 1', '2 s', 'refused')
    assert not (launcher.folder / 'nobody').exists()

  def test_somebody_else_at_its_port(self, launcher):
    command = 'train', '--config', write(launcher.folder)
    with socket.create_server(('', 0)) as other:
      port = other.getsockname()[1]
      flags = several.flags(2, port)
      done = launcher.start(*command, *flags[0], OPD_JOIN_TIMEOUT_S='2').finish()
    one_line(done, f"coordinator='127.0.0.1:{port}'", 'cannot listen')

  def test_the_same_process_twice(self, launcher):
    command = 'train', '--config', write(launcher.folder)
    flags = several.flags(3)
    done = [p.finish() for p in [launcher.start(*command, *flags[i]) for i in (0, 1, 1)]]
    for p in done:
      one_line(p, 'process 1 of 3')

  def test_another_number_of_processes(self, launcher):
    command = 'train', '--config', write(launcher.folder)
    port = several.free_port()
    done = [p.finish() for p in [launcher.start(*command, *several.flags(count, port)[i])
                                 for i, count in ((0, 2), (1, 3))]]
    for p in done:
      one_line(p, f"coordinator='127.0.0.1:{port}'", 'process 1 of 3', 'process 0 of 2')

  def test_other_configs(self, launcher):
    folder = launcher.folder
    files = write(folder, 'one'), write(folder, 'other', optimizer__learning_rate=0.5)
    done = [p.finish() for p in [
        launcher.start('train', '--config', file, '--workdir', folder / 'differ', *own)
        for file, own in zip(files, several.flags(2), strict=True)]]
    for p in done:
      one_line(p, 'config.optimizer.learning_rate=0.01 on process 0', '0.5 on process 1')
    assert not (folder / 'differ').exists()

  @pytest.fixture(scope='class')
  @staticmethod
  def two_hosts(launcher):
    """Their folders, with a model and a data set that have the same name and other contents."""
    for i in (0, 1):
      folder = launcher.folder / f'host{i}'
      folder.mkdir()
      tiny.write_model(folder / 'model', seed=i)
      tiny.write_jsonl(folder / 'rows.jsonl', [{'q': f'{n}+{i}=', 'a': '1'} for n in range(64)])
    return [launcher.folder / f'host{i}' for i in (0, 1)]

  @pytest.mark.parametrize(('command', 'what', 'more'), [
      ('train', 'student.path.model.safetensors', ('--workdir', 'RUN')),
      ('doctor', 'student.path.model.safetensors', ()),
      ('evaluate', 'model.model.safetensors', ('--model', 'model')),
      ('train', 'task.options.source.rows.jsonl', ('--workdir', 'RUN'))])
  def test_other_weights_or_data_under_the_same_name(
      self, command, what, more, two_hosts, launcher):
    c = tiny.config('sft', steps=2, student__path='model')
    if what.startswith('task'):
      c = tiny.config('grpo', steps=2)
      c.task = config.task_config('prompts', source='rows.jsonl', holdout_examples=16,
                                  prompt_column='q', answer_column='a', grader='exact')
    file, workdir = tiny.write_config(launcher.folder / 'same.py', c), launcher.folder / 'same'
    more = [str(workdir) if word == 'RUN' else word for word in more]
    done = [p.finish() for p in [
        launcher.start(command, '--config', file, *more, *own, cwd=host)
        for host, own in zip(two_hosts, several.flags(2), strict=True)]]
    for p in done:
      one_line(p, f'{what}=', 'on process 0', 'on process 1')
    assert not (workdir / 'config.json').exists()

  def test_work_directories_that_are_not_one(self, launcher):
    folder = launcher.folder
    for i in (0, 1):
      (folder / f'disk{i}').mkdir()
    file = write(folder)
    done = [p.finish() for p in [
        launcher.start('train', '--config', file, '--workdir', 'here', *own,
                       cwd=folder / f'disk{i}') for i, own in enumerate(several.flags(2))]]
    one_line(done[0], "workdir='here'", 'process 1 of 2')
    assert not (folder / 'disk0' / 'here' / 'config.json').exists()

  def test_two_that_were_not_joined_in_one_directory(self, launcher):
    marker, workdir = launcher.folder / 'alone.held', launcher.folder / 'alone'
    command = 'train', '--config', write(launcher.folder), '--workdir', workdir
    first = launcher.start(*command, hold=('row:1', marker))
    tiny.wait_until(marker.exists)
    one_line(launcher.start(*command).finish(), f'workdir={str(workdir)!r} is in use by process',
             '--coordinator')
    first.kill()
    first.finish()


@pytest.mark.parametrize('said', [b'GET / HTTP/1.1\r\n\r\n', b'{}\n', b'7\n', b'{"name": "x"}\n'])
def test_strangers_at_the_port_of_the_coordinator_are_sent_away(said):
  port, end = several.free_port(), time.monotonic() + tiny.PATIENCE_S
  starts = [join.Start(f'127.0.0.1:{port}', 2, i) for i in (0, 1)]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first, strangers = pool.submit(join._receive, starts[0], end), []

    def come():
      with contextlib.suppress(ConnectionRefusedError):  # nobody listens there yet
        strangers.append(socket.create_connection(('127.0.0.1', port)))
      return strangers

    tiny.wait_until(come)
    strangers[0].sendall(said)
    with contextlib.suppress(ConnectionResetError):  # closed before all of it was read
      assert strangers[0].recv(1) == b''
    names, peers = join._connect(starts[1], end)
    assert (names, list(peers)) == (first.result()[0], [0])
  for peer in (*strangers, *peers.values(), *first.result()[1].values()):
    peer.close()


EXCHANGES = '''
import sys
from opd_jax.parallel import hosts, join
join.join(join.find(sys.argv[1], 2, int(sys.argv[2])))
import jax
import numpy as np
i = hosts.index()
assert (i, hosts.count()) == (int(sys.argv[2]), 2)
assert hosts.exchange({'a': i}) == [{'a': 0}, {'a': 1}]
for sizes in ((1, 10**6), (10**6, 2 * 10**6), (10, 20)):  # through the store, or over devices
  got = hosts.exchange(bytes([i]) * sizes[i])
  assert got == [b'\\0' * sizes[0], b'\\1' * sizes[1]]
assert hosts.decide(lambda: hosts.decide(lambda: i)) == 0
try:
  hosts.decide(lambda: 1 // 0)
  raise AssertionError
except (ZeroDivisionError if i == 0 else hosts.HostError) as e:
  assert 'division' in str(e) and (i == 0 or 'process 0 of 2' in str(e))
for n in (0, 1, 7):
  seen = []
  assert hosts.divide(range(n), lambda part: seen.extend(part) or [2 * x for x in part]) == [
      2 * x for x in range(n)]
  assert len(seen) <= (n + 1) // 2
rows = jax.sharding.NamedSharding(jax.make_mesh((4,), ('a',)), jax.sharding.PartitionSpec('a'))
spread = jax.make_array_from_callback((8,), rows, lambda at: np.arange(8.0)[at])
try:
  np.asarray(spread)
  raise AssertionError('nothing to gather')
except RuntimeError:
  pass
assert hosts.fetch({'x': spread, 'y': np.ones(2)})['x'].tolist() == list(range(8))
votes = hosts.Votes()
assert [votes(i == 1 and step == 2) for step in range(5)] == [False, False, False, True, False]
assert not hosts.any_of(False) and hosts.any_of(i == 1)
hosts.leave()
'''


def test_what_goes_between_processes():
  address = f'127.0.0.1:{several.free_port()}'
  processes = [subprocess.Popen(
      [sys.executable, '-c', EXCHANGES, address, str(i)], text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, env=tiny.environment(devices=2)) for i in (0, 1)]
  done = [p.communicate(timeout=tiny.PATIENCE_S) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], done
