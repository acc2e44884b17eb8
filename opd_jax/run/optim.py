"""Optimizers and learning-rate schedules, all from optax."""

from __future__ import annotations

import optax

OPTIMIZERS = ('adamw', 'sgd')
SCHEDULES = ('constant', 'linear', 'cosine')


def make_schedule(kind: str, peak: float, final: float, warmup_steps: int, total_steps: int
                  ) -> optax.Schedule:
  """Makes a schedule: linear warm-up from 0 to `peak`, then constant, or decay to `final` at
  `total_steps`."""
  after = max(total_steps - warmup_steps, 1)
  if kind == 'constant':
    main = optax.constant_schedule(peak)
  elif kind == 'linear':
    main = optax.linear_schedule(peak, final, after)
  elif kind == 'cosine':
    main = optax.cosine_decay_schedule(peak, after, alpha=final / peak if peak else 0.0)
  else:
    raise ValueError(f'optimizer.schedule={kind!r}; allowed: {list(SCHEDULES)}')
  if not warmup_steps:
    return main
  # Step 0 already moves: a first step of size zero would waste a batch.
  warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
  return optax.join_schedules([warmup, main], [warmup_steps])


def make_optimizer(name: str, schedule: optax.Schedule, *, b1: float, b2: float, eps: float,
                   weight_decay: float, clip_norm: float) -> optax.GradientTransformation:
  """Makes an optimizer: clipping by global norm (0: none), then AdamW, or SGD with momentum b1."""
  if name == 'adamw':
    rule = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
  elif name == 'sgd':
    rule = optax.sgd(schedule, momentum=b1 or None)
  else:
    raise ValueError(f'optimizer.name={name!r}; allowed: {list(OPTIMIZERS)}')
  return optax.chain(optax.clip_by_global_norm(clip_norm), rule) if clip_norm else rule
