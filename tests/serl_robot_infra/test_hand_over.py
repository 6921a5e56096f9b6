"""Taking over and letting go, a thousand times at random moments, and a thousand hostile actions at them: no commanded
step that the limits do not allow.

The real runner, safety chain, broker and hand operator; the arm is a servo that follows its targets late, and the
device a hand that grabs and lets go by dice.
"""

import io

import numpy as np
import pytest

from openpi_client.action_chunk_broker import ActionChunkBroker
from serl_robot_infra.adder import Adder
from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.episode import ControlStack, EpisodeRunner
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.guard import RobotGuard
from serl_robot_infra.interventions.hand import HandOperator, HandSettings
from serl_robot_infra.link import Run
from serl_robot_infra.observers.base import Observer
from serl_robot_infra.pacing import Pace, StopSignal
from serl_robot_infra.rewards.environment import EnvironmentReward
from serl_robot_infra.safety import LEAD_S, SafetyChain
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

HZ, MAX_SPEED, MAX_ACCELERATION = 20.0, 0.4, 4.0
STEP, CHANGE = MAX_SPEED / HZ, MAX_ACCELERATION / HZ**2
NAMES = {"delta": ("dx", "dy"), "absolute": ("joint1", "joint2")}


class Servo:
    """Two axes that go a share of the way to their target in each tick; delta actions move the target."""

    def __init__(self, control, follows):
        self._control, self._follows = control, follows
        limit = 0.1 if control == "delta" else 3.0
        self.spec = TaskSpec(
            name="servo", prompt="move", cameras={}, state_names=("p1", "p2"), state_low=(-3.0,) * 2,
            state_high=(3.0,) * 2, action_names=NAMES[control], action_low=(-limit,) * 2, action_high=(limit,) * 2,
            control_hz=HZ, max_ticks=250,
            targets={"joint1": "p1", "joint2": "p2"} if control == "absolute" else {},
        )  # fmt: skip

    def reset(self, seed, *, actuator_noise=0.0):
        self._at = np.random.default_rng(seed).uniform(-1, 1, 2)
        self._target = self._at.copy()
        return self._observe()

    def step(self, action):
        self._target = self._target + action if self._control == "delta" else action.astype(float)
        self._at += self._follows * (self._target - self._at)
        return StepResult(self._observe(), 0.0, False, False, False)

    def close(self):
        pass

    def _observe(self):
        return Observation({}, self._at.astype(np.float32))


class Dice:
    """A hand that grabs for some ticks and lets go for some, and pushes anywhere."""

    commands = ("takeover",)

    def __init__(self, names, rng):
        self._names, self._rng, self._left, self._grabs = names, rng, 0, False

    def motion(self):
        if self._left == 0:
            self._grabs, self._left = not self._grabs, int(self._rng.integers(1, 6))
        self._left -= 1
        return dict(zip(self._names, self._rng.uniform(-1, 1, 2).tolist(), strict=True))

    def pressed(self):
        return []

    def holds_takeover(self):
        return self._grabs

    def missing(self):
        return None

    def describe(self):
        return []

    def close(self):
        pass


class Wild:
    """A policy whose chunks begin and go anywhere; remembers what it saw when it was asked."""

    def __init__(self, spec, rng):
        self._spec, self._rng, self.saw = spec, rng, []

    def infer(self, body):
        self.saw.append(body["observation"]["state"].tolist())
        actions = self._rng.uniform(self._spec.action_low, self._spec.action_high, (8, 2)).astype(np.float32)
        return {"actions": actions, "policy_version": 1}

    def reset(self):
        pass


class Ticks(Observer):
    def __init__(self):
        self.steps = []

    def tick(self, step):
        self.steps.append(step)


def settings(gripper=None):
    return HandSettings(share=1.0, touch=False, release_s=0.5, gripper=gripper, gripper_closed="high")


def drive(control, follows, tmp_path, episodes, acceleration=True):
    """Run episodes of 250 ticks; the steps of each."""
    rng = np.random.default_rng(0)
    env = Servo(control, follows)
    names = NAMES[control]
    policy = Wild(env.spec, rng)
    limits = {"max_speed": dict.fromkeys(names, MAX_SPEED)}
    if acceleration:
        limits["max_acceleration"] = dict.fromkeys(names, MAX_ACCELERATION)
    operator = HandOperator(Dice(names, rng), env.spec, names, settings())
    estop = EmergencyStop(tmp_path / "estop")
    guard = RobotGuard(None, estop, 0, None)
    stack = ControlStack(
        env=env, broker=ActionChunkBroker(policy, 4), operator=operator,
        safety=SafetyChain.of(env.spec, limits), reward=EnvironmentReward(), adder=Adder(io.BytesIO), pace=Pace(0),
        guard=guard,
    )  # fmt: skip
    stack.adder._send = lambda body: None
    watched = []
    try:
        for seed in range(episodes):
            ticks = Ticks()
            runner = EpisodeRunner(stack, ticks, StopSignal(), "a", "b", True, 0.0, 1.0)
            runner.run(Run(f"e{seed}", "online", "s", seed, 0, True), seed)
            watched.append(ticks.steps)
    finally:
        guard.close()
        estop.close()
    return watched, policy


def moves_of(control, steps):
    """What was commanded, as a displacement: float64[n, 2]."""
    actions = np.array([step.action for step in steps], float)
    if control == "delta":
        return actions
    return np.diff(np.vstack([steps[0].observation.state, actions]), axis=0)


@pytest.mark.parametrize("follows", [1.0, 0.35])
@pytest.mark.parametrize("control", ["delta", "absolute"])
def test_a_thousand_hand_overs_make_no_jump(control, follows, tmp_path):
    episodes, policy = drive(control, follows, tmp_path, 14)
    hand_overs, lets_go = 0, 0
    for steps in episodes:
        moves, by_hand = moves_of(control, steps), np.array([step.intervention for step in steps])
        hand_overs += np.count_nonzero(np.diff(by_hand))
        assert np.abs(moves).max() <= STEP + 1e-6
        assert np.abs(np.diff(np.vstack([np.zeros(2), moves]), axis=0)).max() <= CHANGE + 1e-6
        if control == "absolute":  # and never further from where the arm is than half a second of motion, and a step
            ahead = np.array([step.action - step.observation.state for step in steps])
            assert np.abs(ahead).max() <= LEAD_S * MAX_SPEED + STEP + 1e-6
        # The policy plans anew at the tick after the hand let go, from what the arm is doing then.
        released = [steps[tick + 1] for tick in np.flatnonzero(by_hand[:-1] & ~by_hand[1:])]
        lets_go += len(released)
        assert all(step.observation.state.tolist() in policy.saw for step in released)
    assert hand_overs >= 1000
    assert lets_go >= 450


def test_a_blocked_arm_is_not_let_fly_to_a_target_that_ran_away_from_it(tmp_path):
    chain = SafetyChain.of(Servo("absolute", 1.0).spec, {"max_speed": {"joint1": MAX_SPEED}})
    blocked = np.zeros(2, np.float32)
    for _ in range(200):  # the policy pushes against what blocks it
        pushed = chain.filter(np.float32([3.0, 0.0]), blocked, "policy version 1")
    assert pushed[0] == pytest.approx(LEAD_S * MAX_SPEED + STEP)
    held = [chain.filter(np.float32([0.0, 0.0]), blocked, "operator")[0] for _ in range(11)]  # the person takes over
    assert held[-1] == pytest.approx(0.0, abs=1e-6)  # within half a second it is where the arm is


def test_taking_over_moves_no_joint_and_no_gripper():
    env = Servo("absolute", 1.0)
    names, hand = ("joint1",), settings(gripper="joint2")
    device = Dice(names, np.random.default_rng(0))
    device.motion = dict
    operator = HandOperator(device, env.spec, names, hand)
    operator.reset(np.random.default_rng(0), from_start=False)
    proposal = np.float32([2.0, -1.5])
    seen = Observation({}, np.float32([0.25, -0.5]))
    assert operator.act(seen, lambda: proposal, 0)[1] is False
    device._grabs = True
    action, by_hand = operator.act(seen, lambda: proposal, 1)
    assert by_hand
    assert action.tolist() == [0.25, -1.5]  # the joint where it is; the gripper as it was told last
    device.pressed = lambda: ["gripper"]
    assert operator.act(seen, lambda: proposal, 2)[0].tolist() == [0.25, 3.0]  # it was nearer to open, and closes
