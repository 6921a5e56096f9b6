"""A step that never comes back: the robot is stopped, what was executed is kept, the process ends to be restarted."""

import subprocess
import time

import pytest
from robot_process import moves_of, start
from scripted_learner import RobotPick, ScriptedLearner, ticket

HANGS_AT, STOP_MS = 7, 200


@pytest.fixture
def learner():
    robot = RobotPick()
    with ScriptedLearner(robot.spec, [ticket("demo", 1), ticket("demo", 2)]) as learner:
        yield learner
    robot.close()


@pytest.fixture
def actor(learner, tmp_path):
    """Start an actor in this run's folder: (exit code, what it said, seconds)."""

    def act(**options):
        ports = [learner.server.config.port_number, learner.server.config.broadcast_port]
        options |= {"role": "actor", "ports": ports, "runs": str(tmp_path / "runs"), "moves": str(tmp_path / "moves")}
        begun = time.monotonic()
        process = start(options, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said, time.monotonic() - begun

    return act


def test_it_is_stopped_its_ticks_are_spooled_and_the_next_start_goes_on(learner, actor, tmp_path):
    code, said, _ = actor(hangs_at=HANGS_AT, stop_ms=STOP_MS, restart_s=0.6)
    assert code == 1, said
    assert "NotingRobot.step has not come back for 0." in said
    assert "NotingRobot.step did not come back within 1 s (rollout.watchdog.restart_s): this process ends; what" in said
    last = moves_of(tmp_path / "moves", "a")[-1]
    assert STOP_MS / 1e3 <= moves_of(tmp_path / "moves", "s")[0] - last < 0.6
    code, said, _ = actor()
    assert code == 0, said
    first = [batch for batch in learner.batches if batch.episode.episode_id == "demo-1"]
    assert sum(batch.n for batch in first) == HANGS_AT  # less than a batch of ten, and none is lost
    assert (learner.batches[-1].episode.episode_id, learner.batches[-1].outcome is None) == ("demo-2", False)


@pytest.mark.slow
def test_one_that_keeps_the_interpreter_ends_the_process_as_well(actor):
    code, said, seconds = actor(hangs_at=HANGS_AT, blind=True, stop_ms=STOP_MS, restart_s=0.5, blind_s=0.8)
    assert code == 1, said
    assert seconds < 30
    assert "Timeout (0:00:01" in said  # where each thread was
    assert "in step" in said
