"""Whatever ends an episode: how long until the robot was told to hold or to stop. A real actor, a random fault."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from chaos import SEED
from robot_ends import STOP_S
from robot_process import HZ, moves_of

HERE = Path(__file__).parent
PERIOD_S = 1 / HZ
SILENCE_S = 2 * PERIOD_S  # until the guard holds
BUSY_INTERPRETER_S = STOP_S + PERIOD_S  # until the watchdog process stops


@dataclass(frozen=True)
class Kind:
    """timeout_s: stated, on top of the one period; since: what the time is counted from (fault, now, last action)."""

    cause: Callable[[Rig], None] | None  # None: a word in the fault file
    timeout_s: float = 0.0
    since: str = "fault"
    ends_actor: bool = False


def send(number: signal.Signals) -> Callable[[Rig], None]:
    return lambda rig: rig.actor.send_signal(number)


def twice(rig: Rig) -> None:
    rig.actor.send_signal(signal.SIGINT)
    rig.actor.send_signal(signal.SIGINT)


def during_reset(rig: Rig) -> None:
    rig.fault.write_text("nan_action")
    since = time.monotonic()
    rig.wait(lambda: rig.of("r", since), "the next reset")
    time.sleep(0.05)
    rig.now = time.monotonic()
    rig.actor.send_signal(signal.SIGTERM)


KINDS = {
    **{name: Kind(None) for name in ("nan_action", "inf_action", "wrong_action", "nan_state", "wrong_image", "judged")},
    **{
        name: Kind(None, ends_actor=True)
        for name in ("camera_lost", "bus_error", "operator_fails", "reward_fails", "reset_fails")
    },
    "silent": Kind(None, SILENCE_S, "action"),
    "hangs": Kind(None, SILENCE_S, "action"),
    "keeps_interpreter": Kind(None, BUSY_INTERPRETER_S, "action"),
    "time_limit": Kind(lambda rig: None, since="action"),
    "SIGTERM": Kind(send(signal.SIGTERM), since="now", ends_actor=True),
    "SIGINT": Kind(send(signal.SIGINT), since="now", ends_actor=True),
    "SIGINT twice": Kind(twice, since="now", ends_actor=True),
    "SIGHUP": Kind(send(signal.SIGHUP), since="now", ends_actor=True),
    "SIGTERM during a reset": Kind(during_reset, since="now", ends_actor=True),
    "kill -9": Kind(send(signal.SIGKILL), since="now", ends_actor=True),
    "SIGSTOP": Kind(send(signal.SIGSTOP), BUSY_INTERPRETER_S, "action"),
    "e-stop by SIGUSR1": Kind(send(signal.SIGUSR1), since="now"),
    "e-stop by file": Kind(lambda rig: rig.latch.touch(), since="now"),
    "e-stop by key": Kind(lambda rig: os.write(rig.master, b" "), since="now"),
    "learner stopped": Kind(lambda rig: rig.learner.send_signal(signal.SIGSTOP), SILENCE_S, "action"),
    "learner killed": Kind(lambda rig: rig.learner.kill(), SILENCE_S, "action"),
}


class Rig:
    """A learner and an actor that are started again when a fault has ended them."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder, self.fault, self.latch = folder, folder / "fault", folder / "test" / "estop"
        self.log = (folder / "log").open("w")
        self.learner = self.actor = None
        self.master = self.slave = -1
        self.now = 0.0

    def start(self) -> None:
        """Whatever is not running."""
        if self.learner is None or self.learner.poll() is not None:
            self.learner = self._process({"role": "learner"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.ports = [int(port) for port in self.learner.stdout.readline().split()]
            if self.actor is not None:  # it knows the old ports
                self.actor.kill()
                self.actor.wait()
        if self.actor is None or self.actor.poll() is not None:
            self._close_terminal()
            self.master, self.slave = os.openpty()
            options = {"role": "actor", "ports": self.ports}
            self.actor = self._process(options, stdin=self.slave, stdout=self.log)

    def of(self, what: str, after: float) -> list[float]:
        return [at for kind in what for at in moves_of(self.folder / "moves", kind) if at > after]

    def wait(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, f"never: {what}; {(self.folder / 'log').read_text()[-2000:]}"
            time.sleep(0.002)

    def provoke(self, name: str, rng: random.Random) -> float:
        """Make it happen in a running episode; seconds until the robot was told, less the stated timeout."""
        kind = KINDS[name]
        self.start()
        began = time.monotonic()
        self.wait(lambda: len(self.of("a", began)) >= 3, f"{name}: the robot moves")
        time.sleep(rng.uniform(0, PERIOD_S))
        self.now = time.monotonic()
        if kind.cause:
            kind.cause(self)
        else:
            self.fault.write_text(name)
            self.wait(lambda: self.of("f", self.now), f"{name}: the fault")
        after = self.of("f", self.now)[0] if kind.since == "fault" else self.now
        self.wait(lambda: self.of("hsw", after), f"{name}: hold or stop")
        told = min(self.of("hsw", after))
        since = max(at for at in self.of("a", began) if at < told) if kind.since == "action" else after
        self._mend(name, kind, told)
        return told - since - kind.timeout_s

    def _mend(self, name: str, kind: Kind, told: float) -> None:
        """After the robot was told: no action before the next reset. Then everything runs again."""
        if name.startswith("e-stop"):
            self.wait(lambda: self.of("sw", told - 1e-9), f"{name}: a stop")
            self.wait(self.latch.exists, f"{name}: the latch is written")
            assert not self.of("r", told), "it moved while it was latched"
            self.latch.unlink()
        if name in ("SIGSTOP", "keeps_interpreter", "silent", "hangs"):
            self.wait(lambda: self.of("sw", told - 1e-9), f"{name}: a stop after the hold")
        self.actor.send_signal(signal.SIGCONT)
        if self.learner.poll() is None:
            self.learner.send_signal(signal.SIGCONT)
        if kind.ends_actor:
            self.wait(lambda: self.actor.poll() is not None, f"{name}: the actor ends")
        self.start()
        self.wait(lambda: self.of("r", told), f"{name}: the next reset")
        if kind.timeout_s == 0.0:
            reset = min(self.of("r", told))
            assert [at for at in self.of("a", told) if at < reset] == [], f"{name}: an action after it was told"

    def close(self) -> None:
        for process in (self.actor, self.learner):
            if process is not None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        stream.close()
        self._close_terminal()
        self.log.close()

    def _process(self, options: dict, **popen) -> subprocess.Popen:
        paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        words = json.dumps(options | {"folder": str(self.folder)})
        command = [sys.executable, HERE / "robot_ends.py", words]
        return subprocess.Popen(command, env=environment, text=True, stderr=self.log, **popen)

    def _close_terminal(self) -> None:
        for end in (self.master, self.slave):
            if end >= 0:
                os.close(end)
        self.master = self.slave = -1


def provoke_all(folder: Path, names: list[str], seed: int) -> list[tuple[str, float]]:
    rig, rng = Rig(folder), random.Random(seed)
    try:
        return [(name, rig.provoke(name, rng)) for name in names]
    finally:
        rig.close()


@pytest.mark.parametrize("episodes", [30, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.timeout(1200)
def test_whatever_ends_an_episode_the_robot_is_told_within_one_period(tmp_path, figures, episodes):
    rng = random.Random(SEED)
    names = [*KINDS, *rng.choices([*KINDS], k=episodes - len(KINDS))]
    rng.shuffle(names)
    halves = names[::2], names[1::2]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(provoke_all, tmp_path / str(k), half, SEED + k) for k, half in enumerate(halves)]
        late = [row for job in jobs for row in job.result()]
    seconds = np.array([value for _, value in late])
    worst = {}
    for name, value in late:
        worst[name] = max(worst.get(name, value), value)
    worst = {name: round(value * 1e3, 1) for name, value in worst.items()}
    counts, edges = np.histogram(seconds * 1e3, [-1e3, 2, 5, 10, 20, 30, 40, 50, 1e6])
    figures.row(
        "robot_ends", "hold or stop within one period and the kind's stated timeout", bool((seconds <= PERIOD_S).all()),
        episodes=len(late), kinds=len(KINDS), period_ms=PERIOD_S * 1e3,
        histogram_ms={f"<= {edge:g}": int(n) for n, edge in zip(counts, edges[1:], strict=True)}, worst_ms=worst,
    )  # fmt: skip
    assert {name: ms for name, ms in worst.items() if ms > PERIOD_S * 1e3} == {}
