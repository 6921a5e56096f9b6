"""How a head runs a single layer: compiled where that pays, checkpointed where memory is short.

Heads (pi0.head, groot.head) take `compile: auto | on | off`. auto means inference on a GPU: there a compiler that fails
costs one line in the log and the layer runs uncompiled from then on, while a backward pass could not be taken back. One
layer is compiled, all layers of its shape use it. Weights are inputs of the compiled code, so new parameters copied in
place need no new compilation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from serl_launcher.policies.shapes_only import computed_again

log = logging.getLogger("policy")
MODES = ("auto", "on", "off")


def check_switch(key: str, value: Any) -> str:
    """auto, on or off; yaml's booleans are understood. Raises ValueError naming the key."""
    mode = {True: "on", False: "off"}.get(value, value)
    if mode not in MODES:
        raise ValueError(f"{key}: expected one of {list(MODES)}, got {value!r}")
    return mode


def run_layer(checkpointing: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`; with `checkpointing` its activations are computed again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        # The state of the generator is kept: dropout may be on, and the second pass must draw what the first drew.
        return checkpoint(function, *arguments, use_reentrant=False, context_fn=computed_again)
    return function(*arguments)


class CompiledLayer:
    """A layer function `f(layer, tensors…)`; compiled at its first call on a device for which that is wanted."""

    def __init__(self, function: Callable[..., Any], mode: str, backend: str = "inductor") -> None:
        self.function, self.mode, self.backend = function, mode, backend
        self._compiled: Callable[..., Any] | None = None
        self._failed = mode == "off"

    def __call__(self, layer: Any, x: Tensor, *rest: Any) -> Any:
        """As the function itself."""
        pays = x.is_cuda and not torch.is_grad_enabled()
        if self._failed or x.is_meta or (self.mode == "auto" and not pays):
            return self.function(layer, x, *rest)
        if self._compiled is None:
            self._compiled = torch.compile(self.function, backend=self.backend)
        try:
            return self._compiled(layer, x, *rest)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            self._failed = True
            reason = str(error).strip().splitlines()
            log.warning("policy.compile: %s runs uncompiled: %s", self.function.__name__, (reason or [error])[0])
            return self.function(layer, x, *rest)

    def __deepcopy__(self, memo: dict) -> CompiledLayer:
        return CompiledLayer(self.function, self.mode, self.backend)
