"""The control period: when actions reach a robot that does nothing, at 10, 30, 50 Hz with answers after 5, 50, 300 ms.

    actor (this process, the real one) ─▶ gateway process ─▶ policy process that answers zeros after the delay

chunks   without real-time chunking the robot waits for each chunk; measured are the ticks within one: the time from one
         `env.step` to the next where both actions are of the same chunk of 8.
rtc      with it no tick waits. A chunk is twice as long as the delay takes in ticks, plus two, and a new one is asked
         for as soon as the last has come: the delay is half a chunk. Measured are all ticks after the second chunk;
         an idle tick came more than half a period late.

Every row's value is a 99th percentile in ms beside the period, or a count of idle ticks. The spool writes to disk. What
a bare sleep of the machine comes to in the same minutes is a row of its own.
"""

from __future__ import annotations

import io
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rows import Row
from suites._control_robot import IdleRobot

from serl_robot_infra.pacing import Pace

HERE = Path(__file__).parent
CHUNK = 8
SPEC = {
    "name": "idle", "prompt": "do nothing", "cameras": {"front": [64, 64]}, "state_names": ["delay_s", "chunk"],
    "state_low": [0, 0], "state_high": [1, 1000], "action_names": ["dx", "dy"], "action_low": [-1, -1],
    "action_high": [1, 1], "control_hz": 50.0, "max_ticks": 3000,
}  # fmt: skip


def rows(quick: bool) -> Iterator[Row]:
    """Every figure of the suite."""
    seconds = 2.0 if quick else 20.0
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, ExitStack() as stack:
        config = start(Path(folder), stack)
        for hz in (10, 30, 50):
            bare = np.diff(asleep(hz, seconds))
            yield Row.of(f"control/{hz} Hz/a bare sleep/p99", float(np.percentile(bare, 99)) * 1e3, "ms")
            for delay_ms in (5, 50, 300):
                name = f"control/{hz} Hz, answers after {delay_ms} ms"
                yield within_chunks(name, drive(config, hz, delay_ms, CHUNK, CHUNK, "off", seconds), hz)
                delay = math.ceil(hz * delay_ms / 1e3) + 1  # in ticks: an answer is taken up at the tick after it came
                times = drive(config, hz, delay_ms, 2 * delay, delay, "rtc", seconds)
                yield from realtime(name, times[4 * delay :], hz)


def asleep(hz: float, seconds: float) -> np.ndarray:
    """What the machine makes of `time.sleep` now: when a loop without robot, policy or gateway came round."""
    pace, times = Pace(hz), []
    pace.start()
    while not times or times[-1] < times[0] + seconds:
        pace.wait()
        times.append(time.monotonic())
    return np.array(times)


def within_chunks(name: str, times: np.ndarray, hz: float) -> Row:
    """p99 of the period between two ticks of one chunk."""
    gaps = np.diff(times)[np.arange(1, len(times)) % CHUNK != 0]
    return Row.of(f"{name}/chunks/p99", float(np.percentile(gaps, 99)) * 1e3, "ms", 1e3 / hz, "<= 1.1")


def realtime(name: str, times: np.ndarray, hz: float) -> Iterator[Row]:
    """p99 of the period, and the ticks that came more than half a period late."""
    gaps = np.diff(times)
    yield Row.of(f"{name}/rtc/p99", float(np.percentile(gaps, 99)) * 1e3, "ms", 1e3 / hz, "<= 1.1")
    idle = int(np.count_nonzero(gaps > 1.5 / hz))
    yield Row.of(f"{name}/rtc/idle ticks of {len(gaps)}", idle, "ticks", None, "<= 0")


def drive(
    config: DictConfig, hz: float, delay_ms: float, chunk: int, horizon: int, realtime: str, seconds: float
) -> np.ndarray:
    """One episode by the real actor; time.monotonic() of each action at the robot. RuntimeError when it was cut."""
    from serl_robot_infra.main import main

    ticks = int(seconds * hz)
    if realtime == "off":  # the ticks of one chunk, then the wait for the next
        ticks = max(3 * CHUNK, int(seconds / (CHUNK / hz + delay_ms / 1e3)) * CHUNK)
    cfg = OmegaConf.merge(config, {"rollout": {"rate_hz": hz, "execute_horizon": horizon, "realtime": realtime}})
    settings = {"spec": "${task.spec}", "delay_s": delay_ms / 1e3, "chunk": chunk, "ticks": ticks}
    cfg.task.env = {"_target_": "suites._control_robot.IdleRobot", **settings}
    screen = io.StringIO()
    code = main(cfg, screen)
    if code or len(IdleRobot.last.sent_at) != ticks:
        raise RuntimeError(f"the actor ended with {code} after {len(IdleRobot.last.sent_at)}:\n{screen.getvalue()}")
    return np.array(IdleRobot.last.sent_at)


def start(folder: Path, stack: ExitStack, spec: dict[str, Any] = SPEC) -> DictConfig:
    """A gateway and the policy, until `stack` ends; the actor's config."""
    from flowserl_cli.compose import load_config

    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
        port, broadcast = (free.getsockname()[1] for free in (first, second))
    words = [f"port={port}", f"broadcast_port={broadcast}", "run=control", f"runs_dir={folder}", "rollout.episodes=1"]
    config = load_config([*words, "rollout.video_every=0", "rollout.estop_key=null", "replay.capacity_frames=4000"])
    changes: dict[str, Any] = {"spec": spec, "operator": None, "rate_hz": None, "noop_dims": None}
    config.task = OmegaConf.merge({key: value for key, value in config.task.items() if key not in changes}, changes)
    config.schedule.stages = [{"name": "online", "mode": "online", "steps": 10**9}]
    run_dir = folder / "control"
    run_dir.mkdir()
    OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    for argv in (["-m", "serl_launcher.gateway"], [str(HERE / "_control_policy.py")]):
        process = subprocess.Popen([sys.executable, *argv, str(run_dir)], stderr=subprocess.DEVNULL)
        stack.callback(process.wait, 20)
        stack.callback(process.terminate)
        time.sleep(0.1)
    return config
