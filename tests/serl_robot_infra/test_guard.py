"""E-stop and watchdog: the latch, the guard's thread, and both in a running actor whose learner is stopped."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from omegaconf import OmegaConf
from scripted_learner import RobotPick, Screen, ScriptedLearner, actor_config, still_policy, ticket

from serl_robot_infra.adder import Adder
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.guard import RobotGuard
from serl_robot_infra.main import main
from serl_robot_infra.pacing import StopSignal

PERIOD_S = 0.05  # 20 Hz


class Robot:
    def __init__(self):
        self.holds, self.stops, self.fail = [], [], 0

    def hold(self):
        self.holds.append(time.monotonic())

    def stop(self):
        if self.fail:
            self.fail -= 1
            raise OSError("the driver is busy")
        self.stops.append(time.monotonic())


@pytest.fixture
def estop(tmp_path):
    estop = EmergencyStop(tmp_path / "run" / "estop")
    yield estop
    estop.close()


@pytest.fixture
def robot():
    return Robot()


@pytest.fixture
def guard(robot, estop):
    guard = RobotGuard(robot, estop, rate_hz=20, stop_s=0.3)
    yield guard
    guard.close()


def wait_for(question, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def later(path):
    """What another process would see, or a later one."""
    estop = EmergencyStop(path)
    estop.close()
    return estop.reason()


def test_the_latch_is_the_file_and_only_a_person_removes_it(estop):
    assert estop.reason() is None
    estop.press("the red button")
    assert estop.reason() == "the red button"  # at once
    wait_for(estop.path.exists)
    wait_for(lambda: estop.reason().startswith("the red button at "))
    estop.press("somebody else")
    wait_for(lambda: estop.reason().startswith("the red button at "))  # the first press stays
    assert later(estop.path).startswith("the red button at ")
    estop.path.unlink()
    wait_for(lambda: estop.reason() is None)
    estop.path.touch()
    wait_for(lambda: estop.reason() == f"the file {estop.path}")


def test_sigusr1_presses_it_even_while_the_main_thread_is_busy(guard, estop, robot):
    with guard.installed():
        watcher = threading.Thread(target=lambda: wait_for(lambda: estop.reason() and robot.stops))
        watcher.start()
        os.kill(os.getpid(), signal.SIGUSR1)
        watcher.join()
        assert estop.reason().startswith("SIGUSR1")


def test_a_latch_that_cannot_be_written_stays_pressed(tmp_path):
    estop = EmergencyStop(tmp_path / "estop" / "latch")
    (tmp_path / "estop").rmdir()
    (tmp_path / "estop").touch()  # a file where the folder should be
    estop.press("x")
    for _ in range(2):
        wait_for(lambda: estop.reason().startswith("x (") and "cannot be written: restart" in estop.reason())
    (tmp_path / "estop").unlink()
    (tmp_path / "estop").mkdir()
    wait_for(lambda: estop.reason().startswith("x at "))  # it was written when that was possible
    estop.close()


def _a_folder(path):
    path.mkdir()


def _a_link_to_itself(path):
    path.symlink_to(path.name)


def _a_link_to_nothing(path):
    path.symlink_to("nowhere")


def _a_folder_that_is_gone(path):
    path.parent.rename(path.parent.with_name("elsewhere"))


@pytest.mark.parametrize("damage", [_a_folder, _a_link_to_itself, _a_link_to_nothing, _a_folder_that_is_gone])
def test_a_latch_that_cannot_be_read_counts_as_pressed(guard, estop, robot, damage):
    assert guard.feed() is None
    damage(estop.path)
    wait_for(lambda: robot.stops)
    assert "cannot be read" in guard.feed()


def test_what_a_latch_says_cannot_write_on_a_screen(tmp_path):
    (tmp_path / "estop").write_bytes(b"alice\x1b[2J\x00\n at \xff noon" + b"x" * 1000)
    assert later(tmp_path / "estop").startswith("alice[2J at � noonxxx")
    assert len(later(tmp_path / "estop")) == 200


def test_a_disk_that_hangs_delays_neither_the_press_nor_the_watchdog(guard, estop, robot, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(estop, "_read", released.wait)  # a look that does not come back
    monkeypatch.setattr(estop, "_write", lambda by: released.wait())
    time.sleep(0.1)
    assert guard.feed() is None
    started = time.monotonic()
    wait_for(lambda: robot.stops)
    assert "controlled stop" in guard.tripped  # the watchdog: before a second of hanging counts as pressed
    guard.disarm()
    wait_for(lambda: "cannot be looked at" in (guard.feed() or ""))
    assert time.monotonic() - started > 0.9
    estop.press("x")
    assert guard.feed() == "e-stop pressed: x"
    released.set()


def test_a_press_stops_first_and_is_written_afterwards(guard, estop, robot, monkeypatch):
    seen = []
    write = estop._write
    monkeypatch.setattr(estop, "_write", lambda by: (time.sleep(0.5), seen.append(len(robot.stops)), write(by))[2])
    assert guard.feed() is None
    pressed = time.monotonic()
    estop.press("x")
    wait_for(lambda: robot.stops)
    assert robot.stops[0] - pressed <= PERIOD_S
    wait_for(lambda: seen)
    assert seen == [1]


def test_a_driver_that_stops_every_thread_for_a_while_presses_nothing(estop):
    """A look that was in hand meanwhile took that long, but nobody was there to see it."""
    estop._look = 7
    assert estop.reason() is None
    for _ in range(3):
        estop._asked -= 2.0  # as if this thread had not run for two seconds
        estop._look = 7
        assert estop.reason() is None


def test_the_guard_stops_the_robot_once_for_a_press_and_forbids_actions_until_the_reset(guard, estop, robot):
    assert guard.feed() is None
    estop.press("x")
    assert guard.feed().startswith("e-stop pressed: x")
    wait_for(lambda: robot.stops)
    time.sleep(0.2)
    assert len(robot.stops) == 1
    assert guard.forbids()
    wait_for(estop.path.exists)
    estop.path.unlink()
    wait_for(lambda: estop.reason() is None)
    assert guard.feed() == "e-stop pressed: x"  # a robot that was stopped takes no action before its reset
    guard.rest(stop=False)
    assert not robot.holds
    assert guard.feed() is None


def test_silence_holds_then_stops_and_ends_the_episode(guard, robot):
    time.sleep(0.5)
    assert not robot.holds  # not armed before the first action
    started = time.monotonic()
    assert guard.feed() is None
    wait_for(lambda: guard.tripped)
    assert "controlled stop" in guard.feed()
    wait_for(lambda: robot.stops)
    assert robot.holds[0] - started >= 2 * PERIOD_S
    assert len(robot.holds) >= 2
    assert 0.3 <= robot.stops[0] - started <= 0.3 + 2 * PERIOD_S
    guard.rest(stop=False)
    assert len(robot.stops) == 1  # it was stopped already
    assert guard.feed() is None


def test_rest_holds_or_stops_and_stays_armed_until_the_driver_took_it(guard, robot):
    guard.feed()
    guard.rest(stop=False)
    assert (len(robot.holds), robot.stops) == (1, [])
    guard.rest(stop=True)
    assert (len(robot.holds), robot.stops) == (1, [])  # it rests
    guard.feed()
    robot.fail = 3
    guard.rest(stop=True)
    wait_for(lambda: robot.stops)


def test_a_stop_during_a_reset_is_repeated_until_the_reset_is_given_up(guard, estop, robot):
    """A driver's reset may clear a stop that came as it began."""
    assert guard.begin() is None
    estop.press("x")
    wait_for(lambda: len(robot.stops) >= 4)
    guard.rest(stop=False)
    wait_for(estop.path.exists)
    n = len(robot.stops)
    time.sleep(0.2)
    assert len(robot.stops) == n


def test_closing_stops_a_robot_that_still_moves(robot, estop):
    guard = RobotGuard(robot, estop, rate_hz=20, stop_s=None)
    assert guard.begin() is None  # a reset
    guard.close()
    assert len(robot.stops) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_robot_while_the_main_thread_hangs_in_a_driver(robot, estop, number):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it
    guard = RobotGuard(robot, estop, rate_hz=20, stop_s=None)
    stop = StopSignal()
    with stop.installed(), guard.installed():
        guard.begin()
        sent = time.monotonic()
        os.kill(os.getpid(), number)
        time.sleep(0.3)
        assert robot.stops[0] - sent <= PERIOD_S
        assert guard.feed() == f"stopped by {number.name}"
        assert stop.signal is number
    guard.rest(stop=True)
    n = len(robot.stops)
    guard.close()
    signal.signal(signal.SIGHUP, before)
    assert len(robot.stops) == n


def test_a_stop_that_fails_is_tried_again(guard, robot, caplog):
    robot.fail = 2
    guard.feed()
    wait_for(lambda: robot.stops)
    assert "trying again" in caplog.text


def run(learner, tmp_path, stream=None, **rollout):
    watchdog = {"enabled": "auto", "hold_after_chunks": 2, "stop_ms": 300}
    config = actor_config(learner, tmp_path, rate_hz=20, watchdog=watchdog, **rollout)
    config.task.env = {"_target_": "scripted_learner.RobotPick"}
    stream = stream or io.StringIO()
    code = main(config, stream)
    return code, stream.getvalue()


@pytest.fixture(scope="module")
def spec():
    env = RobotPick()
    yield env.spec
    env.close()


def when_moving(ticks, action):
    """Do `action` when the robot has moved for some ticks; returns the thread and the list with its time."""
    times = []
    RobotPick.last = None

    def wait():
        wait_for(lambda: RobotPick.last is not None and len(RobotPick.last.sent) >= ticks)
        times.append(time.monotonic())
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, times


@pytest.mark.parametrize("by", ["signal", "file"])
def test_an_estop_acts_within_one_period_and_holds_until_the_file_is_gone(spec, tmp_path, by):
    latch = tmp_path / "test" / "estop"
    press = (lambda: os.kill(os.getpid(), signal.SIGUSR1)) if by == "signal" else latch.touch
    with ScriptedLearner(spec, [ticket("eval", 1), ticket("eval", 2)]) as learner:
        thread, pressed = when_moving(5, press)
        released, screen = [], Screen()

        def release():
            thread.join()
            screen.wait_for("When it is safe, remove")  # it would have begun the next episode
            time.sleep(5 * PERIOD_S)
            released.append((time.monotonic(), len(RobotPick.last.resets)))
            latch.unlink()

        releasing = threading.Thread(target=release)
        releasing.start()
        code, out = run(learner, tmp_path, screen)
        releasing.join()
        first, second = learner.episodes()
    robot = RobotPick.last
    assert code == 0, out
    assert "e-stop pressed" in out
    at, resets = released[0]
    after = [t for t, _ in robot.sent if pressed[0] < t < at]
    assert all(t - pressed[0] <= PERIOD_S for t in after)
    assert robot.stops[0] - pressed[0] <= PERIOD_S
    assert resets == 1  # nothing moved while it was latched
    # What was sent is what is recorded, to the last tick.
    assert first.outcome.truncated_by == "stop"
    assert [a.tolist() for a in first.arrays["action"]] == [a.tolist() for _, a in robot.sent[: first.n]]
    assert second.n == 60


LEARNER = """
    import sys, time
    from scripted_learner import RobotPick, ScriptedLearner, ticket
    with ScriptedLearner(RobotPick().spec, [ticket("eval", 1)]) as learner:
        print(learner.server.config.port_number, learner.server.config.broadcast_port, flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("realtime", ["off", "async"])
def test_a_stopped_learner_trips_the_watchdog_within_two_periods(spec, tmp_path, realtime):
    paths = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    learner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LEARNER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        port, broadcast = map(int, learner.stdout.readline().split())
        config = actor_config(None, tmp_path, rate_hz=20, realtime=realtime, flush_timeout_s=5.0)
        OmegaConf.update(config, "rollout.watchdog", {"stop_ms": 300}, force_add=True)
        config.task.env = {"_target_": "scripted_learner.RobotPick"}
        config.task.spec = spec.to_dict()
        config.port, config.broadcast_port = port, broadcast
        config.rollout.episodes = 1
        thread, _ = when_moving(6, lambda: learner.send_signal(signal.SIGSTOP))
        stream = io.StringIO()
        waking = threading.Thread(
            target=lambda: (thread.join(), wait_for(lambda: RobotPick.last.stops), learner.send_signal(signal.SIGCONT))
        )
        waking.start()
        code = main(config, stream)
        waking.join()
    finally:
        learner.send_signal(signal.SIGCONT)
        learner.stdin.close()
        learner.wait(20)
    robot = RobotPick.last
    assert code == 0, stream.getvalue()
    assert "controlled stop (rollout.watchdog.stop_ms)" in stream.getvalue()
    last_action = robot.sent[-1][0]
    assert robot.holds
    assert robot.holds[0] > last_action
    assert 0.3 <= robot.stops[0] - last_action <= 0.3 + 2 * PERIOD_S
    assert len(robot.sent) >= 6


def test_a_policy_that_is_slow_but_answers_only_makes_the_robot_hold(spec, tmp_path):
    still = still_policy()

    def slow(body):
        time.sleep(0.12)  # two periods, far from the 300 ms of a stop
        return still(body)

    with ScriptedLearner(spec, [ticket("eval", 1)], slow) as learner:
        code, out = run(learner, tmp_path, execute_horizon=8)
        (episode,) = learner.episodes()
    assert code == 0, out
    assert episode.n == 60
    assert RobotPick.last.holds
    assert not RobotPick.last.stops


def test_a_nan_makes_the_robot_hold_before_anything_is_written(spec, tmp_path, monkeypatch):
    still, answers = still_policy(), []

    def failing(body):
        answers.append(body)
        answer = still(body)
        return answer if len(answers) < 3 else answer | {"actions": answer["actions"] * float("nan")}

    order, end = [], Adder.end
    monkeypatch.setattr(RobotPick, "hold", lambda robot: order.append("hold"))
    monkeypatch.setattr(Adder, "end", lambda *told: (order.append("written"), end(*told))[1])
    with ScriptedLearner(spec, [ticket("eval", 1)], failing) as learner:
        code, out = run(learner, tmp_path)
        (episode,) = learner.episodes()
    assert code == 0, out
    assert episode.n == 8
    assert order == ["hold", "written"]
    assert not RobotPick.last.stops


def test_an_end_that_the_environment_declares_is_left_to_it(spec, tmp_path):
    with ScriptedLearner(spec, [ticket("eval", 1)]) as learner:
        code, out = run(learner, tmp_path)
        (episode,) = learner.episodes()
    assert code == 0, out
    assert episode.n == 60  # its own time limit
    assert not RobotPick.last.holds
    assert not RobotPick.last.stops
