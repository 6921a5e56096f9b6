"""task=dobot_pnp by its documented commands, every process a real one, on a lab that speaks as an X-Trainer.

Ten demonstrations at the leader arms, cloning, evaluation, online rejection sampling with help, evaluation. What the
person of the lab does is in dobot_lab.py; the run and its figures are those of any other.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from whole_run import ROOT, check

LAB = ROOT / "tests" / "serl_robot_infra" / "dobot_lab.py"
GOAL = "{left_joint1:%s,left_joint2:%s,right_joint1:%s,right_joint2:%s}"
TASK = [
    "task=dobot_pnp", "run=dobot", "task.spec.max_ticks=160", "reward=goal_pose",
    "task.spec.cameras={cam_high:[60,80],cam_left_wrist:[60,80],cam_right_wrist:[60,80]}",
    f"reward.goal={GOAL % (-1.321, 0.2, 1.321, -0.2)}", f"reward.tolerance={GOAL % (0.04, 0.04, 0.04, 0.04)}",
]  # fmt: skip
LEARNER = [
    "schedule.stages.0.episodes=10", "schedule.stages.1.steps=150", "schedule.stages.2.episodes=10",
    "schedule.stages.3.steps=300", "+schedule.stages.3.episodes=15", "schedule.stages.4.episodes=10",
    "replay.capacity_frames=6000", "trainer.publish_period=25", "trainer.batch_size=16", "exporter.period_s=10",
]  # fmt: skip
# A loaded machine answers late, and that is not what is tried here.
ACTOR = ["task.env.home_speed=0.6", "task.operator.match_speed=0.6", "rollout.watchdog.stop_ms=3000"]


class Lab:
    """Context manager: the lab as a process; `words` for the actor, `said` once it has ended."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir()

    def __enter__(self) -> "Lab":
        self._process = start(
            [sys.executable, str(LAB), str(self._folder)], self._folder / "log", stdout=subprocess.PIPE
        )
        self.words = self._process.stdout.readline().split()
        return self

    def __exit__(self, *error) -> None:
        self.said = self._process.communicate(timeout=30)[0]


def start(command, log: Path, **popen) -> subprocess.Popen:
    paths = os.pathsep.join([str(LAB.parent), *filter(None, sys.path)])
    with log.open("w") as err:
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, text=True, stdin=subprocess.PIPE, stderr=err,
            **({"stdout": err} | popen),
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_demonstrations_cloning_help_and_evaluation_on_an_x_trainer(tmp_path, free_ports):
    words = [*TASK, f"runs_dir={tmp_path}", f"port={free_ports[0]}", f"broadcast_port={free_ports[1]}"]
    with Lab(tmp_path / "lab") as lab:
        learner = start(["bash", "run_learner.sh", *words, *LEARNER], tmp_path / "learner.log")
        actor = start(["bash", "run_actor.sh", *words, *ACTOR, *lab.words], tmp_path / "actor.log")
        try:
            assert learner.wait(2500) == 0, (tmp_path / "learner.log").read_text()[-3000:]
        finally:
            for process in (actor, learner):
                process.terminate()
                process.wait(60)
    summary = json.loads((tmp_path / "dobot" / "summary.json").read_text())
    print(json.dumps({key: value for key, value in summary.items() if "success" in key}), lab.said)
    assert summary["episodes"] >= 10 + 10 + 15 + 10
    assert summary["success_rate"] > summary["success_rate_before_online"]
    assert "nothing lost" in check(tmp_path / "dobot")
    demonstrated, helped = map(int, re.search(r"demonstrated (\d+) helped (\d+)", lab.said).groups())
    assert demonstrated >= 10
    screen = (tmp_path / "actor.log").read_text()
    assert "watchdog: controlled stop after 3000 ms without an action, by a process of its own as well" in screen
    assert ("operator" in screen) or not helped


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killing_the_actor_stops_both_arms_and_it_is_started_again(tmp_path, free_ports):
    from dobot_lab import Person, serve_cameras, words  # brings OpenCV
    from dobot_rig import DobotRig

    common = [*TASK, f"runs_dir={tmp_path}", f"port={free_ports[0]}", f"broadcast_port={free_ports[1]}"]
    with DobotRig(tmp_path) as rig:
        learner = start(["bash", "run_learner.sh", *common, *LEARNER], tmp_path / "learner.log")
        said = words(rig, serve_cameras())
        actor = start(["bash", "run_actor.sh", *common, *ACTOR, *said], tmp_path / "actor.log", start_new_session=True)
        Person(rig).start()
        try:
            log, deadline = tmp_path / "actor.log", time.monotonic() + 240
            while "#1 demos" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.1)
            told = len(rig.arms["left"].goals)
            while len(rig.arms["left"].goals) < told + 10:
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.01)
            killed = time.monotonic()
            os.kill(int(Path(f"/proc/{actor.pid}/task/{actor.pid}/children").read_text()), signal.SIGKILL)
            while not all(arm.said("ResetRobot") and arm.said("ResetRobot")[-1] > killed for arm in rig.arms.values()):
                assert time.monotonic() < killed + 10
                time.sleep(0.01)
            assert rig.arms["left"].said("ResetRobot")[-1] - killed < 1.0
            told = log.stat().st_size
            while "#1 demos" not in log.read_text()[told:]:  # run_actor.sh starts it again, and the arms move
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.1)
            assert "the actor ended (signal SIGKILL); starting it again in 0.5 s" in log.read_text()
        finally:
            for process in (actor, learner):
                process.terminate()
                process.wait(60)
