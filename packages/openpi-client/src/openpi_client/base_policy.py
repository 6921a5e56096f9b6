"""What a policy is to its user: observation in, action out. Implemented by clients, brokers and in-process policies."""

from abc import ABC, abstractmethod
from typing import Any


class BasePolicy(ABC):
    """A policy, wherever it runs. A wrapper around a policy is a policy."""

    @abstractmethod
    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """Answer one observation.

        Args:
            obs: nested dict of numpy arrays and scalars, as the policy at hand expects it.

        Returns:
            At least `actions`: float32[ah, ad], or float32[ad] when the policy is a broker.
        """

    def reset(self) -> None:  # noqa: B027  (most policies carry nothing from one episode to the next)
        """Forget what belongs to the episode that ended."""
