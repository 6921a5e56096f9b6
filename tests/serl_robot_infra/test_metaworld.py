"""A Meta-World task behind our interface. Skipped where the `metaworld` extra is not installed."""

import subprocess
import sys

import numpy as np
import pytest
from hydra.utils import instantiate

pytest.importorskip("metaworld", reason="the metaworld extra is not installed")

from omegaconf import OmegaConf

from flowserl_cli.compose import load_config
from serl_robot_infra.envs.base import ScriptedEnvironment
from serl_robot_infra.envs.metaworld import MetaWorldEnv
from serl_robot_infra.wiring import build_env, build_operator
from serl_transport.contract.specs import TaskSpec


@pytest.fixture(scope="module", params=["metaworld", "metaworld_box_close", "metaworld_pick_place"])
def cfg(request):
    return load_config(
        [f"task={request.param}", "task.env.image_size=32", "task.spec.cameras={front:[32,32],wrist:[32,32]}"]
    )


@pytest.fixture(scope="module")
def env(cfg):
    env = build_env(cfg, TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True)))
    yield env
    env.close()


def test_contract(env):
    assert isinstance(env, ScriptedEnvironment)
    assert TaskSpec.from_dict(env.spec.to_dict()) == env.spec
    observation = env.reset(0)
    env.spec.check_observation(observation)
    assert all(image.std() > 10 for image in observation.images.values())
    low, high = np.array(env.spec.state_low), np.array(env.spec.state_high)
    assert np.all((observation.state >= low) & (observation.state <= high))


def test_reset_is_a_function_of_the_seed_and_leaves_numpys_generator_alone(env):
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    first, scene = env.reset(5), env.privileged()
    assert np.random.rand() == expected
    env.step(env.expert().act())
    env.reset(6)
    assert not np.allclose(scene, env.privileged())
    again = env.reset(5)
    assert np.array_equal(scene, env.privileged())
    assert np.array_equal(first.images["front"], again.images["front"])
    assert np.array_equal(first.state, again.state)


def test_the_operator_demonstrates_and_takes_over(env, cfg):
    operator, successes, still = build_operator(cfg, env), [], np.float32([0, 0, 0, -1])
    for seed in range(4):
        from_start = seed < 2
        observation = env.reset(seed, actuator_noise=0.15 if from_start else 0.0)
        operator.reset(np.random.default_rng(seed), from_start=from_start)
        for tick in range(env.spec.max_ticks):
            action, drove = operator.act(observation, lambda: still, tick)
            assert drove == (from_start or tick >= cfg.task.operator.takeover_tick)
            result = env.step(action)
            observation = result.observation
            if result.terminated or result.truncated:
                break
        assert result.terminated == result.success == (result.reward == 1.0)
        successes.append(result.success)
    assert successes == [True] * 4


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 30), marks=pytest.mark.slow)], ids=["some", "many"])
@pytest.mark.parametrize(("task", "repeat"), [("box-close-v3", 2), ("pick-place-v3", 4)])
def test_the_carrying_operator_always_gets_there(task, repeat, seeds):
    env = MetaWorldEnv(task, "carry it", cameras=(), repeat=repeat, max_ticks=60)
    for seed in seeds:
        env.reset(seed)
        expert = env.expert()
        while not ((result := env.step(expert.act())).terminated or result.truncated):
            pass
        assert result.success, seed


def test_actions_are_metres_per_tick_and_nothing_is_solved_by_itself(env):
    before = env.reset(0).state
    limit = env.spec.action_high[0]
    for _ in range(4):
        env.step(np.float32([limit, 0, 0, -1]))
    for _ in range(env.spec.max_ticks - 4):
        result = env.step(np.float32([0, 0, 0, -1]))
    assert result.observation.state[0] - before[0] == pytest.approx(4 * limit, abs=0.01)
    assert (result.truncated, result.terminated, result.success) == (True, False, False)


def test_a_marker_goal_goes_into_the_state():
    env = MetaWorldEnv("pick-place-v3", "move it there", cameras=(), goal_in_state=True)
    state = env.reset(3).state
    assert env.spec.state_names[-3:] == ("goal_x", "goal_y", "goal_z")
    assert state[-3:] == pytest.approx(env.privileged()[-3:])
    assert np.abs(state[-3:]).min() > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"task": "bin-piking-v3"}, r"task.env.task: Meta-World has no 'bin-piking-v3'; did you mean 'bin-picking-v3'"),
        ({"cameras": ["top"]}, r"cameras: Meta-World has \[.*'front'.*\], got 'top'"),
    ],
)
def test_user_mistakes(words, message):
    with pytest.raises(ValueError, match=message):
        MetaWorldEnv(**({"task": "bin-picking-v3", "prompt": "x"} | words))


def test_its_absence_is_one_message():
    code = (
        "import sys; sys.modules['metaworld'] = None\n"
        "from serl_robot_infra.envs.metaworld import MetaWorldEnv\n"
        "try: MetaWorldEnv('bin-picking-v3', 'x')\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install --no-deps metaworld==3.0.0" in done.stdout


def test_the_yaml_names_what_the_class_takes(cfg):
    assert instantiate(cfg.task.env, cameras=[]).spec.max_ticks == cfg.task.spec.max_ticks
