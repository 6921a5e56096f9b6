"""A script in the operator's place: takes over an episode that drags on, and gives demonstrations.

Called by the actor loop each tick; asks the environment's expert for actions. Once it took over it drives to the end.
"""

from collections.abc import Callable, Sequence

import numpy as np

from serl_robot_infra.envs.base import Environment, ScriptedEnvironment
from serl_transport.contract.schema import Observation


class ScriptedOperator:
    """Answers `interventions.base.Intervention`.

    Args:
        env: a simulated environment with an expert.
        takeover_tick: the tick from which it drives an online episode.
        jitter: the takeover tick of an episode is drawn from `takeover_tick` ± this.
        hesitation: ticks without motion before it begins to act, drawn from 0 to this, as people need them.
        still_dims: action dims that are 0 meanwhile; None: all.
    """

    def __init__(
        self,
        env: Environment,
        takeover_tick: int = 22,
        jitter: int = 0,
        hesitation: int = 0,
        still_dims: Sequence[int] | None = None,
    ):
        if not isinstance(env, ScriptedEnvironment):
            raise ValueError(
                f"ScriptedOperator: {type(env).__name__} has no scripted expert; set rollout.operator=false or name "
                "another task.operator._target_"
            )
        for name, value in (("takeover_tick", takeover_tick), ("jitter", jitter), ("hesitation", hesitation)):
            if value < 0:
                raise ValueError(f"task.operator.{name}: expected 0 or more, got {value}")
        self._expert = env.expert()
        self._takeover_tick = takeover_tick
        self._jitter = jitter
        self._hesitation = hesitation
        self._still = slice(None) if still_dims is None else list(still_dims)
        self._drives_from = self._moves_from = takeover_tick

    def reset(self, rng: np.random.Generator, *, from_start: bool) -> None:
        """Draw this episode's takeover tick."""
        self._expert.reset()
        jitter = int(rng.integers(-self._jitter, self._jitter + 1)) if self._jitter else 0
        self._drives_from = 0 if from_start else max(0, self._takeover_tick + jitter)
        pause = int(rng.integers(0, self._hesitation + 1)) if self._hesitation else 0
        self._moves_from = self._drives_from + pause

    def act(self, observation: Observation, propose: Callable[[], np.ndarray], tick: int) -> tuple[np.ndarray, bool]:
        """The expert's action from the takeover tick on, the policy's before."""
        if tick >= self._moves_from:
            return self._expert.act(), True
        if tick >= self._drives_from:
            action = self._expert.act()
            action[self._still] = 0.0
            self._expert.reset()
            return action, True
        return propose(), False
