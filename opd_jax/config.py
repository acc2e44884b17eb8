"""Experiment configs: the one template with every field, and typed config arguments.

ConfigDict stops here: the rest of the package takes frozen dataclasses and keyword arguments.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict

from opd_jax import objective as objective_lib
from opd_jax import tasks
from opd_jax.params import flatten

SOURCES = ('student', 'teacher', 'dataset')
STAGE = 'stage:'  # prefix of a path that names an earlier stage of the same pipeline


class ConfigError(ValueError):
  """A config that cannot run: names the field, the value and what is allowed."""


def default_config() -> ConfigDict:
  """Every field of a run, locked: assigning a field that is not here raises."""
  c = ConfigDict()
  c.name = 'run'
  c.seed = 0
  c.steps = 100  # batches; gradient steps are steps * optimizer.updates_per_batch

  # Who learns. `path` is a Hugging Face directory, 'stage:NAME', or 'organization/name' of the hub
  # with its commit as `revision`; with path '' a fresh model is made from `fresh` (the fields of a
  # config.json) with a character tokenizer.
  # `factory` is the 'package.module:function' of a Flax module (see `foreign.load`), '' for none.
  c.student = ConfigDict(dict(path='', revision='', factory=''))
  c.student.fresh = ConfigDict(dict(
      model_type='qwen3', hidden_size=64, intermediate_size=192, num_hidden_layers=2,
      num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
      rope_theta=100.0, tie_word_embeddings=False, max_position_embeddings=512))

  # Low-rank adapters instead of the whole model: rank 0 trains the whole model. `targets` is 'all',
  # 'attention', 'mlp' or a regular expression (lora.Settings). `path` is a PEFT directory to start
  # from, which then says all of it.
  c.student.lora = ConfigDict(dict(rank=0, alpha=32.0, targets='all', path=''))

  # Who grades: kind is a file in opd_jax/teachers/, or 'none'.
  c.teacher = ConfigDict(dict(kind='none', path='', revision='', factory=''))
  # What objective.reference_coef and objective.extrapolation refer to; kinds are those of teachers.
  c.reference = ConfigDict(dict(kind='none', path='', revision=''))

  _add_compute(c)

  # What it learns on: name is a file in opd_jax/tasks/, options are its Options.
  c.task = task_config('arithmetic')

  _add_data(c)

  # How completions are sampled, in training and (temperature, stop) evaluation. The student is
  # trained at this temperature too.
  # `stop`: whose stop tokens end a completion: 'student', 'teacher' or the 'union' of both.
  # `teacher_mix`: in training, tokens come from this share of the teacher's distribution and the
  # rest of the student's (MiniLLM, 2023, arXiv 2306.08543, section 2.2).
  c.sample = ConfigDict(dict(temperature=1.0, top_p=1.0, top_k=0, stop='student', teacher_mix=0.0))

  # See objective.Objective for every field, and objective.Local for those of `local`.
  c.objective = ConfigDict({
      f.name: f.default for f in dataclasses.fields(objective_lib.Objective)
      if f.name not in ('temperature', 'local')})
  c.objective.local = ConfigDict(dataclasses.asdict(objective_lib.Local()))

  c.optimizer = ConfigDict(dict(
      name='adamw', learning_rate=1e-3, schedule='constant', final_learning_rate=0.0,
      warmup_steps=0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0,
      updates_per_batch=1))

  _add_bookkeeping(c)
  c.lock()
  return c


def _add_compute(c: ConfigDict) -> None:
  # How student and teacher compute.
  c.compute = ConfigDict()
  c.compute.dtype = 'float32'  # of activations; trained parameters and reductions are float32
  # How teachers and the base under an adapter are kept: 'auto' is compute.dtype.
  c.compute.frozen_dtype = 'auto'
  c.compute.remat = False  # recompute each layer in the backward pass
  c.compute.layer_unroll = 1  # layers per iteration of the scan over layers
  c.compute.microbatch_rows = 0  # rows per forward/backward pass, 0 for the whole batch
  c.compute.chunk_tokens = 4096  # tokens whose vocabulary rows exist at a time
  c.compute.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, expert=1))  # -1: what is left
  # Wait for each program before the next: 'auto' does on several fake CPU devices, where programs
  # with collectives in flight together can deadlock.
  c.compute.block = 'auto'


def _add_data(c: ConfigDict) -> None:
  # How prompts become tokens. template is 'none' (the text as it is) or whose chat template is
  # used, 'student' or 'teacher'; system, thinking ('default', 'on', 'off') and date (what one
  # that writes today's date writes in its place) are for a template; special_tokens, only without
  # one, lets the tokenizer put its own tokens (BOS) first.
  c.prompt = ConfigDict(dict(template='none', system='', thinking='default', date='',
                             special_tokens=False))

  c.data = ConfigDict()
  c.data.source = 'student'  # who writes the completions: student, teacher or dataset
  # The share of batches that the student writes, decided by (seed, step) and so the same on every
  # host; the others are written by the teacher or given by the dataset (GKD, 2023, arXiv
  # 2306.13649, its lambda).
  c.data.on_policy_fraction = 1.0
  c.data.off_policy_source = 'none'
  c.data.split = 'train'
  c.data.limit = 0  # use only the first so many examples, 0 for all
  c.data.prompts_per_step = 256
  c.data.samples_per_prompt = 1
  c.data.max_prompt_tokens = 12
  c.data.max_new_tokens = 36
  # Examples that do not fit: 'raise'; 'drop'; 'cut' (the beginning of a prompt, the end of a given
  # completion).
  c.data.overlong = 'raise'

  # Rows beside these in every gradient step, written by 'teacher' or given by the 'dataset', with
  # an objective of their own: likelihood_coef for golden data (StableOPD, 2026, arXiv 2604.08527),
  # distill_coef for the exact divergence on them (DistiLLM-2, 2025, arXiv 2503.07067).
  c.given = ConfigDict(dict(
      source='none', split='train', prompts_per_step=0, likelihood_coef=0.0, distill_coef=0.0,
      divergence='forward_kl', divergence_alpha=0.0, support='full', top_k=0, tail='none'))


def _add_bookkeeping(c: ConfigDict) -> None:
  c.eval = ConfigDict()
  c.eval.every_steps = 0  # 0: only before the first and after the last step
  c.eval.problems = 256
  c.eval.samples_per_problem = 2
  # Of evaluation, whatever the training samples are cut to: runs stay comparable.
  c.eval.top_p, c.eval.top_k = 1.0, 0
  c.eval.pass_k = 2
  c.eval.stop_at_sampled_accuracy = 0.0  # end the stage once reached, 0 for never
  # How many most likely tokens of student and teacher are compared (at most half of the
  # vocabulary), 0 for none.
  c.eval.overlap_top_k = 16

  # `export` is what a finished run leaves for others: 'full', the whole model with adapters merged
  # into it (and the adapter beside it), or only the 'adapter'.
  c.checkpoint = ConfigDict(dict(every_steps=100, keep_latest=2, keep_best=1,
                                 best_metric='sampled_accuracy', export='full'))
  # What is checked at every start, on this many rollouts of at most so many tokens. A check is 'on'
  # or 'off: REASON'; see opd_jax/doctor.py.
  c.doctor = ConfigDict(dict(
      rollouts=8, max_new_tokens=256, max_reverse_kl=6.0,
      templates='on', token_ids='on', stop_tokens='on', vocabulary='on', memory='on',
      unused_options='on', self_kl='on', uniform_teacher='on', support='on', special_tokens='on',
      truncation='on'))
  # What `opd diagnose` measures gradients on: so many batches of so many prompts (with at least two
  # samples each), and the k of the top-k supports. A bias shows from 8 batches on.
  c.diagnose = ConfigDict(dict(batches=8, prompts=32, top_k=16))
  c.log = ConfigDict()
  c.log.every_steps = 1
  c.log.plain_every_steps = 10  # lines on a console that is no terminal
  c.log.transcripts = 3
  c.log.max_sampler_gap = 0.0  # stop if sampler and scorer differ by more nats, 0 for never


def task_config(name: str, **options: Any) -> ConfigDict:
  """The `task` group for a task, with all of its knobs spelled out.

  Raises:
    ValueError: an unknown task or knob.
  """
  values = dataclasses.asdict(tasks.options(tasks.get(name), options))
  return ConfigDict(dict(name=name, options=ConfigDict(values)))


def default_pipeline() -> ConfigDict:
  """Named stages, each a config of `default_config`, run in `order` for every seed."""
  c = ConfigDict()
  c.name = 'pipeline'
  c.seeds = (0,)
  c.order = ()
  c.stages = ConfigDict()
  # What the report shows; every field names stages.
  c.report = ConfigDict(dict(
      teacher='',  # 'stage:NAME' of the method that made the teacher, '' if none of them did
      methods=(),  # the rows of the table and the curves of the picture
      labels=(),  # their names, in the same order
      levels=(0.9, 0.95)))  # shares of the teacher's accuracy to reach
  return c


def is_pipeline(c: ConfigDict) -> bool:
  """Whether `c` is a pipeline rather than one run."""
  return 'stages' in c


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Parses the string after the colon of `--config file.py:arg`, strictly.

  'tiny,seeds=3' sets `size='tiny'` (a bare word, where the experiment has a `size`) and seeds=3.
  Values take the type of their default.

  Raises:
    ConfigError: an unknown name or a value of another type.
  """
  out = ConfigDict(defaults)
  for part in filter(None, (arg or '').split(',')):
    name, has_value, text = part.partition('=')
    if not has_value and 'size' in defaults:
      name, text = 'size', part
    if name not in defaults:
      raise ConfigError(f'config argument {part!r}: unknown name {name!r}; allowed: '
                        f'{sorted(defaults)}')
    default, value = defaults[name], text
    if not isinstance(default, str):
      try:
        value = ast.literal_eval(text)
      except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if type(value) is not type(default):
      raise ConfigError(f'config argument {part!r}: {name} takes a {type(default).__name__}')
    out[name] = value
  return out


def to_dict(c: ConfigDict) -> dict[str, Any]:
  """Plain JSON content (tuples become lists)."""
  return json.loads(c.to_json())


def from_dict(values: dict[str, Any]) -> ConfigDict:
  """The inverse of `to_dict`, for a single run.

  Raises:
    ConfigError: fields that are missing or unknown.
  """
  def fill(template, given, prefix):
    if sorted(template) != sorted(given):
      odd = sorted({f'{prefix}{k}' for k in set(template) ^ set(given)})
      raise ConfigError(f'fields {odd} are missing or unknown; allowed: those of a config of this '
                        'version')
    for name, value in given.items():
      if isinstance(template[name], ConfigDict):
        fill(template[name], value, f'{prefix}{name}.')
      else:
        template[name] = tuple(value) if isinstance(template[name], tuple) else value

  c = default_config()
  c.student.fresh = ConfigDict(values.get('student', {}).get('fresh', {}))
  if 'task' in values:
    name = values['task']['name']
    defaults = {f.name: f.default for f in dataclasses.fields(tasks.get(name).Options)}
    c.task = task_config(name, **{
        k: tuple(v) if isinstance(defaults.get(k), tuple) else v
        for k, v in values['task']['options'].items()})
  fill(c, values, '')
  return c


def make_objective(c: ConfigDict, source: str = '') -> objective_lib.Objective:
  """The pure code's Objective for rows of a source, by default data.source. The student's
  temperature is the sampler's, by construction, and that at which it is distilled on other text
  too; text that it only imitates is scored at temperature 1."""
  fields = c.objective.to_dict()
  own = (source or c.data.source) == 'student' or bool(
      c.objective.distill_coef or c.objective.final_distill_coef)
  return objective_lib.Objective(**{**fields, 'local': objective_lib.Local(**fields['local'])},
                                 temperature=c.sample.temperature if own else 1.0)


def make_given_objective(c: ConfigDict) -> objective_lib.Objective | None:
  """That of the rows of `given`; None without any."""
  if c.given.source == 'none':
    return None
  fields = {name: value for name, value in c.given.to_dict().items()
            if name not in ('source', 'split', 'prompts_per_step')}
  if not c.given.distill_coef:
    return objective_lib.Objective(distill_coef=0.0, importance='none',
                                   likelihood_coef=c.given.likelihood_coef,
                                   reduction=c.objective.reduction)
  return objective_lib.Objective(
      **fields, route='direct', importance='none', reduction=c.objective.reduction,
      temperature=c.sample.temperature, teacher_temperature=c.objective.teacher_temperature)


def has_adapter(c: ConfigDict) -> bool:
  """Whether adapters are trained instead of the whole model."""
  return bool(c.student.lora.rank or c.student.lora.path)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
  """'field: old -> new' for every field in which two configs differ."""
  a, b = flatten(a), flatten(b)
  return [f'{k}: {a.get(k, "(absent)")!r} -> {b.get(k, "(absent)")!r}'
          for k in sorted(set(a) | set(b)) if a.get(k, '(absent)') != b.get(k, '(absent)')]
