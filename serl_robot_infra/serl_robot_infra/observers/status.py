"""Tells the learner, with each heartbeat, what this actor runs and what keeps it from working.

Fed by the actor loop and its watchers' threads; shown in the learner's status and on its pane.
"""

from collections.abc import Callable

from serl_robot_infra.observers.base import EpisodeReport, Observer
from serl_transport.contract.schema import EpisodeInfo, Observation, TimeStep


class StatusObserver(Observer):
    """Keeps `mode`, `policy_version` and `trouble` of the heartbeat true, by `LearnerLink.set_status`.

    An episode that was cut stays a trouble until another tick is executed.
    """

    def __init__(self, set_status: Callable[..., None]):
        self._set_status = set_status
        self._version: int | None = None
        self._trouble: str | None = None

    def episode_started(self, info: EpisodeInfo) -> None:
        self._set_status(mode=info.mode)

    def trouble(self, text: str | None) -> None:
        if text != self._trouble:
            self._trouble = text
            self._set_status(trouble=text)

    def episode_ended(self, report: EpisodeReport, last_observation: Observation | None) -> None:
        if report.cut_reason is not None and not report.last:
            self.trouble(report.cut_reason)

    def tick(self, step: TimeStep) -> None:
        self.trouble(None)
        if step.policy_version != self._version and step.policy_version >= 0:
            self._version = step.policy_version
            self._set_status(policy_version=self._version)
