"""Rewards on the robot side: learned ones, a silent reward server, a goal pose, a person's keys (real terminal)."""

import io
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from omegaconf import OmegaConf
from scripted_learner import ScriptedLearner, actor_config, ticket

from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.episode import ruled
from serl_robot_infra.interventions.base import NOTHING_SAID, Words
from serl_robot_infra.main import main
from serl_robot_infra.rewards.classifier import ClassifierReward
from serl_robot_infra.rewards.goal_pose import GoalPoseReward
from serl_robot_infra.rewards.human_key import HumanKeyReward
from serl_robot_infra.rewards.operator import OperatorReward
from serl_robot_infra.wiring import build_reward, evaluation_reward
from serl_transport.contract.errors import ServerSilent
from serl_transport.contract.schema import Observation

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


class Fooled:
    """A classifier that sees success everywhere."""

    success_source = "classifier"

    def reset(self):
        pass

    def judge(self, result):
        return replace(result, reward=1.0, terminated=True, success=True)


@pytest.mark.parametrize(("evaluate_with", "ticks", "success"), [("environment", 60, False), (None, 1, True)])
def test_the_environment_may_judge_evaluations_while_a_classifier_judges_the_rest(
    tmp_path, evaluate_with, ticks, success
):
    env = PickEnv(image_size=32, renderer="ray")
    tickets = [ticket("eval", 1_000_000), ticket("online", 1, takeover=False)]
    with ScriptedLearner(env.spec, tickets) as learner:
        cfg = actor_config(learner, tmp_path)
        cfg.reward = {"_target_": f"{__name__}.Fooled", "evaluate_with": evaluate_with}
        out = io.StringIO()
        assert main(cfg, out) == 0, out.getvalue()
        evaluation, online = learner.episodes()
    env.close()
    assert (evaluation.n, evaluation.outcome.success) == (ticks, success)
    assert evaluation.outcome.success_source == (evaluate_with or "classifier")
    assert (online.n, online.outcome.success, online.outcome.success_source) == (1, True, "classifier")


def test_an_unknown_judge_of_evaluations_is_named():
    cfg = OmegaConf.create({"task": {}, "reward": {"_target_": f"{__name__}.Fooled", "evaluate_with": "human"}})
    with pytest.raises(ValueError, match=r"reward.evaluate_with: expected environment or null .*, got 'human'"):
        evaluation_reward(cfg, build_reward(cfg))


def at(x, ended=False):
    """A step that ended in state (x, 9)."""
    state = np.array([x, 9.0], np.float32)
    return replace(STEP, observation=Observation(images={}, state=state), terminated=ended, success=False)


def test_a_goal_pose_must_be_held_and_only_named_states_count():
    source = GoalPoseReward(["x", "y"], {"x": 1.0}, {"x": 0.1}, hold_ticks=2)
    results = [source.judge(at(x)) for x in (1.05, 1.2, 0.95, 1.0)]
    assert [(r.reward, r.terminated) for r in results] == [(0, False), (0, False), (0, False), (1, True)]
    source.reset()
    result = source.judge(at(1.0, ended=True))  # the environment may end an episode, but not call it a success
    assert (result.success, result.terminated, result.reward) == (False, True, 0)


def test_a_goal_that_the_task_has_not_got_is_named():
    with pytest.raises(ValueError, match="expected the same states of x, y, got z and z"):
        GoalPoseReward(["x", "y"], {"z": 1.0}, {"z": 0.1})


TERMINAL = """
import sys, time
from serl_robot_infra.rewards.human_key import HumanKeyReward
from serl_robot_infra.interventions.base import NOTHING_SAID
source = HumanKeyReward(discard_key="x")
print("ready", flush=True)
for _ in range(3):
    while (said := source.words()) == NOTHING_SAID:
        time.sleep(0.01)
    print(said.success, said.failure, said.discard, flush=True)
"""


def test_keys_of_a_terminal_are_a_persons_words():
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL], stdin=slave, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        for key, line in ((b"?s", "True False False\n"), (b"f", "False True False\n"), (b"x", "False False True\n")):
            os.write(master, key)
            assert process.stdout.readline() == line
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(master)
        os.close(slave)


def test_a_persons_word_outranks_whoever_judged_and_brings_the_return_to_one():
    said = Words(success=True)
    result = ruled(STEP, said, return_so_far=0.25)
    assert (result.reward, result.terminated, result.success) == (0.75, True, True)
    result = ruled(STEP, said | Words(failure=True), return_so_far=0.25)
    assert (result.reward, result.terminated, result.success) == (0.0, True, False)
    result = ruled(STEP, said | Words(discard=True), return_so_far=0.0)
    assert (result.terminated, result.truncated, result.success) == (False, True, False)
    assert ruled(STEP, NOTHING_SAID, return_so_far=0.0) is STEP


def test_with_reward_operator_the_environments_own_word_does_not_count():
    assert judged(OperatorReward(), 1) == [(0, True, False)]  # its end is a failure


def test_without_a_terminal_the_mistake_is_named(monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    with pytest.raises(ValueError, match="needs a terminal"):
        HumanKeyReward()
