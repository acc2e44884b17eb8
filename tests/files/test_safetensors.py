"""Tensors of a layer and an expert each, and what is missing of them."""

from __future__ import annotations

from checkpoints import float32, raw, refusal, write_raw
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.files import safetensors as safetensors_lib
from opd_jax.models import params


class TestExperts:
  """A table with tensors per layer and expert, and one tensor per expert alone."""

  def specs(self):
    init = jax.nn.initializers.zeros
    return {'layers': {'up': params.ParamSpec(
        (2, 3, 4, 5), ('layer', 'experts', 'embed', 'mlp'), init,
        'l.{layer}.e.{expert}.up', (5, 4), True)},
            'norm': params.ParamSpec((4,), (None,), init, 'norm', (4,))}

  def test_leading_axes_are_layer_then_expert(self, tmp_path):
    specs = self.specs()
    up = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    file = tmp_path / 'x.safetensors'
    stored = {f'l.{i}.e.{j}.up': float32(up[i, j].T) for i in range(2) for j in range(3)}
    write_raw(file, {**stored, 'norm': float32(np.ones(4))})
    found = safetensors_lib.read_header(file)
    safetensors_lib.check(found, specs, 'x')
    got = safetensors_lib.read(specs, found)
    np.testing.assert_array_equal(got['layers']['up'], up)
    index = (slice(1, 2), slice(1, 3), slice(0, 2), slice(None))
    part = safetensors_lib._read_slice(specs['layers']['up'], found, np.dtype(np.float32), index)
    np.testing.assert_array_equal(part, up[index])
    for leaves in (got, jax.tree.map(jnp.asarray, got)):
      plan = safetensors_lib.plan(specs, leaves)
      (again := tmp_path / 'again').unlink(missing_ok=True)
      safetensors_lib.write(again, plan, safetensors_lib.stream(specs, leaves, plan))
      assert raw(again) == raw(file)

  def test_a_missing_expert(self, tmp_path):
    write_raw(tmp_path / 'x', {'l.0.e.0.up': float32(np.ones((5, 4))), 'norm': float32([1, 2, 3])})
    message = refusal(ValueError, safetensors_lib.check,
                      safetensors_lib.read_header(tmp_path / 'x'), self.specs(), 'the file')
    assert "'l.0.e.1.up', 'l.0.e.2.up', 'l.1.e.0.up'" in message
    assert all(part in message for part in ('norm', '(3,)', '(4,)'))
