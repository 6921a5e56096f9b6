"""The two devices that stages run on: the card, and the host that a rehearsal takes for it. All of torch.cuda is here.

Stages call these methods and nothing of torch.cuda, so that a rehearsal runs every line of theirs.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.graphs import GraphRunner

SYNCHRONISES = "synchronizing"  # in torch's warning of an operation that waits for the device


class Card:
    """The GPU."""

    torch_device = torch.device("cuda")
    compiler = "inductor"
    half = torch.bfloat16
    activities = (ProfilerActivity.CPU, ProfilerActivity.CUDA)
    profiled = DeviceType.CUDA

    def wait(self) -> None:
        """Until everything that is queued is done."""
        torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """The highest mark of memory begins anew here; what is not in use goes back."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """The most that tensors took since `forget_peak`."""
        return torch.cuda.max_memory_allocated()

    def watch_waits(self, mode: str) -> None:
        """`warn` or `default`: whether operations that wait for the device say so."""
        torch.cuda.set_sync_debug_mode(mode)

    def graphs(self, engine: PolicyEngine) -> Any:
        """A runner of graphs without any captured yet, as the engine makes it."""
        return engine._graph_runner("on")

    def facts(self) -> dict[str, Any]:
        """What the card is."""
        p = torch.cuda.get_device_properties(0)
        found = dict(gpu=p.name, memory_gb=round(p.total_memory / 1e9, 1), multiprocessors=p.multi_processor_count)
        found |= dict(capability=f"{p.major}.{p.minor}", cudnn=torch.backends.cudnn.version(), nvidia_smi=nvidia_smi())
        return found | dict(bf16=torch.cuda.is_bf16_supported())


class Host:
    """The CPU in the card's place."""

    torch_device = torch.device("cpu")
    compiler = "aot_eager"  # traces as the card's does, and compiles no C++
    half = torch.float32  # a CPU without bf16 instructions takes minutes for it
    activities = (ProfilerActivity.CPU,)
    profiled = DeviceType.CPU

    def wait(self) -> None:
        """Nothing is queued."""

    def forget_peak(self) -> None:
        """The host's mark cannot be set back without /proc; it counts from the start of the process."""

    def peak_bytes(self) -> int:
        """The most that the process took."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def watch_waits(self, mode: str) -> None:
        """Nothing waits for a device."""

    def graphs(self, engine: PolicyEngine) -> Any:
        """A runner whose captures run the same forward pass into the same buffer."""
        return GraphRunner(engine._forward, recorded)

    def facts(self) -> dict[str, Any]:
        """What stands for the card."""
        return dict(gpu="none: a rehearsal on the CPU", nvidia_smi=nvidia_smi())


def recorded(forward: Callable, inputs: dict[str, Tensor], pool: Any) -> tuple[Tensor, Callable, Any]:
    """What a capture gives, without CUDA."""
    output = forward(inputs).clone()
    return output, lambda: output.copy_(forward(inputs)), pool


def nvidia_smi() -> str:
    """Name, driver, clocks and what else runs on the card, one line; why not, where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi"
    query = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,power.limit,utilization.gpu"
    command = [tool, f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return " ".join((done.stdout or done.stderr).split())


@contextmanager
def waits(device: Card | Host) -> Iterator[list[str]]:
    """Where the host waits for the device within: `file:line` of every time, filled when it ends."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        device.watch_waits("warn")
        try:
            yield found
        finally:
            device.watch_waits("default")
            found += [f"{w.filename}:{w.lineno}" for w in told if SYNCHRONISES in str(w.message)]
