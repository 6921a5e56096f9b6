"""What an operator is to the actor loop: asked at every tick whether it drives, and what a person said.

Implemented by each file beside. An operator's device may be a judge as well: its words (`Words`) end an episode, throw
it away, or say that the scene is ready.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from serl_transport.contract.schema import Observation


@dataclass(frozen=True, slots=True)
class Words:
    """What a person said since they were asked last. The events of LeRobot's teleoperators, and two more."""

    success: bool = False  # the task is solved: the episode ends
    failure: bool = False  # it is not, and will not be: the episode ends
    discard: bool = False  # throw the episode away and make it again (LeRobot: rerecord_episode)
    ready: bool = False  # the scene is set: the next episode may begin
    stop: bool = False  # end after this episode


NOTHING_SAID = Words()


class Intervention(Protocol):
    """A human's device or a script. One episode at a time. A class may inherit from this one: it says nothing then."""

    def reset(self, rng: np.random.Generator, *, from_start: bool) -> None:
        """Begin an episode; what was said before is forgotten.

        Args:
            rng: the episode's own stream, a function of its seed.
            from_start: a demonstration: the operator drives from the first tick.
        """
        ...

    def act(self, observation: Observation, propose: Callable[[], np.ndarray], tick: int) -> tuple[np.ndarray, bool]:
        """Who drives this tick, and with which action.

        Args:
            observation: what the robot senses.
            propose: asks the policy for its float32[ad]. A function rather than an action, so that no inference is
                spent on a tick that the operator drives anyway.
            tick: ticks since the episode began.

        Returns:
            The action float32[ad], and whether it is the operator's.
        """
        ...

    def words(self) -> Words:
        """What was said since the last call. Asked after each tick and while the scene is waited for; never waits."""
        return NOTHING_SAID

    def describe(self) -> Sequence[str]:
        """A line for each thing that the device can do, for the actor's start: `space: take over, let go`."""
        return ()

    def close(self) -> None:
        """Let go of the device; idempotent."""
