"""start.sh's launcher over real processes: a copy of it in a small checkout whose two sides are short scripts.

What is real here: process groups, signals, pipes, restarts, the pid registry, tmux. The sides' own work is tested
elsewhere.
"""

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flowserl_cli.registry import Registry
from serl_config.process import process_stat

PATIENCE_S = 60.0
ENTRY = """
import runpy, sys
from pathlib import Path
root = Path(__file__).resolve().parents[1]
side = next(name for name in ("actor", "learner") if f"{name}=true" in sys.argv)
runpy.run_path(str(root / f"{side}.py"), {"root": root, "run_dir": root / "runs" / "quickstart"}, run_name="__main__")
"""
FOREVER = """
import os, signal, sys, time
def end(*_):
    time.sleep(0.2)
    with open(root / "order", "a") as order:
        order.write(NAME + " ")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
(root / (NAME + ".pid")).write_text(str(os.getpid()))
print(NAME, "is up")
time.sleep(600)
"""
COMPLETE = "import json\nrun_dir.mkdir(parents=True, exist_ok=True)\n(run_dir / 'summary.json').write_text('{}')\n"


class Checkout:
    """A folder that start.sh could have been cloned into."""

    def __init__(self, root: Path, ports: tuple[int, int]) -> None:
        self.root, self.ports = root, ports
        (root / "examples").mkdir(parents=True)
        (root / "examples" / "train_rlpd.py").write_text(ENTRY)
        self.side("actor", FOREVER)
        self.side("learner", FOREVER)

    def side(self, name: str, code: str) -> None:
        (self.root / f"{name}.py").write_text(f"NAME = {name!r}\n{code}")

    def command(self, *words: str) -> list[str]:
        """What start.sh execs, on ports that nobody else on this machine listens on."""
        ports = [] if "--stop" in words else [f"port={self.ports[0]}", f"broadcast_port={self.ports[1]}"]
        return [sys.executable, "-m", "flowserl_cli.start", *words, *ports]

    def start(self, *words: str, **options) -> subprocess.Popen:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": self.root} | options
        return subprocess.Popen(self.command(*words), stdin=subprocess.DEVNULL, **options)

    def run(self, *words: str) -> tuple[int, str]:
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=PATIENCE_S, cwd=self.root)
        return done.returncode, done.stdout + done.stderr

    def clean_up(self) -> None:
        """Stop what a failed test left behind."""
        if list(Registry(self.root).alive()):
            self.run("--stop")

    def pid(self, name: str) -> int:
        path = self.root / f"{name}.pid"
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if path.exists() and (text := path.read_text()):
                return int(text)
            time.sleep(0.02)
        pytest.fail(f"no {name} within {PATIENCE_S} s")


@pytest.fixture
def checkout(repo_root, tmp_path, free_ports):
    checkout = Checkout(tmp_path / "clone", free_ports)
    yield checkout
    checkout.clean_up()


def alive(pid: int) -> bool:
    fields = process_stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def test_lines_are_prefixed_and_a_complete_run_ends_with_0(checkout):
    checkout.side("actor", "import sys\nprint('episode 1')\nprint('no newline', end='')\nsys.stdout.flush()")
    checkout.side("learner", "print('10%\\r20%')\nimport sys; print('warned', file=sys.stderr)\n" + COMPLETE)
    code, text = checkout.run("--no-tmux")
    lines = text.splitlines()
    assert code == 0
    assert {"[actor] episode 1", "[actor] no newline", "[learner] 10%", "[learner] 20%", "[learner] warned"} <= set(
        lines
    )
    assert all(line.startswith(("[actor] ", "[learner] ")) for line in lines)


def test_no_terminal_falls_back_to_the_foreground(checkout):
    checkout.side("actor", "pass")
    checkout.side("learner", COMPLETE)
    code, text = checkout.run()
    assert (code, text.splitlines()[0]) == (0, "no terminal or no tmux: both sides follow in this window")


def test_a_learner_that_ends_without_summary_is_no_success(checkout):
    checkout.side("actor", "pass")
    checkout.side("learner", "pass")
    code, text = checkout.run("--no-tmux")
    assert code == 1
    assert "the learner ended without" in text


@pytest.mark.parametrize(("side", "other"), [("actor", "learner"), ("learner", "actor")])
def test_a_mistake_of_the_user_ends_both_sides(checkout, side, other):
    wait = f"import time\nwhile not (root / '{other}.pid').exists(): time.sleep(0.02)\n"
    checkout.side(side, wait + "import sys; print('port=1: expected'); sys.exit(2)")
    code, text = checkout.run("--no-tmux")
    assert code == 2
    assert text.count("port=1: expected") == 1
    assert not alive(checkout.pid(other))
    assert (checkout.root / "order").read_text() == f"{other} "


def test_a_side_that_crashes_is_started_again(checkout):
    crash = "import os\nif not (root / 'once').exists():\n    (root / 'once').touch(); os.kill(os.getpid(), 9)\n"
    checkout.side("actor", crash + "print('second life'); (root / 'go').touch()")
    checkout.side("learner", "import time\nwhile not (root / 'go').exists(): time.sleep(0.02)\n" + COMPLETE)
    code, text = checkout.run("--no-tmux")
    assert code == 0
    assert "[actor] the actor ended (signal SIGKILL); starting it again in 0.5 s" in text
    assert "[actor] second life" in text


def test_a_camera_that_is_gone_at_a_restart_is_no_mistake_of_the_user(checkout):
    lives = "import sys\nlife = len((root / 'lives').read_text()) if (root / 'lives').exists() else 0\n"
    count = "(root / 'lives').write_text('x' * (life + 1))\nif life < 3: print('camera: no such device')\n"
    checkout.side("actor", lives + count + "if life < 3: sys.exit(2 if life else 1)\n(root / 'go').touch()")
    checkout.side("learner", "import time\nwhile not (root / 'go').exists(): time.sleep(0.02)\n" + COMPLETE)
    code, text = checkout.run("--no-tmux")
    assert code == 0
    assert text.count("[actor] camera: no such device") == 3
    assert text.count("the actor ended (exit code 2); starting it again in") == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_actor_then_the_learner(checkout, signum):
    launcher = checkout.start("--no-tmux")
    pids = [checkout.pid(name) for name in ("actor", "learner")]
    launcher.send_signal(signum)
    launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 128 + signum
    assert (checkout.root / "order").read_text().split() == ["actor", "learner"]
    assert not any(map(alive, pids))


def test_the_sides_end_in_order_when_the_launcher_is_killed(checkout):
    launcher = checkout.start("--no-tmux")
    pids = [checkout.pid(name) for name in ("actor", "learner")]
    launcher.kill()
    launcher.communicate(timeout=PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))
    assert sorted((checkout.root / "order").read_text().split()) == ["actor", "learner"]


def test_a_reader_that_goes_away_ends_the_run(checkout):
    checkout.side("actor", "import time\nwhile True: print('busy'); time.sleep(0.02)")
    launcher = checkout.start("--no-tmux")
    learner = checkout.pid("learner")
    launcher.stdout.readline()
    launcher.stdout.close()
    assert launcher.wait(PATIENCE_S) != 0
    assert not alive(learner)


def test_stop_ends_what_start_started_and_nothing_else(checkout, repo_root, tmp_path):
    other_ports = checkout.ports[::-1]
    neighbour = Checkout(tmp_path / "other", other_ports)
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        launchers = [checkout.start("--no-tmux"), neighbour.start("--no-tmux")]
        mine = [checkout.pid(name) for name in ("actor", "learner")]
        theirs = [neighbour.pid(name) for name in ("actor", "learner")]
        # A dead launcher's pid that the kernel has given to somebody else.
        stale = {"pid": stranger.pid, "started": 1, "name": "launcher", "run_dir": "x", "socket": None}
        (checkout.root / "runs" / ".launch" / f"{stranger.pid}.json").write_text(json.dumps(stale))
        code, text = checkout.run("--stop")
        assert code == 0
        assert text.rstrip().endswith("stopped")
        assert launchers[0].wait(PATIENCE_S) == 128 + signal.SIGTERM
        assert not any(map(alive, mine))
        assert all(map(alive, [*theirs, launchers[1].pid, stranger.pid]))
        assert checkout.run("--stop") == (0, "nothing to stop: start.sh runs nothing here\n")
    finally:
        stranger.kill()
        stranger.wait()
        neighbour.clean_up()
        for launcher in launchers:
            launcher.communicate(timeout=PATIENCE_S)


def test_stop_of_one_run_leaves_the_other(checkout):
    launcher = checkout.start("--no-tmux", "run=a")
    checkout.pid("learner")
    assert checkout.run("--stop", "run=b") == (0, "run b is not running\n")
    assert launcher.poll() is None
    assert checkout.run("--stop", "run=a")[0] == 0
    launcher.communicate(timeout=PATIENCE_S)


def test_the_same_run_is_not_started_twice(checkout):
    launcher = checkout.start("--no-tmux")
    checkout.pid("learner")
    code, text = checkout.run("--no-tmux")
    assert code == 2
    assert f"already running (pid {launcher.pid})" in text
    checkout.run("--stop")
    launcher.communicate(timeout=PATIENCE_S)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fast"], "unknown flag '--fast'"),
        (["--no-tmux", "algo=reject_samplng_pi0"], "did you mean 'reject_sampling_pi0'"),
        (["--no-tmux", "actor=true"], "start.sh runs both sides; drop 'actor=true'"),
    ],
)
def test_a_mistake_is_said_before_anything_starts(checkout, words, message):
    code, text = checkout.run(*words)
    assert code == 2
    assert message in text
    assert "Traceback" not in text
    assert not (checkout.root / "actor.pid").exists()


def test_a_port_in_use_is_said_before_the_actor_could_reach_the_learner_that_holds_it(checkout):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", checkout.ports[0]))
        taken.listen()
        code, text = checkout.run("--no-tmux", "run=second")
    assert code == 2
    assert f"port={checkout.ports[0]} on 127.0.0.1: address already in use" in text
    assert "Traceback" not in text
    assert not (checkout.root / "actor.pid").exists()


def test_a_finished_run_of_the_same_name_is_moved_aside(checkout):
    checkout.side("actor", "pass")
    checkout.side("learner", COMPLETE + "import shutil\nshutil.copy(root / 'config.yaml', run_dir)")
    from omegaconf import OmegaConf

    from flowserl_cli.compose import load_config

    (checkout.root / "config.yaml").write_text(OmegaConf.to_yaml(load_config([]), resolve=True))
    assert checkout.run("--no-tmux")[0] == 0
    code, text = checkout.run("--no-tmux")
    assert code == 0
    assert "the finished run quickstart was moved to" in text
    assert len(list((checkout.root / "runs").glob("quickstart*"))) == 2


class Terminal:
    """A process on a pseudo terminal whose output is kept."""

    def __init__(self, checkout: Checkout) -> None:
        self.text = ""
        master, slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm"}
        self.process = subprocess.Popen(
            checkout.command(),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            cwd=checkout.root,
            start_new_session=True,
        )
        os.close(slave)
        self._master = master
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.text:
            assert time.monotonic() < deadline, f"never shown: {text}"
            time.sleep(0.02)

    def wait(self) -> int:
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            self.text += data.decode(errors="replace")
        os.close(self._master)


needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


def sessions(checkout: Checkout) -> list[str]:
    """tmux servers of this checkout's launchers that still answer."""
    sockets = [json.loads(p.read_text())["socket"] for p in (checkout.root / "runs" / ".launch").glob("*.json")]
    return [s for s in sockets if s and not subprocess.run(["tmux", "-L", s, "ls"], capture_output=True).returncode]


@needs_tmux
def test_panes_end_with_the_learner(checkout):
    checkout.side(
        "learner",
        "print('learned something')\nimport time\nwhile not (root / 'go').exists(): time.sleep(0.02)\n" + COMPLETE,
    )
    terminal = Terminal(checkout)
    actor = checkout.pid("actor")
    servers = sessions(checkout)
    assert len(servers) > 0
    (checkout.root / "go").touch()
    deadline = time.monotonic() + PATIENCE_S
    while not list(checkout.root.rglob("*.learner.exit")) and time.monotonic() < deadline:
        time.sleep(0.02)
    # The actor here never says goodbye by itself: it is stopped when it is clear that it will not.
    os.kill(actor, signal.SIGTERM)
    assert terminal.wait() == 0
    assert "learned something" in terminal.text.rpartition("--- learner, last lines")[2]
    assert not alive(actor)
    assert all(subprocess.run(["tmux", "-L", s, "ls"], capture_output=True).returncode for s in servers)


@needs_tmux
def test_the_keys_typed_into_the_panes_are_the_actors(checkout):
    """Also the e-stop's and Ctrl-C: the actor's pane is the one that is selected."""
    checkout.side(
        "actor",
        "from serl_robot_infra.keyboard import terminal_keyboard\nimport os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\nkeyboard = terminal_keyboard()\n"
        "for key in 'w ':\n    keyboard.on(key, lambda key=key: (root / 'keys').open('a').write(key), key)\n"
        "(root / 'actor.pid').write_text(str(os.getpid()))\nprint('listening')\ntime.sleep(600)\n",
    )
    terminal = Terminal(checkout)
    checkout.pid("actor")
    terminal.wait_for("listening")
    terminal.type(b"xw w")
    deadline = time.monotonic() + PATIENCE_S
    while not (checkout.root / "keys").exists() or (checkout.root / "keys").read_text() != "w w":
        assert time.monotonic() < deadline, "the keys never came"
        time.sleep(0.02)
    terminal.type(b"\x03")
    assert terminal.wait() == 130


@needs_tmux
@pytest.mark.parametrize("how", ["ctrl-c", "stop"])
def test_panes_are_ended_by_the_user(checkout, how):
    terminal = Terminal(checkout)
    pids = [checkout.pid(name) for name in ("actor", "learner")]
    servers = sessions(checkout)
    if how == "stop":
        assert checkout.run("--stop")[0] == 0
    else:
        terminal.wait_for("is up")  # tmux reads keys once it has drawn
        terminal.type(b"\x03")
    assert terminal.wait() in (130, 143)
    assert not any(map(alive, pids))
    assert all(subprocess.run(["tmux", "-L", s, "ls"], capture_output=True).returncode for s in servers)


@needs_tmux
def test_the_run_outlives_a_closed_terminal_and_can_be_stopped(checkout):
    terminal = Terminal(checkout)
    pids = [checkout.pid(name) for name in ("actor", "learner")]
    terminal.process.send_signal(signal.SIGHUP)
    terminal.wait()
    assert all(map(alive, pids))
    servers = sessions(checkout)
    assert len(servers) > 0
    assert checkout.run("--stop")[0] == 0
    assert not any(map(alive, pids))
    assert all(subprocess.run(["tmux", "-L", s, "ls"], capture_output=True).returncode for s in servers)
