"""No operator: the policy drives every tick. Used in evaluation, with `operator=none` and `rollout.operator=false`."""

from collections.abc import Callable

import numpy as np

from serl_robot_infra.interventions.base import Intervention
from serl_transport.contract.schema import Observation


class NoIntervention(Intervention):
    """Nobody drives, nobody says anything."""

    def reset(self, rng: np.random.Generator, *, from_start: bool) -> None:
        """Nothing to prepare. A demonstration is never asked of nobody: the episode runner refuses it."""

    def act(self, observation: Observation, propose: Callable[[], np.ndarray], tick: int) -> tuple[np.ndarray, bool]:
        """The policy's action."""
        return propose(), False
