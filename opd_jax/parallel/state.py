"""The train state before the first step, and how it is split."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from opd_jax.models import params as params_lib
from opd_jax.parallel import sharding
from opd_jax.types import TrainState


def init(optimizer: optax.GradientTransformation, trained: Any) -> TrainState:
  """Makes the train state before the first step."""
  return TrainState(step=jnp.int32(0), params=trained, opt_state=optimizer.init(trained))


def abstract(specs: dict[str, Any], optimizer: optax.GradientTransformation,
             mesh: jax.sharding.Mesh) -> TrainState:
  """Describes a train state: shapes, dtypes and shardings; moments are sharded as their
  parameters."""
  shapes = jax.eval_shape(functools.partial(init, optimizer), params_lib.abstract_params(specs))
  weights, scalar = sharding.param_shardings(specs, mesh), sharding.replicated(mesh)
  shardings = TrainState(
      step=scalar, params=weights, opt_state=optax.tree_utils.tree_map_params(
          optimizer, lambda _, sharding: sharding, shapes.opt_state, weights,
          transform_non_params=lambda _: scalar))
  return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                      shapes, shardings)
