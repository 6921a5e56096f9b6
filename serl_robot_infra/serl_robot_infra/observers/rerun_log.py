"""Streams a rollout to a rerun viewer: `rollout.rerun=true`, made by `wiring`. Needs rerun-sdk on the actor's host.

    loop ─▶ RerunObserver keeps references ─▶ [QUEUE ticks; what is too much is counted] ─▶ thread ─▶ rerun ─▶ viewer

rerun waits for a viewer that does not read once it holds some 400 MB for it; that holds the thread up, never the loop.
"""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from serl_robot_infra.observers.base import EpisodeReport, Observer
from serl_transport.connection.reach import bracketed, is_ipv6, obstacle
from serl_transport.contract.schema import EpisodeInfo, Observation, TimeStep
from serl_transport.contract.specs import TaskSpec

FLUSH_S = 2.0  # at the end; rerun itself would wait much longer for a viewer that was closed
QUEUE = 64  # ticks that wait for the thread
QUALITY = 80  # JPEG's


class RerunObserver(Observer):
    """Pictures, state, executed action, planned chunk, reward, return and driver of every tick.

    target: host:port of a viewer, or an .rrd file. say: told once per episode of what a slow viewer did not get.
    ValueError: rerun is not installed, or the address cannot be read.
    """

    def __init__(self, spec: TaskSpec, target: str | Path, say: Callable[[str], None] = lambda text: None):
        self._rerun, self._spec, self._say = _rerun(), spec, say
        self._stream = self._rerun.RecordingStream("flowserl")
        self._to_file = isinstance(target, Path)
        if isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._stream.save(target)
        else:
            host, port = read_address(target)
            self._stream.connect_grpc(f"rerun+http://{bracketed(host)}:{port}/proxy")
        self._tick, self._return, self._lost = 0, 0.0, 0
        self._error: Exception | None = None
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._run, name="rerun", daemon=True)
        self._thread.start()

    def episode_started(self, info: EpisodeInfo) -> None:
        self._return = 0.0
        text = f"{info.stage} seed {info.seed} {info.episode_id}"
        self._put(lambda: self._log_text(text))

    def planned(self, chunk: np.ndarray) -> None:
        tick, values = self._tick, np.array(chunk, np.float64)
        self._put(lambda: self._log_plan(tick, values))

    def tick(self, step: TimeStep) -> None:
        """Keep the step, which nobody writes to any more."""
        tick, self._return = self._tick, self._return + step.reward
        self._tick += 1
        told = self._return
        if not self._put(lambda: self._log_tick(tick, step, told)):
            self._lost += 1

    def episode_ended(self, report: EpisodeReport, last_observation: Observation | None) -> None:
        text, lost, self._lost = report.result, self._lost, 0
        if lost:
            text += f"; {lost} of {report.ticks} ticks are missing here"
            self._say(f"rollout.rerun: the viewer is slow, {lost} of {report.ticks} ticks were not sent to it")
        self._put(lambda: self._log_text(text))

    def close(self) -> None:
        """Send what is buffered; what takes longer than FLUSH_S is not waited for."""
        try:
            self._queue.put(None, timeout=FLUSH_S)
        except queue.Full:
            return
        self._thread.join(FLUSH_S)
        if not self._thread.is_alive():
            self._stream.flush(timeout_sec=FLUSH_S)
            if self._to_file:
                self._stream.disconnect()  # writes the file's footer

    def _put(self, log: Callable[[], None]) -> bool:
        """False where there is no room. Raises what the thread has failed with."""
        if self._error is not None:
            raise self._error
        try:
            self._queue.put_nowait(log)
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        try:
            self._stream.send_blueprint(self._blueprint())
            while (log := self._queue.get()) is not None:
                log()
        except Exception as error:  # told by the loop's next call
            self._error = error

    def _blueprint(self) -> Any:
        """Pictures on the left; on the right action and plan over each other, state, reward and driver, the log."""
        views = self._rerun.blueprint
        cameras = [views.Spatial2DView(origin=f"camera/{name}", name=name) for name in self._spec.cameras]
        series = [
            views.TimeSeriesView(contents=["action/**", "planned/**"], name="action and plan"),
            views.TimeSeriesView(origin="state", name="state"),
            views.TimeSeriesView(contents=["reward", "return", "operator"], name="reward and driver"),
            views.TextLogView(origin="episode", name="episodes"),
        ]
        columns = [views.Vertical(*cameras)] if cameras else []
        return views.Blueprint(views.Horizontal(*columns, views.Vertical(*series)))

    def _log_text(self, text: str) -> None:
        self._stream.log("episode", self._rerun.TextLog(text))

    def _log_tick(self, tick: int, step: TimeStep, told: float) -> None:
        rerun, stream = self._rerun, self._stream
        stream.set_time("tick", sequence=tick)
        for camera, image in step.observation.images.items():
            stream.log(f"camera/{camera}", rerun.Image(image).compress(jpeg_quality=QUALITY))
        for name, value in zip(self._spec.state_names, step.observation.state, strict=True):
            stream.log(f"state/{name}", rerun.Scalars(float(value)))
        for name, value in zip(self._spec.action_names, step.action, strict=True):
            stream.log(f"action/{name}", rerun.Scalars(float(value)))
        stream.log("reward", rerun.Scalars(step.reward))
        stream.log("return", rerun.Scalars(told))
        stream.log("operator", rerun.Scalars(float(step.intervention)))

    def _log_plan(self, tick: int, chunk: np.ndarray) -> None:
        """The chunk's actions at the ticks that they were planned for; where chunks overlap both are there."""
        times = [self._rerun.TimeColumn("tick", sequence=np.arange(tick, tick + len(chunk)))]
        for name, values in zip(self._spec.action_names, chunk.T, strict=True):
            self._stream.send_columns(f"planned/{name}", times, self._rerun.Scalars.columns(scalars=values))


def connected(spec: TaskSpec, address: str, say: Callable[[str], None]) -> RerunObserver | None:
    """An observer for the viewer at `address`; None, and one line, where nobody listens: the run goes on without.

    Raises ValueError as RerunObserver does.
    """
    _rerun()
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


def _rerun() -> Any:
    try:
        import rerun
    except ImportError:
        raise ValueError(
            "rollout.rerun=true needs rerun-sdk in the actor's environment, which comes without: "
            "VIRTUAL_ENV=.venv .venv/bin/uv pip install rerun-sdk==0.33.1, or set rollout.rerun=false"
        ) from None
    return rerun
