"""Which kernels a card computes with, chosen once: the fused attention, and how float32 products are rounded.

The policy engine and the learner call `pin_kernels` at their start. `AttentionCalls` watches one pass and tells which
kernels it took. Who compares two paths (benchmarks, the tests on a card) does it under `exact`: TF32 keeps 10 of 23
bits of a factor, so that two shapes of one product differ by 1e-3 of their size, not by 1e-6.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger("policy")
ATTENTION = {  # torch.backends.cuda.enable_<name>_sdp
    "flash": True,  # takes no mask
    "mem_efficient": True,
    "math": True,  # unfused, where the others refuse: said at the start of serving (AttentionCalls)
    "cudnn": False,  # plans every shape anew at its first call, and what it takes changes between its releases
}
_FUSED = "aten._scaled_dot_product_"
_UNFUSED = "aten._safe_softmax"  # of torch's own attention by plain operations, and of nothing else


def pin_kernels(device: torch.device) -> None:
    """Pin what CUDA may compute with, for this process, and say it in one line; nothing on another device."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    for name, on in ATTENTION.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(on)
    allowed, off = (", ".join(name for name, on in ATTENTION.items() if on is wanted) for wanted in (True, False))
    log.info("%s: attention kernels %s (%s off); float32 products in TF32", device, allowed, off)


@contextmanager
def exact() -> Iterator[None]:
    """Float32 products and convolutions at full precision, on a card too; as it was afterwards."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


class AttentionCalls(TorchDispatchMode):
    """Counts the attention kernels of what runs under it; not of compiled code, nor in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()  # calls, by torch's own name for the kernel; "math": unfused

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(function)
        if name.startswith(_FUSED):
            self.kernels[name.removeprefix(_FUSED).removesuffix(".default").replace("_attention", "")] += 1
        elif name.startswith(_UNFUSED):
            self.kernels["math"] += 1
        return function(*args, **(kwargs or {}))

    def say(self) -> None:
        """One line in the log; a warning where attention was not fused."""
        found = ", ".join(f"{name} {calls}" for name, calls in self.kernels.most_common()) or "none"
        if self.kernels["math"]:
            log.warning("attention calls of an answer: %s; what runs as math no fused kernel takes, and is slow", found)
        else:
            log.info("attention calls of an answer: %s", found)
