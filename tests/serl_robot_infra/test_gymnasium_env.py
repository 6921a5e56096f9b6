"""Any Gymnasium id as an environment: Gymnasium-Robotics' Fetch by the tasks' own yamls, and a small one of ours."""

import gymnasium
import numpy as np
import pytest
from omegaconf import OmegaConf

from flowserl_cli.compose import load_config
from serl_robot_infra.envs.base import ScriptedEnvironment
from serl_robot_infra.envs.gymnasium_env import GymnasiumEnv
from serl_robot_infra.wiring import build_env, build_operator
from serl_transport.contract.specs import TaskSpec


class Device:
    """A number on an accelerator, as simulators with batches give it."""

    def __init__(self, value):
        self._value = np.asarray(value, np.float32)[None]

    def cpu(self):
        return self._value


class Line(gymnasium.Env):
    """A point on a line, to be moved to 1; images, nested keys and a batch of one, as simulators differ."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    action_space = gymnasium.spaces.Box(-1.0, 3.0, (1, 2), np.float32)
    observation_space = gymnasium.spaces.Dict()

    def __init__(self, render_mode=None, goal=1.0, ends=True):
        self.render_mode, self._goal, self._ends, self.taken = render_mode, goal, ends, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._at = float(self.np_random.uniform(-0.5, 0.5))
        return self._seen(), {}

    def step(self, action):
        self.taken.append(action)
        self._at += float(action[0, 0])
        there = self._at >= self._goal
        return self._seen(), Device(-1.0), there and self._ends, Device(0.0), {"said": {"there": Device(there)}}

    def render(self):
        return np.full((8, 12, 3), 200, np.uint8)

    def _seen(self):
        image = np.zeros((1, 8, 12, 3), np.uint8)
        return {"robot": {"at": Device([self._at, 9.0])}, "goal": np.float64([self._goal]), "pixels": {"top": image}}


gymnasium.register("flowserl/Line-v0", Line, disable_env_checker=True, order_enforce=False)

SPEC = {
    "name": "line", "prompt": "go", "cameras": {"top": [4, 6], "own": [8, 12]}, "state_names": ["at", "goal"],
    "state_low": [-9, -9], "state_high": [9, 9], "action_names": ["dx", "grip"], "action_low": [-0.1, 0.0],
    "action_high": [0.3, 40.0], "control_hz": 10.0, "max_ticks": 5,
}  # fmt: skip
WORDS = {
    "id": "flowserl/Line-v0", "state": ["robot/at[0:1]", "goal"], "cameras": {"top": "pixels/top", "own": "render"},
    "success": "said/there", "noise_dims": [0],
}  # fmt: skip


def line(spec=None, **words):
    return GymnasiumEnv(SPEC | (spec or {}), **(WORDS | words))


def test_state_images_and_actions_are_found_by_name():
    env = line()
    seen = env.reset(3)
    env.spec.check_observation(seen)
    assert (seen.images["own"].mean(), seen.images["top"].shape) == (200, (4, 6, 3))
    at = seen.state[0]
    assert seen.state[1] == 1.0
    result = env.step(np.float32([0.1, 50.0]))
    taken = env._env.unwrapped.taken[-1]
    # 0.1 is half way from -0.1 to 0.3, so half way from -1 to 3; 50 is clipped to 40, the box's 3.
    assert (taken.shape, taken.dtype, taken.ravel().tolist()) == ((1, 2), np.float32, [1.0, 3.0])
    assert result.observation.state[0] == pytest.approx(at + 1.0)
    env.close()


def test_success_ends_it_and_is_the_reward_and_time_truncates():
    env = line()
    env.reset(0)
    results = [env.step(np.float32([0.15, 0]))]
    assert (results[0].terminated, results[0].truncated, results[0].success, results[0].reward) == (
        True,
        False,
        True,
        1.0,
    )
    env = line(kwargs={"goal": 99.0}, reward="environment")
    env.reset(0)
    results = [env.step(np.float32([0.0, 0])) for _ in range(5)]
    assert [result.truncated for result in results] == [False] * 4 + [True]
    assert {(result.terminated, result.success, result.reward) for result in results} == {(False, False, -1.0)}


def test_the_environments_own_end_may_be_the_success():
    env = line(success="terminated")
    env.reset(0)
    assert env.step(np.float32([0.15, 0])).success


def test_a_reset_is_a_function_of_the_seed_and_noise_disturbs_the_named_actions_alone():
    env = line()
    first = env.reset(5).state[0]
    assert env.reset(6).state[0] != first
    env.reset(5, actuator_noise=0.3)
    env.step(np.float32([0.0, 20.0]))
    env.reset(5)
    env.step(np.float32([0.0, 20.0]))
    disturbed, calm = (taken.ravel() for taken in env._env.unwrapped.taken[-2:])
    assert disturbed[0] != calm[0]
    assert disturbed[1] == calm[1] == 1.0
    assert env.reset(5, actuator_noise=0.3).state[0] == first


@pytest.mark.parametrize(
    ("spec", "words", "message"),
    [
        ({}, {"id": "flowserl/Lin-v0"}, "task.env.id: "),
        ({}, {"state": ["robott/at"]}, "task.env.state: the observation has no 'robott/at'; did you mean 'robot'"),
        ({}, {"state": ["robot"]}, "task.env.state: name keys of the observation: at"),
        ({}, {"state": ["goal"]}, "task.env.state: expected 2 numbers (task.spec.state_names), got 1"),
        ({}, {"cameras": {"top": "pixels/top"}}, "task.env.cameras: expected ['own', 'top'] as task.spec, got ['top']"),
        ({}, {"cameras": {"top": "pixels/topp", "own": "render"}}, "observation has no 'pixels/topp'; did you mean"),
        ({}, {"cameras": {"top": "camera:top", "own": "render"}}, "camera:top needs a MuJoCo model"),
        ({"cameras": {"top": [8, 8], "own": [8, 12]}}, {}, "task.spec.cameras.top: expected [8, 12]"),
        ({"action_names": ["dx"], "action_low": [0], "action_high": [1]}, {}, "task.spec.action_names: expected 2, as"),
        ({}, {"reward": "sparse"}, "task.env.reward: expected success or environment, got 'sparse'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(spec, words, message):
    with pytest.raises(ValueError) as caught:
        line(spec, **words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_success_that_info_does_not_have_is_named():
    env = line(success="is_success")
    env.reset(0)
    with pytest.raises(ValueError, match=r"task\.env\.success: info has no 'is_success'; there are said"):
        env.step(np.float32([0, 0]))


def test_without_an_expert_a_scripted_operator_is_refused():
    with pytest.raises(ValueError, match=r"task\.env\.expert: none is named"):
        line().expert()


@pytest.fixture(scope="module", params=["fetch_reach", "fetch_pick_and_place"])
def fetch(request):
    pytest.importorskip("gymnasium_robotics", reason="the robotics extra is not installed")
    cfg = load_config([f"task={request.param}", "task.spec.cameras={front:[16,16]}"])
    env = build_env(cfg, TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True)))
    yield cfg, env
    env.close()


def test_fetch_keeps_the_contract_and_its_operator_gets_there(fetch):
    cfg, env = fetch
    assert isinstance(env, ScriptedEnvironment)
    operator, low, high = build_operator(cfg, env), np.array(env.spec.state_low), np.array(env.spec.state_high)
    for seed in range(3):
        observation = env.reset(seed, actuator_noise=0.15)
        env.spec.check_observation(observation)
        assert observation.images["front"].std() > 10
        operator.reset(np.random.default_rng(seed), from_start=True)
        for tick in range(env.spec.max_ticks):
            assert np.all((observation.state >= low) & (observation.state <= high))
            result = env.step(operator.act(observation, lambda: None, tick)[0])
            observation = result.observation
            if result.terminated or result.truncated:
                break
        assert result.success, seed


def test_fetchs_hand_goes_two_thirds_of_what_it_is_asked(fetch):
    _, env = fetch
    before = env.reset(0).state[0]
    for _ in range(4):
        env.step(np.float32([0.02, 0, 0, 1]))
    state = env.step(np.float32([0, 0, 0, 1])).observation.state
    assert state[0] - before == pytest.approx(0.08 * 0.65, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("id", ["FetchPush-v4", "FetchSlide-v4", "FetchReachDense-v4"])
def test_fetchs_other_ids_keep_the_contract(id):
    pytest.importorskip("gymnasium_robotics", reason="the robotics extra is not installed")
    name = "fetch_reach" if "Reach" in id else "fetch_pick_and_place"
    task = load_config(
        [f"task={name}", "task.spec.cameras={front:[16,16]}", f"task.env.id=gymnasium_robotics:{id}"]
    ).task
    env = GymnasiumEnv(**{key: value for key, value in task.env.items() if key not in ("_target_", "expert", "kwargs")})
    env.spec.check_observation(env.reset(1))
    for _ in range(env.spec.max_ticks):
        result = env.step(np.float32([0, 0, 0.01, -1]))
        env.spec.check_observation(result.observation)
    assert (result.truncated, result.success) == (True, False)
    env.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.spec.control_hz=20"], "task.spec.control_hz: expected 25, a step of this id is 0.04 s, got 20"),
        (["task.env.cameras.front=camera:external"], "task.env.cameras.front: no camera 'external'; did you mean"),
    ],
)
def test_fetchs_mistakes_are_one_line(words, message):
    pytest.importorskip("gymnasium_robotics", reason="the robotics extra is not installed")
    task = load_config(["task=fetch_reach", *words]).task.env
    options = {key: value for key, value in task.items() if key not in ("_target_", "expert")}
    with pytest.raises(ValueError) as caught:
        GymnasiumEnv(**options)
    assert message in str(caught.value)
