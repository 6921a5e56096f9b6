"""Streams a rollout to a rerun viewer: `rollout.rerun=true`, made by `wiring`. Needs rerun-sdk on the actor's host.

    loop ─▶ RerunObserver keeps references ─▶ [QUEUE calls; the rest is counted] ─▶ thread ─▶ rerun_process ─▶ viewer

A viewer that does not read holds up the process, after some 400 MB, then the thread; never the loop, nor its end.
"""

import contextlib
import importlib.util
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from serl_robot_infra.observers.base import EpisodeReport, Observer
from serl_transport.connection.reach import bracketed, is_ipv6, obstacle
from serl_transport.contract.schema import EpisodeInfo, Observation, TimeStep
from serl_transport.contract.specs import TaskSpec

END_S = 5.0  # at the end, for the process: more than rerun_process.FLUSH_S
QUEUE = 64  # calls that wait for the thread


class RerunObserver(Observer):
    """Pictures, state, executed action, planned chunk, reward, return and driver of every tick.

    target: host:port of a viewer, or an .rrd file. say: told once per episode of what a slow viewer did not get.
    ValueError: rerun is not installed, or the address cannot be read.
    """

    def __init__(self, spec: TaskSpec, target: str | Path, say: Callable[[str], None] = lambda text: None):
        _check_installed()
        self._spec, self._say = spec, say
        if not isinstance(target, Path):
            host, port = read_address(target)
            target = f"rerun+http://{bracketed(host)}:{port}/proxy"  # type: ignore[assignment]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serl_robot_infra.observers.rerun_process", str(target)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the actor's, whose last ticks are still to come
        )
        self._tick, self._return, self._lost = 0, 0.0, 0
        self._error: Exception | None = None
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._run, name="rerun", daemon=True)
        self._thread.start()
        self._put("lay_out", list(spec.cameras))

    def episode_started(self, info: EpisodeInfo) -> None:
        self._return = 0.0
        self._put("text", f"{info.stage} seed {info.seed} {info.episode_id}")

    def planned(self, chunk: np.ndarray) -> None:
        values = np.array(chunk, np.float64).T
        self._put("plan", self._tick, dict(zip(self._spec.action_names, values, strict=True)))

    def tick(self, step: TimeStep) -> None:
        """Keep the pictures, which nobody can write to any more."""
        self._return += step.reward
        values = {"reward": float(step.reward), "return": self._return, "operator": float(step.intervention)}
        for group, names, row in (
            ("state", self._spec.state_names, step.observation.state),
            ("action", self._spec.action_names, step.action),
        ):
            values |= {f"{group}/{name}": float(value) for name, value in zip(names, row, strict=True)}
        if not self._put("tick", self._tick, step.observation.images, values):
            self._lost += 1
        self._tick += 1

    def episode_ended(self, report: EpisodeReport, last_observation: Observation | None) -> None:
        text, lost, self._lost = report.result, self._lost, 0
        if lost:
            text += f"; {lost} of {report.ticks} ticks are missing here"
            self._say(f"rollout.rerun: the viewer is slow, {lost} of {report.ticks} ticks were not sent to it")
        self._put("text", text)

    def close(self) -> None:
        """Send what is buffered; a viewer that takes longer than END_S is not waited for."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=END_S)
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._say("rollout.rerun: the viewer does not read; what it lacks is not waited for")

    def _put(self, method: str, *arguments: Any) -> bool:
        """False where there is no room. Raises what the thread has failed with."""
        if self._error is not None:
            raise self._error
        try:
            self._queue.put_nowait((method, arguments))
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            with pipe:
                while (call := self._queue.get()) is not None:
                    pickle.dump(call, pipe, protocol=pickle.HIGHEST_PROTOCOL)
                    pipe.flush()
        except Exception as error:  # told by the loop's next call
            self._error = RuntimeError(f"rerun's process has ended, its message is above ({error})")


def connected(spec: TaskSpec, address: str, say: Callable[[str], None]) -> RerunObserver | None:
    """An observer for the viewer at `address`; None, and one line, where nobody listens: the run goes on without.

    Raises ValueError as RerunObserver does.
    """
    _check_installed()
    host, port = read_address(address)
    if (why := obstacle(host, port)) is not None:
        say(
            f"rollout.rerun: no viewer at {address} ({why}), the run goes on without; to look live, start "
            f"`rerun --port {port}` first, or set rollout.rerun_address=<host:port> (docs/data.md)"
        )
        return None
    say(f"rollout.rerun: streaming to the viewer at {host}:{port}")
    return RerunObserver(spec, address, say)


def read_address(address: str) -> tuple[str, int]:
    """`host:port` or `[host]:port`. ValueError naming rollout.rerun_address otherwise."""
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535 or (":" in host and not is_ipv6(host)):
        raise ValueError(
            f"rollout.rerun_address={address}: expected host:port, such as 127.0.0.1:9876 or [fd00::7]:9876"
        )
    return host.strip("[]"), int(port)


def _check_installed() -> None:
    if importlib.util.find_spec("rerun") is None:
        raise ValueError(
            "rollout.rerun=true needs rerun-sdk in the actor's environment, which comes without: "
            "VIRTUAL_ENV=.venv .venv/bin/uv pip install rerun-sdk==0.33.1, or set rollout.rerun=false"
        )
