"""Attention on a mesh of four devices, for the child of models/test_kernels.py."""

from __future__ import annotations

import functools
from typing import Any

import attending
import collectives
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import meshed_layout
import numpy as np

from opd_jax.models import attention, kernels
from opd_jax.models.attention import Mask

LENGTH, HEADS, KV_HEADS = 100, 4, 2


def differences() -> dict[str, Any]:
  """By form: what travels in its gradient, and how far it is off the reference on one device."""
  q, k, v, d, valid = (jnp.concatenate([x, x[:1]]) for x in attending.rows_of(
      LENGTH, HEADS, KV_HEADS))  # four rows
  mask = Mask(valid, (30,), how='reference')
  want = attending.both(lambda *x: attention.attention(*x, mask, 0.4), q, k, v, d, valid)
  mesh, out = meshed_layout.make_mesh(1, fsdp=2, tensor=2), {}
  splash = functools.partial(kernels.splash, window=30, scale=0.4, softcap=0.0, interpret=True)
  forms = {'blocks': lambda q, k, v, valid: attention.blocks(q, k, v, valid, 30, 0.4, 0.0, 32),
           'splash': lambda *x: kernels.on_own(splash, *x, decoding=False)}

  def place(x, heads):
    spec = ['fsdp'] + [None] * (x.ndim - 1)
    if heads:
      spec[heads] = 'tensor'
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

  placed = [place(x, axis) for x, axis in ((q, 2), (k, 1), (v, 1), (valid, 0), (d, 2))]
  for name, form in forms.items():
    def total(q, k, v, valid, d, form=form):
      read = jnp.where(valid[:, :, None, None], form(q, k, v, valid), 0)
      return jnp.sum(read * d), read

    grad = jax.grad(total, (0, 1, 2), has_aux=True)
    with jax.set_mesh(mesh):
      compiled = jax.jit(grad).lower(*placed).compile()
      grads, read = compiled(*placed)
    got = [np.asarray(x, np.float64) for x in (read, *grads)]
    out[name] = dict(
        travels=[(kind, size) for kind, size, _, _ in collectives.of_program(compiled.as_text())],
        off=max(float(np.abs(a - b).max()) for a, b in zip(want, got, strict=True)))
  return out
