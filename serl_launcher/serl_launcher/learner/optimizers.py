"""Optimizer factories as the device wants them. Called by the learner.

On a GPU one fused kernel updates all parameters of a group, where the optimizer has such a kernel and the yaml does not
say otherwise (`fused`, `foreach`).
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def for_device(factory: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The factory, with `fused=True` on a GPU where that is possible and not decided."""
    inner = factory.func if isinstance(factory, partial) else factory
    given = factory.keywords if isinstance(factory, partial) else {}
    decided = {"fused", "foreach"} & given.keys()
    if device.type != "cuda" or decided or "fused" not in inspect.signature(inner).parameters:
        return factory
    return partial(factory, fused=True)
