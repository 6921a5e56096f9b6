"""A full disk on the robot's host: the actor holds and says so, the watchdog stops the robot, then it goes on."""

import threading
import time

import pytest
from omegaconf import OmegaConf
from scripted_learner import RobotPick, Screen, ScriptedLearner, actor_config, ticket

from serl_robot_infra.main import main
from serl_robot_infra.observers.base import Observer, ObserverGroup


@pytest.fixture
def disk(tmpfs):
    """A tmpfs of 8 MB."""
    return tmpfs("size=8m")


@pytest.fixture
def spec():
    env = RobotPick()
    yield env.spec
    env.close()


def fill(disk) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError:
            pass


@pytest.mark.faults
def test_the_actor_holds_the_watchdog_stops_the_robot_and_it_goes_on_when_there_is_room(spec, disk):
    screen = Screen()

    def full_for_a_while() -> None:
        deadline = time.monotonic() + 60
        while not learner.batches and time.monotonic() < deadline:
            time.sleep(0.01)
        fill(disk)
        try:
            screen.wait_for("the robot holds until the learner has taken some", 60)
            while not RobotPick.last.stops and time.monotonic() < deadline:
                time.sleep(0.01)
            silent.append(len(RobotPick.last.sent))
            time.sleep(0.5)
            silent.append(len(RobotPick.last.sent))
        finally:
            (disk / "ballast").unlink()

    silent: list[int] = []
    with ScriptedLearner(spec, [ticket("eval", k) for k in (1, 2, 3)]) as learner:
        config = actor_config(learner, disk, rate_hz=20, video_every=1)
        OmegaConf.update(config, "rollout.watchdog", {"stop_ms": 300}, force_add=True)
        config.task.env = {"_target_": "scripted_learner.RobotPick"}
        filling = threading.Thread(target=full_for_a_while)
        filling.start()
        code = main(config, screen)
        filling.join()
    out = screen.getvalue()
    assert code == 0, out
    assert "cannot write to the spool" in out
    assert RobotPick.last.stops, "the watchdog must not wait for a disk"
    assert silent[0] == silent[1], "a robot that was stopped moved while the disk was full"
    assert "controlled stop" in out
    assert {batch.episode.episode_id for batch in learner.batches} == {"eval-1", "eval-2", "eval-3"}
    assert sum(batch.n for batch in learner.batches) == len(RobotPick.last.sent)  # each tick that was sent is recorded


def test_an_observer_whose_disk_is_full_misses_one_and_stays():
    class Full(Observer):
        told = 0

        def message(self, text):
            Full.told += 1
            raise OSError(28, "No space left on device")

        def tick(self, step):
            raise OSError(28, "No space left on device")

    said = []

    class Screen(Observer):
        def message(self, text):
            said.append(text)

    group = ObserverGroup([Full(), Screen()])
    group.tick(None)
    group.tick(None)
    assert said == ["Full could not write, this one is missing: [Errno 28] No space left on device"] * 2
    assert Full.told == 2
