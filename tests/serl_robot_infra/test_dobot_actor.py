"""task=dobot_pnp as it stands, in the real actor: leaders demonstrate, an alarm and a lost arm cost an episode."""

import threading
import time

import numpy as np
import pytest
from dobot_rig import DobotRig
from fake_dobot import HOME
from omegaconf import OmegaConf
from scripted_learner import Screen, ScriptedLearner, actor_config, ticket

from serl_robot_infra.main import main
from serl_transport.contract.specs import TaskSpec

TICKS = 10


@pytest.fixture
def rig(tmp_path):
    words = [f"spec.max_ticks={TICKS}", "operator.match_speed=1.0", "operator.max_age_ms=2000"]
    patient = ["env.feedback_max_age_ms=1000", "env.home_speed=1.5"]
    with DobotRig(tmp_path, *words, *patient) as rig:
        rig.task.env.spec = rig.task.spec
        yield rig


def act(rig, tmp_path, tickets, meanwhile=lambda screen: None, **rollout):
    """Exit code, what the screen said, and the episodes."""
    spec = TaskSpec.from_dict(OmegaConf.to_container(rig.task.spec, resolve=True))
    home = np.float32([*np.radians(HOME["left"]), 1.0, *np.radians(HOME["right"]), 1.0])
    still = np.tile(home, (8, 1))
    with ScriptedLearner(
        spec, tickets, lambda body: {"actions": still, "policy_version": 1, "server_ms": 0.1}
    ) as learner:
        config = actor_config(learner, tmp_path, demo_noise="auto", rate_hz=None, **rollout)
        OmegaConf.update(config, "rollout.watchdog", {"stop_ms": 5000.0}, force_add=True)
        config.task = rig.task
        screen = Screen()
        thread = threading.Thread(target=meanwhile, args=(screen,), daemon=True)
        thread.start()
        code = main(config, screen)
        thread.join(10)
        return code, screen.getvalue(), learner.episodes()


@pytest.mark.parametrize("fault", ["alarm", pytest.param("no power", marks=pytest.mark.slow)])
def test_an_alarm_or_an_arm_without_power_costs_one_episode_and_the_night_goes_on(rig, tmp_path, fault):
    left = rig.arms["left"]

    def meanwhile(screen):
        while len(left.goals) < TICKS // 2:
            time.sleep(0.01)
        left.alarm(117) if fault == "alarm" else left.unplug()
        screen.wait_for("cut at tick")
        if fault == "no power":
            time.sleep(1.5)
            left.plug()

    rig.leaders["left"].put(np.radians(HOME["left"]) + np.eye(6)[0] * 0.1, 1.0)
    tickets = [ticket("demo", seed) for seed in range(1, 6)]
    code, out, episodes = act(rig, tmp_path, tickets, meanwhile, wait_for_ready=False)
    assert code == 0, out
    assert "watchdog: controlled stop after 5000 ms without an action, by a process of its own as well" in out
    told = "left arm: the controller has alarm 117 (collision)" if fault == "alarm" else "left arm: 127.0.0.1"
    assert told in out[out.index("cut at tick") :].splitlines()[0]
    whole = [episode for episode in episodes if episode.n == TICKS]
    assert len(whole) >= len(episodes) - 1
    last = whole[-1]
    assert last.arrays["intervention"].all()
    assert last.arrays["action"][-1, 0] == pytest.approx(np.radians(HOME["left"][0]) + 0.1, abs=0.01)
    assert np.abs(np.diff(last.arrays["action"][:, :6], axis=0)).max() <= 0.8 / 20 + 1e-5  # max_speed
