"""No operator: the policy drives every tick. Used in evaluation and with `rollout.operator=false`."""

from collections.abc import Callable

import numpy as np

from serl_robot_infra.interventions.base import Intervention
from serl_transport.contract.schema import Observation


class NoIntervention(Intervention):
    """Nobody drives, nobody says anything."""

    def reset(self, rng: np.random.Generator, *, from_start: bool) -> None:
        """Nothing to prepare; a demonstration without an operator is refused."""
        if from_start:
            raise ValueError("a demonstration needs an operator: set task.operator and rollout.operator=true")

    def act(self, observation: Observation, propose: Callable[[], np.ndarray], tick: int) -> tuple[np.ndarray, bool]:
        """The policy's action."""
        return propose(), False
