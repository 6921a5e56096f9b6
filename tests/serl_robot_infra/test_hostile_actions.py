"""A thousand actions that nobody should send, from the policy and from a person's device: none leaves the limits.

NaN, infinities, numbers of any size, jumps, targets outside the workspace, full speed one way and the other at each
hand-over. Through the whole chain, policy ─▶ operator ─▶ safety ─▶ guard ─▶ env, in delta and in absolute control, with
an arm that follows, one that lags and one that is blocked. What the environment was sent is what is judged.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from test_hand_over import CHANGE, MAX_ACCELERATION, MAX_SPEED, NAMES, STEP, Servo, Ticks

from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.realtime_chunk_broker import RealtimeChunkBroker
from serl_robot_infra.adder import Adder
from serl_robot_infra.episode import ControlStack, EpisodeRunner
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.guard import RobotGuard
from serl_robot_infra.interventions.base import NOTHING_SAID
from serl_robot_infra.link import Run
from serl_robot_infra.pacing import Pace, StopSignal
from serl_robot_infra.rewards.environment import EnvironmentReward
from serl_robot_infra.safety import LEAD_S, SafetyChain

ACTIONS = 1000  # hostile ones that must have been asked for, for each case
BOX = {"low": -0.8, "high": 0.8}
NO_NUMBERS = (np.nan, np.inf, -np.inf, 1e30, -3.4e38)
HUGE = (1e17, -1e17, 1e9, -1e9, 1e-38)


class Arm(Servo):
    """Keeps everything that it was sent, and where it was then. Its limits are within reach."""

    def __init__(self, control, follows):
        super().__init__(control, follows)
        if control == "absolute":
            self.spec = replace(self.spec, action_low=(-1.0, -1.0), action_high=(1.0, 1.0))

    def reset(self, seed, *, actuator_noise=0.0):
        self.sent = []
        return super().reset(seed)

    def step(self, action):
        self.sent.append((self._at.copy(), action.copy()))
        return super().step(action)


class Hostile:
    """Actions to break a robot with: float32[2] each."""

    def __init__(self, spec, rng):
        self._low, self._high, self._rng = np.array(spec.action_low), np.array(spec.action_high), rng
        self.asked, self._side, self._to = 0, itertools.cycle((-1.0, 1.0)), np.ones(2)

    def action(self, finite=True):
        self.asked += 1
        kinds = (self._jump, self._huge, self._reversal, self._outside, self._onwards, self._onwards, self._onwards)
        action = kinds[self._rng.integers(len(kinds))]()
        if not finite:
            action[self._rng.integers(2)] = NO_NUMBERS[self._rng.integers(len(NO_NUMBERS))]
        return action.astype(np.float32)

    def _jump(self):
        return self._rng.uniform(self._low, self._high)

    def _huge(self):
        return self._rng.choice(HUGE, 2)

    def _reversal(self):
        return np.where(next(self._side) > 0, self._high, self._low)

    def _onwards(self):  # against the same limit until it changes its mind
        self._to = self._rng.choice((-1.0, 1.0), 2) if self._rng.random() < 0.02 else self._to
        return self._to * 100.0

    def _outside(self):
        return np.where(self._rng.random(2) < 0.5, self._low, self._high) * self._rng.uniform(1.0, 50.0, 2)


class HostilePolicy:
    """Chunks of hostile actions; now and then one holds a number that is none."""

    def __init__(self, hostile, rng):
        self._hostile, self._rng = hostile, rng

    def infer(self, body):
        spoilt = self._rng.integers(8) if self._rng.random() < 0.02 else -1
        actions = np.array([self._hostile.action(finite=k != spoilt) for k in range(8)])
        return {"actions": actions, "policy_version": 1}

    def reset(self):
        pass


class HostileHand:
    """A device whose numbers are as hostile; grabs and lets go by dice."""

    vocabulary = ()

    def __init__(self, hostile, rng):
        self._hostile, self._rng, self._drives = hostile, rng, False

    def reset(self, rng, *, from_start):
        self._drives = False

    def act(self, observation, propose, tick):
        if self._rng.random() < 0.3:
            self._drives = not self._drives
        if self._drives:
            return self._hostile.action(finite=self._rng.random() > 0.004), True
        return propose(), False

    def words(self):
        return NOTHING_SAID

    def missing(self):
        return None


def attacked(control, follows, realtime, tmp_path):
    """Episodes until there were enough hostile actions of each kind; what the arm was sent in each, how each ended."""
    rng = np.random.default_rng(7)
    arm = Arm(control, follows)
    hostile = Hostile(arm.spec, rng)
    policy = HostilePolicy(hostile, rng)
    names = NAMES[control]
    limits = {
        "max_speed": dict.fromkeys(names, MAX_SPEED), "max_acceleration": dict.fromkeys(names, MAX_ACCELERATION),
        "workspace": {"p1": BOX | {"action": names[0]}},
    }  # fmt: skip
    estop = EmergencyStop(tmp_path / "estop")
    guard = RobotGuard(None, estop, 0, None)
    broker = RealtimeChunkBroker(policy, 4, "rtc") if realtime else ActionChunkBroker(policy, 4)
    adder = Adder(lambda body: None)
    hand = HostileHand(hostile, rng)
    stack = ControlStack(
        arm, broker, hand, SafetyChain.of(arm.spec, limits), EnvironmentReward(), adder, Pace(0), guard
    )
    episodes = []
    try:
        for seed in itertools.count():
            ticks = Ticks()
            runner = EpisodeRunner(stack, ticks, StopSignal(), "a", "b", True, 0.0, 1.0)
            report = runner.run(Run(f"e{seed}", "online", "s", seed, 0, True), seed)
            episodes.append((arm.sent, ticks.steps, report.cut_reason))
            came = any("expected a" in (reason or "") for _, _, reason in episodes)  # a number that is none
            if hostile.asked >= ACTIONS and came:
                return arm.spec, episodes
    finally:
        guard.close()
        estop.close()
        if realtime:
            broker.close()


@pytest.mark.parametrize(
    ("follows", "realtime"),
    [(1.0, False), (0.35, False), (0.0, False), (0.35, True)],
    ids=["follows", "lags", "blocked", "lags-rtc"],
)
@pytest.mark.parametrize("control", ["delta", "absolute"])
def test_a_thousand_hostile_actions_send_nothing_outside_the_limits(control, follows, realtime, tmp_path):
    spec, episodes = attacked(control, follows, realtime, tmp_path)
    everything = np.array([action for sent, _, _ in episodes for _, action in sent])
    assert len(everything) > 300
    if control == "absolute" and follows and not realtime:  # and the arm was driven against its limits
        assert np.isin(everything[:, 1], np.float32([1, -1])).sum() > 5
    for sent, steps, _ in episodes:
        assert len(sent) == len(steps)  # what was sent is what is recorded
        if not sent:
            continue
        at, actions = (np.array(part, float) for part in zip(*sent, strict=True))
        assert np.array_equal(actions, [step.action for step in steps])
        assert np.isfinite(actions).all()
        assert (actions >= np.float32(spec.action_low)).all()
        assert (actions <= np.float32(spec.action_high)).all()
        goal = at + actions if control == "delta" else actions
        inside = np.clip(goal[:, 0], np.minimum(BOX["low"], at[:, 0]), np.maximum(BOX["high"], at[:, 0]))
        assert np.abs(goal[:, 0] - inside).max() < 1e-6  # never further out of the box
        moves = actions if control == "delta" else np.diff(np.vstack([at[0], actions]), axis=0)
        assert np.abs(moves[:, 1]).max() <= STEP + 1e-6
        turns = np.abs(np.diff(np.vstack([np.zeros(2), moves]), axis=0))[:, 1]
        at_a_limit = np.isin(actions[:, 1].astype(np.float32), np.float32([spec.action_low[1], spec.action_high[1]]))
        lead = LEAD_S * MAX_SPEED
        held_back = np.abs(actions - at)[:, 1] > lead - 2 * STEP if control == "absolute" else np.zeros(len(sent), bool)
        free = ~(at_a_limit | held_back | np.roll(held_back, 1))
        assert turns[free].max(initial=0.0) <= CHANGE + 1e-6
        if control == "absolute":
            assert np.abs(actions - at).max() <= lead + STEP + 1e-6
