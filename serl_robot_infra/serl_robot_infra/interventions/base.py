"""What an operator is to the actor loop: asked at every tick whether it drives. Implemented by each file beside."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from serl_transport.contract.schema import Observation


class Intervention(Protocol):
    """A human's device or a script. One episode at a time."""

    def reset(self, rng: np.random.Generator, *, from_start: bool) -> None:
        """Begin an episode.

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
