"""Compiles the evaluation of a model, and what it needs of the settings of a run."""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any

import jax

from opd_jax.algorithm import sample, score
from opd_jax.data import prompts as prompts_lib
from opd_jax.data.examples import Examples
from opd_jax.files.huggingface import LoadedModel
from opd_jax.parallel import sharding
from opd_jax.parallel.apart import Apart
from opd_jax.run import evaluate
from opd_jax.settings import Run
from opd_jax.types import Model, Rollout, Wants


def make_sampler(run: Run, model: Model, stop_tokens: tuple[int, ...], pad_token: int,
                 **other: Any) -> Callable[..., Rollout]:
  """Makes (params, prompts, key) -> rollout, not compiled yet: `sample.sample_fn` with the settings
  of a run, but for `other` ones of its keywords, such as temperature=0.0."""
  settings = dict(
      model=model, max_new_tokens=run.data.max_new_tokens, temperature=run.sample.temperature,
      top_p=run.sample.top_p, top_k=run.sample.top_k, stop_tokens=stop_tokens,
      pad_token=pad_token, slots=run.sample.slots)
  return functools.partial(sample.sample_fn, **settings | other)


def make_see(apart: Apart, model: Model, rows: int) -> evaluate.See:
  """Makes what a teacher on devices of its own tells the evaluation of the student."""
  program = jax.jit(functools.partial(
      score.teacher_logprob_fn, model=model, temperature=1.0, wants=Wants(hidden=True),
      chunk_tokens=apart.chunk_tokens, microbatch_rows=apart.rows_of_pass(rows)),
      out_shardings=sharding.by_rows(apart.mesh))
  return evaluate.See(apart, program, model)


def make_evaluator(run: Run, student: LoadedModel, teacher: Model | None, *, task: Any,
                   examples: Examples, stop_tokens: tuple[int, ...], mesh: jax.sharding.Mesh,
                   key: jax.Array, see: evaluate.See | None = None) -> evaluate.Evaluator:
  """Makes the evaluation of models shaped like `student` on held-out examples; `see` is that of a
  teacher on devices of its own, and `key` of all draws."""
  draw = functools.partial(make_sampler, run, student.model, stop_tokens,
                           prompts_lib.pad_id(student.tokenizer), max_new_tokens=run.eval_tokens)
  rows, shards = sharding.by_rows(mesh), sharding.row_shards(mesh)
  samples = run.eval.samples_per_problem
  compare = None
  if teacher is not None:
    # What training takes at a time, or its largest part that divides the rows: over all at once,
    # the attention scores alone may be larger than anything that training holds.
    compare = jax.jit(functools.partial(
        evaluate.row_sums, model=student.model, teacher=teacher,
        temperature=run.sample.temperature, teacher_temperature=run.objective.teacher_temperature,
        chunk_tokens=run.compute.chunk_tokens * shards,
        microbatch_rows=math.gcd(run.compute.microbatch_rows * shards, len(examples) * samples),
        overlap_top_k=evaluate.clamp_top_k(run.eval.overlap_top_k, student.model)),
        out_shardings=sharding.replicated(mesh))
  return evaluate.Evaluator(
      sample=jax.jit(draw(top_p=run.eval.top_p, top_k=run.eval.top_k), out_shardings=rows),
      greedy=jax.jit(draw(temperature=0.0, top_p=1.0, top_k=0), out_shardings=rows),
      compare=compare, see=see, samples_per_problem=samples, pass_k=run.eval.pass_k, task=task,
      examples=examples, tokenizer=student.tokenizer, mesh=mesh,
      key=key)
