"""Turns a policy that answers with chunks into one that answers with single actions. Used by the control loop."""

from typing import Any

import numpy as np

from openpi_client.base_policy import BasePolicy


class ActionChunkBroker(BasePolicy):
    """Executes the first `execute_horizon` actions of each chunk, then asks the policy again.

    Args:
        policy: answers `infer` with `actions` float32[ah, ad].
        execute_horizon: how many actions of a chunk are executed; at most ah.
    """

    def __init__(self, policy: BasePolicy, execute_horizon: int):
        if execute_horizon < 1:
            raise ValueError(f"execute_horizon: expected at least 1, got {execute_horizon}")
        self._policy = policy
        self._horizon = execute_horizon
        self._chunk: dict[str, Any] | None = None
        self._next = 0

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """The chunk's entries, with `actions` float32[ad] of this tick; of a new chunk also `plan`, float32[ah, ad]."""
        if fresh := self._chunk is None:
            chunk = self._policy.infer(obs)
            length = len(chunk["actions"])
            if length < self._horizon:
                raise ValueError(f"execute_horizon={self._horizon} is longer than the chunk, {length} actions")
            # A policy may answer with the buffer that it writes its next chunk to.
            self._chunk, self._next = {**chunk, "actions": np.array(chunk["actions"])}, 0
        assert self._chunk is not None
        answer = {**self._chunk, "actions": self._chunk["actions"][self._next]}
        if fresh:
            answer["plan"] = self._chunk["actions"]
        self._next += 1
        if self._next >= self._horizon:
            self._chunk = None
        return answer

    def drop_chunk(self) -> None:
        """Forget the rest of the chunk: someone else drove meanwhile."""
        self._chunk = None

    def reset(self) -> None:
        """A new episode began: forget the chunk, and tell the policy."""
        self._chunk = None
        self._policy.reset()
