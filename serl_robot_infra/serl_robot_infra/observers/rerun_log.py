"""Streams a rollout to a rerun viewer. Optional: `rollout.rerun=true` and `pip install rerun-sdk` on the host."""

from pathlib import Path

from serl_robot_infra.observers.base import EpisodeReport, Observer
from serl_transport.schema import EpisodeInfo, Observation, TimeStep
from serl_transport.specs import TaskSpec


class RerunObserver(Observer):
    """Logs images, state, action, reward and driver per tick.

    Args:
        spec: names of the state and action dims.
        path: write an .rrd file instead of connecting to a viewer on this host.

    Raises:
        ValueError: rerun is not installed.
    """

    def __init__(self, spec: TaskSpec, path: Path | None = None):
        try:
            import rerun
        except ImportError:
            raise ValueError(
                "rollout.rerun=true needs rerun: pip install rerun-sdk, or set rollout.rerun=false"
            ) from None
        self._rerun = rerun
        self._spec = spec
        self._stream = rerun.RecordingStream("flowserl")
        if path is None:
            self._stream.connect_grpc()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream.save(path)
        self._tick = 0

    def episode_started(self, info: EpisodeInfo) -> None:
        """Name the episode in the log."""
        self._stream.log("episode", self._rerun.TextLog(f"{info.stage} seed {info.seed} {info.episode_id}"))

    def tick(self, step: TimeStep) -> None:
        """Log one tick."""
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
        """Log the outcome."""
        self._stream.log("episode", self._rerun.TextLog("success" if report.outcome.success else "failure"))

    def close(self) -> None:
        """Send what is buffered."""
        self._stream.flush()
