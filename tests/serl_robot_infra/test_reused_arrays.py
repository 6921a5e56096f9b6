"""A driver, an operator's device and a policy that hand out the same arrays at every tick: what is recorded stays."""

import io
import threading

import numpy as np
import pytest
from scripted_learner import ScriptedLearner, actor_config, ticket

from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.realtime_chunk_broker import RealtimeChunkBroker
from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.interventions.base import Intervention
from serl_robot_infra.main import main
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

TICKS = 25  # more than two step batches
SPEC = TaskSpec.from_dict(
    {
        "name": "reused", "prompt": "p", "cameras": {"cam": [8, 8]}, "state_names": ["s"], "state_low": [0.0],
        "state_high": [99.0], "action_names": ["a"], "action_low": [-99.0], "action_high": [99.0], "control_hz": 30.0,
        "max_ticks": 60,
    }
)  # fmt: skip


class Reusing:
    """One frame, one state, one array of what was executed; and it scales the action that it is given in place."""

    spec = SPEC

    def __init__(self, tells_executed=False, mirrored=False):
        self._executed = np.zeros(1, np.float32) if tells_executed else None
        self._frame = np.zeros((8, 8, 3), np.uint8)
        self._view = self._frame[:, ::-1] if mirrored else self._frame  # not contiguous, as a flipped picture is
        self._state = np.zeros(1, np.float32)

    def _look(self):
        self._frame[:], self._state[:] = 10 * self._tick, self._tick
        return Observation({"cam": self._view}, self._state)

    def reset(self, seed, *, actuator_noise=0.0):
        self._tick = 0
        return self._look()

    def step(self, action):
        self._tick += 1
        action *= 10.0
        if self._executed is not None:
            self._executed[:] = action
        return StepResult(self._look(), 0.0, self._tick == TICKS, False, self._tick == TICKS, self._executed)

    def close(self):
        pass


class Device(Intervention):
    """Answers with the buffer that it reads the device into."""

    def __init__(self, env):
        self._axes = np.zeros(1, np.float32)

    def reset(self, rng, *, from_start):
        pass

    def act(self, observation, propose, tick):
        self._axes[:] = tick / 4
        return self._axes, True


class Chunks:
    """A policy that writes each chunk into the same array, and does not get done with the second one."""

    def __init__(self):
        self.chunk, self._asked = np.zeros((8, 1), np.float32), 0
        self.writing, self.done = threading.Event(), threading.Event()

    def infer(self, body):
        self._asked += 1
        self.chunk[:, 0] = 100 * self._asked + np.arange(8)
        if self._asked > 1:
            self.writing.set()
            self.done.wait(10.0)
        return {"actions": self.chunk, "policy_version": self._asked}

    def reset(self):
        pass


def recorded(tmp_path, **env):
    with ScriptedLearner(SPEC, [ticket("demo", 1)]) as learner:
        config = actor_config(learner, tmp_path, demo_noise=0.0)
        config.task.env = {"_target_": "test_reused_arrays.Reusing", **env}
        config.task.operator = {"_target_": "test_reused_arrays.Device"}
        out = io.StringIO()
        assert main(config, out) == 0, out.getvalue()
        (episode,) = learner.episodes()
    return episode.arrays


@pytest.mark.parametrize("mirrored", [False, True])
def test_each_tick_is_recorded_as_it_was_when_step_returned(tmp_path, mirrored):
    arrays = recorded(tmp_path, mirrored=mirrored)
    assert arrays["observation.state"][:, 0].tolist() == list(range(TICKS + 1))
    frames = arrays["observation.images.cam"]
    assert frames[:, 0, 0, 0].tolist() == [10 * tick for tick in range(TICKS + 1)]
    assert arrays["action"][:, 0].tolist() == [tick / 4 for tick in range(TICKS)]  # as it was sent to the driver


def test_so_is_what_a_driver_says_that_it_executed(tmp_path):
    assert recorded(tmp_path, tells_executed=True)["action"][:, 0].tolist() == [2.5 * tick for tick in range(TICKS)]


def test_nobody_can_write_to_what_is_recorded():
    kept = Observation({"cam": np.zeros((8, 8, 3), np.uint8)}, np.zeros(1, np.float32)).kept()
    for array in (kept.state, kept.images["cam"]):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 1


def test_a_chunk_is_executed_as_the_policy_answered_it():
    policy = Chunks()
    broker = ActionChunkBroker(policy, 8)
    first = broker.infer({})["actions"][0]
    policy.chunk[:] = -1
    assert [first, *(broker.infer({})["actions"][0] for _ in range(3))] == [100, 101, 102, 103]


def test_so_it_is_while_the_policy_works_on_the_next_one():
    policy = Chunks()
    broker = RealtimeChunkBroker(policy, 8, "async")
    actions = [broker.infer({})["actions"][0], broker.infer({})["actions"][0]]
    assert policy.writing.wait(10.0)
    actions += [broker.infer({})["actions"][0] for _ in range(3)]
    policy.done.set()
    broker.close()
    assert actions == [100, 101, 102, 103, 104]
