"""A worker (benchmarks/turns.py) that takes steps of TRL on the work of benchmarks/step_work.py.

    python third_party/run_trl.py WORK distillation|gkd float32|bfloat16

Both trainers as a user calls them, on-policy and with the exact reverse KL: `DistillationTrainer`
(beta=1), `GKDTrainer` (lmbda=1, beta=1). bfloat16 is their own bf16=True. A step is what lies
between their callbacks `on_step_begin` and `on_step_end`; of it, generation is the time in
`generate` of the student, the teacher's that in its forward pass, and all the rest is the update.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT / 'benchmarks')

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
import turns  # noqa: E402

COMMON = dict(
    gradient_accumulation_steps=1, max_steps=10**6, learning_rate=1e-5, adam_beta2=0.95,
    weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type='constant', gradient_checkpointing=False,
    save_strategy='no', logging_strategy='no', report_to='none', disable_tqdm=True, use_cpu=True,
    dataloader_pin_memory=False, beta=1.0, temperature=1.0, seed=0)


class Wait(transformers.TrainerCallback):
  """Lets the trainer take a step only when it is told to."""

  def __init__(self, here: turns.Turns):
    self._here, self._phase = here, None

  def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
    """Waits for the word."""
    if not self._here.wait():
      self._here.say(peak_bytes=turns.peak_bytes())
      os._exit(0)  # in the middle of an endless training
    self._phase = self._here.clock.phase(turns.STEP)
    self._phase.__enter__()

  def on_step_end(self, *args: Any, **kwargs: Any) -> None:
    """Answers."""
    self._phase.__exit__(None, None, None)
    self._here.say(spent=turns.with_rest(self._here.clock.take(), 'update'))


def make_trainer(work: pathlib.Path, kind: str, dtype: str, here: turns.Turns) -> Any:
  """Makes the trainer, with the clock in its models."""
  sizes = json.loads((work / 'work.json').read_text())
  tokenizer = transformers.AutoTokenizer.from_pretrained(work / 'tokenizer', padding_side='left')
  student, teacher = (transformers.AutoModelForCausalLM.from_pretrained(
      work / part, dtype=torch.float32) for part in ('student', 'teacher'))
  student.generation_config.eos_token_id = tokenizer.eos_token_id
  student.generate = here.clock.timed('generate', student.generate)
  heard = teacher.base_model if kind == 'distillation' else teacher
  heard.forward = here.clock.timed('score_teacher', heard.forward)
  settings = dict(COMMON, output_dir=tempfile.mkdtemp(prefix='run_trl_'), bf16=dtype == 'bfloat16',
                  per_device_train_batch_size=sizes['rows'])
  rows = [{'prompt': text} for text in sizes['texts']]
  if kind == 'distillation':
    settings |= dict(max_completion_length=sizes['new'])
    trainer, config = trl.DistillationTrainer, trl.DistillationConfig
  else:
    from trl.experimental import gkd
    settings |= dict(max_new_tokens=sizes['new'], lmbda=1.0,
                     max_length=sizes['prompt'] + sizes['new'])
    mask = [0] * sizes['prompt'] + [1] * sizes['new']  # by which its loss is divided
    rows = [{**row, 'input_ids': ids, 'completion_mask': mask}
            for row, ids in zip(rows, sizes['tokens'], strict=True)]
    trainer, config = gkd.GKDTrainer, gkd.GKDConfig
  return trainer(model=student, teacher_model=teacher, args=config(**settings),
                 train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
                 callbacks=[Wait(here)]), sizes


def given_loss(trainer: Any, kind: str, sizes: dict[str, Any]) -> float:
  """Computes the trainer's own loss on the given rows, by its `compute_loss`."""
  ids, prompt = torch.tensor(sizes['tokens']), sizes['prompt']
  count = torch.tensor(sizes['rows'] * sizes['new'])
  if kind == 'distillation':
    inputs = {'prompt_ids': ids[:, :prompt], 'completion_ids': ids[:, prompt:],
              'num_items_in_batch': count}
    inputs |= {name.replace('ids', 'mask'): torch.ones_like(inputs[name])
               for name in ('prompt_ids', 'completion_ids')}
  else:
    labels = ids.clone()
    labels[:, :prompt] = -100
    inputs = {'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'labels': labels}
  trainer.model.train()
  with torch.no_grad(), trainer.compute_loss_context_manager():
    return float(trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count))


def main() -> None:
  """Serves steps."""
  work, kind, dtype = pathlib.Path(sys.argv[1]), *sys.argv[2:]
  here = turns.Turns()
  imports = turns.peak_bytes()
  trainer, sizes = make_trainer(work, kind, dtype, here)
  loss = given_loss(trainer, kind, sizes)
  here.clock.take()
  here.say(losses={'reverse_kl': loss}, import_bytes=imports, threads=torch.get_num_threads(),
           versions={m.__name__: m.__version__ for m in (torch, transformers, trl)})
  trainer.train()


if __name__ == '__main__':
  main()
