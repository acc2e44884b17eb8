"""What docs/pods.md gives to clusters: the manifest is one that they take, and SLURM's script runs.

No cluster is asked. The manifest is read into models of JobSet and of Kubernetes that
`kubeflow-trainer-api` generates from their schemas: names, types, and what is required. The script
runs as it stands on the page, on one machine, between an `srun` and a `scontrol` that do what
SLURM's do to processes.
"""

import copy
import math
import os
import pathlib
import re
import subprocess
import sys

from kubeflow_trainer_api.models.io_k8s_api_core_v1_persistent_volume_claim import (
    IoK8sApiCoreV1PersistentVolumeClaim as VolumeClaim,
)
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet as JobSet
import pydantic
import pytest
import several
import tiny
import yaml

from opd_jax import __main__ as console
from opd_jax import experiment

PAGE = (tiny.ROOT / 'docs' / 'pods.md').read_text()
CLAIM, JOBSET = yaml.safe_load_all((tiny.ROOT / 'docs' / 'launch' / 'jobset.yaml').read_text())


# --- GKE ---


def job(jobset):
  return jobset['spec']['replicatedJobs'][0]['template']['spec']


def pod(jobset):
  return job(jobset)['template']['spec']


def keeps(kept, given):
  """Whether all that was given is there, and besides it only defaults: in place of a text that is
  required and missing, there is an empty one."""
  if isinstance(given, dict):
    added = [v for k, v in kept.items() if k not in given]
    return '' not in added and all(k in kept and keeps(kept[k], v) for k, v in given.items())
  if isinstance(given, list):
    return len(kept) == len(given) and all(map(keeps, kept, given))
  return kept == given


def validate(model, manifest):
  """Raises where the model does not take it; a name that is none of its fields, it drops."""
  assert keeps(model.from_dict(copy.deepcopy(manifest)).to_dict(), manifest)


class TestJobSet:

  def test_the_manifest_is_one(self):
    assert JOBSET['apiVersion'] == 'jobset.x-k8s.io/v1alpha2' and JOBSET['kind'] == 'JobSet'
    assert CLAIM['apiVersion'] == 'v1' and CLAIM['kind'] == 'PersistentVolumeClaim'
    validate(JobSet, JOBSET)
    validate(VolumeClaim, CLAIM)

  @pytest.mark.parametrize('damage', [
      lambda m: pod(m).update(terminationGraceSeconds=600),
      lambda m: job(m).update(completions='16'),
      lambda m: m['spec']['failurePolicy']['rules'][0].pop('action'),
      lambda m: m['spec']['failurePolicy'].update(restarts=3),
      lambda m: pod(m)['containers'][0]['volumeMounts'][0].pop('mountPath'),
      lambda m: job(m)['podFailurePolicy']['rules'][0]['onExitCodes'].pop('operator')])
  def test_another_is_refused(self, damage):
    damage(manifest := copy.deepcopy(JOBSET))
    with pytest.raises((pydantic.ValidationError, AssertionError)):
      validate(JobSet, manifest)

  def test_the_hosts_have_the_chips_of_the_slice(self):
    chips = math.prod(map(int, pod(JOBSET)['nodeSelector'][
        'cloud.google.com/gke-tpu-topology'].split('x')))
    of_a_host = pod(JOBSET)['containers'][0]['resources']['limits']['google.com/tpu']
    assert job(JOBSET)['parallelism'] == job(JOBSET)['completions'] == chips / of_a_host

  def test_its_command_is_one_for_that_slice(self):
    words = pod(JOBSET)['containers'][0]['command']
    file, _, size = next(w for w in words if w.startswith('--config='))[9:].partition(':')
    assert (tiny.ROOT / file).is_file() and words[:2] == ['opd', 'train']
    topology = pod(JOBSET)['nodeSelector']['cloud.google.com/gke-tpu-topology']
    assert experiment.MACHINES[size].topology == f'v6e:{topology}'

  def test_a_preemption_is_known_by_its_exit_status_and_starts_all_again(self):
    container, = pod(JOBSET)['containers']
    rule, = job(JOBSET)['podFailurePolicy']['rules']
    assert rule['onExitCodes'] == {'containerName': container['name'], 'operator': 'In',
                                   'values': [console.PREEMPTED]}
    again, = JOBSET['spec']['failurePolicy']['rules']
    assert again['onJobFailureReasons'] == ['PodFailurePolicy']
    assert container['command'][0] == 'opd'  # a shell would not hand SIGTERM on
    assert pod(JOBSET)['restartPolicy'] == 'Never'  # which a podFailurePolicy asks for

  def test_all_that_lasts_is_on_the_shared_volume(self):
    container, = pod(JOBSET)['containers']
    mount, = container['volumeMounts']
    volume, = pod(JOBSET)['volumes']
    assert volume == {'name': mount['name'],
                      'persistentVolumeClaim': {'claimName': CLAIM['metadata']['name']}}
    assert CLAIM['spec']['accessModes'] == ['ReadWriteMany']
    paths = [v['value'] for v in container['env']] + [
        word.partition('=')[2] for word in container['command'] if '=/' in word]
    assert len(paths) == 3 and all(p.startswith(f'{mount["mountPath"]}/') for p in paths)


# --- SLURM ---


SRUN = '''
import os, subprocess, sys
words = sys.argv[sys.argv.index('opd'):]  # without srun's own flags
step = {'SLURM_STEP_NODELIST': 'localhost,localhost', 'SLURM_STEP_NUM_NODES': '2',
        'SLURM_STEP_TASKS_PER_NODE': '1(x2)', 'SLURM_LOCALID': '0'}
tasks = [subprocess.Popen(words, env={**os.environ, **step, 'SLURM_PROCID': str(i)})
         for i in range(int(os.environ['SLURM_NTASKS']))]
sys.exit(max(task.wait() for task in tasks))  # as srun: the highest
'''


class Slurm:
  """A folder in place of /work, and of what a job finds on its PATH."""

  def __init__(self, folder: pathlib.Path, opd: str):
    self.work, self._bin = folder, folder / 'opd_jax' / '.venv' / 'bin'
    self._bin.mkdir(parents=True)
    (self._bin / 'activate').write_text(f'PATH={self._bin}:$PATH\n')
    (folder / 'xla').symlink_to(os.environ['JAX_COMPILATION_CACHE_DIR'])
    for name, text in (('srun.py', SRUN), ('opd', f'#!/bin/sh\n{opd}\n'),
                       ('srun', f'#!/bin/sh\nexec {sys.executable} {self._bin}/srun.py "$@"\n'),
                       ('scontrol', f'#!/bin/sh\necho "$@" >> {folder}/asked\n')):
      (self._bin / name).write_text(text)
      (self._bin / name).chmod(0o755)

  def run(self) -> subprocess.CompletedProcess[str]:
    """Runs the page's script, as the batch step of a job of two nodes with a task each."""
    script, = re.findall(r'^```bash\n(#!.*?\n)```$', PAGE, re.DOTALL | re.MULTILINE)
    assert '#SBATCH --ntasks-per-node=1\n' in script
    return subprocess.run(
        ['bash', '-c', script.replace('/work/', f'{self.work}/')], text=True, capture_output=True,
        timeout=tiny.PATIENCE_S, env=tiny.environment(
            1, SLURM_JOB_ID='4242', SLURM_NTASKS='2', SLURM_PROCID='0', SLURM_LOCALID='0',
            JAX_COORDINATOR_PORT=str(several.free_port())))


class TestSlurm:

  def test_the_script_trains_to_the_end(self, tmp_path):
    slurm = Slurm(tmp_path, f'exec {sys.executable} -m opd_jax "$@"')
    paths = {who: str(tiny.write_model(tmp_path / who, seed))
             for seed, who in enumerate(('student', 'teacher'))}
    c = tiny.config('opd_sampled', steps=2, student__path=paths['student'],
                    teacher__path=paths['teacher'], **{
                        f'doctor__{name}': 'off: not the point' for name in (
                            'self_kl', 'uniform_teacher', 'support', 'special_tokens',
                            'truncation')})
    (tmp_path / 'opd_jax' / 'experiments').mkdir()
    tiny.write_config(tmp_path / 'opd_jax' / 'experiments' / 'checkpoints.py', c)
    done = slurm.run()
    assert done.returncode == 0 and not done.stderr, done.stderr
    workdir = tmp_path / 'runs' / 'one'
    assert done.stdout.count(f'done: {workdir}') == 1  # by two processes, which are one run
    assert [r['step'] for r in tiny.rows(workdir, 'train')] == [1, 2]
    assert (workdir / 'result.json').exists() and not (tmp_path / 'asked').exists()

  @pytest.mark.parametrize(('status', 'asked'), [(143, 'requeue 4242\n'), (2, None), (0, None)])
  def test_what_was_preempted_queues_again(self, status, asked, tmp_path):
    slurm = Slurm(tmp_path, f'[ $SLURM_PROCID = 1 ] && exit {status} || exit 0')
    assert slurm.run().returncode == status
    file = tmp_path / 'asked'
    assert (file.read_text() if file.exists() else None) == asked
