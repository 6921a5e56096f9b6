"""Tells the learner, with each heartbeat, what this actor runs. Fed by the actor loop; shown on the learner's pane."""

from collections.abc import Callable

from serl_robot_infra.observers.base import Observer
from serl_transport.contract.schema import EpisodeInfo, TimeStep


class StatusObserver(Observer):
    """Keeps `mode` and `policy_version` of the heartbeat true, by `LearnerLink.set_status`."""

    def __init__(self, set_status: Callable[..., None]):
        self._set_status = set_status
        self._version: int | None = None

    def episode_started(self, info: EpisodeInfo) -> None:
        self._set_status(mode=info.mode)

    def tick(self, step: TimeStep) -> None:
        if step.policy_version != self._version and step.policy_version >= 0:
            self._version = step.policy_version
            self._set_status(policy_version=self._version)
