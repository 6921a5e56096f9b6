"""What a rollout tells its watchers. Called by the actor loop; implemented by each file beside.

episode_started ─▶ (planned before some,) tick × n ─▶ episode_ended, and message at any time
"""

import errno
import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serl_transport.contract.schema import EpisodeInfo, Observation, Outcome, TimeStep

log = logging.getLogger(__name__)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # refusals of a disk, which may pass


@dataclass(frozen=True, slots=True)
class EpisodeReport:
    """One finished episode."""

    index: int  # counts the episodes of this process, from 1
    info: EpisodeInfo  # who made it
    outcome: Outcome  # how it ended
    cut_reason: str | None  # why it was cut short, for people; None when it ran to its end
    ticks: int  # recorded ticks; 0: it never came to a first tick and was not sent
    return_: float  # sum of rewards
    operator_ticks: int  # ticks that the operator drove
    seconds: float  # wall time from reset to end
    policy_version: int  # that drove last; -1: none did
    last: bool = False  # a person said that no episode shall follow
    driven_s: float = 0.0  # wall time from the first tick to the end

    @property
    def result(self) -> str:
        """`success` or `failure`."""
        return "success" if self.outcome.success else "failure"

    @property
    def video_name(self) -> str:
        """The file of its video, where it has one."""
        return f"{self.info.episode_id}-{self.result}.mp4"


class Observer:
    """Watches; every method does nothing unless overridden."""

    def episode_started(self, info: EpisodeInfo) -> None:
        """The environment was reset."""

    def planned(self, chunk: np.ndarray) -> None:
        """The policy has a new chunk: float32[n, ad], from the action of the tick that is about to be executed on."""

    def tick(self, step: TimeStep) -> None:
        """One tick was executed and recorded."""

    def episode_ended(self, report: EpisodeReport, last_observation: Observation | None) -> None:
        """The episode was handed over to the spool; no observation when the first one was unusable."""

    def message(self, text: str) -> None:
        """Something people should know: waiting, holding, stopping. Repeated while it lasts."""

    def trouble(self, text: str | None) -> None:
        """What keeps the robot from working, repeated while it lasts; None: nothing any more. From any thread."""

    def ask(self, text: str) -> None:
        """A person is asked to do something now, and waited for."""

    def close(self) -> None:
        """The rollout is over."""


class ObserverGroup(Observer):
    """Several observers as one. Watching never stops a robot: an observer that fails is reported and left out, one
    whose write the disk refused misses that one and stays."""

    def __init__(self, observers: Sequence[Observer]):
        self._observers = list(observers)

    def episode_started(self, info: EpisodeInfo) -> None:
        self._tell("episode_started", info)

    def planned(self, chunk: np.ndarray) -> None:
        self._tell("planned", chunk)

    def tick(self, step: TimeStep) -> None:
        self._tell("tick", step)

    def episode_ended(self, report: EpisodeReport, last_observation: Observation | None) -> None:
        self._tell("episode_ended", report, last_observation)

    def message(self, text: str) -> None:
        self._tell("message", text)

    def trouble(self, text: str | None) -> None:
        self._tell("trouble", text)

    def ask(self, text: str) -> None:
        self._tell("ask", text)

    def close(self) -> None:
        self._tell("close")

    def _tell(self, method: str, *arguments: object) -> None:
        for observer in list(self._observers):
            try:
                getattr(observer, method)(*arguments)
            except Exception as error:
                log.debug("%s", traceback.format_exc())
                self._failed(observer, method, error)

    def _failed(self, observer: Observer, method: str, error: Exception) -> None:
        name = type(observer).__name__
        if not isinstance(error, OSError) or error.errno not in _DISK:
            self._observers.remove(observer)
            self.message(f"{name} failed and is switched off: {error}")
        elif method != "message":  # else the message about it would fail in the same way, again and again
            self.message(f"{name} could not write, this one is missing: {error}")
