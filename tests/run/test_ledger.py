"""What a step is booked as: by hand, against the products of the programs, against the compiler's
count, and the table of the post."""

from __future__ import annotations

import json

from conftest import qwen3_config
import jax
import numpy as np
import pytest
from scipy import optimize
import tiny

from opd_jax import models, programs
from opd_jax.algorithm.objective import Objective
from opd_jax.data.streams import OWN, Stream
from opd_jax.doctor import lowered
from opd_jax.errors import ConfigError
from opd_jax.models import lora, params
from opd_jax.run import flops, ledger
from opd_jax.run.ledger import Counter, Ledger, efficiency
from opd_jax.tools.plan import products, shapes

SIZES = dict(vocab_size=256, hidden_size=64, intermediate_size=192, num_attention_heads=6,
             num_key_value_heads=2, head_dim=16, num_hidden_layers=3)
IMITATE = dict(distill_coef=0.0, likelihood_coef=1.0, importance='none')


def spend(lengths, student, teacher=None, reference=None, *, writer='student', adapter_specs=None,
          updates=1, mix=0.0, **fields):
  """What a step costs on rows of these lengths, with an objective of these fields."""
  stream = Stream(OWN, writer, mix, Objective(**fields), 'train', len(lengths), 1, (0.0, 1.0), 0)
  return Counter(student, teacher, reference, adapter_specs, updates).stream(stream, lengths)


class TestParts:

  def test_every_forward_pass_is_booked_where_it_belongs(self):
    small = models.build(qwen3_config(**SIZES))
    large = models.build(qwen3_config(**{**SIZES, 'hidden_size': 128}))
    lengths = np.array([10, 20, 7])
    own, theirs = (flops.forward_flops(m, lengths) for m in (small, large))
    assert own < theirs

    opd = dict(student_sampling=own, student_scoring=own, teacher_scoring=theirs)
    assert spend(lengths, small, large, updates=2) == Ledger(student_training=6 * own, **opd)
    assert spend(lengths, small, large, updates=2, advantages='recomputed') == Ledger(
        student_training=6 * own, **{**opd, 'student_scoring': 2 * own})
    assert spend(lengths, small, large, student_logprobs='sampler') == Ledger(
        student_training=3 * own, **{**opd, 'student_scoring': 0.0})
    assert spend(lengths, small, large, writer='teacher', **IMITATE) == Ledger(
        student_training=3 * own, teacher_sampling=theirs)
    assert spend(lengths, small, writer='dataset', **IMITATE) == Ledger(student_training=3 * own)
    assert spend(lengths, small, large, mix=0.5) == Ledger(
        student_training=3 * own, teacher_sampling=theirs, **opd)
    assert spend(lengths, small, large, large, reference_kl='k2(0.1)') == Ledger(
        student_training=3 * own, reference_scoring=theirs, **opd)

  def test_adapters_need_no_gradient_of_the_base(self):
    model = models.build(qwen3_config(**SIZES))
    specs = lora.adapter_specs(model.specs, lora.Settings(rank=3, alpha=1.0, targets='attention'))
    lengths = np.array([10, 20, 7])
    own, c = flops.forward_flops(model, lengths), model.config
    wide = {'q': c.num_attention_heads, 'k': c.num_key_value_heads, 'v': c.num_key_value_heads,
            'o': c.num_attention_heads}
    extra = sum(2 * 37 * c.num_hidden_layers * 3 * (c.hidden_size + heads * c.head_dim)
                for heads in wide.values())
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs
    spent = spend(lengths, model, model, updates=2, adapter_specs=specs)
    # A forward pass, the gradient of the activations, and of the adapters' own weights; of
    # attention, both of whose operands are activations, both gradients.
    assert spent.student_training == pytest.approx(
        2 * (2 * (own - attention) + 3 * attention + 3 * extra), rel=1e-12)
    assert spent.student_scoring == spent.student_sampling == pytest.approx(own + extra, rel=1e-12)

  def test_heads_that_are_applied_again_count(self):
    model = models.build(qwen3_config())
    lengths = np.array([5.0, 9.0])
    head = 2.0 * model.config.vocab_size * model.config.hidden_size * lengths.sum()
    assert flops.head_flops(model, lengths) == head
    own = flops.forward_flops(model, lengths)
    # The loss applies the head of a model that was scored once more in each update; that of one
    # whose hidden states are all that is asked for, one time less.
    exact, full = dict(baseline='exact'), dict(route='direct', support='full', importance='none')
    for updates, fields, student, teacher in (
        (1, {}, (1, 0), 0), (1, exact, (1, 1), 1), (1, full, (0, 0), 0), (3, exact, (1, 3), 3),
        (3, full, (0, 0), 2), (3, dict(exact, advantages='recomputed'), (3, 3), 3)):
      spent = spend(lengths, model, model, updates=updates, **fields)
      assert spent.student_training == pytest.approx(3 * updates * own)
      assert spent.student_scoring == pytest.approx(student[0] * own + student[1] * head)
      assert spent.teacher_scoring == pytest.approx(own + teacher * head)

  def test_a_ledger_adds_up_and_can_be_read_again(self):
    one = Ledger(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert (one + one * 2).values == (3.0, 6.0, 9.0, 12.0, 15.0, 18.0)
    assert (one.total, one.with_text_given) == (21.0, 16.0)
    assert ledger.read(json.loads(json.dumps(one.parts())), 'here') == one

  @pytest.mark.parametrize(('parts', 'match'), [
      ({'student': 1.0, 'sampling': 1.0, 'teacher': 1.0},
       r"here: flops has the parts \['sampling', 'student', 'teacher'\]; allowed: "
       r"\['student_training'"),
      ({**Ledger().parts(), 'teacher_sampling': float('nan')},
       r'here: flops\.teacher_sampling=nan; allowed'),
      ({**Ledger().parts(), 'student_training': -1.0}, r'student_training=-1\.0; allowed'),
      ({**Ledger().parts(), 'student_training': '1'}, r"student_training='1'; allowed")])
  def test_what_is_no_ledger_is_refused(self, parts, match):
    with pytest.raises(ConfigError, match=match):
      ledger.read(parts, 'here')


class TestPrograms:
  """The programs of a run, as they are, of one layer in one piece: XLA sees the body of each loop
  once, so each loop goes round once (a layer, a microbatch, a chunk of tokens; of the sampler, the
  first token is written before its loop and the second in it).

  What the programs do and the method does not need is known and taken out: the masked half of the
  square of attention, and of the decoding step the free places of the cache. What the convention of
  2 N a token counts and no program does is the head at the prompt's tokens. (The last token of a
  row predicts nothing, and is no input; the ledger counts it, with lengths as they are.) Then
  products agree to the operation, and XLA's count is above by what is elementwise: norms, softmax,
  rotation, the draw of a token, AdamW. At these widths that is 1 to 6 %, and less the wider the
  model.
  """

  ROWS, PROMPT, NEW = 8, 63, 2
  CASES = {
      'sampled': ('opd_sampled', {}),
      'exact': ('opd_exact', {}),
      'adapters': ('opd_sampled', dict(student__lora__rank=4)),
      'imitated': ('sft_teacher', {})}

  @pytest.fixture(params=CASES)
  def made(self, request, tmp_path):
    """The settings and the programs of a run, from config.json alone."""
    shape = {**tiny.SHAPE, **SIZES, 'num_hidden_layers': 1, 'max_position_embeddings': 128}
    for name, wide in (('student', 64), ('teacher', 96)):
      (tmp_path / name).mkdir()
      (tmp_path / name / 'config.json').write_text(json.dumps({**shape, 'hidden_size': wide}))
    kind, fields = self.CASES[request.param]
    c = tiny.config(
        kind, student__path=str(tmp_path / 'student'), teacher__path=str(tmp_path / 'teacher'),
        data__prompts_per_step=self.ROWS, data__max_prompt_tokens=self.PROMPT,
        data__max_new_tokens=self.NEW, compute__microbatch_rows=self.ROWS,
        compute__chunk_tokens=4096, **fields)
    run = shapes.parse(c, str(tmp_path))
    return run, programs.compile_programs(run, shapes.open_parts(run, jax.devices()))

  def expected(self, made):
    """{program: operations of its products}, from the ledger."""
    parts, length = made.parts, self.PROMPT + self.NEW - 1
    stream, lengths = parts.streams[0], np.full(self.ROWS, length)
    spent = parts.counter(updates=1).stream(stream, lengths)

    def differs(model, times, pairs, of_head=None):
      c = model.config
      masked = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * self.ROWS * pairs
      head = flops.head_flops(model, np.full(self.ROWS, self.PROMPT - 1))
      return times * masked - (of_head or times) * head

    student, teacher = parts.student.model, parts.teacher.model
    square = length * (length - 1) / 2
    cached = self.PROMPT * (self.PROMPT - 1) / 2 + self.PROMPT + self.NEW - length
    frozen = parts.adapter is not None
    out = {'update': spent.student_training + differs(student, 3, square, 2 if frozen else 3),
           'sample': spent.student_sampling + differs(student, 1, cached),
           'score student': spent.student_scoring + differs(student, 1, square),
           'score teacher': spent.teacher_scoring + differs(teacher, 1, square)}
    if stream.writer == 'teacher':
      out['sample'] = spent.teacher_sampling + differs(teacher, 1, cached)
    if stream.objective.needs_hidden_in_loss:  # the teacher's head is applied in the update
      head = flops.head_flops(teacher, np.full(self.ROWS, self.NEW))
      out['update'] += head
      out['score teacher'] -= head
    if frozen:  # the loss writes down a gradient of the head that nobody reads, and XLA drops
      out['update'] += flops.head_flops(student, np.full(self.ROWS, self.NEW))
    return out

  def test_the_ledger_is_what_the_programs_do(self, made):
    run, compiled = made
    expected, seen = self.expected(compiled), set()
    for name, call in lowered.calls(run, compiled, lowered.resident(compiled)).items():
      if name.startswith('evaluate'):
        continue
      seen.add(name)
      asked = products.count(call.trace().jaxpr, self.NEW - 1).flops
      assert asked == pytest.approx(expected[name], rel=1e-12), name
      counted = call.compile().cost_analysis()['flops']
      assert 1.0 <= counted / expected[name] <= 1.07, name
    assert {'update', 'sample'} <= seen


@pytest.fixture(scope='module')
def qwen():
  """The post's student and teacher, from their config.json."""
  folder = tiny.ROOT / 'experiments' / 'pods' / 'models' / 'Qwen'
  return tuple(models.build(json.loads((folder / name / 'config.json').read_text()))
               for name in ('Qwen3-8B-Base', 'Qwen3-32B'))


class TestPost:
  """The table of the Thinking Machines post (October 2025), from the settings that it states:
  Qwen3-8B-Base, a teacher counted as Qwen3-32B, 400 thousand prompts of text by the teacher, or two
  million; 77 thousand prompts x 4 answers of OPD (150 steps of 512 prompts).

  FLOPs         teacher   student
  SFT-400K      8.5e20    3.8e20
  SFT-2M        3.4e21    1.5e21
  OPD           8.4e19    8.2e19

  What the formulas explain: both numbers of OPD, to 2 %, with nothing free: 307,200 rows of 4096
  tokens, the default of its recipe, at 2 N a token for the teacher's grading and 8 N for the
  student's writing and learning, N all parameters. (Adapters, at 6 N, would take rows of 5400: the
  student's count is that of a full update. log p_S is the sampler's, and not scored again.) With
  attention, and without the embedding, rows of 4011 (teacher) and 4084 (student).

  What they do not: SFT. At 6 N the student's 3.8e20 are rows of 19 thousand tokens, at 2 N the
  teacher's 8.5e20 rows of 32 thousand; of equal rows the teacher's writing is 4/3 of the student's
  training, and not 2.2 times. With attention the two lengths are 16.0 and 23.9 thousand: rows that
  are written to their end and learned up to 16 thousand tokens would fit, but the post does not say
  so. And SFT-2M is five times the prompts of SFT-400K, but 4.0 times its teacher and 3.95 times its
  student: the totals are those of 1.6 million prompts. Five times SFT-400K would be 11.4 and 37
  times OPD's compute, in place of 9.0 and 29.5.
  """

  SFT_400K = Ledger(student_training=3.8e20, teacher_sampling=8.5e20)
  SFT_2M = Ledger(student_training=1.5e21, teacher_sampling=3.4e21)
  # Of the student the sum is stated; a quarter of 8 N is writing.
  OPD = Ledger(student_training=0.75 * 8.2e19, student_sampling=0.25 * 8.2e19,
               teacher_scoring=8.4e19)
  ROWS = 150 * 512 * 4

  @staticmethod
  def opd(student, teacher, tokens):
    """What OPD costs a row of so many tokens."""
    return spend(np.array([tokens]), student, teacher, student_logprobs='sampler')

  @staticmethod
  def sft(student, teacher, tokens):
    """What SFT on the teacher's text costs a row."""
    return spend(np.array([tokens]), student, teacher, writer='teacher', **IMITATE)

  @staticmethod
  def length(cost, stated):
    """The length at which a row costs what is stated."""
    return optimize.brentq(lambda n: cost(n) - stated, 1, 1e6)

  def test_the_compute_efficiency_follows_from_the_totals(self):
    found = efficiency(self.SFT_2M, self.OPD)
    assert found.text_given == pytest.approx(9.0, abs=0.05)
    assert found.charged == pytest.approx(29.5, abs=0.05)
    # From five times the row of SFT-400K instead.
    found = efficiency(self.SFT_400K * 5, self.OPD)
    assert found.text_given == pytest.approx(11.4, abs=0.05)
    assert found.charged == pytest.approx(37.0, abs=0.1)

  def test_opd_is_rows_of_4096_tokens(self, qwen):
    student, teacher = (params.count_params(m.specs) for m in qwen)
    tokens = self.ROWS * 4096
    assert 2 * teacher * tokens == pytest.approx(8.4e19, rel=0.02)
    assert (2 + 6) * student * tokens == pytest.approx(8.2e19, rel=0.02)
    # As the ledger counts: no embedding, but attention.
    graded = self.length(lambda n: self.opd(*qwen, n).teacher_scoring, 8.4e19 / self.ROWS)
    learned = self.length(lambda n: self.opd(*qwen, n).total - self.opd(*qwen, n).teacher_scoring,
                          8.2e19 / self.ROWS)
    assert (graded, learned) == pytest.approx((4011, 4084), abs=1)
    one = self.opd(*qwen, 4050) * self.ROWS
    assert one.teacher_scoring == pytest.approx(8.4e19, rel=0.02)
    assert one.student_training + one.student_sampling == pytest.approx(8.2e19, rel=0.02)

  def test_sft_is_no_row_of_one_length(self, qwen):
    written, learned = (self.length(lambda n, p=part: getattr(self.sft(*qwen, n), p), stated / 4e5)
                        for part, stated in (('teacher_sampling', 8.5e20),
                                             ('student_training', 3.8e20)))
    assert (written, learned) == pytest.approx((23_875, 15_959), abs=1)
    ratios = [row.teacher_sampling / row.student_training
              for row in (self.sft(*qwen, n) for n in (1, 4096, 16_384, 65_536))]
    assert all(1.25 < ratio < 1.42 for ratio in ratios) and 8.5 / 3.8 > 2.2
    student, teacher = (params.count_params(m.specs) for m in qwen)
    tokens = 3.8e20 / (6 * student), 8.5e20 / (2 * teacher)
    assert [n / 4e5 for n in tokens] == pytest.approx([19_331, 32_431], abs=1)

  def test_two_million_prompts_are_booked_as_four_times_the_400_thousand(self):
    assert self.SFT_2M.teacher_sampling / self.SFT_400K.teacher_sampling == pytest.approx(4.0)
    assert self.SFT_2M.student_training / self.SFT_400K.student_training == pytest.approx(3.95,
                                                                                          abs=0.01)
