"""gym-hil's PandaPickCube behind our interface. Skipped where the `hil` extra is not installed."""

import mujoco
import numpy as np
import pytest

pytest.importorskip("gym_hil", reason="the hil extra (gym-hil) is not installed")

from serl_robot_infra.envs.base import ScriptedEnvironment
from serl_robot_infra.envs.gym_hil import GymHilPickEnv
from serl_transport.contract.specs import TaskSpec


@pytest.fixture(scope="module")
def env():
    before = mujoco.Renderer
    env = GymHilPickEnv(image_size=32)
    assert mujoco.Renderer is before
    yield env
    env.close()


def test_contract(env):
    assert isinstance(env, ScriptedEnvironment)
    assert TaskSpec.from_dict(env.spec.to_dict()) == env.spec
    env.spec.check_observation(env.reset(0))


def test_reset_is_a_function_of_the_seed_and_leaves_numpys_generator_alone(env):
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    first = env.reset(5)
    assert np.random.rand() == expected
    cube = env.cube_position
    env.reset(6)
    assert not np.allclose(cube, env.cube_position)
    again = env.reset(5)
    assert np.array_equal(cube, env.cube_position)
    assert np.array_equal(first.images["front"], again.images["front"])
    assert first.images["front"].std() > 10


@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_expert_succeeds(env, noise):
    expert, successes = env.expert(), 0
    for seed in range(3):
        env.reset(seed, actuator_noise=noise)
        expert.reset()
        result = env.step(expert.act())
        while not (result.terminated or result.truncated):
            result = env.step(expert.act())
        successes += result.success
    assert successes == 3


def test_actions_are_metres_per_tick(env):
    env.reset(0)
    before = env.tcp_position
    for _ in range(4):
        env.step(np.float32([0, 0.02, 0, -1]))
    for _ in range(4):
        env.step(np.float32([0, 0, 0, -1]))
    assert env.tcp_position[1] - before[1] == pytest.approx(0.08, abs=0.01)


def test_states_alone():
    env = GymHilPickEnv(cameras=(), cube_in_state=True)
    observation = env.reset(3)
    env.spec.check_observation(observation)
    assert (observation.images, env.renderer_name, env.spec.name) == ({}, "none", "pick_gym_hil_state")
    assert observation.state[-3:] == pytest.approx(env.cube_position, abs=1e-6)
    with pytest.raises(ValueError, match=r"cameras: gym-hil has \['front', 'wrist'\], got 'top'"):
        GymHilPickEnv(cameras=("top",))
