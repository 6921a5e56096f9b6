"""What a person drives is recorded tick by tick at the control rate, however seldom the policy is asked."""

import io

import numpy as np
from omegaconf import OmegaConf
from scripted_learner import ScriptedLearner, actor_config, ticket

from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.interventions.base import Intervention
from serl_robot_infra.main import main
from serl_robot_infra.operators import slower
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

HZ, TICKS, CHUNK = 50.0, 40, 8
DRIVEN = range(11, 30)  # begins and ends within a chunk
SPEC = TaskSpec.from_dict(
    {
        "name": "dense", "prompt": "p", "cameras": {"cam": [4, 4]}, "state_names": ["s"], "state_low": [0.0],
        "state_high": [99.0], "action_names": ["a"], "action_low": [-999.0], "action_high": [999.0],
        "control_hz": HZ, "max_ticks": 60,
    }
)  # fmt: skip


class Counting:
    """Its picture and its state say which tick it is."""

    spec = SPEC

    def reset(self, seed, *, actuator_noise=0.0):
        self._tick = 0
        return self._look()

    def step(self, action):
        self._tick += 1
        return StepResult(self._look(), 0.0, self._tick == TICKS, False, self._tick == TICKS)

    def close(self):
        pass

    def _look(self):
        return Observation({"cam": np.full((4, 4, 3), self._tick, np.uint8)}, np.float32([self._tick]))


class FastDevice(Intervention):
    """Delivers ten readings a tick, as a leader arm read by a thread does: the newest one is driven."""

    def __init__(self, env):
        self._reading = 0

    def reset(self, rng, *, from_start):
        self._reading = 0

    def act(self, observation, propose, tick):
        self._reading += 10
        return (np.float32([self._reading]), True) if tick in DRIVEN else (propose(), False)


def drive(tmp_path, rate_hz):
    policy = {"actions": np.full((CHUNK, 1), -1.0, np.float32), "policy_version": 3, "server_ms": 0.1}
    with ScriptedLearner(SPEC, [ticket("online", 1)], lambda body: policy) as learner:
        config = actor_config(learner, tmp_path, execute_horizon=CHUNK, rate_hz=rate_hz)
        config.task.env = {"_target_": "test_dense_recording.Counting"}
        config.task.operator = {"_target_": "test_dense_recording.FastDevice"}
        out = io.StringIO()
        assert main(config, out) == 0, out.getvalue()
        (episode,) = learner.episodes()
        return episode.arrays, [int(body["observation"]["state"][0]) for body in learner.infer_bodies], out.getvalue()


def test_every_tick_of_an_intervention_is_a_transition_with_its_own_picture(tmp_path):
    arrays, asked, out = drive(tmp_path, rate_hz=None)
    assert np.flatnonzero(arrays["intervention"]).tolist() == list(DRIVEN)
    assert arrays["observation.images.cam"][:, 0, 0, 0].tolist() == list(range(TICKS + 1))
    assert arrays["action"][list(DRIVEN), 0].tolist() == [10.0 * (tick + 1) for tick in DRIVEN]
    assert asked == [0, 8, 30, 38]  # once a chunk, and anew after the person let go
    assert "below" not in out


def test_they_are_a_period_apart(tmp_path):
    arrays, _, _ = drive(tmp_path, rate_hz=None)
    gaps = np.diff(arrays["time_ns"][list(DRIVEN)]) / 1e9
    assert np.median(gaps) > 0.5 / HZ


def test_a_rate_below_the_tasks_is_said_since_the_recording_has_the_tasks(tmp_path):
    def said(rate_hz):
        return slower(OmegaConf.create({"rollout": {"rate_hz": rate_hz}, "task": {}}), SPEC)

    assert said(20.0).startswith("rollout.rate_hz=20 is below spec.control_hz=50: ticks are 0.05 s apart")
    assert [said(rate) for rate in (None, 0, 50.0, 100.0)] == [None] * 4
