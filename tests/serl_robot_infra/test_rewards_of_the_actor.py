"""Learned rewards on the robot side: outcomes, stages, and a reward server that falls silent."""

import numpy as np
import pytest

from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.rewards.classifier import ClassifierReward
from serl_transport.errors import ServerSilent
from serl_transport.schema import Observation

STEP = StepResult(
    Observation(images={"front": np.zeros((2, 2, 3), np.uint8)}, state=np.zeros(1, np.float32)),
    reward=7.0, terminated=True, truncated=False, success=True,
)  # fmt: skip


class Answers:
    """A reward server that says these probabilities in turn; None: silence."""

    def __init__(self, kind, said, patience=1):
        self.kind, self.said, self.patience = kind, list(said), patience

    def request(self, type, payload, timeout_ms):
        assert type == "reward"
        assert set(payload) == {"images", "state"}
        said = self.said.pop(0) if self.said else None
        if said is None:
            raise ServerSilent("no reply")
        return {"kind": self.kind, "probabilities": said, "threshold": 0.5, "patience": self.patience}


def judged(source, n):
    return [(r.reward, r.terminated, r.success) for r in (source.judge(STEP) for _ in range(n))]


def test_an_outcome_needs_patience_observations_in_a_row_and_the_environments_word_does_not_count():
    said = [[0.4, 0.6], [0.6, 0.4], [0.4, 0.6], [0.5, 0.5]]
    source = ClassifierReward(Answers("outcome", said, patience=2))
    assert judged(source, 4) == [(0, False, False)] * 3 + [(1, True, True)]


def test_the_environment_may_end_an_episode_as_a_failure_where_allowed():
    source = ClassifierReward(Answers("outcome", [[0.9, 0.1]]), environment_may_end=True)
    assert judged(source, 1) == [(0, True, False)]


def test_each_stage_is_rewarded_once_in_order_and_sums_to_one():
    stages = [0, 2, 0, 2, 2, 3, 3]  # the jump to 2 counts as reaching 1, falling back takes nothing
    source = ClassifierReward(Answers("process", [np.eye(4)[k] for k in stages]))
    rewards = judged(source, 6)
    assert [r[0] for r in rewards] == pytest.approx([0, 1 / 3, 0, 1 / 3, 0, 1 / 3])
    assert rewards[-1][1:] == (True, True)
    source.reset()
    assert judged(source, 1)[0][0] == pytest.approx(1 / 3)  # a new episode begins at stage 0


def test_a_silent_reward_server_ends_the_episode_as_truncated_and_keeps_its_tick():
    result = ClassifierReward(Answers("outcome", []), patience_s=0.0).judge(STEP)
    assert (result.reward, result.terminated, result.truncated, result.success) == (0.0, False, True, False)
