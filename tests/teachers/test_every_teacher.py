"""What every kind of teacher must satisfy: a new file of teachers/ is covered without an edit."""

import pathlib

from conftest import family_config, sharp_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import models, teachers
from opd_jax.data import prompts as prompts_lib
from opd_jax.files import huggingface
from opd_jax.models import params as params_lib


def test_teachers_are_found_by_listing_the_folder():
  folder = pathlib.Path(teachers.__file__).parent
  files = sorted(f.stem for f in folder.glob('*.py') if f.stem != '__init__')
  assert teachers.names() == [teachers.NONE, *files]
  for kind in ('oracle', teachers.NONE):
    with pytest.raises(ValueError) as error:
      teachers.load(kind, '', None, {})
    message = str(error.value)
    assert f'teacher.kind={kind!r}' in message and str(teachers.names()) in message


@pytest.mark.parametrize('kind', [n for n in teachers.names() if n != teachers.NONE])
def test_teacher(kind, tmp_path):
  characters = prompts_lib.character_tokenizer()
  made = []
  for seed, tied in ((0, False), (1, True)):
    model = models.build(family_config('qwen3', tied))
    path = tmp_path / str(seed)
    huggingface.write_checkpoint(path, model, sharp_params(model, seed), characters)
    made.append(huggingface.load(path, {'dtype': jnp.float32}))
  student = made[0]
  before = student.read()
  # A kind reads a directory, or refuses one: then it must say so, and do without.
  loaded = {}
  for path in (str(tmp_path / '1'), ''):
    try:
      loaded[path] = teachers.load(kind, path, student, {'dtype': jnp.float32})
    except ValueError as error:
      assert 'teacher.path' in str(error) and 'allowed' in str(error)
  assert loaded, 'neither a directory nor an empty path is accepted'
  for teacher in loaded.values():
    assert isinstance(teacher, huggingface.LoadedModel)
    shapes = params_lib.abstract_params(teacher.model.specs)
    assert jax.tree.map(jnp.shape, teacher.read()) == jax.tree.map(lambda s: s.shape, shapes)
    assert prompts_lib.same_vocabulary(teacher.tokenizer, characters)
    tokens = jnp.asarray([[5, 6, 7]], jnp.int32)
    params = jax.tree.map(jnp.asarray, teacher.read())
    hidden, _ = teacher.model.forward(params, tokens, jnp.arange(3)[None], jnp.ones((1, 3), bool),
                                      None)
    logits = teacher.model.head(params).logits(hidden)
    assert logits.shape == (1, 3, student.model.config.vocab_size)
    assert float(jnp.std(logits)) > 0.1  # it has an opinion
  if (path := str(tmp_path / '1')) in loaded:  # and it is the one in the directory
    same = jax.tree.map(np.array_equal, loaded[path].read(), made[1].read())
    assert all(jax.tree.leaves(same))
  after = jax.tree.map(np.array_equal, student.read(), before)
  assert all(jax.tree.leaves(after)), 'loading a teacher changed the student'
