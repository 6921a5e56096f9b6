"""operator=keyboard: keys typed at a terminal drive the robot, judge it, throw episodes away and say ready.

The actor, its keyboard thread, the transport and the learner's server are the real ones; the terminal is a pseudo one.
"""

import os
import signal
import time

import numpy as np
import pytest
from scripted_learner import RobotPick, ScriptedLearner, ticket

from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.interventions.base import OperatorGoneError
from serl_robot_infra.interventions.keyboard import Keys
from serl_robot_infra.keyboard import Keyboard, TerminalGoneError

BY_HAND = ("operator=keyboard", "reward=operator")


@pytest.fixture(scope="module")
def spec():
    env = PickEnv(image_size=32, renderer="ray")
    yield env.spec
    env.close()


def executed():
    """float32[n, 4], what the robot was sent."""
    return np.array([action for _, action in RobotPick.last.sent])


def test_a_demonstration_by_hand_waits_for_the_scene_and_is_recorded_as_executed(spec, tmp_path, typist):
    def hands():
        typist.screen.wait_for("demo-1: set the scene, then press enter")
        typist.type(b"yg")  # there is nothing to judge or to grasp yet
        time.sleep(0.3)
        assert typist.robot_ticks() == 0
        typist.type(b"\r")
        typist.wait_ticks(2)
        typist.hold(b"w", 0.5)
        typist.type(b"g")
        typist.wait_ticks(2)
        typist.type(b"y")

    with ScriptedLearner(spec, [ticket("demo", 1)]) as learner:
        code, out = typist.run(learner, tmp_path, hands, *BY_HAND, "operator_name=Ann")
        (episode,) = learner.episodes()
    assert code == 0, out
    assert (episode.outcome.success, episode.outcome.success_source) == (True, "human")
    assert (episode.drivers, episode.outcome.judge) == (("Ann",), "Ann")
    assert episode.outcome.truncated_by is None
    assert episode.arrays["next.reward"].tolist() == [0.0] * (episode.n - 1) + [1.0]
    assert episode.arrays["intervention"].all()
    action = episode.arrays["action"]
    assert np.array_equal(action, executed())
    assert np.allclose(action[:2], [0, 0, 0, -1])  # what was pressed before the first tick counted for nothing
    assert set(action[:, 0].tolist()) == {0.0, float(np.float32(0.0125))}  # half of the action's limit, or nothing
    assert 4 <= np.count_nonzero(action[:, 0]) <= 9
    assert not action[-1, 0]  # the key was let go
    assert not action[:, 1:3].any()
    assert action[-1, 3] == 1.0  # closed
    assert "success: said when no episode was running, counts for nothing" in out
    assert len(RobotPick.last.resets) == 2  # looked at again: the person set the scene after the first
    assert "  w / s: dx + / -" in out
    assert "  y: success: the episode ends" in out


def test_taking_over_and_letting_go_and_the_policy_plans_anew(spec, tmp_path, typist):
    def hands():
        typist.screen.wait_for("set the scene")
        typist.type(b"\r")
        typist.wait_ticks(3)
        typist.type(b"t")
        typist.wait_ticks(14)  # longer than release_s, without a touch
        typist.type(b"t")
        typist.wait_ticks(3)
        typist.type(b"d")  # a tap takes over by itself, for a second
        typist.wait_ticks(14)
        typist.type(b"n")

    with ScriptedLearner(spec, [ticket("online", 1)]) as learner:
        code, out = typist.run(learner, tmp_path, hands, *BY_HAND)
        (episode,) = learner.episodes()
    assert code == 0, out
    assert (episode.outcome.success, episode.outcome.success_source) == (False, "human")
    assert episode.arrays["next.done"][-1]
    by_hand = episode.arrays["intervention"]
    turns = np.flatnonzero(np.diff(by_hand)) + 1
    assert len(turns) == 4
    assert 13 <= turns[1] - turns[0] <= 16
    assert 9 <= turns[3] - turns[2] <= 12
    action = episode.arrays["action"]
    assert np.array_equal(action, executed())
    assert not action[turns[0] : turns[1], :3].any()  # taking over moves nothing by itself
    assert (action[:, 3] == -1).all()  # nor the gripper
    assert 1 <= np.count_nonzero(action[turns[2] : turns[3], 1] < 0) <= 3  # one tap, one small step
    asked = [body["observation"]["state"].tolist() for body in learner.infer_bodies]
    for turn in (turns[1], turns[3]):
        assert episode.arrays["observation.state"][turn].tolist() in asked


def test_a_discarded_episode_is_delivered_as_such_and_made_again(spec, tmp_path, typist):
    def hands():
        for n, verdict in ((1, b"x"), (2, b"y")):
            typist.screen.wait_for(f"demo-{n}: set the scene")
            typist.type(b"\r")
            typist.wait_ticks(3)
            typist.type(verdict)

    with ScriptedLearner(spec, [ticket("demo", 1), ticket("demo", 2), ticket("demo", 3)]) as learner:
        code, out = typist.run(learner, tmp_path, hands, *BY_HAND, episodes=1)
        first, second = learner.episodes()
    assert code == 0, out
    assert (first.outcome.truncated_by, first.outcome.success, second.outcome.success) == ("discard", False, True)
    assert first.arrays["next.truncated"][-1]
    assert "#1 stage-demo · discarded" in out
    assert "1 episodes done" in out  # the discarded one was none


def test_stop_ends_after_the_episode_and_also_while_the_scene_is_waited_for(spec, tmp_path, typist):
    def hands():
        typist.screen.wait_for("demo-1: set the scene")
        typist.type(b"\r")
        typist.wait_ticks(2)
        typist.type(b"q")
        typist.wait_ticks(3)  # the episode goes on
        typist.type(b"y")

    with ScriptedLearner(spec, [ticket("demo", n) for n in range(1, 9)]) as learner:
        code, out = typist.run(learner, tmp_path, hands, *BY_HAND)
        assert len(learner.episodes()) == 1
        assert "stopped by the operator; 1 episodes" in out
        typist.screen.truncate(0)
        code, out = typist.run(
            learner, tmp_path, lambda: (typist.screen.wait_for("demo-2: set the scene"), typist.type(b"q")), *BY_HAND
        )
        assert len(learner.episodes()) == 1
    assert code == 0
    assert "stopped by the operator; 0 episodes" in out


class SlowPick(RobotPick):
    """Takes a while to drive home; says when it does."""

    homing = 0

    def reset(self, seed, *, actuator_noise=0.0):
        SlowPick.homing += 1
        time.sleep(0.6)
        return super().reset(seed, actuator_noise=actuator_noise)


@pytest.mark.parametrize(
    ("words", "keys"), [(BY_HAND, b"yyxt"), (("operator=none", "reward=human_key"), b"ssx")], ids=["operator", "human"]
)
def test_a_key_pressed_while_the_arm_homes_counts_for_nothing(spec, tmp_path, typist, monkeypatch, words, keys):
    monkeypatch.setattr(SlowPick, "homing", 0)

    def hands():
        typist.wait(lambda: SlowPick.homing == 1)
        time.sleep(0.1)
        typist.type(keys)
        typist.wait_ticks(12)
        typist.type(keys[:1])

    with ScriptedLearner(spec, [ticket("online", 1)]) as learner:
        settings = {"wait_for_ready": False, "rate_hz": 10, "env": f"{__name__}.SlowPick"}
        code, out = typist.run(learner, tmp_path, hands, *words, **settings)
        (episode,) = learner.episodes()
    assert code == 0, out
    assert episode.outcome.success
    assert episode.n >= 12
    assert not episode.arrays["intervention"].any()


def test_a_terminal_that_is_closed_in_mid_drive_cuts_the_episode_and_the_robot_holds(
    spec,
    tmp_path,
    typist,
):
    def hands():
        typist.screen.wait_for("set the scene")
        typist.type(b"\r")
        typist.wait_ticks(3)
        typist.hang_up()
        typist.screen.wait_for("waiting for the operator: the operator's terminal was closed")
        os.kill(os.getpid(), signal.SIGTERM)

    with ScriptedLearner(spec, [ticket("demo", 1), ticket("demo", 2)]) as learner:
        code, out = typist.run(learner, tmp_path, hands, *BY_HAND)
        (episode,) = learner.episodes()
    assert code == 0
    assert "cut at tick" in out
    assert episode.n == len(RobotPick.last.sent) >= 3
    assert episode.outcome.truncated_by == "stop"
    assert RobotPick.last.holds
    assert len(RobotPick.last.resets) == 2  # nothing moves while nobody is there


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("operator=keyboard", "reward=human_key"), "reward.success_key: the key 's' is operator.axes.dx.1 already"),
        (("operator=keyboard", "operator.keys.stop=space"), "operator.keys.stop: the key 'space' is rollout.estop_key"),
        (("operator=keyboard", "operator.keys.stop=y"), "operator.keys.success and operator.keys.stop: expected diff"),
        (("operator=keyboard", "operator.share=2"), "operator.share: expected a number above 0 and at most 1, got 2"),
        (("operator=keyboard", "+operator.axes.dq=[1,2]"), "operator.axes.dq: expected an action of the task"),
        (("operator=keyboard", "reward=operator", "operator.keys.success=null"), "no key or button for success"),
        (("operator=keyboard", "operator.keys.ready=null"), "rollout.wait_for_ready=auto: nobody can say ready"),
    ],
)
def test_a_key_that_cannot_be_used_as_meant_is_one_line(spec, tmp_path, typist, words, message):
    with ScriptedLearner(spec, []) as learner:
        code, out = typist.run(learner, tmp_path, lambda: None, *words, estop_key="space")
    assert code == 2
    (line,) = [line for line in out.splitlines() if line.startswith("actor: error:")]
    assert message in line


def test_without_a_terminal_the_mistake_is_named(spec, tmp_path, typist, monkeypatch):
    with open(os.devnull) as stdin, ScriptedLearner(spec, []) as learner:
        monkeypatch.setattr("sys.stdin", stdin)
        code, out = typist.run(learner, tmp_path, lambda: None, *BY_HAND)
    assert code == 2
    assert (
        "operator=keyboard needs a terminal to press keys at: start the actor in one (run_actor.sh, or start.sh" in out
    )


class Hands:
    """A keyboard whose keys a test presses."""

    def __init__(self):
        self.left = []
        self.keyboard = Keyboard(self._read)

    def _read(self):
        time.sleep(0.001)
        if self.left and self.left[0] is None:
            raise TerminalGoneError
        return self.left.pop(0) if self.left else None

    def press(self, *keys):
        self.left += keys
        while self.left and self.left[0] is not None:
            time.sleep(0.001)
        time.sleep(0.01)


def test_a_press_moves_for_hold_s_and_one_tick_at_least_and_the_newest_direction_counts():
    hands = Hands()
    keys = Keys(hands.keyboard, {"dx": ["w", "s"], "dy": ["a", "d"]}, {"takeover": "t"}, hold_s=0.1)
    hands.press("w")
    time.sleep(0.2)  # a slow control loop
    assert keys.motion() == {"dx": 1.0}  # a tap is never lost
    assert keys.motion() == {"dx": 0.0}  # nor does it last
    hands.press("w", "s", "a", "t", "t")
    assert keys.motion() == {"dx": -1.0, "dy": 1.0}
    assert keys.motion() == {"dx": -1.0, "dy": 1.0}
    assert keys.pressed() == ["takeover", "takeover"]
    assert keys.pressed() == []
    hands.left.append(None)
    hands.keyboard._thread.join(10)
    with pytest.raises(OperatorGoneError, match="terminal was closed"):
        keys.motion()
