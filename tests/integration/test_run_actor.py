"""What run_actor.sh and run_learner.sh become, `flowserl_cli.keep`, as real processes: a small checkout whose actor, or
learner, is a short script."""

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from flowserl_cli import sides
from serl_config import process
from serl_config.process import process_stat

PATIENCE_S = 60.0
FOREVER = """
def end(signum, frame):
    (root / "ended").open("a").write(signal.Signals(signum).name + " ")
    if signum == signal.SIGTERM or len((root / "ended").read_text().split()) > 1:
        sys.exit(130)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGUSR1, lambda *_: (root / "pressed").touch())
up()
time.sleep(600)
"""
PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
root = Path(__file__).resolve().parents[1]
assert {"actor=true", "learner=true"} & set(sys.argv) and "run=mine" in sys.argv
lives = root / "lives"
life = len(lives.read_text()) if lives.exists() else 0
def up():
    lives.open("a").write("x")
    (root / f"up{life}").write_text(str(os.getpid()))
"""
TAKES_THE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
CRASH = "up()\nif life == 0: os.kill(os.getpid(), 9)\n"


class Robot:
    """A folder that run_actor.sh could have gone to, and its keeper."""

    def __init__(self, root: Path):
        self.root = root
        (root / "examples").mkdir()

    def start(self, code: str, at_terminal: bool = False, side: str = "actor", **options) -> subprocess.Popen:
        """at_terminal: its standard input is that of a session of its own, as a person's shell has it."""
        (self.root / "examples" / "train_rlpd.py").write_text(PREAMBLE + code)
        command = [sys.executable, "-m", "flowserl_cli.keep", side, "run=mine"]
        if at_terminal:
            options["start_new_session"] = True
            command = [sys.executable, "-c", TAKES_THE_TERMINAL, *command[1:]]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.keeper = subprocess.Popen(command, cwd=self.root, **(pipes | options))
        return self.keeper

    def end(self) -> tuple[int, str]:
        said, _ = self.keeper.communicate(timeout=PATIENCE_S)
        return self.keeper.returncode, said

    def wait_for(self, what, why: str):
        deadline = time.monotonic() + PATIENCE_S
        while not (value := what()):
            assert time.monotonic() < deadline, f"never: {why}"
            time.sleep(0.02)
        return value

    def pid(self, life: int = 0) -> int:
        """Of the actor in that life, once it is up."""
        path = self.root / f"up{life}"
        return int(self.wait_for(lambda: path.exists() and path.read_text(), f"life {life}"))


def gone(pid: int) -> bool:
    fields = process_stat(pid)
    return not fields or fields[0] in "ZX"


@pytest.fixture
def robot(tmp_path):
    robot = Robot(tmp_path)
    yield robot
    if robot.keeper.poll() is None:
        robot.keeper.kill()
        robot.keeper.wait()


def test_an_actor_that_dies_is_started_again_and_one_that_is_done_is_not(robot):
    robot.start(CRASH + "print('second life')\n")
    code, said = robot.end()
    assert code == 0
    assert "[actor] the actor ended (signal SIGKILL); starting it again in 0.5 s" in said
    assert said.count("second life") == 1
    assert (robot.root / "lives").read_text() == "xx"


@pytest.mark.parametrize("ending", ["done", "stopped"])
def test_a_learner_whose_supervisor_is_killed_goes_on_and_one_that_is_over_does_not(robot, ending):
    code = "if life == 0: up(); os.kill(os.getpid(), 9)\nprint('goes on', flush=True)\n"
    robot.start(code + (FOREVER if ending == "stopped" else ""), side="learner")
    if ending == "stopped":
        robot.pid(1)
        robot.keeper.send_signal(signal.SIGTERM)
    code, said = robot.end()
    assert code == {"done": 0, "stopped": 130}[ending]
    assert "[learner] the learner ended (signal SIGKILL); starting it again in 0.5 s" in said
    assert said.count("goes on") == 1


def test_one_that_worked_goes_on_with_its_run_whatever_was_asked_of_a_new_one(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "READY_AFTER_S", 0.0)
    (tmp_path / "examples").mkdir()
    told = tmp_path / "told"
    (tmp_path / "examples" / "train_rlpd.py").write_text(
        f"import sys; file = open({str(told)!r}, 'a'); print(*sys.argv[1:], file=file, flush=True)\n"
        f"if len(open({str(told)!r}).readlines()) < 3: import os; os.kill(os.getpid(), 9)\n"
    )
    assert sides.keep(sides.Side("learner", ["resume=never"], tmp_path, prefixed=False), sides.Stopper()) == 0
    again = "learner=true resume=never resume=auto on_complete=keep"
    assert told.read_text().splitlines() == ["learner=true resume=never", again, again]


def test_a_mistake_of_the_user_ends_it(robot):
    robot.start("up()\nprint('rollout.mode: expected'); sys.exit(2)\n")
    code, said = robot.end()
    assert (code, said) == (2, "rollout.mode: expected\n")


def test_a_robot_host_which_has_no_launcher_can_keep_an_actor():
    code = "import sys; sys.modules['serl_launcher'] = None; import flowserl_cli.keep"
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE_S).returncode == 0


def test_ctrl_c_goes_on_to_the_actor_the_second_one_as_well_and_ends_it(robot):
    keeper = robot.start(FOREVER)
    actor = robot.pid()
    for count in (1, 2):
        keeper.send_signal(signal.SIGINT)
        robot.wait_for(lambda n=count: (robot.root / "ended").exists() and len(ended(robot)) == n, f"signal {count}")
    assert robot.end() == (130, "")
    assert gone(actor)
    assert ended(robot) == ["SIGINT", "SIGINT"]


def ended(robot):
    return (robot.root / "ended").read_text().split()


def test_ctrl_c_while_the_next_start_is_waited_for_calls_it_off(robot):
    keeper = robot.start("up()\nsys.exit(1)\n")
    robot.wait_for(lambda: (robot.root / "up1").exists(), "the second life")  # 1 s until the next
    keeper.send_signal(signal.SIGINT)
    assert robot.end()[0] == 130
    assert (robot.root / "lives").read_text() == "xx"


def test_the_estops_signal_goes_on_to_the_actor_which_goes_on(robot):
    keeper = robot.start(FOREVER)
    actor = robot.pid()
    keeper.send_signal(signal.SIGUSR1)
    robot.wait_for((robot.root / "pressed").exists, "the press")
    assert keeper.poll() is None
    assert not gone(actor)
    keeper.send_signal(signal.SIGTERM)
    assert robot.end()[0] == 130
    assert ended(robot) == ["SIGTERM"]


def test_an_actor_whose_keeper_is_killed_ends_in_order(robot):
    keeper = robot.start(FOREVER)
    actor = robot.pid()
    keeper.kill()
    robot.wait_for(lambda: gone(actor), "its end")
    assert ended(robot) == ["SIGTERM"]


def test_at_a_terminal_the_actor_has_the_keys_and_what_it_leaves_is_put_right(robot):
    """Killed in cbreak, which shows no key that is typed; Ctrl-Z would leave the robot moving."""
    master, slave = pty.openpty()
    code = "import tty\ntty.setcbreak(0)\nup()\nif life == 0: os.kill(os.getpid(), 9)\n"
    code += (
        "(root / 'key').write_text(os.read(0, 1).decode())\nos.kill(os.getpid(), 9) if life == 1 else time.sleep(9)\n"
    )
    keeper = robot.start(code, at_terminal=True, stdin=slave, stdout=slave, stderr=slave)
    before = termios.tcgetattr(slave)
    robot.pid(1)
    os.write(master, b"\x1ak")
    robot.wait_for((robot.root / "key").exists, "the key")
    assert (robot.root / "key").read_text() == "k"
    robot.wait_for(lambda: termios.tcgetattr(slave)[3] & termios.ECHO, "the mode that it found")
    assert termios.tcgetattr(slave) == before
    os.write(master, b"\x03")
    assert keeper.wait(PATIENCE_S) == 130
    shown = os.read(master, 65536).decode()
    assert "Ctrl-Z is not taken" in shown
    os.close(slave)
    os.close(master)


def test_a_terminal_that_is_closed_ends_both(robot):
    master, slave = pty.openpty()
    with (robot.root / "said").open("w") as said:
        keeper = robot.start(FOREVER, at_terminal=True, stdin=slave, stdout=said, stderr=said)
    os.close(slave)
    actor = robot.pid()
    os.close(master)
    assert keeper.wait(PATIENCE_S) == 130
    assert gone(actor)
    assert ended(robot) == ["SIGTERM"]
    assert (robot.root / "said").read_text() == ""
