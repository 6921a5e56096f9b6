"""The watchdog process: it stops a robot whose actor cannot, over a way of its own."""

import ctypes
import subprocess
import sys
import time

import pytest
from test_guard import PERIOD_S, Robot, wait_for

from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.guard import RobotGuard
from serl_robot_infra.watchdog import StopCommand, WatchdogProcess

STOP_S = 0.3
PATH = "stops"


class NotingStopper:
    """Appends when it was called, `time.monotonic()` seconds; fails at first if asked to."""

    def __init__(self, path, failures=0):
        self._path, self._failures = path, failures

    def stop(self):
        if self._failures:
            self._failures -= 1
            raise ConnectionError("the controller's second port is busy")
        with open(self._path, "a") as file:
            file.write(f"{time.monotonic()}\n")


def stops(folder):
    return [float(line) for line in (folder / PATH).read_text().split()] if (folder / PATH).exists() else []


@pytest.fixture
def watchdog(tmp_path, request):
    node = {"_target_": "test_watchdog.NotingStopper", "path": str(tmp_path / PATH), **getattr(request, "param", {})}
    watchdog = WatchdogProcess(node, tmp_path / "estop", PERIOD_S, STOP_S)
    yield watchdog
    watchdog.close()
    assert watchdog._process.returncode is not None


def keep_the_interpreter(seconds):
    """As a driver's C extension does that does not release it."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def test_a_driver_that_keeps_the_interpreter_is_stopped_in_time(tmp_path, watchdog):
    robot, estop = Robot(), EmergencyStop(tmp_path / "estop")
    guard = RobotGuard(robot, estop, rate_hz=20, stop_s=STOP_S, watchdog=watchdog)
    for _ in range(5):
        assert guard.feed() is None
        time.sleep(PERIOD_S)
    assert guard.feed() is None
    fed = time.monotonic()
    keep_the_interpreter(1.5)
    assert STOP_S <= stops(tmp_path)[0] - fed <= STOP_S + 3 * PERIOD_S  # a period later than the guard would have
    assert "stopped the robot" in guard.feed() or "controlled stop" in guard.feed()  # the action comes too late
    guard.rest(stop=False)
    assert robot.stops  # a robot that was stopped is not told to hold
    assert guard.feed() is None
    guard.close()
    estop.close()


def test_a_press_during_a_reset_that_keeps_the_interpreter(tmp_path, watchdog):
    robot, estop = Robot(), EmergencyStop(tmp_path / "estop")
    guard = RobotGuard(robot, estop, rate_hz=20, stop_s=STOP_S, watchdog=watchdog)
    assert guard.begin() is None
    code = "import sys, time; time.sleep(0.3); open(sys.argv[1], 'w'); print(time.monotonic())"
    presser = subprocess.Popen([sys.executable, "-c", code, tmp_path / "estop"], stdout=subprocess.PIPE, text=True)
    keep_the_interpreter(1.5)
    pressed = float(presser.communicate()[0])
    assert stops(tmp_path)[0] - pressed <= 4 * PERIOD_S
    guard.close()
    estop.close()


def test_a_robot_whose_actor_is_gone_is_stopped(tmp_path, watchdog):
    watchdog.feed()
    watchdog._link.shutdown(2)  # what kill -9 leaves
    assert watchdog._process.wait(20) == 0
    assert len(stops(tmp_path)) == 1


def test_at_rest_it_waits_and_ends_with_its_actor(tmp_path, watchdog):
    for _ in range(2):
        watchdog.begin()
        watchdog.feed()
        watchdog.disarm()
        time.sleep(STOP_S + 4 * PERIOD_S)
        assert watchdog.forbids() is None
    watchdog.close()
    assert watchdog._process.returncode == 0
    assert stops(tmp_path) == []


@pytest.mark.parametrize("watchdog", [{"failures": 3}], indirect=True)
def test_a_stop_that_fails_is_tried_again(tmp_path, watchdog):
    watchdog.feed()
    wait_for(lambda: stops(tmp_path))
    wait_for(watchdog.forbids)


def test_without_it_no_action_is_sent(tmp_path, watchdog):
    estop = EmergencyStop(tmp_path / "estop")
    guard = RobotGuard(Robot(), estop, rate_hz=20, stop_s=STOP_S, watchdog=watchdog)
    assert guard.feed() is None
    watchdog._process.kill()
    watchdog._process.wait()
    wait_for(lambda: "does not listen any more" in (guard.feed() or ""))
    guard.rest(stop=False)
    assert "does not listen any more" in guard.begin()
    guard.close()
    estop.close()


def test_a_stopper_that_cannot_be_made_is_told(tmp_path):
    node = {"_target_": "test_watchdog.NotingStopper", "host": "10.0.0.9"}
    with pytest.raises(ValueError, match=r"the stopper test_watchdog\.NotingStopper of this robot cannot be made"):
        WatchdogProcess(node, tmp_path / "estop", PERIOD_S, STOP_S)


def test_a_command_can_stop(tmp_path):
    StopCommand(["touch", str(tmp_path / "stopped")]).stop()
    assert (tmp_path / "stopped").exists()
    with pytest.raises(subprocess.CalledProcessError):
        StopCommand(["false"]).stop()
    with pytest.raises(subprocess.TimeoutExpired):
        StopCommand(["sleep", "5"], timeout_s=0.1).stop()
