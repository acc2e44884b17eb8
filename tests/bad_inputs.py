"""Bad inputs and what is said of them: the table of docs/refusals.md.

    python tests/bad_inputs.py > docs/refusals.md

A case is what somebody gave, and a function that hands it to the package. test_bad_inputs.py holds
the table against the messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import json
import os
import pathlib
import re
import tempfile
from typing import Any

import conftest  # noqa: F401, the environment comes first
import tiny

from opd_jax import build, config, experiment, presets, tasks
from opd_jax.tools import export

HEAD = '''# What is refused, and what is said

Each of these inputs ends with one line and the exit status 2 before a model is computed with; the
line names the field, the value and what is allowed. `python tests/bad_inputs.py` writes the table;
a test holds it against the code. DIR is the directory of the files.
'''


def fields(kind: str, **values: Any) -> Callable[[], Any]:
  """Parses a config of a kind with these fields."""
  return lambda: config.parse(tiny.config(kind, **values))


FIELDS = [
    ('a count of zero', fields('sft', steps=0)),
    ('a negative seed', fields('sft', seed=-1)),
    ('a field of another type', lambda: config.parse(config.from_dict(
        {**config.to_dict(tiny.config('sft')), 'steps': '6'}))),
    ('a field that is not there', lambda: config.parse(config.from_dict(
        {**config.to_dict(tiny.config('sft')), 'step': 6}))),
    ('a learning rate that is no number', fields('sft', optimizer__learning_rate=float('nan'))),
    ('an unknown optimizer', fields('sft', optimizer__name='adam')),
    ('an unknown divergence', fields('opd_exact', objective__divergence='kl')),
    ('a divergence without its parameter', fields('opd_exact', objective__divergence='skew_kl')),
    ('a parameter out of bounds', fields('opd_exact',
                                         objective__divergence='jensen_shannon(1.5)')),
    ('a support that is no call', fields('opd_exact', objective__support='teacher_top_k 16')),
    ('an exact divergence as an advantage', fields('opd_sampled', objective__support='full')),
    ('a top k whose rest is dropped', fields(
        'opd_exact', objective__support='teacher_top_k(16, tail="drop")')),
    ('an option that nothing reads', fields('opd_exact', objective__discount=0.5)),
    ('nothing to train towards', fields('sft', objective__likelihood_coef=0.0)),
    ('top-p without a ratio', fields('opd_sampled', sample__top_p=0.9,
                                     objective__importance='none')),
    ('a temperature of zero', fields('opd_sampled', sample__temperature=0.0)),
    ('no teacher', fields('opd_sampled', teacher__kind='none')),
    ('an unknown kind of teacher', fields('opd_sampled', teacher__kind='oracle')),
    ('a group of one', fields('grpo', data__samples_per_prompt=1)),
    ('rows for the student that a data set gives', fields(
        'sft', data__source='dataset', data__samples_per_prompt=4)),
    ('batches of others without their source', fields('opd_exact', data__on_policy_fraction=0.5)),
    ('a warm start as long as the run', fields(
        'opd_exact', data__warm_steps=6, data__off_policy_source='teacher')),
    ('microbatches that do not divide', fields('sft', compute__microbatch_rows=5)),
    ('training on held-out rows', fields('sft', data__split='eval')),
    ('more of pass@k than samples', fields('sft', eval__pass_k=3)),
    ('a chat switch without a template', fields('sft', prompt__thinking='off')),
    ('adapters on a Flax module', fields('sft', student__factory='a.b:c', student__lora__rank=4)),
    ('an adapter directory that is none', fields('sft', student__lora__path='nowhere')),
    ('only the adapter of a whole model', fields('sft', checkpoint__export='adapter')),
    ('a config.json for a fresh student that nothing implements', fields(
        'sft', student__fresh={**tiny.SHAPE, 'model_type': 'gpt7'})),
    ('an unknown preset', lambda: presets.apply(tiny.config('opd_sampled'), 'opt')),
    ('models that a command has to make first', lambda: experiment.find_made(
        'DIR', ('teacher', 'without_12_to_17'),
        'python experiments/assets/smollm2.py --out DIR')),
    ('an unknown argument of an experiment', lambda: experiment.parse_arg('sed=3', seeds=3)),
    ('an argument of another type', lambda: experiment.parse_arg('seeds=x', seeds=3)),
    ('a check turned off without a reason', fields('sft', doctor__support='off')),
    ('a mesh of more devices than there are', lambda: build.open_parts(
        config.parse(tiny.config('sft', compute__mesh__tensor=3)))),
    ('a stage of a single run', lambda: experiment.pick_stage(tiny.config('sft'), 'opd')),
]


def _edit(file: pathlib.Path, **changes: Any) -> None:
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# (what, change of a model's directory)
MODELS: list[tuple[str, Callable[[pathlib.Path], Any]]] = [
    ('a family that is not there', lambda d: _edit(d / 'config.json', model_type='gpt7')),
    ('a size that is a text', lambda d: _edit(d / 'config.json', hidden_size='32')),
    ('a size below zero', lambda d: _edit(d / 'config.json', num_hidden_layers=-2)),
    ('sizes that are not those of the weights', lambda d: _edit(d / 'config.json',
                                                                intermediate_size=48)),
    ('a field that would change the model', lambda d: _edit(d / 'config.json',
                                                            attention_bias=True)),
    ('a config.json that is cut off', lambda d: (d / 'config.json').write_text('{"model_type": ')),
    ('a config.json that holds a list', lambda d: (d / 'config.json').write_text('[]')),
    ('no config.json', lambda d: (d / 'config.json').unlink()),
    ('no tokenizer', lambda d: (d / 'tokenizer_config.json').unlink()),
    ('a tokenizer.json that is cut off', lambda d: (d / 'tokenizer.json').write_text('{"ver')),
    ('an end token that the tokenizer has not', lambda d: (
        d / 'generation_config.json').write_text('{"eos_token_id": 4000}')),
    ('no weights', lambda d: (d / 'model.safetensors').unlink()),
    ('weights that are cut off', lambda d: os.truncate(d / 'model.safetensors', 2000)),
    ('a header that is no JSON', lambda d: (d / 'model.safetensors').write_bytes(
        b'\x08' + b'\0' * 7 + b'notjson!')),
    ('only pickled weights', lambda d: (d / 'model.safetensors').rename(d / 'pytorch_model.bin')),
    ('a GGUF file', lambda d: (d / 'model.safetensors').rename(d / 'model-Q4.gguf')),
    ('a config.json that is nested without end', lambda d: (
        d / 'config.json').write_text('[' * 100_000)),
    ('a pipe in place of a file', lambda d: ((d / 'tokenizer.json').unlink(),
                                             os.mkfifo(d / 'tokenizer.json'))),
]

# (what, content of a file, its name, options)
ROWS: list[tuple[str, bytes, str, dict[str, Any]]] = [
    ('a column that is not there', b'{"q": "1+1", "a": "2"}\n', 'rows.jsonl',
     dict(prompt_column='question', answer_column='a')),
    ('two columns that could be the prompt', b'{"question": "x", "prompt": "y"}\n', 'rows.jsonl',
     {}),
    ('a line that is no JSON', b'{"q": "1+1", "a": "2"}\n{"q": \n', 'rows.jsonl',
     dict(prompt_column='q', answer_column='a')),
    ('a row without the column', b'{"q": "1+1", "a": "2"}\n{"a": "3"}\n', 'rows.jsonl',
     dict(prompt_column='q', answer_column='a')),
    ('a prompt that is a number', b'{"q": 7, "a": "2"}\n', 'rows.jsonl',
     dict(prompt_column='q', answer_column='a')),
    ('a file in Latin-1', 'q,a\ncaf\xe9,2\n'.encode('latin-1'), 'rows.csv',
     dict(prompt_column='q', answer_column='a')),
    ('a prompt of five million characters', json.dumps({'q': 'x' * 5 * 10**6, 'a': '2'}).encode()
     + b'\n' + b'{"q": "1+1", "a": "2"}\n' * 3, 'rows.jsonl',
     dict(prompt_column='q', answer_column='a')),
    ('a prompt without a token', b'{"q": "", "a": "2"}\n{"q": "1+1", "a": "2"}\n', 'rows.jsonl',
     dict(prompt_column='q', answer_column='a')),
    ('an empty file', b'', 'rows.jsonl', dict(prompt_column='q', answer_column='a')),
    ('a file of another kind', b'x', 'rows.xlsx', dict(prompt_column='q', answer_column='a')),
    ('an unknown grader', b'{"q": "1", "a": "2"}\n', 'rows.jsonl',
     dict(prompt_column='q', answer_column='a', grader='guess')),
    ('more held out than there are', b'{"q": "1", "a": "2"}\n{"q": "2", "a": "2"}\n', 'rows.jsonl',
     dict(prompt_column='q', answer_column='a', holdout_examples=9)),
]


# (what, task, rows of its local copy, options): published data sets.
TASKS = [
    ('a task that is not there', 'aime23', {}, {}),
    ('a copy with other columns', 'aime24', {'question': '1?', 'answer': '1'}, {}),
    ('an evaluation task that is none', 'deepmath', {}, dict(eval='tulu3')),
    ('nothing to evaluate on', 'deepmath', {}, dict(eval='')),
    ('an answer that is not there', 'math500', {'problem': '1?', 'answer': ''}, {}),
    ('a solution without its answer', 'gsm8k', {'question': '1?', 'answer': 'It is 1.'}, {}),
    ('a question without all choices', 'gpqa_diamond', {
        'Question': '1?', 'Correct Answer': '1', **{f'Incorrect Answer {i}': '' for i in (1, 2, 3)}
    }, {}),
    ('an instruction without its setting', 'ifeval', {
        'prompt': 'x', 'instruction_id_list': ['keywords:existence'], 'kwargs': [{}]}, {}),
    ('an instruction that nobody knows', 'ifeval', {
        'prompt': 'x', 'instruction_id_list': ['keywords:none'], 'kwargs': [{}]}, {}),
]


def _load_task(folder: pathlib.Path, i: int, name: str, row: dict[str, Any],
               options: dict[str, Any]) -> None:
  file = tiny.write_jsonl(folder / f'{name}_{i}.jsonl', [row])
  task = tasks.get(name)
  task.load('eval', tasks.options(task, {'source': str(file), **options}))


def _open_model(folder: pathlib.Path, i: int, change: Callable[[pathlib.Path], Any]) -> None:
  path = tiny.write_model(folder / f'model_{i}')
  change(path)
  build.open_parts(config.parse(tiny.config('sft', student__path=str(path))))


def _open_rows(folder: pathlib.Path, i: int, content: bytes, name: str, options: dict[str, Any]
               ) -> None:
  file = folder / f'{i}_{name}'
  file.write_bytes(content)
  c = tiny.config('grpo')
  c.task = config.task_config('prompts', source=str(file), **{
      'holdout_examples': 1, 'grader': 'exact', **options})
  build.open_parts(config.parse(c))


def messages(folder: pathlib.Path) -> Iterator[tuple[str, str, str]]:
  """Yields (group, what, message) of every case; '' as a message where nothing was refused."""
  cases = [('settings', what, call) for what, call in FIELDS]
  cases += [('models', what, lambda i=i, change=change: _open_model(folder, i, change))
            for i, (what, change) in enumerate(MODELS)]
  cases += [('rows', what, lambda i=i, case=case: _open_rows(folder, i, *case))
            for i, (what, *case) in enumerate(ROWS)]
  cases += [('tasks', what, lambda i=i, case=case: _load_task(folder, i, *case))
            for i, (what, *case) in enumerate(TASKS)]
  cases += [('directories', 'an export of what is no run', lambda: export.export(
      folder, folder / 'new', 'full', -1, ''))]
  for group, what, call in cases:
    try:
      call()
      said = ''
    except ValueError as e:
      said = str(e)
    yield group, what, re.sub(r'/model_\d+', '/MODEL', said.replace(str(folder), 'DIR'))


def table(folder: pathlib.Path) -> str:
  """Writes all of them as a Markdown page."""
  lines, last = [HEAD], ''
  for group, what, said in messages(folder):
    if group != last:
      lines += [f'\n## {group.capitalize()}\n', '| input | message |', '|---|---|']
    last = group
    shown = said if len(said) <= 300 else said[:300] + ' ...'
    lines.append(f'| {what} | `{shown.replace("|", chr(92) + "|").replace("`", chr(39))}` |')
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  with tempfile.TemporaryDirectory() as scratch:
    print(table(pathlib.Path(scratch)), end='')
