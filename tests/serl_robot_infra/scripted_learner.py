"""A learner for actor tests: the real TrainerServer on a free loopback port, with scripted tickets and policy.

It validates and keeps what arrives, so a test asks `episodes()` for what a journal would hold.
"""

import io
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from serl_robot_infra.envs.pick import PickEnv
from serl_transport.config import TrainerConfig
from serl_transport.contract.schema import Episode, StepBatch
from serl_transport.contract.specs import TaskSpec
from serl_transport.server import TrainerServer

Infer = Callable[[dict[str, Any]], dict[str, Any]]


def ticket(mode: str, seed: int, *, takeover: bool = True, episode_id: str | None = None) -> dict[str, Any]:
    """A run ticket."""
    return {
        "action": "run",
        "episode_id": episode_id or f"{mode}-{seed}",
        "mode": mode,
        "stage": f"stage-{mode}",
        "seed": seed,
        "min_version": 0,
        "takeover": takeover,
    }


def still_policy(version: int = 3, horizon: int = 8) -> Infer:
    """A policy that does nothing, with the gripper open."""
    actions = np.tile(np.float32([0, 0, 0, -1]), (horizon, 1))
    return lambda body: {"actions": actions, "policy_version": version, "server_ms": 0.1}


class ScriptedLearner:
    """Context manager; hands out `tickets` in order, then stop."""

    def __init__(
        self,
        spec: TaskSpec,
        tickets: Iterable[dict[str, Any]],
        infer: Infer | None = None,
        ports: tuple[int, int] = (0, 0),
        answers: dict[str, dict[str, Any]] | None = None,  # to requests beside next_episode
    ):
        self.spec = spec
        self.batches: list[StepBatch] = []
        self.infer_bodies: list[dict[str, Any]] = []
        self.wants: list[str] = []
        self._tickets = iter(tickets)
        self._infer, self._answers = infer or still_policy(), answers or {}
        self.server = TrainerServer(
            TrainerConfig(
                port_number=ports[0], broadcast_port=ports[1], request_types=["next_episode", *(answers or {})]
            ),
            data_callback=self._data,
            request_callback=self._request,
            spec=spec,
        )
        self.server.handle("infer", lambda peer, envelope, body: self._answer(body))

    def __enter__(self) -> "ScriptedLearner":
        self.server.start(threaded=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stop()

    def episodes(self) -> list[Episode]:
        """Finished episodes, in order of their first batch."""
        groups: dict[str, list[StepBatch]] = {}
        for batch in self.batches:
            groups.setdefault(batch.episode.episode_id, []).append(batch)
        return [Episode.from_batches(batches) for batches in groups.values()]

    def _data(self, store: str, payload: dict[str, Any]) -> None:
        for body in payload["data"]:
            self.batches.append(StepBatch.from_body(body, self.spec))

    def _request(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        if kind in self._answers:
            return self._answers[kind]
        self.wants.append(payload["want"])
        return next(self._tickets, {"action": "stop", "reason": "the script is over"})

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        self.infer_bodies.append(body)
        return self._infer(body)


class Screen(io.StringIO):
    """What the actor prints; others wait for its words."""

    def wait_for(self, text, seconds=30.0):
        deadline = time.monotonic() + seconds
        while text not in self.getvalue():
            assert time.monotonic() < deadline, f"never said: {text}; {self.getvalue()[-2000:]}"
            time.sleep(0.01)


def actor_config(learner: ScriptedLearner | None, runs_dir: Any, **rollout: Any) -> DictConfig:
    """A resolved config for the pick task; `rollout` overrides keys of its section."""
    config = OmegaConf.create(
        {
            "task": {
                "spec": learner.spec.to_dict() if learner else {},
                "env": {"_target_": "serl_robot_infra.envs.pick.PickEnv", "image_size": 32, "renderer": "ray"},
                "operator": {
                    "_target_": "serl_robot_infra.interventions.scripted.ScriptedOperator",
                    "takeover_tick": 5,
                },
            },
            "rollout": {
                "mode": "follow",
                "episodes": None,
                "policy": "remote",
                "execute_horizon": 4,
                "rate_hz": 0,
                "operator": True,
                "demo_noise": 0.15,
                "batch_ticks": 10,
                "hold_limit_s": 1.0,
                "flush_timeout_s": 10.0,
                "spool_mb": 64,
                "video_every": 0,
                "ledger": True,
                "rerun": False,
                **rollout,
            },
            "ip": "127.0.0.1",
            "port": learner.server.config.port_number if learner else 0,
            "broadcast_port": learner.server.config.broadcast_port if learner else 0,
            "unique_identifier": "actor-0",
            "runs_dir": str(runs_dir),
            "run": "test",
        }
    )
    return config


class LocalStill:
    """`still_policy` as a local policy, built like one from yaml."""

    def __init__(self, cfg: DictConfig, link: Any):
        self.infer = still_policy()


noises: list[float] = []  # that the environments below were reset with


class NoisyPick(PickEnv):
    """The pick task as it is; notes the disturbance that it is reset with."""

    def __init__(self):
        super().__init__(image_size=32, renderer="ray")

    def reset(self, seed: int, *, actuator_noise: float = 0.0):
        noises.append(actuator_noise)
        return super().reset(seed, actuator_noise=actuator_noise)


class PlainPick(NoisyPick):
    """Takes no disturbance."""

    def reset(self, seed: int):
        return super().reset(seed)


class BrokenPick(NoisyPick):
    """Its driver gives up."""

    def __init__(self, when: str, kind: str = "RuntimeError"):
        super().__init__()
        self._when, self._error = when, {"RuntimeError": RuntimeError, "ConnectionError": ConnectionError}[kind]

    def reset(self, seed: int, *, actuator_noise: float = 0.0):
        self._look("reset")
        return super().reset(seed, actuator_noise=actuator_noise)

    def step(self, action: np.ndarray):
        self._look("step")
        return super().step(action)

    def _look(self, at: str) -> None:
        if at == self._when:
            raise self._error("camera front is gone")


class RobotPick(PickEnv):
    """The pick task as a robot that moves by itself between two actions; notes what was sent to it, and when."""

    last: "RobotPick | None" = None  # the newest one: `main` builds it from yaml

    def __init__(self, **options: Any):
        super().__init__(image_size=32, renderer="ray", **options)
        self.sent: list[tuple[float, np.ndarray]] = []
        self.holds: list[float] = []
        self.stops: list[float] = []
        self.resets: list[float] = []
        RobotPick.last = self

    def reset(self, seed: int, *, actuator_noise: float = 0.0):
        self.resets.append(time.monotonic())
        noises.append(actuator_noise)
        return super().reset(seed, actuator_noise=actuator_noise)

    def step(self, action: np.ndarray):
        self.sent.append((time.monotonic(), action.copy()))
        return super().step(action)

    def hold(self) -> None:
        self.holds.append(time.monotonic())

    def stop(self) -> None:
        self.stops.append(time.monotonic())
