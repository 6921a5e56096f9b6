"""A script in the operator's place: takes over an episode that drags on, and gives demonstrations.

Called by the actor loop each tick; asks the environment's expert for actions. Once it took over it drives to the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from serl_robot_infra.envs.base import Environment, Expert, ScriptedEnvironment
from serl_robot_infra.interventions.base import Intervention
from serl_transport.contract.people import SCRIPT
from serl_transport.contract.schema import Observation


@dataclass(slots=True)
class ScriptedOperator(Intervention):
    """Takes over by itself. ValueError: no scripted expert, or a number below 0."""

    env: Environment  # simulated, with an expert
    takeover_tick: int = 22  # the tick from which it drives an online episode
    jitter: int = 0  # the takeover tick of an episode is drawn from `takeover_tick` ± this
    hesitation: int = 0  # ticks without motion before it begins to act, drawn from 0 to this, as people need them
    still_dims: Sequence[int] | None = None  # action dims that stand still meanwhile; None: all
    person: str = SCRIPT
    _expert: Expert = field(init=False)
    _drives_from: int = field(init=False, default=0)
    _moves_from: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not isinstance(self.env, ScriptedEnvironment):
            raise ValueError(
                f"ScriptedOperator: {type(self.env).__name__} has no scripted expert; set rollout.operator=false or "
                "name another task.operator._target_"
            )
        for name in ("takeover_tick", "jitter", "hesitation"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"task.operator.{name}: expected 0 or more, got {value}")
        self._expert = self.env.expert()

    def reset(self, rng: np.random.Generator, *, from_start: bool) -> None:
        """Draw this episode's takeover tick."""
        self._expert.reset()
        jitter = int(rng.integers(-self.jitter, self.jitter + 1)) if self.jitter else 0
        self._drives_from = 0 if from_start else max(0, self.takeover_tick + jitter)
        pause = int(rng.integers(0, self.hesitation + 1)) if self.hesitation else 0
        self._moves_from = self._drives_from + pause

    def act(self, observation: Observation, propose: Callable[[], np.ndarray], tick: int) -> tuple[np.ndarray, bool]:
        """The expert's action from the takeover tick on, the policy's before."""
        if tick >= self._moves_from:
            return self._expert.act(), True
        if tick >= self._drives_from:
            action = self._expert.act()
            still = range(len(action)) if self.still_dims is None else self.still_dims
            targets = self.env.spec.target_dims
            for place in still:  # a displacement of nothing; a target where the robot is
                action[place] = observation.state[targets[place]] if place in targets else 0.0
            self._expert.reset()
            return action, True
        return propose(), False
