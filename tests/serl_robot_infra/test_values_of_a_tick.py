"""What an environment and a reward source return: what no later reader could take is refused where it comes from."""

import io

import numpy as np
import pytest
from scripted_learner import ScriptedLearner, actor_config, ticket

from serl_robot_infra.envs.base import StepResult
from serl_robot_infra.envs.images import fitted
from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.main import main
from serl_robot_infra.safety import SafetyChain, UnsafeTickError


class Earns(PickEnv):
    """Pays `reward` at its second tick."""

    reward = 1.0

    def __init__(self):
        super().__init__(image_size=32, renderer="ray")

    def step(self, action):
        seen = super().step(action)
        self.ticks = getattr(self, "ticks", 0) + 1
        reward = Earns.reward if self.ticks == 2 else seen.reward
        return StepResult(seen.observation, reward, seen.terminated, np.bool_(seen.truncated), seen.success)


@pytest.fixture(scope="module")
def env():
    env = Earns()
    yield env
    env.close()


def judged(env, **values):
    seen = env.reset(0)
    result = StepResult(seen, **({"reward": 0.0, "terminated": False, "truncated": False, "success": False} | values))
    return SafetyChain(env.spec).check_result(result)


@pytest.mark.parametrize("reward", [1, np.float32(1), np.array(1.0), np.int64(1)])
def test_numbers_and_flags_of_any_library_become_plain(env, reward):
    result = judged(env, reward=reward, success=np.bool_(True), terminated=1)
    assert (type(result.reward), result.reward) == (float, 1.0)
    assert (result.success, result.terminated) == (True, True)
    assert type(result.success) is type(result.terminated) is bool


@pytest.mark.parametrize("reward", [np.nan, np.inf, 1e12])
def test_a_reward_that_is_nan_or_absurd_ends_the_episode(env, reward):
    with pytest.raises(UnsafeTickError, match=r"reward: expected -1e\+09 to 1e\+09, got"):
        judged(env, reward=reward)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"reward": None}, "a tick's reward: expected a number, got None"),
        ({"reward": "1"}, "a tick's reward: expected a number, got '1'"),
        ({"success": None}, "a tick's success: expected true or false, got None"),
        ({"terminated": np.nan}, "a tick's terminated: expected true or false, got nan"),
    ],
)
def test_what_is_no_number_and_no_flag_is_a_mistake(env, values, told):
    with pytest.raises(ValueError, match=told):
        judged(env, **values)


@pytest.mark.parametrize(("reward", "code"), [(float("nan"), 0), (None, 2)])
def test_an_actor_says_it_and_keeps_what_came_before(env, tmp_path, monkeypatch, reward, code):
    monkeypatch.setattr(Earns, "reward", reward)
    out = io.StringIO()
    with ScriptedLearner(env.spec, [ticket("eval", 1)]) as learner:
        cfg = actor_config(learner, tmp_path)
        cfg.task.env = {"_target_": "test_values_of_a_tick.Earns"}
        assert main(cfg, out) == code
        (episode,) = learner.episodes()
    assert episode.n == 1
    assert episode.outcome.truncated_by == "stop"
    assert ("cut at tick 1: reward: expected" if code == 0 else "a tick's reward: expected a number") in out.getvalue()


def test_a_float_picture_is_refused_with_its_camera_and_range():
    with pytest.raises(ValueError, match="camera 'front': expected a picture of uint8, got float32 from 0 to"):
        fitted(np.linspace(0, 0.5, 48, dtype=np.float32).reshape(4, 4, 3), (2, 2), "front")
