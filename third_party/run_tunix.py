"""A worker (benchmarks/turns.py) that takes steps of Tunix on the work of benchmarks/step_work.py.

    python third_party/run_tunix.py WORK float32|bfloat16

Tunix 0.1.7 has a sampler and a distillation trainer, and no loop of both: the loop here is ours, a
data set that samples the next rows with the weights of the moment. The loss is theirs, the forward
KL (alpha=1, temperature=1), over the places of the completion, which are all that its forward
function returns here; it takes one-hot labels whatever alpha is.
"""

from __future__ import annotations

from collections.abc import Iterator
import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT / 'benchmarks')

from flax import nnx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import transformers  # noqa: E402
from tunix.distillation import distillation_trainer, strategies  # noqa: E402
from tunix.generate import sampler as sampler_lib  # noqa: E402
from tunix.generate import utils  # noqa: E402
from tunix.models.qwen3 import model as model_lib  # noqa: E402
from tunix.models.qwen3 import params as params_lib  # noqa: E402
import turns  # noqa: E402


def read_model(folder: pathlib.Path, dtype: str) -> Any:
  """Reads a checkpoint with Tunix's own loader; parameters are float32."""
  c = json.loads((folder / 'config.json').read_text())
  theta = c.get('rope_theta') or c['rope_parameters']['rope_theta']
  config = model_lib.ModelConfig(
      num_layers=c['num_hidden_layers'], vocab_size=c['vocab_size'], embed_dim=c['hidden_size'],
      hidden_dim=c['intermediate_size'], num_heads=c['num_attention_heads'],
      head_dim=c['head_dim'], num_kv_heads=c['num_key_value_heads'], rope_theta=int(theta),
      norm_eps=c['rms_norm_eps'], use_tied_embedding=True, dtype=jnp.dtype(dtype))
  return params_lib.create_model_from_safe_tensors(str(folder), config, dtype=jnp.float32)


class Loop:
  """Sampler, strategy and trainer, on the clock."""

  def __init__(self, work: pathlib.Path, dtype: str, here: turns.Turns):
    """Reads the models."""
    self._here = here
    self.sizes = sizes = json.loads((work / 'work.json').read_text())
    student, teacher = (read_model(work / part, dtype) for part in ('student', 'teacher'))
    tokenizer = transformers.AutoTokenizer.from_pretrained(work / 'tokenizer')
    c, prompt = student.config, sizes['prompt']
    self.sampler = sampler_lib.Sampler(student, tokenizer, sampler_lib.CacheConfig(
        prompt + sizes['new'], c.num_layers, c.num_kv_heads, c.head_dim))

    def forward(model, input_tokens, input_mask, positions, attention_mask):
      return model(input_tokens, positions, None, attention_mask)[0][:, prompt - 1:-1]

    def labels(input_tokens, **_):
      return jax.nn.one_hot(input_tokens[:, prompt:], c.vocab_size)

    strategy = strategies.LogitStrategy(forward, forward, labels, temperature=1.0, alpha=1.0)
    strategy.get_teacher_outputs = here.clock.timed(
        'score_teacher', strategy.get_teacher_outputs, jax.block_until_ready)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0),
                            optax.adamw(1e-5, b1=0.9, b2=0.95, weight_decay=0.0))
    self.trainer = distillation_trainer.DistillationTrainer(
        student, teacher, strategy, optimizer,
        distillation_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=None)
    ).with_gen_model_input_fn(self._inputs)

  @staticmethod
  def _inputs(x):
    mask = jnp.asarray(x.input_mask)
    return {'input_tokens': jnp.asarray(x.input_tokens), 'input_mask': mask,
            'positions': utils.build_positions_from_mask(mask),
            'attention_mask': utils.make_causal_attn_mask(mask, mask.shape[1])}

  def given_loss(self) -> float:
    """Computes the trainer's own loss on the given rows."""
    tokens = np.array(self.sizes['tokens'], np.int32)
    example = distillation_trainer.TrainingInput(
        input_tokens=tokens, input_mask=np.ones(tokens.shape, bool))
    inputs, trainer = self._inputs(example), self.trainer
    theirs = trainer.strategy.get_teacher_outputs(trainer.teacher_model, inputs)
    loss, _ = nnx.jit(trainer.get_train_loss)(trainer.model, theirs, inputs)
    return float(loss)

  def examples(self) -> Iterator[Any]:
    """Samples the rows of each step, when there is to be one."""
    step = 0
    while self._here.wait():
      with self._here.clock.phase(turns.STEP):
        with self._here.clock.phase('generate'):
          tokens = self._sample(step)
        yield distillation_trainer.TrainingInput(
            input_tokens=tokens, input_mask=np.ones(tokens.shape, bool))
        # The trainer asks for the next rows when it has dispatched the update.
        jax.block_until_ready(nnx.state(self.trainer.model))
      self._here.say(spent=turns.with_rest(self._here.clock.take(), 'update'))
      step += 1

  def _sample(self, step):
    self.sampler.transformer_state = nnx.variables(self.trainer.model, nnx.Param)
    out = self.sampler(self.sizes['texts'], self.sizes['new'],
                       max_prompt_length=self.sizes['prompt'], temperature=1.0, top_p=1.0,
                       seed=step)
    completions = np.stack([np.asarray(t) for t in out.tokens])
    assert completions.shape == (self.sizes['rows'], self.sizes['new']), completions.shape
    return np.concatenate([out.padded_prompt_tokens, completions], axis=1).astype(np.int32)


def main() -> None:
  """Serves steps."""
  import importlib.metadata
  work, dtype = pathlib.Path(sys.argv[1]), sys.argv[2]
  here = turns.Turns()
  imports = turns.peak_bytes()
  loop = Loop(work, dtype, here)
  loss = loop.given_loss()
  here.clock.take()
  versions = {name: importlib.metadata.version(name) for name in ('google-tunix', 'jax', 'flax')}
  here.say(losses={'forward_kl': loss}, import_bytes=imports, versions=versions)
  loop.trainer.train(loop.examples())
  here.say(peak_bytes=turns.peak_bytes())


if __name__ == '__main__':
  main()
