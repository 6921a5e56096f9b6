"""Streams a rollout to a rerun viewer: `rollout.rerun=true`, made by `wiring`. Needs rerun-sdk on the actor's host."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from serl_robot_infra.observers.base import EpisodeReport, Observer
from serl_transport.connection.reach import bracketed, is_ipv6, obstacle
from serl_transport.contract.schema import EpisodeInfo, Observation, TimeStep
from serl_transport.contract.specs import TaskSpec

FLUSH_S = 2.0  # at the end; rerun itself would wait much longer for a viewer that was closed


class RerunObserver(Observer):
    """Logs images, state, action, reward and driver per tick.

    target: host:port of a viewer, or an .rrd file. ValueError: rerun is not installed, or the address cannot be read.
    """

    def __init__(self, spec: TaskSpec, target: str | Path):
        self._rerun = _rerun()
        self._spec = spec
        self._stream = self._rerun.RecordingStream("flowserl")
        if isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._stream.save(target)
        else:
            host, port = read_address(target)
            self._stream.connect_grpc(f"rerun+http://{bracketed(host)}:{port}/proxy")
        self._tick = 0

    def episode_started(self, info: EpisodeInfo) -> None:
        self._stream.log("episode", self._rerun.TextLog(f"{info.stage} seed {info.seed} {info.episode_id}"))

    def tick(self, step: TimeStep) -> None:
        rerun, stream = self._rerun, self._stream
        stream.set_time("tick", sequence=self._tick)
        self._tick += 1
        for camera, image in step.observation.images.items():
            stream.log(f"camera/{camera}", rerun.Image(image))
        for name, value in zip(self._spec.state_names, step.observation.state, strict=True):
            stream.log(f"state/{name}", rerun.Scalars(float(value)))
        for name, value in zip(self._spec.action_names, step.action, strict=True):
            stream.log(f"action/{name}", rerun.Scalars(float(value)))
        stream.log("reward", rerun.Scalars(step.reward))
        stream.log("operator", rerun.Scalars(float(step.intervention)))

    def episode_ended(self, report: EpisodeReport, last_observation: Observation | None) -> None:
        self._stream.log("episode", self._rerun.TextLog("success" if report.outcome.success else "failure"))

    def close(self) -> None:
        """Send what is buffered."""
        self._stream.flush(timeout_sec=FLUSH_S)


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
    return RerunObserver(spec, address)


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
