"""Every field of a run: name, type, default and meaning. Those of the objective are in
algorithm/objective.py, the options of a task in its file.

`Run` is what the code reads: frozen, checked, without None. `config.parse` makes it of the
`ConfigDict` that people write.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from opd_jax.algorithm.objective import Objective

FRESH = dict(
    model_type='qwen3', hidden_size=64, intermediate_size=192, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
    rope_theta=100.0, tie_word_embeddings=False, max_position_embeddings=512)


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters instead of the whole model."""

  rank: int = 0  # 0 trains the whole model
  alpha: float = 32.0
  targets: str = 'all'  # 'all', 'attention', 'mlp' or a regular expression (lora.Settings)
  path: str = ''  # a PEFT directory to start from, which then says all of it


@dataclasses.dataclass(frozen=True)
class Student:
  """Who learns."""

  # A Hugging Face directory, 'stage:NAME', or 'organization/name' of the hub, where `revision` is a
  # commit, or a branch or tag ('' is main), whose commit the first start keeps (config.pin). ''
  # makes a fresh model from `fresh` with a character tokenizer.
  path: str = ''
  revision: str = ''
  factory: str = ''  # 'package.module:function' of a Flax module (files/factory.py), '' for none
  fresh: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(FRESH))  # config.json
  lora: Lora = Lora()


@dataclasses.dataclass(frozen=True)
class Teacher:
  """Who grades."""

  kind: str = 'none'  # a file in opd_jax/teachers/, or 'none'
  path: str = ''
  revision: str = ''
  factory: str = ''


@dataclasses.dataclass(frozen=True)
class Reference:
  """What objective.reference_kl and objective.extrapolation refer to."""

  kind: str = 'none'  # those of teachers
  path: str = ''
  revision: str = ''


@dataclasses.dataclass(frozen=True)
class Mesh:
  """How many devices along each axis; -1 for what is left."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  expert: int = 1


@dataclasses.dataclass(frozen=True)
class Compute:
  """How student and teacher compute."""

  dtype: str = 'float32'  # of activations; trained parameters and reductions are float32
  frozen_dtype: str = 'auto'  # of teachers and of the base under an adapter: 'auto' is `dtype`
  # The form of attention (models/attention.py): 'reference', 'blocks', 'cudnn' (NVIDIA), 'splash'
  # (TPU); 'auto' takes the fastest that the platform has for the length, dtype and model.
  attention: str = 'auto'
  # What the backward pass computes again: 'none'; 'attention', the scores (other forms than the
  # reference always do); 'layer', all but what enters a layer, which 'offload' keeps on the host.
  remat: str = 'none'
  layer_unroll: int = 1  # layers per iteration of the scan over layers
  # Of each part into which the mesh splits rows (data times fsdp), so that a config means the same
  # on one device and on many: rows per forward/backward pass, 0 for all that it has; tokens whose
  # vocabulary rows exist at a time.
  microbatch_rows: int = 0
  chunk_tokens: int = 4096
  # To how many lengths (the room, its half, its quarter, ...) passes of rows alike in length are
  # cut; 1 for the room alone, 0 for as many as leave the shortest 128 tokens, at most four.
  length_buckets: int = 0
  mesh: Mesh = Mesh()
  # Into how many parts, of the devices of `mesh.fsdp`, the weights are split where tokens are
  # decoded; 1 gathers them whole, 0 chooses by their size (run/meshes.py).
  decode_split: int = 0
  # So many of the devices are the teacher's, with a mesh of their own; 0 shares the student's. Then
  # a step's prompts may be split into parts: the teacher grades one while the student writes the
  # next.
  teacher_devices: int = 0
  teacher_mesh: Mesh = Mesh()
  pipeline_parts: int = 1
  # Wait for each program before the next: 'auto' does on several fake CPU devices, where programs
  # with collectives in flight together can deadlock.
  block: str = 'auto'


@dataclasses.dataclass(frozen=True)
class Task:
  """What it learns on."""

  name: str = 'arithmetic'  # a file in opd_jax/tasks/
  options: Any = dataclasses.field(default_factory=dict)  # `config.parse` makes the task's Options


@dataclasses.dataclass(frozen=True)
class Prompt:
  """How prompts become tokens (data/prompts.py)."""

  template: str = 'none'  # the text as it is, or whose chat template: 'student' or 'teacher'
  # For a template: the system message, its switch 'on' or 'off', and what one that writes today's
  # date writes in its place.
  system: str = ''
  thinking: str = 'default'
  date: str = ''
  special_tokens: bool = False  # without one: the tokenizer puts its own tokens (BOS) first
  # What becomes of control tokens, such as '<|im_end|>', that prompts or completions write out:
  # 'refuse'; 'text', encoded like other characters; 'tokens', where they stand there on purpose.
  control_tokens: str = 'refuse'


@dataclasses.dataclass(frozen=True)
class Data:
  """Who writes the rows, on which prompts."""

  source: str = 'student'  # student, teacher or dataset
  # The share of batches that the student writes, decided by (seed, step) and so the same on every
  # host; the others are written by the teacher or given by the dataset (GKD, 2023, arXiv
  # 2306.13649, its lambda).
  on_policy_fraction: float = 1.0
  off_policy_source: str = 'none'
  # What the teacher writes: 'fresh' in every step; 'fixed', samples_per_prompt answers to each
  # example once, before the first step, which is a data set to learn from again and again.
  teacher_answers: str = 'fresh'
  # The first so many batches are all of the off-policy source: a student that is far from its
  # teacher first learns on text that the teacher knows.
  warm_steps: int = 0
  split: str = 'train'
  limit: int = 0  # use only the first so many examples, 0 for all
  prompts_per_step: int = 256
  samples_per_prompt: int = 1
  max_prompt_tokens: int = 12
  max_new_tokens: int = 36
  # Examples that do not fit: 'raise'; 'drop'; 'cut' (the beginning of a prompt, the end of a given
  # completion).
  overlong: str = 'raise'


@dataclasses.dataclass(frozen=True)
class Given:
  """Rows beside these in every gradient step, written by 'teacher' or given by the 'dataset', with
  an objective of their own: likelihood_coef for golden data (StableOPD, 2026, arXiv 2604.08527),
  distill_coef for the exact divergence on them (DistiLLM-2, 2025, arXiv 2503.07067)."""

  source: str = 'none'
  split: str = 'train'
  prompts_per_step: int = 0
  likelihood_coef: float = 0.0
  distill_coef: float = 0.0
  divergence: str = 'forward_kl'
  support: str = 'full'


@dataclasses.dataclass(frozen=True)
class Sample:
  """How completions are sampled, in training and (temperature, stop) evaluation. The student is
  trained at this temperature too."""

  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  stop: str = 'student'  # whose stop tokens end a completion: 'student', 'teacher' or their 'union'
  # In training, tokens come from this share of the teacher's distribution and the rest of the
  # student's (MiniLLM, 2023, arXiv 2306.08543, section 2.2).
  teacher_mix: float = 0.0
  # So many rows are written at a time, in evaluations too, and where one ends the next begins; 0
  # for all rows at once (algorithm/slots.py).
  slots: int = 0


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """How the student moves."""

  name: str = 'adamw'
  learning_rate: float = 1e-3
  schedule: str = 'constant'
  final_learning_rate: float = 0.0
  warmup_steps: int = 0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0  # 0 for none
  updates_per_batch: int = 1


@dataclasses.dataclass(frozen=True)
class Eval:
  """How the student is evaluated on held-out problems."""

  every_steps: int = 0  # 0: only before the first and after the last step
  problems: int = 256  # the first so many of the split, 0 for all
  samples_per_problem: int = 2
  max_new_tokens: int = 0  # room for an answer, 0 for data.max_new_tokens
  # Whatever the training samples are cut to: runs stay comparable.
  top_p: float = 1.0
  top_k: int = 0
  pass_k: int = 2
  stop_at_sampled_accuracy: float = 0.0  # end the stage once reached, 0 for never
  # How many most likely tokens of student and teacher are compared (at most half of the
  # vocabulary), 0 for none.
  overlap_top_k: int = 16


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a run leaves on disk."""

  every_steps: int = 100
  keep_latest: int = 2
  keep_best: int = -1  # -1 is 1 where the task grades, and 0 where there are no accuracies
  best_metric: str = 'sampled_accuracy'
  # For others: 'full', the whole model with adapters merged into it (and the adapter beside it), or
  # only the 'adapter'.
  export: str = 'full'

  @property
  def most_best(self) -> int:
    """How many of the best are kept at most: where nothing is graded, none is the best."""
    return 1 if self.keep_best == -1 else self.keep_best


@dataclasses.dataclass(frozen=True)
class Doctor:
  """What is checked at every start, on this many rollouts of at most so many tokens (fewer where
  `opd doctor` looks on a CPU). A check is 'on' or 'off: REASON' (doctor/)."""

  rollouts: int = 8
  max_new_tokens: int = 256
  max_reverse_kl: float = 6.0
  # Why a run may go on although its data or models are not what it was started on; '' refuses.
  changed_inputs: str = ''
  templates: str = 'on'
  token_ids: str = 'on'
  stop_tokens: str = 'on'
  vocabulary: str = 'on'
  memory: str = 'on'
  unused_options: str = 'on'
  self_kl: str = 'on'
  uniform_teacher: str = 'on'
  support: str = 'on'
  special_tokens: str = 'on'
  truncation: str = 'on'


@dataclasses.dataclass(frozen=True)
class Diagnose:
  """What `opd diagnose` measures gradients on: so many batches of so many prompts (with at least
  two samples each), and the k of the top-k supports. A bias shows from 8 batches on."""

  batches: int = 8
  prompts: int = 32
  top_k: int = 16


@dataclasses.dataclass(frozen=True)
class Log:
  """What is written and shown."""

  every_steps: int = 1
  plain_every_steps: int = 10  # lines on a console that is no terminal
  transcripts: int = 3
  max_sampler_gap: float = 0.0  # stop if sampler and scorer differ by more nats, 0 for never


@dataclasses.dataclass(frozen=True)
class Run:
  """The settings of one run."""

  name: str = 'run'
  seed: int = 0
  steps: int = 100  # batches; gradient steps are steps * optimizer.updates_per_batch
  student: Student = Student()
  teacher: Teacher = Teacher()
  reference: Reference = Reference()
  compute: Compute = Compute()
  task: Task = Task()
  prompt: Prompt = Prompt()
  data: Data = Data()
  given: Given = Given()
  sample: Sample = Sample()
  objective: Objective = Objective()  # of the student's own rows; data/streams.py has all of them
  optimizer: Optimizer = Optimizer()
  eval: Eval = Eval()
  checkpoint: Checkpoint = Checkpoint()
  doctor: Doctor = Doctor()
  diagnose: Diagnose = Diagnose()
  log: Log = Log()

  @property
  def has_adapter(self) -> bool:
    """Whether adapters are trained instead of the whole model."""
    return bool(self.student.lora.rank or self.student.lora.path)

  @property
  def eval_tokens(self) -> int:
    """Room for an answer in evaluations."""
    return self.eval.max_new_tokens or self.data.max_new_tokens

  def is_evaluated(self, step: int) -> bool:
    """Tells whether the student that `step` updates have made is evaluated."""
    every = self.eval.every_steps
    return step == self.steps or bool(every) and step % every == 0

  @property
  def frozen_dtype(self) -> str:
    """How parameters that nothing changes are kept."""
    auto = self.compute.frozen_dtype == 'auto'
    return self.compute.dtype if auto else self.compute.frozen_dtype
