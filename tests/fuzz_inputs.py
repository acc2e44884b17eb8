"""What fuzz.py hands to commands: for each kind of input, whole ones and what is damaged of them.

Commands read everything and then stop before they compute: `opd doctor` with its rollouts off, or a
model whose last tensor has a NaN, which is found when all else is fine.
"""

from __future__ import annotations

from collections.abc import Callable
import csv
import dataclasses
import functools
import io
import json
import pathlib
import random
import shutil
from typing import Any

import conftest
import fuzz_templates
from fuzz_wholes import config_file, model, read, workdir
from ml_collections import ConfigDict
import mutations
import tiny

from opd_jax import __main__ as console
from opd_jax import config, models
from opd_jax.files import huggingface, peft
from opd_jax.models.config_json import _GENERATION, _INERT


@dataclasses.dataclass(frozen=True)
class Case:
  """A command, and what was done to what it reads; a refusal may say one of `names` instead of a
  field."""

  args: list[str]
  what: str
  names: tuple[str, ...] = ()


def make(kind: str, seed: int, number: int, folder: pathlib.Path) -> Case:
  """Makes case `number` of a kind, a function of these three, in a folder that is its own."""
  return KINDS[kind](random.Random(f'{seed} {kind} {number}'), folder)


def _copy(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(source, target, symlinks=True))


def _doctor(name: str, **fields: Any) -> list[str]:
  return ['doctor', f'--config={config_file(name)}',
          *(f'--config.{field.replace("__", ".")}={value}' for field, value in fields.items())]


# --- weights ---


def weights(rng: random.Random, folder: pathlib.Path) -> Case:
  """Safetensors files, of models and adapters, with their index and adapter_config.json."""
  name = rng.choice(('plain', 'half', 'shards', 'adapter', 'gemma2'))
  path = _copy(model(name), folder / 'model')
  files = [f for f in sorted(path.iterdir()) if f.suffix == '.safetensors' or f.name in (
      huggingface.INDEX, peft.CONFIG)]
  file = rng.choice(files)
  if file.suffix == '.safetensors' and rng.random() < 0.85:
    what = _change_tensors(rng, file)
  else:
    what = mutations.change_file(rng, file)
  fields = dict(student__lora__path=path) if name == 'adapter' else dict(student__path=path)
  return Case(_doctor('plain', **fields), f'{name} {what}', (file.name,))


def _change_tensors(rng, file):
  data = file.read_bytes()
  length = int.from_bytes(data[:8], 'little')
  how = rng.choice(('header', 'header', 'header', 'text', 'length', 'body', 'size'))
  if how == 'header':
    tree, what = json.loads(data[8:8 + length]), []
    for _ in range(rng.choice((1, 1, 2))):
      tree, did = mutations.change_tree(rng, tree)
      what.append(did)
    text = mutations.dump(tree)
    text += b' ' * (-len(text) % 8)
    data, what = len(text).to_bytes(8, 'little') + text + data[8 + length:], '; '.join(what)
  elif how == 'text':
    text, what = mutations.change_bytes(rng, data[8:8 + length])
    data = len(text).to_bytes(8, 'little') + text + data[8 + length:]
  elif how == 'length':
    wrong = rng.choice((0, 1, length - 1, length + 1, length * 2, 2**31, 2**63, 2**64 - 1))
    data, what = wrong.to_bytes(8, 'little') + data[8:], f'length {wrong}'
  elif how == 'body':
    at, bad = rng.randrange(8 + length, len(data)), rng.choice((b'\x7f\xff' * 4, b'\0' * 64))
    data, what = data[:at] + bad + data[at + len(bad):], f'{bad} at {at}'
  else:
    more = rng.randrange(-len(data), 100)
    data, what = (data + b'\0' * more if more > 0 else data[:more]), f'{more} bytes'
  file.write_bytes(data)
  return f'{file.name} {how}: {what}'


# --- a model's config.json ---


def model_config(rng: random.Random, folder: pathlib.Path) -> Case:
  """config.json of every family: fields of other types, missing, huge, unknown."""
  family = rng.choice(models.names())
  path = _copy(model(family), folder / 'model')
  file = path / 'config.json'
  if rng.random() < 0.3:
    return Case(_doctor('plain', student__path=path),
                f'{family} {mutations.change_file(rng, file)}', (file.name,))
  tree = json.loads(file.read_text())
  if rng.random() < 0.4:  # as transformers writes it
    tree = conftest.family_config(family, tree['tie_word_embeddings'])
  names = sorted({*tree, *_INERT, *_GENERATION, 'layer_types', 'rope_parameters', 'rope_scaling',
                  'num_local_experts', 'partial_rotary_factor', 'pruned_heads', 'quantization',
                  'quantization_config', 'auto_map'})
  what = []
  for _ in range(rng.choice((1, 1, 2))):
    name = rng.choice(names)
    if rng.random() < 0.1:
      tree.pop(name, None)
    else:
      tree[name] = rng.choice((*mutations.ODD, *ROPES, 2**20, 64, 8))
    what.append(f'{name} = {mutations.shown(tree.get(name, "(absent)"))}')
  file.write_bytes(mutations.dump(tree))
  return Case(_doctor('plain', student__path=path), f'{family} {"; ".join(what)}', (file.name,))


ROPES = ({'rope_type': 'linear', 'factor': 'x'}, {'rope_type': []}, {'type': {}},
         {'rope_type': 'llama3', 'factor': 2.0, 'low_freq_factor': [], 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 8}, {'rope_theta': None, 'rope_type': None},
         {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 'x'},
         {'full_attention': 1, 'sliding_attention': 2},
         {'full_attention': {}, 'sliding_attention': {'rope_theta': []}},
         {'rope_type': 'yarn', 'factor': 4.0}, {'rope_theta': 1e4, 'factor': 1.0})


# --- tokenizer files ---


def tokenizer(rng: random.Random, folder: pathlib.Path) -> Case:
  """What a tokenizer is read from, and generation_config.json."""
  name = rng.choice(('plain', 'chat', 'chat'))
  path = _copy(model(name), folder / 'model')
  more = {'special_tokens_map.json': {'eos_token': '<eos>', 'additional_special_tokens': ['<x>']},
          'added_tokens.json': {'<x>': 70}, 'chat_template.json': {'chat_template': tiny.CHAT}}
  for file, content in more.items():
    if rng.random() < 0.2:
      (path / file).write_text(json.dumps(content))
  names = [*more, 'tokenizer.json', 'tokenizer.json', 'tokenizer_config.json',
           'tokenizer_config.json', 'generation_config.json', 'chat_template.jinja']
  files = [path / n for n in names if (path / n).is_file()]
  what = []
  for file in rng.sample(files, rng.choice((1, 1, 2))):
    if file.is_file():
      what.append(mutations.change_file(rng, file))
  return Case(_doctor(name, student__path=path), f'{name} {"; ".join(what)}',
              tuple(f.name for f in files))


# --- data files ---

ROWS = [{'question': f'{i}+{i}=', 'answer': str(2 * i), 'level': i, 'extra': {'gold': [str(i)]},
         'completion': str(2 * i)} for i in range(10, 22)]
TALKS = [{'messages': [{'role': 'user', 'content': f'{i}+1='},
                       {'role': 'assistant', 'content': str(i + 1)}], 'answer': str(i + 1)}
         for i in range(10, 22)]
SHAREGPT = [{'conversations': [{'from': 'human', 'value': f'{i}+1='}]} for i in range(10, 22)]
OPTIONS = dict(
    prompt_column=('auto', 'question', 'messages', 'level', 'extra.gold', '', 'nowhere', 'a.b.c'),
    messages_column=('', '', '', 'messages', 'conversations', 'question', 'extra'),
    answer_column=('auto', 'answer', 'extra.gold', 'level', '', 'extra'),
    completion_column=('', '', 'completion', 'answer', 'extra', 'level'),
    filters=('()', '()', "('level >= 12',)", "('level == None',)", "('extra.gold != 3',)",
             "('answer in [1, 2]',)", "('level',)", "('level < \"x\"',)", "('level >= 99',)"),
    grader=('none', 'exact', 'last_number', 'boxed'), suffix=('', ' =', '\n', '{{'),
    holdout_examples=('1', '2', '11', '12', '0', '-1'), eval_split=('', '', '', 'train', 'test'))


def data(rng: random.Random, folder: pathlib.Path) -> Case:
  """JSONL, JSON and CSV: rows, columns of conversations, options."""
  rows = rng.choice((ROWS, TALKS, TALKS, SHAREGPT))
  suffix = rng.choice(('.jsonl', '.jsonl', '.json', '.csv'))
  file = folder / f'rows{suffix}'
  if suffix == '.csv':
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(rows[0])
    writer.writerows([v if isinstance(v, str) else json.dumps(v) for v in row.values()]
                     for row in rows)
    file.write_text(text.getvalue())
  elif suffix == '.json':
    file.write_text(json.dumps(rows))
  else:
    tiny.write_jsonl(file, rows)
  what = mutations.change_file(rng, file) if rng.random() < 0.85 else ''
  options = dict(source=str(file), holdout_examples='1')
  if rows is ROWS:  # of which two could be the prompt
    options |= dict(prompt_column='question', answer_column='answer',
                    completion_column='completion', grader='exact')
  for name in rng.sample(list(OPTIONS), rng.choice((0, 1, 2, 3))):
    options[name] = rng.choice(OPTIONS[name])
  task = config.task_config('prompts', source='x', holdout_examples=1)
  talks = rows is not ROWS or rng.random() < 0.2
  c = read(config_file('chat' if talks else 'plain'))
  c.unlock()
  c.task, c.data.split, c.data.source = task, 'train', rng.choice(
      ('teacher',) if talks else ('dataset',))
  c.data.max_prompt_tokens, c.data.max_new_tokens, c.eval.problems = (1000 if talks else 20), 8, 1
  if rng.random() < 0.3:
    c.data.overlong = rng.choice(('drop', 'cut'))
  if talks and rng.random() < 0.5:
    c.data.source, c.teacher = 'dataset', config.default_config().teacher
  tiny.write_config(folder / 'config.py', c)
  return Case(['doctor', '--config=config.py', *(
      f'--config.task.options.{name}={value}' for name, value in options.items())],
      f'{what}', (file.name,))


# --- chat templates ---


def template(rng: random.Random, folder: pathlib.Path) -> Case:
  """Programs of Jinja, on ordinary conversations and on unusual ones."""
  path = _copy(model('chat'), folder / 'model')
  text = fuzz_templates.template(rng)
  (path / 'chat_template.jinja').write_text(text)
  rows = tiny.write_jsonl(folder / 'rows.jsonl', [
      {'messages': m} for m in fuzz_templates.conversations()])
  c = read(config_file('chat'))
  c.unlock()
  c.task = config.task_config('prompts', source=str(rows), holdout_examples=1)
  c.eval.problems = 1
  c.student.path = c.teacher.path = str(path)
  c.prompt.thinking = rng.choice(('default', 'default', 'on', 'off'))
  c.prompt.system = rng.choice(('', '', 'Be brief.'))
  c.prompt.date = rng.choice(('', '', '1 Jan 2026'))
  tiny.write_config(folder / 'config.py', c)
  return Case(['doctor', '--config=config.py'], text)


# --- command lines ---

VALUES = ('', '0', '-1', '1', '2', '3.5', '1e400', 'nan', 'x', 'None', 'True', 'false', '1' * 5000,
          '99999999999', '()', '(1,', "('a',)", "(1,'a')", '[1]', '{}', '{"a": 1}', 'a\nb', '\x07',
          'é', 'stage:first', 'stage:', 'a/b', '/', '.', '~', '-', '--', "f(", 'full', 'sampled',
          'f(x)', 'teacher_top_k(0)', 'teacher_top_k(1e99)', 'teacher_top_k("a")', 'skew_kl(2)',
          'jensen_shannon(0.5)', 'skew_kl()', 'skew_kl(1,2,3)', 'truncated(-1)', '__import__("os")',
          'off: why', 'off', 'off:', '(' * 500, "a" * 4000, 'ppo_clip(0.2)', 'group_mean_std')
FLAGS = {'coordinator': ('127.0.0.1:1', 'nobody', ':', ''), 'processes': ('1', '0', '-1', 'two'),
         'process': ('0', '1', '-2', 'x'),
         'workdir': ('run', '/dev/null/x', '.', '', '/proc/x', 'a' * 300, 'é'),
         'stage': ('first', 'second', '', '..', 'first/..'),
         'model': ('MODEL', 'nowhere', '', '/', '/dev/null', '.'),
         'teacher': ('MODEL', 'nowhere', '', '/'), 'output': ('new', '', '/proc/x', '.', 'a/b/c'),
         'format': ('full', 'adapter', '', 'gguf'), 'step': ('1', '2', '-1', '0', '7', 'x', ''),
         'dtype': ('float32', 'bfloat16', '', 'int8'), 'changed_inputs': ('why', ''),
         'topology': ('gpu:1xh100', 'gpu:0xh100', 'v5p', 'gpu:8', '', 'é'),
         'models': ('MODEL', 'nowhere', '', '/dev/null'), 'price': ('2', '-1', 'x', '', 'nan'),
         'json': ('plan.json', '/proc/x', '', '.')}
WORDS = ('extra', '--', '--config.steps', '-config', '--config', '--flagfile=nowhere',
         '--undefok=x', '--noconfig', '--colour=red', '--v=x', '--config.', '--config.steps.x=1',
         '--=1', '-', '--config.optimizer=3', '--config.stages=1',
         '--confg=x', '--step', '\x00', '--nostep',
         '--config.task.options.operations.1=2', '--config.student.fresh.x=3', '--config.steps:2',
         '--config.seed=1', "--config['steps']=3", '--config.steps==3', '--only_check_args=x')


@functools.cache
def _fields(name: str) -> tuple[str, ...]:
  def walk(tree, prefix):
    for key, value in tree.items():
      yield from walk(value, f'{prefix}{key}.') if isinstance(value, ConfigDict) else [
          f'{prefix}{key}']
  return tuple(walk(read(config_file(name)), ''))


def command_line(rng: random.Random, folder: pathlib.Path) -> Case:
  """Commands, flags and `--config.*` overrides, most of them wrong in one or two places."""
  name = rng.choice(('plain', 'chat', 'pipe'))
  command = rng.choice(list(console.COMMANDS))
  reads, args = console.COMMANDS[command].flags, [command]
  if 'config' in reads:
    file = config_file(name)
    if rng.random() < 0.08:
      file = rng.choice(('nowhere.py', '.', '', f'{file}:tiny', f'{file}:', '/dev/null', 'x.json'))
    args.append(f'--config={file}')
    path = 'stages.first.student.path' if name == 'pipe' else 'student.path'
    # Everything is read, and then there is a NaN.
    args.append(f'--config.{path}={model("nan")}')
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
      field = rng.choice(_fields(name))
      if rng.random() < 0.06:
        field = rng.choice((field + 'x', field.upper(), field.rpartition('.')[0], field + '.x'))
      args.append(f'--config.{field}={rng.choice(VALUES)}')
  for flag in reads:
    chance = 0.95 if flag in console.COMMANDS[command].required else 0.3
    if flag != 'config' and rng.random() < chance:
      value = rng.choice(FLAGS[flag])
      args.append(f'--{flag}={value.replace("MODEL", str(model("nan")))}')
  if command == 'export' and rng.random() < 0.7:
    args = [a for a in args if not a.startswith('--workdir')] + [
        f'--workdir={workdir() / "seed_0" / "first"}']
  if rng.random() < 0.2:
    args.insert(rng.randrange(1, len(args) + 1), rng.choice(WORDS))
  return Case(args, '', ('--', 'command'))


# --- every file of a work directory ---


def work_directory(rng: random.Random, folder: pathlib.Path) -> Case:
  """A finished run or pipeline, of which one file is damaged; then resume, report, export,
  evaluate."""
  path = _copy(workdir(), folder / 'work')
  one = path / 'seed_0' / 'first'
  what = []
  if rng.random() < 0.5:  # as if it had been killed before its end
    (one / 'result.json').unlink()
    shutil.rmtree(one / rng.choice(('export', 'adapter', 'tensorboard')), ignore_errors=True)
    what.append('not finished')
  found = sorted(p for p in path.rglob('*') if p.is_file())
  # Many are of orbax, and all of those are as good as one another.
  plain = [p for p in found if 'checkpoints' not in p.parts]
  host = [p for p in found if 'host' in p.parts or p.name in ('metrics', '_CHECKPOINT_METADATA')]
  for _ in range(rng.choice((1, 1, 2))):
    file = rng.choice(rng.choice((plain, plain, host, found)))
    if file.is_file():
      where = file.relative_to(path).parent
      what.append(f'{where}/{mutations.change_file(rng, file)}')
  if rng.random() < 0.1:
    file = rng.choice([p for p in sorted(path.rglob('*')) if p.is_dir()])
    what.append(f'{file.relative_to(path)} {mutations.change_path(rng, file)}')
  made = f'--config={config_file("pipe")}'
  args = rng.choice((
      ['train', made, f'--workdir={path}'], ['train', made, f'--workdir={path}'],
      ['report', made, f'--workdir={path}'],
      ['export', f'--workdir={one}', '--output=new', f'--step={rng.choice((-1, 1, 2))}'],
      ['export', f'--workdir={one}', '--output=new', '--format=adapter'],
      _doctor('plain', student__path=one / 'export')))
  return Case(args, '; '.join(what), tuple(p.name for p in found))


KINDS: dict[str, Callable[[random.Random, pathlib.Path], Case]] = {
    'weights': weights, 'config': model_config, 'tokenizer': tokenizer, 'data': data,
    'template': template, 'command': command_line, 'workdir': work_directory}
