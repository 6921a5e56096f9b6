"""Signs of life: what of a role's beats the supervisor sees, what it calls silence, and when it gives a role up."""

import os
import signal
import subprocess
import sys
import time

import pytest

from serl_config.process import process_stat, stopped_groups
from serl_launcher.run.alive import BEAT_FILE, Beat, Pace
from serl_launcher.supervisor import pulse
from serl_launcher.supervisor.children import Child, ChildSpec
from serl_launcher.supervisor.pulse import Pulse

PATIENCE_S = 30.0


class Role:
    """A process that beats as it is told, line by line."""

    def __init__(self, memory: Pulse, *wrapper: str) -> None:
        code = (
            "import sys\nfrom serl_launcher.run.alive import beat, busy\nfor line in sys.stdin:\n exec(line)\n print()"
        )
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-u", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, BEAT_FILE: memory.path},
        )  # fmt: skip

    def do(self, line: str) -> None:
        """Run one line in it, to its end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self.process.stdout.readline()


@pytest.fixture
def memory():
    return Pulse()


@pytest.fixture
def role(memory):
    one = Role(memory)
    yield one
    one.process.kill()
    one.process.wait()


def look(memory: Pulse, seconds: float, **state: bool) -> "pulse.Silence | None":
    """As many looks as the supervisor has in that time; the last one's finding."""
    found = None
    for _ in range(round(seconds)):
        found = memory.look(1.0, **{"ready": True, "stopped": False, **state})
    return found


def test_a_role_that_beats_is_well_however_long_it_lives(memory, role):
    for _ in range(5):
        role.do("beat()")
        assert look(memory, 5) is None


def test_silence_is_shown_and_then_ends_the_role(memory, role):
    role.do("beat()")
    assert look(memory, 6) is None
    found = look(memory, 1)
    assert (found.text, found.over) == ("silent for 6 s", False)
    found = look(memory, 15)
    assert (found.text, found.over) == ("silent for 21 s", True)
    role.do("beat()")
    assert look(memory, 1) is None


def test_work_that_was_announced_is_shown_and_not_ended_within_what_it_may_take(memory, role):
    role.do("work = busy(600.0, 'writing a checkpoint'); work.__enter__()")
    assert look(memory, 120) is None
    found = look(memory, 380)
    assert found.text == "silent for 499 s: writing a checkpoint, which may take 600 s"
    assert not found.over
    assert look(memory, 102).over
    role.do("beat()")  # somebody deeper down: the allowance is still the outer one's
    assert not look(memory, 500).over
    role.do("work.__exit__(None, None, None)")
    assert look(memory, 1) is None
    assert look(memory, 21).over


def test_an_allowance_within_another_ends_with_it(memory, role):
    role.do("outer = busy(600.0, 'ending'); outer.__enter__(); inner = busy(60.0, 'publishing'); inner.__enter__()")
    assert look(memory, 14).text == "silent for 13 s: publishing, which may take 60 s"
    role.do("inner.__exit__(None, None, None)")
    assert look(memory, 131).text == "silent for 130 s: ending, which may take 600 s"


def test_time_in_which_nobody_looked_is_nobody_s_silence(memory, role):
    """The supervisor was stopped, or the machine slept: after an hour it looks before the roles could run."""
    role.do("beat()")
    assert look(memory, 1) is None
    assert memory.look(3600.0, ready=True, stopped=False) is None


def test_a_role_that_is_stopped_is_shown_at_once_and_soon_ended(memory):
    found = memory.look(1.0, ready=True, stopped=True)
    assert (found.text, found.over, found.stopped) == ("stopped (SIGSTOP) for 1 s", False, True)
    assert look(memory, 2, stopped=True).over
    assert memory.look(1.0, ready=True, stopped=False) is None


def test_a_start_may_take_long_and_is_shown_when_it_does(memory):
    assert look(memory, 30, ready=False) is not None
    assert look(memory, 29 * 60, ready=False).over is False
    assert look(memory, 60, ready=False).over


def test_what_does_not_beat_is_not_accused(memory):
    assert look(memory, 3600) is None


def test_the_memory_of_the_last_life_does_not_count(memory, role):
    role.do("beat()")
    look(memory, 30)
    memory.reset()
    assert look(memory, 10) is None
    assert memory.last == Beat()


def test_a_process_below_one_that_closes_what_it_inherited_reaches_the_memory(memory):
    """As a rank of the trainer under what starts several of them."""
    wrapper = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], close_fds=True).returncode)"
    role = Role(memory, sys.executable, "-c", wrapper)
    try:
        role.do("beat()")
        look(memory, 1)
        assert memory.last.count == 1
        assert memory.last.pid not in (0, role.process.pid)
    finally:
        role.process.stdin.close()
        role.process.wait(PATIENCE_S)


def test_a_pace_is_learned_and_forgets(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace("a step", first_s=1800.0, least_s=30.0)

    def step(seconds):
        with pace.timed():
            now[0] += seconds
        return pace.allowed_s

    assert pace.allowed_s == 1800.0
    assert step(0.1) == 30.0
    assert step(20.0) == pytest.approx(200.0)
    assert step(0.1) == pytest.approx(180.0)
    for _ in range(40):
        step(0.1)
    assert pace.allowed_s == 30.0


def test_a_stopped_group_is_found_and_ends_at_a_stop_in_order(tmp_path):
    code = "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: exit(7))\nprint('up', flush=True)\n"
    code += "time.sleep(600)"
    child = Child(ChildSpec("role", (sys.executable, "-S", "-c", code), log=tmp_path / "log", grace_s=PATIENCE_S))
    child.start()
    deadline = time.monotonic() + PATIENCE_S
    while child.tail() != ["up"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert child.pid not in stopped_groups()
    os.kill(child.pid, signal.SIGSTOP)
    while process_stat(child.pid)[0] != "T" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert child.pid in stopped_groups()
    began = time.monotonic()
    child.stop()
    assert time.monotonic() - began < PATIENCE_S - 5  # it took the SIGTERM, it was not killed after its grace
