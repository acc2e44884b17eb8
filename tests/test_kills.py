"""The short form of kills.py: a few kills at random points of one run."""

import kills
import tiny


def test_a_run_that_is_killed_at_random_points(tmp_path):
  c = tiny.with_models('opd_sampled', steps=12, eval__every_steps=4, checkpoint__every_steps=2,
                       checkpoint__keep_latest=3)
  kind = kills.Kind('plain', c, tmp_path / 'plain', seed=0)
  with kills.Server(tmp_path / 'plain', 1) as server:
    kind.undisturbed(server)
    kind.kill(server, 3)
  assert not kind.failures
  assert sum(kind.hits.values()) == 3 and kind.ended >= 2
