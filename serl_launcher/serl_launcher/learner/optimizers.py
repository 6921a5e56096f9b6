"""Optimizers as the device wants them, and a step of theirs that the device itself leaves out. Called by the learner.

One fused kernel updates all parameters of a group, where the optimizer has such a kernel and the yaml does not say
otherwise (`fused`, `foreach`): on a GPU for speed, Adam's on a CPU, too, because it takes the word whether anything is
to be done from the device (`found_inf`), so that the host need not wait for it.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def for_device(factory: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The factory, with `fused=True` where that is of use (see above), possible and not decided."""
    inner = factory.func if isinstance(factory, partial) else factory
    given = factory.keywords if isinstance(factory, partial) else {}
    decided = {"fused", "foreach"} & given.keys()
    useful = device.type == "cuda" or _is_adam(inner)
    if decided or not useful or "fused" not in inspect.signature(inner).parameters:
        return factory
    return partial(factory, fused=True)


def move(optimizer: Any, taken: Tensor) -> None:
    """The optimizer's step where `taken`, float32 scalar on the device, is 1; where it is 0 nothing of it changes.

    Only fused Adam and AdamW are asked without the host waiting. Others cannot leave a step out by themselves (fused
    SGD would keep momentum that was never written).
    """
    if _is_adam(type(optimizer)) and all(group["fused"] for group in optimizer.param_groups):
        optimizer.found_inf = 1 - taken
        optimizer.step()
    elif taken:
        optimizer.step()


def _is_adam(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, torch.optim.Adam)
