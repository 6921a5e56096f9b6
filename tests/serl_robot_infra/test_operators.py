"""Operators: when they drive, and that no inference is spent while they do."""

import numpy as np
import pytest
from absolute_pick import AbsolutePick

from flowserl_cli.compose import load_config
from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.interventions.none import NoIntervention
from serl_robot_infra.interventions.scripted import ScriptedOperator
from serl_robot_infra.operators import build_operator, control_rate, is_person

PROPOSAL = np.float32([0, 0, 0, -1])


@pytest.fixture
def env():
    return PickEnv(cameras=())


def drive(operator, env, ticks, seed=0, from_start=False):
    observation = env.reset(seed)
    operator.reset(np.random.default_rng(seed), from_start=from_start)
    asked, flags = [], []
    for tick in range(ticks):
        action, intervened = operator.act(observation, lambda tick=tick: asked.append(tick) or PROPOSAL, tick)
        flags.append(intervened)
        observation = env.step(action).observation
    return flags, asked


def test_takeover_at_its_tick_and_to_the_end(env):
    flags, asked = drive(ScriptedOperator(env, takeover_tick=6), env, 10)
    assert flags == [False] * 6 + [True] * 4
    assert asked == list(range(6))


def test_a_demonstration_is_the_operators_from_the_first_tick(env):
    flags, asked = drive(ScriptedOperator(env, takeover_tick=6), env, 5, from_start=True)
    assert flags == [True] * 5
    assert asked == []


def test_jitter_is_a_function_of_the_episode(env):
    operator = ScriptedOperator(env, takeover_tick=10, jitter=5)
    starts = [drive(operator, env, 16, seed)[0].index(True) for seed in range(12)]
    assert starts == [drive(operator, env, 16, seed)[0].index(True) for seed in range(12)]
    assert min(starts) >= 5
    assert max(starts) <= 15
    assert len(set(starts)) > 3


def test_a_hesitating_operator_stands_still_for_a_while_with_the_gripper_as_the_expert_wants_it(env):
    operator = ScriptedOperator(env, takeover_tick=2, hesitation=5, still_dims=[0, 1, 2])
    pauses = []
    for seed in range(8):
        observation = env.reset(seed)
        operator.reset(np.random.default_rng(seed), from_start=False)
        actions = [operator.act(observation, lambda: PROPOSAL, tick)[0] for tick in range(2, 9)]
        still = [not action[:3].any() for action in actions]
        pauses.append(still.index(False))
        assert all(action[3] == -1 for action in actions[: pauses[-1]])
    assert 0 <= min(pauses) < max(pauses) <= 5


def test_a_hesitating_operator_of_targets_keeps_the_robot_where_it_is():
    env = AbsolutePick(cameras=())
    operator = ScriptedOperator(env, takeover_tick=0, hesitation=9, still_dims=[0, 1, 2])
    seen = env.reset(3)
    operator.reset(np.random.default_rng(3), from_start=True)
    action, by_hand = operator.act(seen, lambda: PROPOSAL, 0)
    assert by_hand
    assert action[:3].tolist() == seen.state[:3].tolist()


def test_nobody_drives(env):
    flags, asked = drive(NoIntervention(), env, 3)
    assert flags == [False] * 3
    assert asked == [0, 1, 2]


def test_an_environment_without_expert_is_refused_in_the_users_words():
    class Robot:
        pass

    with pytest.raises(ValueError, match=r"Robot has no scripted expert; set rollout.operator=false"):
        ScriptedOperator(Robot())


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ([], ScriptedOperator),  # the task's own
        (["operator=scripted", "operator.takeover_tick=3"], ScriptedOperator),
        (["operator=none"], NoIntervention),
        (["rollout.mode=eval"], NoIntervention),
    ],
)
def test_the_operator_group_takes_the_place_of_the_tasks_own(env, words, kind):
    cfg = load_config(words)
    operator = build_operator(cfg, env)
    assert type(operator) is kind
    assert not is_person(cfg)
    assert control_rate(cfg, env.spec) == 50.0  # nobody needs real time
    if "operator.takeover_tick=3" in words:
        assert operator.takeover_tick == 3


@pytest.mark.parametrize("device", ["keyboard", "gamepad", "spacemouse"])
def test_a_person_drives_in_real_time(env, device):
    cfg = load_config([f"operator={device}"])
    assert is_person(cfg)
    assert control_rate(cfg, env.spec) == 10.0
    assert control_rate(load_config([f"operator={device}", "rollout.rate_hz=5"]), env.spec) == 5.0


class HalfAnOperator:
    """As a lab may write it: the one method that seems to be needed."""

    def __init__(self, env):
        pass

    def act(self, observation, propose, tick):
        return propose(), False


def test_a_class_that_is_no_operator_is_refused_before_anything_moves(env):
    cfg = load_config(["actor=true", "task=pick"])
    cfg.task.operator = {"_target_": f"{__name__}.HalfAnOperator"}
    with pytest.raises(ValueError, match=r"operator: .*HalfAnOperator has no reset, absent: let it inherit .*Interv"):
        build_operator(cfg, env)
