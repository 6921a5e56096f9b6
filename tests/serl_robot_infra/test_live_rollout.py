"""What people set of a running actor's rollout.*: in force with the next episode, said, taken back, refused aloud."""

import time

import numpy as np
import pytest
from scripted_learner import Screen, ScriptedLearner, actor_config, ticket

from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.guard import RobotGuard
from serl_robot_infra.live_rollout import rate, video_every
from serl_robot_infra.main import main
from serl_robot_infra.pacing import Pace


def by_ann(**values):
    return {"rollout": {key: {"value": value, "by": "Ann"} for key, value in values.items()}}


def test_a_rate_holds_from_the_next_episode_on_and_what_cannot_be_is_said_and_changes_nothing(tmp_path):
    env = PickEnv(image_size=32, renderer="ray", max_ticks=4)
    wanted = [{}, by_ann(rate_hz=10), by_ann(rate_hz=20), by_ann(rate_hz=20, video_every=1, realtime="rtc"), {}]
    tickets = [ticket("eval", seed) | words for seed, words in enumerate(wanted, start=1)]
    with ScriptedLearner(env.spec, tickets) as learner:
        cfg = actor_config(learner, tmp_path)
        cfg.task.env.max_ticks = 4
        code = main(cfg, screen := Screen())
        hz = [1e9 / np.diff(episode.arrays["time_ns"]).mean() for episode in learner.episodes()]
    env.close()
    out = screen.getvalue()
    assert code == 0, out
    assert [rate < 11 for rate in hz] == [False, True, True, True, False]
    assert "rollout.rate_hz=10 from this episode on, by Ann" in out
    assert (
        "the learner sets rollout.'rate_hz', which is refused here: rate_hz: expected a number from 0.001 to 10" in out
    )
    assert "rollout.'video_every', which is refused here: this actor was started without videos" in out
    assert "rollout.'realtime', which is refused here: expected one of rate_hz, video_every" in out
    assert "rollout.rate_hz=0 from this episode on, as this actor was started" in out


def test_a_slower_loop_is_not_held_between_its_ticks_and_never_slower_than_the_watchdog(tmp_path):
    class Robot:
        holds = stops = 0

        def hold(self):
            self.holds += 1

        def stop(self):
            self.stops += 1

    estop, robot = EmergencyStop(tmp_path / "estop"), Robot()
    guard = RobotGuard(robot, estop, rate_hz=50, stop_s=1.0)
    put = rate(50, [(Pace(50), 50)], guard)
    with pytest.raises(ValueError, match=r"1 Hz is a tick in 1 s, and the watchdog stops the robot after 1 s"):
        put(1)
    assert put(4) == 4
    guard.feed()
    time.sleep(0.25)
    assert robot.holds == 0
    assert put(None) == 50
    guard.feed()
    time.sleep(0.25)
    assert robot.holds > 1
    guard.close()
    estop.close()


def test_videos_are_asked_for_and_taken_back():
    class Videos:
        every = {"demo": 20, "online": 20, "eval": 1}

    videos = Videos()
    put = video_every([videos])
    assert put(1) == 1
    assert videos.every == {"demo": 1, "online": 1, "eval": 1}
    assert put(None) == 20
    assert videos.every == Videos.every
