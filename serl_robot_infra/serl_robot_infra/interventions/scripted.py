"""A script in the operator's place: takes over an episode that drags on, and gives demonstrations.

Called by the actor loop each tick; asks the environment's expert for actions. Once it took over it drives to the end.
"""

from collections.abc import Callable

import numpy as np

from serl_robot_infra.envs.base import Environment, ScriptedEnvironment
from serl_transport.schema import Observation


class ScriptedOperator:
    """Answers `interventions.base.Intervention`.

    Args:
        env: a simulated environment with an expert.
        takeover_tick: the tick from which it drives an online episode.
        jitter: the takeover tick of an episode is drawn from `takeover_tick` ± this.
    """

    def __init__(self, env: Environment, takeover_tick: int = 22, jitter: int = 0):
        if not isinstance(env, ScriptedEnvironment):
            raise ValueError(
                f"ScriptedOperator: {type(env).__name__} has no scripted expert; set rollout.operator=false or name "
                "another task.operator._target_"
            )
        if takeover_tick < 0 or jitter < 0:
            raise ValueError(f"takeover_tick and jitter: expected 0 or more, got {takeover_tick} and {jitter}")
        self._expert = env.expert()
        self._takeover_tick = takeover_tick
        self._jitter = jitter
        self._drives_from = takeover_tick

    def reset(self, rng: np.random.Generator, *, from_start: bool) -> None:
        """Draw this episode's takeover tick."""
        self._expert.reset()
        jitter = int(rng.integers(-self._jitter, self._jitter + 1)) if self._jitter else 0
        self._drives_from = 0 if from_start else max(0, self._takeover_tick + jitter)

    def act(self, observation: Observation, propose: Callable[[], np.ndarray], tick: int) -> tuple[np.ndarray, bool]:
        """The expert's action from the takeover tick on, the policy's before."""
        if tick >= self._drives_from:
            return self._expert.act(), True
        return propose(), False
