"""A policy as it was at a moment, beside the one that goes on training. SAC owns one: the start of its online stage."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from serl_launcher.policies.base import FlowPolicy, PolicyInput, Prefix, trainable
from serl_launcher.policies.sharding import together, whole_copy


class Reference:
    """Copies of the trainable parameters, whole on every rank; what is frozen is shared with the policy. Nothing here
    has a gradient."""

    def __init__(self, policy: FlowPolicy) -> None:
        self._policy = policy
        self.tensors: dict[str, Tensor] = {}  # parameter name -> its value then, on the parameter's device
        self.take()

    def take(self) -> None:
        """This is the moment."""
        self.tensors = {name: whole_copy(p) for name, p in trainable(self._policy).items()}

    def convert(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the copies as `nn.Module._apply` does."""
        self.tensors = {name: function(p) for name, p in self.tensors.items()}

    @torch.no_grad()
    def encode(self, observation: PolicyInput) -> Prefix:
        """What the backbone said of these observations."""
        return self._call("encode", observation)

    @torch.no_grad()
    def ready(self, prefix: Prefix, times: Tensor, n: int = 1) -> Prefix:
        """As the policy's then."""
        return self._call("ready", prefix, times, n)

    @torch.no_grad()
    def velocity_at(self, prefix: Prefix, x_t: Tensor, step: int) -> Tensor:
        """The flow's velocity then: float32[b·n, ah, ad]."""
        return self._call("velocity_at", prefix, x_t, step)

    def _call(self, method: str, *args: Any) -> Any:
        tensors = {f"policy.{name}": p for name, p in self.tensors.items()}
        with together(self._policy):  # or the layers would bring their own values back
            return functional_call(_Method(self._policy, method), tensors, args)


class _Method(nn.Module):
    """A policy's method as a module's forward, for functional_call."""

    def __init__(self, policy: FlowPolicy, method: str) -> None:
        super().__init__()
        self.policy, self._method = policy, method

    def forward(self, *args: Any) -> Any:
        return getattr(self.policy, self._method)(*args)
