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
    pauses: float = 0.0  # after every 2 to 5 ticks of motion it looks on for so many times as long; 0: never
    still_dims: Sequence[int] | None = None  # action dims that stand still meanwhile; None: all
    person: str = SCRIPT
    _expert: Expert = field(init=False)
    _rng: np.random.Generator = field(init=False)
    _drives_from: int = field(init=False, default=0)
    _moves_from: int = field(init=False, default=0)
    _moving: int = field(init=False, default=0)  # ticks of motion before the next pause
    _paused: int = field(init=False, default=0)  # ticks of the pause that are left
    _last: np.ndarray | None = field(init=False, default=None)  # what it sent when it moved last

    def __post_init__(self) -> None:
        if not isinstance(self.env, ScriptedEnvironment):
            raise ValueError(
                f"ScriptedOperator: {type(self.env).__name__} has no scripted expert; set rollout.operator=false or "
                "name another task.operator._target_"
            )
        for name in ("takeover_tick", "jitter", "hesitation", "pauses"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"task.operator.{name}: expected 0 or more, got {value}")
        self._expert = self.env.expert()

    def reset(self, rng: np.random.Generator, *, from_start: bool) -> None:
        """Draw this episode's takeover tick."""
        self._expert.reset()
        self._rng = rng
        jitter = int(rng.integers(-self.jitter, self.jitter + 1)) if self.jitter else 0
        self._drives_from = 0 if from_start else max(0, self.takeover_tick + jitter)
        pause = int(rng.integers(0, self.hesitation + 1)) if self.hesitation else 0
        self._moves_from = self._drives_from + pause
        self._moving, self._paused, self._last = 0, 0, None

    def act(self, observation: Observation, propose: Callable[[], np.ndarray], tick: int) -> tuple[np.ndarray, bool]:
        """The expert's action from the takeover tick on, the policy's before."""
        if tick < self._drives_from:
            return propose(), False
        if tick >= self._moves_from:
            return (self._in_bursts(observation) if self.pauses else self._expert.act()), True
        action = self._still(observation, self._expert.act())
        self._expert.reset()
        return action, True

    def _in_bursts(self, observation: Observation) -> np.ndarray:
        """The expert's action, or, in a pause, no motion and the gripper as it was told last."""
        if self._moving == 0:
            self._moving = int(self._rng.integers(2, 6))
            self._paused = 0 if self._last is None else round(self.pauses * self._moving)
        if self._paused:
            self._paused -= 1
            return self._still(observation, self._last.copy())
        self._moving -= 1
        self._last = self._expert.act()
        return self._last

    def _still(self, observation: Observation, action: np.ndarray) -> np.ndarray:
        """The action without motion: a displacement of nothing; a target where the robot is."""
        targets = self.env.spec.target_dims
        for place in range(len(action)) if self.still_dims is None else self.still_dims:
            action[place] = observation.state[targets[place]] if place in targets else 0.0
        return action
