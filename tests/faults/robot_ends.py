"""A learner and an actor whose robot, policy, operator or reward fails when a file says so; for test_faults_robot_ends.

    python robot_ends.py '{"role": "learner", "folder": …}'                   prints its two ports
    python robot_ends.py '{"role": "actor", "ports": …, "folder": …}'         its standard input is its terminal

Writing a fault's name into <folder>/fault makes it happen at the next tick. <folder>/moves gets a line for whatever
happens to the robot, `<what> <time.monotonic()>`: f fault, a action, h hold, s stop, w stop by the watchdog process.
"""

import ctypes
import fcntl
import itertools
import json
import os
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from robot_process import HZ
from scripted_learner import RobotPick, ScriptedLearner, actor_config, still_policy, ticket

from serl_robot_infra.interventions.base import Intervention
from serl_robot_infra.rewards.environment import EnvironmentReward

STOP_S = 0.3
BUSY_S = 1.0  # of a driver that hangs


class Faults:
    """The file that says what fails next, and the robot's life."""

    def __init__(self, folder: str):
        self._file = Path(folder) / "fault"
        self._moves = os.open(Path(folder) / "moves", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, what: str) -> None:
        os.write(self._moves, f"{what} {time.monotonic()}\n".encode())

    def due(self, *kinds: str) -> str | None:
        """The fault that was asked for, if it is one of these; once."""
        try:
            kind = self._file.read_text()
        except FileNotFoundError:
            return None
        if kind not in kinds:
            return None
        self._file.unlink()
        self.note("f")
        return kind


class FaultyRobot(RobotPick):
    """Moves by itself between two actions, never says that an episode is over, and can be stopped by a second way."""

    def __init__(self, folder: str):
        super().__init__()
        self._faults = Faults(folder)
        self.stopper = {"_target_": "robot_ends.SecondWay", "folder": folder}

    def reset(self, seed, *, actuator_noise=0.0):
        self._faults.note("r")
        observation = super().reset(seed, actuator_noise=actuator_noise)
        time.sleep(0.2)  # it moves
        if self._faults.due("reset_fails"):
            raise RuntimeError("the gripper did not open")
        return observation

    def step(self, action):
        self._faults.note("a")
        result = replace(super().step(action), terminated=False, truncated=False)
        match self._faults.due("camera_lost", "bus_error", "hangs", "keeps_interpreter", "nan_state", "wrong_image"):
            case "camera_lost":
                raise RuntimeError("camera front is gone")
            case "bus_error":
                raise OSError("no answer from servo 3")
            case "hangs":
                time.sleep(BUSY_S)
            case "keeps_interpreter":
                ctypes.PyDLL(None).usleep(int(BUSY_S * 1e6))
            case "nan_state":
                result.observation.state[0] = np.nan
            case "wrong_image":
                result.observation.images.popitem()
        return result

    def hold(self):
        self._faults.note("h")

    def stop(self):
        self._faults.note("s")


class SecondWay:
    """What the watchdog process stops the robot by."""

    def __init__(self, folder: str):
        self._faults = Faults(folder)

    def stop(self) -> None:
        self._faults.note("w")


class FaultyOperator(Intervention):
    """A device that is pulled out."""

    def __init__(self, folder: str, env: RobotPick):
        self._faults = Faults(folder)

    def reset(self, rng, *, from_start):
        pass

    def act(self, observation, propose, tick):
        if self._faults.due("operator_fails"):
            raise RuntimeError("gamepad: no such device")
        return propose(), False


class FaultyReward(EnvironmentReward):
    """A person or a classifier that ends the episode, or fails."""

    def __init__(self, folder: str):
        self._faults = Faults(folder)

    def judge(self, result):
        match self._faults.due("judged", "reward_fails"):
            case "judged":
                return replace(result, terminated=True, success=True)
            case "reward_fails":
                raise RuntimeError("classifier: the model is gone")
        return result


def learn(options: dict) -> int:
    """Serve online tickets and actions until stdin closes."""
    faults, still = Faults(options["folder"]), still_policy()

    def infer(body):
        answer = still(body)
        match faults.due("nan_action", "inf_action", "wrong_action", "silent"):
            case "nan_action":
                answer["actions"] = np.full_like(answer["actions"], np.nan)
            case "inf_action":
                answer["actions"] = np.full_like(answer["actions"], np.inf)
            case "wrong_action":
                answer["actions"] = answer["actions"][:, :-1]
            case "silent":
                time.sleep(BUSY_S)
        return answer

    tickets = (ticket("online", seed) for seed in itertools.count(1))
    with ScriptedLearner(RobotPick().spec, tickets, infer) as learner:
        print(learner.server.config.port_number, learner.server.config.broadcast_port, flush=True)
        sys.stdin.read()
    return 0


def act(options: dict) -> int:
    """Run the real actor to its exit code."""
    from serl_robot_infra.main import main

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal is this session's
    folder = options["folder"]
    cfg = actor_config(None, folder, rate_hz=HZ, flush_timeout_s=2.0, estop_key="space", demo_noise=0.0)
    OmegaConf.update(cfg, "rollout.watchdog", {"stop_ms": STOP_S * 1e3}, force_add=True)
    OmegaConf.update(cfg, "reward", {"_target_": "robot_ends.FaultyReward", "folder": folder}, force_add=True)
    robot = RobotPick()
    cfg.task.spec = robot.spec.to_dict()
    robot.close()
    cfg.task.env = {"_target_": "robot_ends.FaultyRobot", "folder": folder}
    cfg.task.operator = {"_target_": "robot_ends.FaultyOperator", "folder": folder}
    cfg.port, cfg.broadcast_port = options["ports"]
    return main(cfg)


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    sys.exit(learn(chosen) if chosen["role"] == "learner" else act(chosen))
