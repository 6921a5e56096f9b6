"""The pick task: contract, units, determinism, expert, cameras."""

import numpy as np
import pytest
from absolute_pick import AbsolutePick

from serl_robot_infra.envs.base import Environment, ScriptedEnvironment
from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.envs.pick.env import STEP_LIMIT
from serl_transport.contract.specs import TaskSpec


@pytest.fixture(scope="module")
def env():
    env = PickEnv(renderer="ray")
    yield env
    env.close()


@pytest.fixture(scope="module")
def blind():
    """States only: quick."""
    return PickEnv(cameras=())


def finish(env, expert):
    result = env.step(expert.act())
    while not (result.terminated or result.truncated):
        result = env.step(expert.act())
    return result


def test_it_answers_the_protocols_and_its_spec_is_valid(env):
    assert isinstance(env, Environment)
    assert isinstance(env, ScriptedEnvironment)
    assert TaskSpec.from_dict(env.spec.to_dict()) == env.spec
    env.spec.check_observation(env.reset(0))


def test_a_seed_names_the_whole_episode(env):
    actions = np.random.default_rng(5).uniform(-0.02, 0.02, (8, 4))

    def rollout(seed, noise):
        observations = [env.reset(seed, actuator_noise=noise)]
        observations += [env.step(action).observation for action in actions]
        return observations

    for noise in (0.0, 0.15):
        first, again = rollout(11, noise), rollout(11, noise)
        other = rollout(12, noise)
        for a, b in zip(first, again, strict=True):
            assert np.array_equal(a.state, b.state)
            assert all(np.array_equal(a.images[name], b.images[name]) for name in a.images)
        assert not np.array_equal(first[0].images["front"], other[0].images["front"])
    # The scene of a seed does not depend on the noise.
    assert np.array_equal(rollout(11, 0.0)[0].state, rollout(11, 0.15)[0].state)
    assert not np.array_equal(rollout(11, 0.0)[-1].state, rollout(11, 0.15)[-1].state)


def test_cubes_lie_within_13_cm_and_cover_the_square(blind):
    cubes = []
    for seed in range(200):
        blind.reset(seed)
        cubes.append(blind.cube_position)
    cubes = np.array(cubes)
    assert np.abs(cubes[:, :2]).max() <= 0.13
    assert cubes[:, :2].min() < -0.12
    assert cubes[:, :2].max() > 0.12
    assert np.allclose(cubes[:, 2], 0.02)


def test_actions_are_metres_per_tick_and_are_clipped(blind):
    blind.reset(0)
    blind.step(np.zeros(4, np.float32))
    before = blind.tcp_position
    for _ in range(4):
        blind.step(np.float32([0.01, 0, 0, -1]))
    for _ in range(3):
        blind.step(np.float32([0, 0, 0, -1]))  # arrive
    assert blind.tcp_position[0] - before[0] == pytest.approx(0.04, abs=0.003)

    def travel(dx):
        blind.reset(0)
        start = blind.tcp_position[0]
        for _ in range(3):
            blind.step(np.float32([dx, 0, 0, -1]))
        return blind.tcp_position[0] - start

    assert travel(10.0) == travel(STEP_LIMIT)


def test_gripper_closes_on_positive_and_the_state_shows_it(blind):
    blind.reset(0)
    opened = blind.step(np.float32([0, 0, 0, -1])).observation.state
    assert opened[3] == pytest.approx(1.0, abs=0.05)
    assert opened[4] == -1.0
    for _ in range(6):
        closed = blind.step(np.float32([0, 0, 0, 0.5])).observation.state
    assert closed[3] < 0.2  # the finger tips touch before the end of their stroke
    assert closed[4] == 1.0


@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_expert_succeeds_quickly_even_on_a_disturbed_robot(blind, noise):
    expert, successes, ticks = blind.expert(), 0, 0
    for seed in range(50):
        blind.reset(seed, actuator_noise=noise)
        expert.reset()
        result = finish(blind, expert)
        successes += result.success
        ticks += blind._tick
    assert successes >= 49
    assert ticks / 50 < 22


def test_a_disturbed_target_is_disturbed_by_what_it_moves_in_a_tick_not_by_its_range():
    env = AbsolutePick(cameras=())
    env.reset(0, actuator_noise=0.15)
    told = env.target.copy()
    heard = []
    for _ in range(200):
        env.step(np.float32([*told, -1.0]))
        heard.append(env.target.copy())
    # 0.15 of the 0.44 m that it crosses in five seconds at 10 Hz; of the range it would be 33 mm.
    assert np.std(heard, axis=0) == pytest.approx(0.15 * 0.0088, rel=0.2)


def test_expert_takes_over_from_whatever_state_a_poor_policy_left(blind):
    expert, successes = blind.expert(), 0
    for seed in range(50):
        rng = np.random.default_rng([seed, 9])
        blind.reset(seed)
        for _ in range(22):
            action = rng.uniform(blind.spec.action_low, blind.spec.action_high)
            if blind.step(action).terminated:
                break
        else:
            expert.reset()
            successes += finish(blind, expert).success
            continue
        successes += 1  # the random walk ended the episode: nothing to take over
    assert successes >= 49


def test_doing_nothing_is_truncated_after_60_ticks(blind):
    blind.reset(3)
    results = [blind.step(np.float32([0, 0, 0, -1])) for _ in range(60)]
    assert [r.truncated for r in results] == [False] * 59 + [True]
    assert not any(r.terminated or r.success for r in results)


def test_an_episode_is_as_long_as_asked():
    env = PickEnv(cameras=(), max_ticks=3)
    env.reset(0)
    assert [env.step(np.zeros(4)).truncated for _ in range(3)] == [False, False, True]
    assert env.spec.max_ticks == 3


def test_a_cube_out_of_reach_is_a_failure_that_terminates(blind):
    blind.reset(3)
    blind._data.qpos[5:7] = [0.29, 0.0]
    result = blind.step(np.float32([0, 0, 0, -1]))
    assert result.terminated
    assert not result.success
    assert result.reward == 0.0


def red(image):
    """Pixels of the cube: clearly more red than green."""
    return (image[..., 0].astype(int) > 2 * image[..., 1].astype(int) + 20).sum()


def test_both_cameras_see_the_cube(env):
    seen = {"front": 0, "wrist": 0}
    expert = env.expert()
    for seed in range(10):
        observation = env.reset(seed)
        assert red(observation.images["front"]) >= 6  # 4 cm at 0.9 m is some 4 x 4 of 64 x 64 pixels
        expert.reset()
        for _ in range(8):  # the hand is above or around the cube by then
            observation = env.step(expert.act()).observation
        for name, image in observation.images.items():
            assert image.std() > 10
            seen[name] += red(image) >= 6
    assert seen["front"] >= 9
    assert seen["wrist"] == 10


def test_an_unknown_camera_is_named():
    with pytest.raises(ValueError, match=r"the pick scene has .*front.*wrist.*got 'top'"):
        PickEnv(cameras=("front", "top"), renderer="ray")
