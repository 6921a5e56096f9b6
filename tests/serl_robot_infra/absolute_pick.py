"""The pick task with absolute targets in place of displacements: x, y, z of the hand, and the gripper's command.

For tests, and by its words on the command line for whoever measures whether it is learned as well:

    export PYTHONPATH=tests/serl_robot_infra
    bash start.sh run=absolute $(.venv/bin/python -m absolute_pick)
"""

import json
from dataclasses import replace

import numpy as np

from serl_robot_infra.envs.pick import PickEnv

LOW, HIGH = (-0.22, -0.22, 0.0, -1.0), (0.22, 0.22, 0.4, 1.0)
TARGETS = {"x": "x", "y": "y", "z": "z"}
MAX_SPEED = 0.25  # m/s: the 0.025 m of a tick that the displacement is limited to
TABLE = 0.2  # height of the hand where its joint is at 0, metres


class AbsolutePick(PickEnv):
    """Answers `envs.base.ScriptedEnvironment`."""

    def __init__(self, **options):
        super().__init__(**options)
        self._moves = self.spec
        self.spec = replace(
            self.spec, name="pick_absolute", action_names=("x", "y", "z", "grip"), action_low=LOW, action_high=HIGH,
            targets=TARGETS,
        )  # fmt: skip
        self._low, self._high = np.asarray(LOW), np.asarray(HIGH)

    @property
    def target(self):
        """float64[3], the target in force, metres; privileged."""
        return self._data.ctrl[:3] + np.array([0.0, 0.0, TABLE])

    def expert(self):
        return AbsoluteExpert(self, super().expert())

    def _command(self, action):
        super()._command(np.concatenate([action[:3] - self.target, action[3:]]))


class AbsoluteExpert:
    """The displacement's expert, from the target in force."""

    def __init__(self, env, expert):
        self._env, self._expert = env, expert
        expert._scene = Displaced(env)
        self.reset = expert.reset

    def act(self):
        move = self._expert.act()
        return np.float32([*(self._env.target + move[:3]), move[3]]).clip(np.float32(LOW), np.float32(HIGH))


class Displaced:
    """The scene as the displacement's expert reads it."""

    def __init__(self, env):
        self._env, self.spec = env, env._moves

    def __getattr__(self, name):
        return getattr(self._env, name)


def words():
    """Overrides of the command line that make `task=pick` this task."""
    spec = {"name": "pick_absolute", "action_names": [*TARGETS, "grip"], "action_low": LOW, "action_high": HIGH}
    return [
        *(f"task.spec.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in spec.items()),
        "+task.spec.targets={x:x,y:y,z:z}",
        "task.env._target_=absolute_pick.AbsolutePick",
        f"task.safety={{max_speed:{{x:{MAX_SPEED},y:{MAX_SPEED},z:{MAX_SPEED}}}}}",
    ]


if __name__ == "__main__":
    print(*(word.replace(" ", "") for word in words()), sep="\n")
