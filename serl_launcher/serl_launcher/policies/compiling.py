"""How a head runs a single layer: compiled where that pays, checkpointed where memory is short.

Heads (pi0.head, groot.head) take `compile: auto | on | off`. auto means inference on a GPU: there a compiler that fails
costs one line in the log and the layer runs uncompiled from then on, while a backward pass could not be taken back. One
layer is compiled, all layers of its shape use it. Weights are inputs of the compiled code, so new parameters copied in
place need no new compilation.

Every form of the inputs (shapes, dtypes, modes) is compiled for itself, with static shapes: torch would widen the
second shape into a symbolic one, and run the ninth uncompiled, without a word. Only what the compiler raises is the
compiler's: an error of the layer itself, and the signal by which torch ends the recomputation of a checkpoint, pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from serl_launcher.policies.shapes_only import computed_again

log = logging.getLogger("policy")
RUN = "run_whole"  # attribute of a layer that is held in parts: calls a function of it with its parameters whole
MODES = ("auto", "on", "off")
MAX_FORMS = 64  # of inputs that a layer function is compiled for; what comes after them runs uncompiled
COMPILER = ("torch._dynamo.", "torch._inductor.", "torch._functorch.", "triton.")  # modules whose errors are its own


def check_switch(key: str, value: Any) -> str:
    """auto, on or off; yaml's booleans are understood. Raises ValueError naming the key."""
    mode = {True: "on", False: "off"}.get(value, value)
    if mode not in MODES:
        raise ValueError(f"{key}: expected one of {list(MODES)}, got {value!r}")
    return mode


def run_layer(checkpointing: bool, function: Callable[..., Any], layer: Any, *rest: Any) -> Any:
    """`function(layer, *rest)`; with `checkpointing` its activations are computed again in the backward pass. A layer
    that is held in parts (policies.sharding) is whole inside."""
    held = getattr(layer, "__dict__", {}).get(RUN)
    run = partial(_run, checkpointing, function)
    return run(layer, *rest) if held is None else held(run, *rest)


def _run(checkpointing: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    if checkpointing and torch.is_grad_enabled():
        # The state of the generator is kept: dropout may be on, and the second pass must draw what the first drew.
        return checkpoint(function, *arguments, use_reentrant=False, context_fn=computed_again)
    return function(*arguments)


class CompiledLayer:
    """A layer function `f(layer, tensors…)`, compiled at its first call with inputs of a form, where that is wanted."""

    def __init__(self, function: FunctionType, mode: str, backend: str | Callable = "inductor") -> None:
        self.function, self.mode, self.backend = function, mode, backend
        self._forms: dict[tuple, Callable[..., Any]] = {}  # form of the inputs -> what runs them
        self._full = self._failed = False  # no form is compiled any more; those that are compiled stay so

    def __call__(self, layer: Any, x: Tensor, *rest: Any) -> Any:
        """As the function itself, errors included."""
        pays = x.is_cuda and not torch.is_grad_enabled()
        if self.mode == "off" or x.is_meta or (self.mode == "auto" and not pays):
            return self.function(layer, x, *rest)
        form = (_modes(x), *map(_form, (x, *rest)))
        run = self._forms.get(form) or self._compile(form, x)
        try:
            return run(layer, x, *rest)
        except Exception as error:
            if not _is_compilers(error):
                raise
            result = self.function(layer, x, *rest)  # an error of the layer's own is raised here, as it is
            self._forms[form], self._failed = self.function, True
            log.warning("policy.compile: %s runs uncompiled: %s", self.function.__name__, _reason(error))
            return result

    def _compile(self, form: tuple, x: Tensor) -> Callable[..., Any]:
        """What runs inputs of a form that is new."""
        if self._failed or self._full:
            return self.function
        if len(self._forms) >= MAX_FORMS:
            self._full = True
            name, shape = self.function.__name__, tuple(x.shape)
            log.warning(
                "policy.compile: %s is compiled for %d forms of its inputs, no more: others run uncompiled, the first "
                "has x of %s",
                *(name, MAX_FORMS, shape),
            )
            return self.function
        # fullgraph: what cannot be compiled in one piece is an error, and said, instead of running in pieces.
        compiled = torch.compile(_own_code(self.function), backend=self.backend, dynamic=False, fullgraph=True)
        return self._forms.setdefault(form, compiled)

    def __deepcopy__(self, memo: dict) -> CompiledLayer:
        return CompiledLayer(self.function, self.mode, self.backend)


def _own_code(function: FunctionType) -> FunctionType:
    """The function with a code object of its own, by which torch keeps what it compiled and counts it."""
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _modes(x: Tensor) -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled(x.device.type)


def _form(value: Any) -> Any:
    """What compiled code is made for: of a tensor its shape, dtype and whether gradients flow through it."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.requires_grad
    if isinstance(value, tuple | list):
        return tuple(map(_form, value))
    return value if isinstance(value, bool | int | float | str) else type(value)


def _is_compilers(error: Exception) -> bool:
    return any(f"{kind.__module__}.".startswith(COMPILER) for kind in type(error).__mro__)


def _reason(error: Exception) -> str:
    """The first line of what a backend raised, not of the frame that torch puts around it."""
    cause = getattr(error, "inner_exception", None) or error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
