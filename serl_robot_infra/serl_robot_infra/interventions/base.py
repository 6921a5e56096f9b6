"""What an operator is to the actor loop: asked at every tick whether it drives, and what a person said.

Implemented by each file beside. An operator's device may be a judge as well: its words (`Words`) end an episode, throw
it away, or say that the scene is ready.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np

from serl_robot_infra.envs.base import StepResult
from serl_transport.contract.schema import Observation


@dataclass(frozen=True, slots=True)
class Words:
    """What a person said since they were asked last. The events of LeRobot's teleoperators, and two more."""

    success: bool = False  # the task is solved: the episode ends
    failure: bool = False  # it is not, and will not be: the episode ends
    discard: bool = False  # throw the episode away and make it again (LeRobot: rerecord_episode)
    ready: bool = False  # the scene is set: the next episode may begin
    stop: bool = False  # end after this episode

    def __or__(self, other: "Words") -> "Words":
        """What either of two said."""
        return Words(*(getattr(self, name) or getattr(other, name) for name in WORDS))

    @property
    def judges(self) -> bool:
        """Was something said of the episode?"""
        return self.success or self.failure or self.discard


WORDS = tuple(field.name for field in fields(Words))
NOTHING_SAID = Words()


def ruled(result: StepResult, said: Words, return_so_far: float) -> StepResult:
    """A person's word outranks whoever judged the tick; failure outranks success, and a discard both.

    A success brings what the rewards before lacked to 1, as a relabelled one does (docs/algorithms/rewards.md).
    """
    if said.discard:
        return replace(result, terminated=False, truncated=True, success=False)
    if said.failure:
        return replace(result, reward=0.0, terminated=True, truncated=False, success=False)
    if said.success:
        reward = max(0.0, 1.0 - return_so_far)
        return replace(result, reward=reward, terminated=True, truncated=False, success=True)
    return result


class OperatorGoneError(Exception):
    """The operator's device vanished: the episode ends with what was executed. The message is for people."""


class Voice(Protocol):
    """Whoever can say something: an operator, or the keys of a terminal (rewards/human_key.py)."""

    vocabulary: Collection[str] = ()
    """The fields of `Words` that it has a key or a button for."""

    person: str | None = None
    """Who is there, where the device knows it (a page does), or `script`; None: whom `operator_name` names."""

    def words(self) -> Words:
        """What was said since the last call. Asked after each tick and while the scene is waited for; never waits."""
        return NOTHING_SAID

    def describe(self) -> Sequence[str]:
        """A line for each thing that the device can do, for the actor's start: `t: take over, let go`."""
        return ()

    def missing(self) -> str | None:
        """Why the device cannot be used now, for people; None: it is there. Looks for it again; never waits.

        Asked before an episode moves anything. Who finds out later raises OperatorGoneError, in `act` or in `words`.
        """
        return None


class Intervention(Voice, Protocol):
    """A human's device or a script. One episode at a time. A class may inherit from this one: it says nothing then."""

    is_person: bool = False
    """A person's device: a simulation keeps to real time, and a robot waits for its scene to be set."""

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

        Raises OperatorGoneError when the device is not there any more.

        Returns:
            The action float32[ad], and whether it is the operator's.
        """
        ...

    def absent(self) -> str | None:
        """Why no demonstration can begin, for people: nobody is at the device; None: somebody is. Never waits.

        Unlike `missing`, which keeps every episode waiting: the policy may drive while nobody is there.
        """
        return None

    def close(self) -> None:
        """Let go of the device; idempotent."""
