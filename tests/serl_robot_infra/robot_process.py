"""An actor with a robot, or its learner, as a process of its own; used by the e-stop's tests and the fault suite.

    python robot_process.py '{"role": "learner"}'                        prints its two ports
    python robot_process.py '{"role": "actor", "ports": …, "runs": …, "moves": …, "terminal": bool}'

The robot appends a line for whatever happens to it, `<what> <time.monotonic()>`: a action, h hold, s stop, r reset.
hangs_at: so many actions later a step never comes back, with `blind` keeping the interpreter.
"""

import ctypes
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

from omegaconf import OmegaConf
from scripted_learner import RobotPick, ScriptedLearner, actor_config, ticket

HERE = Path(__file__).parent
HZ = 20.0


class NotingRobot(RobotPick):
    """A robot whose life is read from a file while it lives."""

    def __init__(self, moves: str, hangs_at: int | None = None, blind: bool = False):
        super().__init__()
        self._hangs_at, self._blind = hangs_at, blind
        self._moves = os.open(moves, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def _note(self, what: str) -> None:
        os.write(self._moves, f"{what} {time.monotonic()}\n".encode())

    def reset(self, seed, *, actuator_noise=0.0):
        self._note("r")
        return super().reset(seed, actuator_noise=actuator_noise)

    def step(self, action):
        self._note("a")
        if len(self.sent) == self._hangs_at:
            ctypes.PyDLL(None).sleep(600) if self._blind else time.sleep(600)
        return super().step(action)

    def hold(self):
        self._note("h")

    def stop(self):
        self._note("s")


def start(options: dict, **popen) -> subprocess.Popen:
    """The process of either role."""
    paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, json.dumps(options)], env=environment, text=True, **popen)


def moves_of(path: Path, what: str) -> list[float]:
    """When that happened, seconds of time.monotonic()."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [float(line.split()[1]) for line in lines if line.startswith(what)]


def learn() -> int:
    """Serve evaluation tickets until stdin closes."""
    tickets = (ticket("eval", seed) for seed in itertools.count(1))
    with ScriptedLearner(RobotPick().spec, tickets) as learner:
        print(learner.server.config.port_number, learner.server.config.broadcast_port, flush=True)
        sys.stdin.read()
    return 0


def act(options: dict) -> int:
    """Run the real actor to its exit code."""
    from serl_robot_infra.main import main
    from serl_robot_infra.observers import call_watch

    if options.get("terminal"):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal is this session's
    cfg = actor_config(None, options["runs"], rate_hz=HZ, flush_timeout_s=5.0, estop_key=options.get("key", "space"))
    watchdog = {"stop_ms": options.get("stop_ms", 500), "restart_s": options.get("restart_s", 60.0)}
    OmegaConf.update(cfg, "rollout.watchdog", watchdog, force_add=True)
    call_watch.BLIND_S = options.get("blind_s", call_watch.BLIND_S)
    robot = RobotPick()
    cfg.task.spec = robot.spec.to_dict()
    robot.close()
    hang = {key: options[key] for key in ("hangs_at", "blind") if key in options}
    cfg.task.env = {"_target_": "robot_process.NotingRobot", "moves": options["moves"], **hang}
    cfg.port, cfg.broadcast_port = options["ports"]
    return main(cfg)


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the test closes the terminal
    chosen = json.loads(sys.argv[1])
    sys.exit(learn() if chosen["role"] == "learner" else act(chosen))
