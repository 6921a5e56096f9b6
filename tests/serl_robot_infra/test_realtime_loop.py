"""The actor loop with a policy that is slower than the tick: idle without real-time chunking, never idle with it."""

import io
import time

import numpy as np
import pytest
from scripted_learner import RobotPick, ScriptedLearner, actor_config, ticket

from serl_robot_infra.main import main
from serl_transport.contract.errors import NotReady

HZ, SLOW_S, AH = 20, 0.16, 12  # a chunk takes more than three ticks
WAITED = 3  # ticks: who waits for a chunk waits longer than this, a machine that is busy seldom


@pytest.fixture(scope="module")
def spec():
    env = RobotPick()
    yield env.spec
    env.close()


def slow_policy(failing=()):
    """The gripper command tells the question's number, the third action the index in the chunk."""
    count = 0

    def infer(body):
        nonlocal count
        count += 1
        number = count
        time.sleep(SLOW_S)
        if number in failing:
            raise NotReady("the policy server restarts")
        actions = np.zeros((AH, 4), np.float32)
        actions[:, 2] = np.arange(AH) / 1000
        actions[:, 3] = number / 100
        return {"actions": actions, "policy_version": number, "server_ms": 0.0}

    return infer


def run(spec, tmp_path, infer, **rollout):
    with ScriptedLearner(spec, [ticket("online", 1, takeover=False)], infer) as learner:
        watchdog = {"enabled": False, "hold_after_chunks": 2, "stop_ms": 500}
        config = actor_config(learner, tmp_path, rate_hz=HZ, watchdog=watchdog, **rollout)
        config.task.env = {"_target_": "scripted_learner.RobotPick"}
        stream = io.StringIO()
        assert main(config, stream) == 0, stream.getvalue()
        (episode,) = learner.episodes()
    times = np.array([t for t, _ in RobotPick.last.sent])
    return learner, episode, np.diff(times) * HZ, stream.getvalue()


def test_without_it_the_robot_waits_at_every_chunk(spec, tmp_path):
    _, episode, gaps, _ = run(spec, tmp_path, slow_policy(), execute_horizon=6)
    assert episode.n == 60
    assert (gaps > WAITED).sum() == 9  # 60 ticks, 6 a chunk, the first one aside


@pytest.mark.parametrize("mode", ["async", "rtc"])
def test_with_it_no_tick_is_idle(spec, tmp_path, mode):
    learner, episode, gaps, _ = run(spec, tmp_path, slow_policy(), execute_horizon=6, realtime=mode)
    assert episode.n == 60
    assert (gaps < WAITED).all(), gaps
    index = np.round(episode.arrays["action"][:, 2] * 1000).astype(int)
    version = episode.arrays["policy_version"]
    # A new chunk is joined at the index of its own time: the age of its observation.
    joins = np.flatnonzero(np.diff(version)) + 1
    assert len(joins) >= 8
    assert (index[joins] >= 3).all()
    assert (index[joins] <= 6).all()
    assert (np.diff(index)[np.diff(version) == 0] == 1).all()
    bodies = learner.infer_bodies
    assert all(("prefix_actions" in body) == (mode == "rtc") for body in bodies[1:])
    if mode == "rtc":
        assert 3 <= bodies[-1]["inference_delay"] <= 6


def test_one_missed_chunk_costs_no_tick(spec, tmp_path):
    _, episode, gaps, out = run(spec, tmp_path, slow_policy(failing={4}), execute_horizon=4, realtime="rtc")
    assert episode.n == 60
    assert (gaps < WAITED).all(), gaps
    assert "holding" not in out
    assert 4 not in episode.arrays["policy_version"]


def test_a_policy_that_stays_away_makes_the_robot_hold_and_the_episode_end(spec, tmp_path):
    infer = slow_policy(failing=set(range(4, 100)))
    _, episode, _, out = run(spec, tmp_path, infer, execute_horizon=4, realtime="rtc", hold_limit_s=0.5)
    assert 4 < episode.n < 40
    assert episode.outcome.truncated_by == "stop"
    assert "policy not ready" in out
    assert "no action for" in out
