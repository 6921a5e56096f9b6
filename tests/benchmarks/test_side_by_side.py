"""The comparison with LeRobot: the environment it is given, the demonstrations, and (slow) whole runs of both sides."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("gym_hil", reason="the hil extra (gym-hil) is not installed")

from lockstep import seed_of
from side_by_side.lerobot_env import GRIPPER_PENALTY, ActionUnits, ScriptedPickCube
from side_by_side.side_task import Robot, Settings, evaluate

SETTINGS = Settings("state", 3, 120, 2, 2, 60, 2)


def test_units_there_and_back():
    units = ActionUnits(np.full(3, 0.025))
    assert units.to_ours(np.float32([1, -2, 0, 1])) == pytest.approx([0.025, -0.025, 0, -1])  # open at first
    assert units.to_ours(np.float32([0, 0, 0.5, 2])) == pytest.approx([0, 0, 0.0125, 1])
    assert units.to_ours(np.float32([0, 0, 0, 1]))[3] == 1  # stays closed
    assert units.to_ours(np.float32([0, 0, 0, 0]))[3] == -1
    ours = np.float32([0.01, -0.025, 0, 1])
    assert units.to_ours(units.to_theirs(ours)) == pytest.approx(ours)


@pytest.fixture(scope="module")
def rollout(tmp_path_factory):
    """(every tick's info by episode, the log's lines, saved files) of an actor that never moves."""
    log, saved = tmp_path_factory.mktemp("side") / "snapshots.jsonl", []
    env = ScriptedPickCube(SETTINGS, log, saved.append)
    episodes = []
    while len(saved) < 3:
        observation, info = env.reset()
        assert env.observation_space.contains(observation)
        assert info == {"is_intervention": False}
        ticks, over = [], False
        while not over:
            _, reward, terminated, truncated, info = env.step(np.float32([0, 0, 0, 1]))
            over = terminated or truncated
            ticks.append(info | {"reward": reward})
        episodes.append(ticks)
    return episodes, [json.loads(line) for line in log.read_text().splitlines()], saved


@pytest.mark.slow
def test_the_operator_is_in_the_gamepads_place(rollout):
    for ticks in rollout[0]:
        drove = [tick["is_intervention"] for tick in ticks]
        assert drove == [False] * 25 + [True] * (len(ticks) - 25)
        assert all(np.array_equal(tick["teleop_action"], [0, 0, 0, 1]) for tick in ticks[:25])
        helped = np.stack([tick["teleop_action"] for tick in ticks[25:]])
        assert np.abs(helped[:, :3]).max() <= 1 + 1e-6
        assert set(helped[:, 3]) <= {0.0, 2.0}
    grasps = [[tick["discrete_penalty"] for tick in ticks] for ticks in rollout[0] if ticks[-1]["succeed"]]
    assert grasps
    assert all(penalties.count(GRIPPER_PENALTY) == 1 for penalties in grasps)  # closed once


@pytest.mark.slow
def test_snapshots_are_due_by_environment_steps(rollout):
    episodes, rows, saved = rollout
    assert [row["point"] for row in rows] == ["before", "curve", "after"]
    assert [row["file"] for row in rows] == [str(path) for path in saved]
    lengths = np.cumsum([0, *map(len, episodes)])
    for row, due in zip(rows, (0, 60, 120), strict=True):
        assert row["env_steps"] == lengths[lengths >= due][0]
        done = list(lengths).index(row["env_steps"])
        assert (row["episodes"], row["interventions"]) == (done, done)


def test_evaluation_is_without_help_and_the_operator_alone_would_succeed():
    robot = Robot(SETTINGS)
    assert evaluate(robot.env, lambda _: np.float32([0, 0, 0, -1]), 2, 1_000_000) == 0
    expert = robot.env.expert()

    def act(_):
        return expert.act()

    expert.reset()
    assert evaluate(robot.env, act, 1, 1_000_000) == 1
    assert seed_of(3, "demo", 1) != seed_of(3, "online", 1)


@pytest.mark.slow
@pytest.mark.parametrize("observation", ["state", "images"])
@pytest.mark.parametrize("side", ["lerobot", "ours"])
def test_a_short_run_of_each_side(repo_root, tmp_path, side, observation):
    numbers = {
        "env-steps": 120,
        "demos": 2,
        "eval-episodes": 2,
        "curve-every": 60,
        "curve-episodes": 2,
        "clone-steps": 4,
    }
    words = [f"--{name}={number}" for name, number in numbers.items()]
    output = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        str(repo_root / "benchmarks" / "side_by_side" / "run.py"),
        side,
        "--observation",
        observation,
        "--output",
        str(output),
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [rows[0]["point"], rows[-1]["point"]] == ["before", "after"]
    assert rows[-1]["env_steps"] >= 120
    wanted = {"algo", "policy", "task", "seed", "success_rate", "episodes", "interventions", "env_steps", "minutes"}
    assert wanted <= rows[-1].keys()
