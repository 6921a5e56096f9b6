"""The task as the gym-hil environment that LeRobot's actor asks for, with the scripted operator in the gamepad's place.

lerobot_role.py registers it as `gym_hil/PandaPickCubeScripted-v0` before LeRobot's own code makes it. It follows
gym-hil's conventions: actions (dx, dy, dz) in [-1, 1] with gripper 0 open, 1 stay, 2 close; the executed action,
`is_intervention` and `discrete_penalty` in info; observations `agent_pos` and `pixels`. What happened goes to a file.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
from lockstep import recent_rate, seed_of
from side_by_side.side_task import Robot, Settings

from serl_transport.contract.schema import Observation

ENV_ID = "PandaPickCubeScripted-v0"
GRIPPER_PENALTY = -0.02


def to_gym(observation: Observation) -> dict:
    """gym-hil's names."""
    pixels = {"pixels": dict(observation.images)} if observation.images else {}
    return {"agent_pos": observation.state, **pixels}


class ActionUnits:
    """Between our action (metres, grip in [-1, 1]) and gym-hil's (shares of the limit, gripper 0, 1 or 2)."""

    def __init__(self, limit: np.ndarray) -> None:
        self._limit = limit  # float[3], metres
        self._grip = -1.0

    def reset(self) -> None:
        """The gripper is open."""
        self._grip = -1.0

    def to_ours(self, action: np.ndarray) -> np.ndarray:
        """float32[4]; gripper 1 keeps the last command."""
        command = round(float(action[3])) - 1
        self._grip = float(command) if command else self._grip
        return np.float32([*np.clip(action[:3], -1, 1) * self._limit, self._grip])

    def to_theirs(self, action: np.ndarray) -> np.ndarray:
        """float32[4]."""
        return np.float32([*action[:3] / self._limit, 2.0 if action[3] > 0 else 0.0])


class ScriptedPickCube(gym.Env):
    """PandaPickCube in our environment object.

    Args:
        settings: of the run.
        log: JSON lines, one for each snapshot of the policy that was due when an episode began.
        save: writes the acting policy's parameters to a file.
    """

    metadata = {"render_modes": ["human"], "render_fps": 10}

    def __init__(self, settings: Settings, log: Path, save: Callable[[Path], None]) -> None:
        self._settings, self._log, self._save = settings, log, save
        self._robot = Robot(settings)
        self.render_mode = "human"  # what LeRobot asks for; nothing is shown
        spec = self._robot.env.spec
        self._units = ActionUnits(np.asarray(spec.action_high[:3]))
        self.action_space = gym.spaces.Box(np.float32([-1, -1, -1, 0]), np.float32([1, 1, 1, 2]))
        images = {n: gym.spaces.Box(0, 255, (*size, 3), np.uint8) for n, size in spec.cameras.items()}
        state = gym.spaces.Box(-np.inf, np.inf, (len(spec.state_names),), np.float32)
        pixels = {"pixels": gym.spaces.Dict(images)} if images else {}
        self.observation_space = gym.spaces.Dict({"agent_pos": state, **pixels})
        self._steps = 0
        self._successes: list[bool] = []
        self._helped: list[bool] = []
        every = settings.curve_every or settings.env_steps
        curve = [(steps, "curve") for steps in range(every, settings.env_steps, every)]
        self._due = [(0, "before"), *curve, (settings.env_steps, "after")]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """The next online episode of the run's seed; LeRobot names none."""
        self._take_due_snapshot()
        self._observation = self._robot.begin(seed_of(self._settings.seed, "online", len(self._helped) + 1), "online")
        self._units.reset()
        self._closed = False
        self._tick, self._drove = 0, False
        return to_gym(self._observation), {"is_intervention": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One tick: the operator's action in place of `action` where it drives."""
        proposal = np.asarray(action, np.float32).reshape(-1)
        ours, helped = self._robot.operator.act(self._observation, lambda: self._units.to_ours(proposal), self._tick)
        executed = self._units.to_theirs(ours) if helped else proposal
        if helped:
            self._units.to_ours(executed)
        result = self._robot.env.step(ours)
        self._observation = result.observation
        self._tick, self._steps, self._drove = self._tick + 1, self._steps + 1, self._drove or helped
        if result.terminated or result.truncated:
            self._helped.append(self._drove)
            self._successes.append(result.success)
        info = {
            "is_intervention": helped,
            "teleop_action": executed,
            "discrete_penalty": self._penalty(ours[3] > 0),
            "succeed": result.success,
        }
        return to_gym(result.observation), result.reward, result.terminated, result.truncated, info

    def _penalty(self, close: bool) -> float:
        """gym-hil's price of moving the gripper."""
        moved, self._closed = close != self._closed, close
        return GRIPPER_PENALTY if moved else 0.0

    def _take_due_snapshot(self) -> None:
        """One at a time: an episode can pass two of them only where they are closer than an episode is long."""
        if not self._due or self._steps < self._due[0][0]:
            return
        _, point = self._due.pop(0)
        path = self._log.with_name(f"policy_{point}_{self._steps}.pt")
        self._save(path)
        row = {
            "point": point,
            "file": str(path),
            "time": time.time(),
            "env_steps": self._steps,
            "episodes": len(self._helped),
            "interventions": sum(self._helped),
            "recent_intervention_rate": recent_rate(self._helped),
            "recent_training_success": round(float(np.mean(self._successes[-50:])), 3) if self._successes else None,
        }
        with self._log.open("a") as file:
            file.write(json.dumps(row) + "\n")
