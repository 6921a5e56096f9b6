"""Policies as the actor loop uses them: on the learner's policy server, or any other behind the same interface, timed.

All of them are `openpi_client.BasePolicy`: `infer` takes the body of an `infer` message (docs/architecture.md) and
answers `actions` float32[ah, ad] in physical units and `policy_version`.
"""

import time
from collections import deque
from typing import Any, Protocol

import numpy as np

from openpi_client.base_policy import BasePolicy
from serl_robot_infra.link import LearnerLink
from serl_transport.contract.schema import Observation

_TIMEOUT_MS = 3000


def infer_body(
    observation: Observation, prompt: str, min_version: int, seed: int | None, mode: str = "online"
) -> dict[str, Any]:
    """The body of one `infer` message; a seed makes the sampled chunk a function of observation and version."""
    return {
        "observation": {"images": dict(observation.images), "state": observation.state},
        "prompt": prompt,
        "min_version": min_version,
        "seed": seed,
        "mode": mode,
    }


class Infers(Protocol):
    """The one thing that a policy must do here; the in-process policy of the learner install has no more."""

    def infer(self, body: dict[str, Any], /) -> dict[str, Any]:
        """Answer the body of an `infer` message."""
        ...


class RemotePolicy(BasePolicy):
    """The learner's policy server. Raises NotReady before it serves `min_version`, ServerSilent when it is away."""

    def __init__(self, link: LearnerLink):
        self._link = link

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """Ask for one chunk; a policy server that comes to it after the timeout refuses it instead of executing it."""
        return self._link.infer({**obs, "deadline_ms": _TIMEOUT_MS}, timeout_ms=_TIMEOUT_MS)


class MeasuredPolicy(BasePolicy):
    """A policy that also knows how long it takes."""

    def __init__(self, policy: Infers):
        self._policy = policy
        self._latencies: deque[float] = deque(maxlen=100)

    @property
    def p50_ms(self) -> float | None:
        """Median latency of the last 100 answers, milliseconds; None before the first."""
        latencies = list(self._latencies)  # at once: with real-time chunking another thread appends
        return float(np.median(latencies)) if latencies else None

    def reset(self) -> None:
        """Told to a policy that has a memory of its episode; the in-process one has none."""
        if isinstance(self._policy, BasePolicy):
            self._policy.reset()

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """The policy's answer."""
        start = time.perf_counter()
        answer = self._policy.infer(obs)
        self._latencies.append((time.perf_counter() - start) * 1e3)
        return answer
