"""Runs that end before their last step: at a goal, or by a signal."""

import pytest
import reuse
import tiny

from opd_jax import train


class TestEarlyStop:

  def test_at_an_accuracy(self, tmp_path):
    c = tiny.with_models('sft', steps=12, eval__every_steps=2, eval__stop_at_sampled_accuracy=0.01)
    result = reuse.train(c, tmp_path)
    assert result['steps'] == 2 and [e['step'] for e in result['evals']] == [0, 2]
    assert tiny.read_checkpoint(tmp_path, 2)['host']['stopped_at'] == 2

  def test_stays_stopped_after_a_kill(self, tmp_path, monkeypatch):
    c = tiny.with_models('sft', steps=12, eval__every_steps=2, eval__stop_at_sampled_accuracy=0.01)
    with monkeypatch.context() as m:
      m.setattr(train, 'finish', None)  # as if it had been killed before the export
      with pytest.raises(TypeError):
        reuse.train(c, tmp_path)
    assert reuse.train(c, tmp_path)['steps'] == 2


class TestInterrupted:

  @pytest.mark.parametrize('calls', [0, 1, 3])
  def test_whenever_the_signal_comes_there_is_a_checkpoint(self, calls, tmp_path, monkeypatch):
    # The flag is read at several places of the loop; it may go up between any two of them.
    class Flag:
      reads = 0

      def __enter__(self):
        return self

      def __exit__(self, *exc):
        pass

      def __call__(self):
        self.reads += 1
        return self.reads > calls

      now = __call__
      end = None  # before the first step nothing is written

    monkeypatch.setattr(train, 'Interrupts', Flag)
    c = tiny.with_models('sft', steps=12, checkpoint__every_steps=100, eval__every_steps=4)
    with pytest.raises(train.PreemptedError) as e:
      reuse.train(c, tmp_path)
    step = tiny.rows(tmp_path, 'train')[-1]['step']
    assert f'step {step},' in str(e.value)
    assert tiny.checkpoint_steps(tmp_path)[-1] == step
