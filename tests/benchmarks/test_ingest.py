"""The ingest suite against a real gateway: each actor's acknowledged ticks count, packed journals are smaller."""

import pytest
from suites.ingest import BATCH, expert_episode, measure

from serl_robot_infra.envs.pick import PickEnv


@pytest.mark.slow
def test_actors_that_send_as_fast_as_they_can_are_all_served():
    env = PickEnv()
    episode = expert_episode(env)
    packed = measure(3, 1.5, env.spec, episode, "lossless")
    raw = measure(1, 1.5, env.spec, episode, "raw")
    assert packed.rate > BATCH
    assert 0 < packed.fairness <= 1
    assert packed.memory_mb > 5
    assert packed.disk_bytes < 0.2 * raw.disk_bytes
    assert raw.disk_bytes > 2 * 64 * 64 * 3  # two cameras' pixels
