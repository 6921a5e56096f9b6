"""What an environment is to the actor loop: reset, step, close and a TaskSpec.

Called by `actor.Actor`; implemented by each file of this folder. Observations flow out, executed actions flow in, both
in physical units. In the spirit of dm_env and gymnasium, with one addition: success is told apart from termination.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec, kept


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one action led to."""

    observation: Observation  # after it
    reward: float  # the environment's own
    terminated: bool  # a success or failure state was reached (no bootstrap)
    truncated: bool  # the time limit was reached (bootstrap)
    success: bool  # the task is solved
    executed: np.ndarray | None = (
        None  # float32[ad] that the driver really sent, after its own limits; None: the action
    )


def kept_result(result: StepResult) -> StepResult:
    """The same with copies: a driver may hand out the arrays that it writes the next tick to."""
    return replace(result, observation=result.observation.kept(), executed=kept(result.executed))


class PartLostError(Exception):
    """A camera, a bus or the operator's device does not answer; the message says which, for people.

    Raised by `reset`, `step` and an operator's `act` where the next call opens the part anew: the episode is cut, the
    robot holds, and the actor goes on. A driver that cannot do so lets its OSError pass: the actor ends with exit
    code 1 and is started again.
    """


@runtime_checkable
class Environment(Protocol):
    """A robot or a simulator. One episode at a time, one thread.

    What it returns may be the same arrays at every tick: the loop copies them at once. The action that it is given is
    its own.

    A robot also has `hold()` and `stop()` (guard.Stoppable), called from any thread, also during `step` and `reset`.
    One whose controller can be reached twice names a `stopper`: a config node of what stops it from another process
    (watchdog.py), for example `{"_target_": "my_lab.arm.SecondConnection", "host": "10.0.0.9"}`.

    Three more are optional, for tools/check_robot.py and for an episode whose scene a person sets: `observe()`, what is
    seen now, without a motion; `limits()`, action name -> (low, high) that the robot itself allows, in the task's
    units; `falls_on_stop`, true where a stop takes the torque away.
    """

    @property
    def spec(self) -> TaskSpec:
        """Cameras, state and action names, limits and rate; must equal the task's yaml."""
        ...

    def reset(self, seed: int, *, actuator_noise: float = 0.0) -> Observation:
        """Begin an episode.

        Args:
            seed: the whole episode start is a function of it.
            actuator_noise: standard deviation of a disturbance that the robot adds to the translation when it executes
                an action, in units of its full move (`TaskSpec.full_moves`). The recorded action stays the commanded
                one, so that demonstrations show recovery (DART, Laskey et al. 2017). A real robot refuses all but 0.
        """
        ...

    def step(self, action: np.ndarray) -> StepResult:
        """Execute float32[ad] for one control tick; an action outside the limits is clipped.

        OSError and anything else but ValueError: the driver failed. PartLostError: the next `reset` mends it.
        """
        ...

    def close(self) -> None:
        """Release the renderer or the robot; idempotent."""
        ...


class Expert(Protocol):
    """A scripted operator's skill: it may read the simulator's privileged state."""

    def reset(self) -> None:
        """Forget the phase; the next `act` may start from any state of an episode."""
        ...

    def act(self) -> np.ndarray:
        """float32[ad], the action for the environment's current state."""
        ...


@runtime_checkable
class ScriptedEnvironment(Environment, Protocol):
    """An environment that comes with a scripted expert."""

    def expert(self) -> Expert:
        """A new expert that reads this environment."""
        ...
