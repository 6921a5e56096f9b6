"""The table of docs/performance.md: inference and training steps of PI0 and GR00T N1.7 beside what the machine can do.

Rates of a large matrix product and of a large copy are measured in the same run. A row's floor is the longer of its own
FLOPs at the one and the weights that it must read at the other; `fraction_of_peak` is FLOPs a second over the first.
Inference is what the policy server does: arrays in, through a CUDA graph where there is a GPU, actions out on the host.
Every model and kind of step is measured in a process of its own (suites._apart): what fails says so, the next begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rows import Row
from suites._apart import apart
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from serl_launcher.policies import kernels
from serl_launcher.policies.base import PolicyInput, flow_loss, sample, trainable
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.full import FullGrootSize
from serl_launcher.policies.groot.tiny import TinyGrootSize
from serl_launcher.policies.pi0.build import build_pi0
from serl_launcher.policies.pi0.full import FullSize
from serl_launcher.policies.precision import hold
from serl_launcher.serving.graphs import GraphRunner
from serl_transport.contract.specs import TaskSpec

# (goal, first step) in ms on an H100, as docs/performance.md has them.
GOALS = {
    "pi0/inference/batch1": (12.0, 25.0),
    "pi0/inference/batch32": (300.0, None),
    "pi0/expert_step/batch32": (270.0, None),
    "pi0/full_step/batch32": (1100.0, None),
    "groot_n1_7/inference/batch1": (10.0, 20.0),
}


@dataclass(frozen=True, slots=True)
class Model:
    """One head of the table."""

    name: str
    build: Callable[..., nn.Module]  # (train mode, precision) -> policy with random weights
    side: int  # px of its task's pictures
    flow_steps: int
    modes: tuple[str, ...]  # training steps that are timed

    @property
    def spec(self) -> TaskSpec:
        return task(self.side)


@dataclass(slots=True)
class Peaks:
    """What the machine reaches."""

    flops: float  # a second, of a large matrix product in the precision of the run
    bytes: float  # a second, read and written by a large copy

    @classmethod
    def measured(cls, device: Any, precision: str) -> Peaks:
        """In this process."""
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        return cls(matmul_rate(device, dtype), copy_rate(device))


def full_models() -> list[Model]:
    """The released sizes with random weights."""
    return _models(224, FullSize("pi0"), 50, FullGrootSize(), 40)


def middle_models(size: Any, depth: int) -> list[Model]:
    """A size whose arithmetic dominates on a CPU. size: of PI0."""
    shape = dict(width=256, layers=depth, vision_width=128, vision_layers=depth, head_width=256, head_layers=2 * depth)
    return _models(size.image_size, size, 16, TinyGrootSize(image_size=128, prompt_tokens=16, **shape), 16)


def _models(side: int, pi0: Any, pi0_ticks: int, groot: Any, groot_ticks: int) -> list[Model]:
    return [
        Model("pi0", partial(_pi0, side, pi0, pi0_ticks), side, 10, ("expert", "full")),
        Model("groot_n1_7", partial(_groot, side, groot, groot_ticks), side, 4, ("head", "full")),
    ]


def _pi0(side: int, size: Any, ticks: int, train: str, precision: str) -> nn.Module:
    options = dict(train=train, attention="sdpa", precision=precision)
    return build_pi0("bench", task(side), "random", 0, ticks, size, **options)


def _groot(side: int, size: Any, ticks: int, train: str, precision: str) -> nn.Module:
    """`head`: what GR00T's users tune by default; `full`: backbone as well."""
    tune = {"llm": train == "full", "visual": train == "full"}
    return build_groot("bench", task(side), "random", 0, ticks, size, tune=tune, precision=precision)


def task(side: int) -> TaskSpec:
    """Three cameras, 7 joints."""
    joints = [f"j{k}" for k in range(7)]
    low, high = [-1.0] * 7, [1.0] * 7
    cameras = {camera: [side, side] for camera in ("front", "side", "wrist")}
    return TaskSpec.from_dict(
        dict(name="bench", prompt="pick up the red cube", cameras=cameras)
        | dict(state_names=joints, state_low=low, state_high=high)
        | dict(action_names=joints, action_low=low, action_high=high, control_hz=10, max_ticks=60)
    )


def table(device: Any, models: list[Model], batches: tuple[int, ...], rounds: int, precision: str) -> Iterator[Row]:
    """Every row, model by model."""
    yield from apart("policy/peak", partial(peak_rows, device, precision))
    for model in models:
        inference = partial(inference_rows, device, model, batches, rounds, precision)
        yield from apart(f"policy/{model.name}/inference", inference)
        for mode in model.modes:
            name = f"{model.name}/{mode}_step/batch{batches[-1]}"
            yield from apart(
                f"policy/{name}", partial(training_rows, device, model, mode, batches[-1], rounds, precision)
            )


def peak_rows(device: Any, precision: str) -> Iterator[Row]:
    """What the machine reaches."""
    peaks = Peaks.measured(device, precision)
    yield Row.of(f"policy/peak/matmul/{precision}", peaks.flops / 1e12, "TFLOP/s")
    yield Row.of("policy/peak/memory", peaks.bytes / 1e9, "GB/s")


def inference_rows(device: Any, model: Model, batches: tuple[int, ...], rounds: int, precision: str) -> Iterator[Row]:
    """Each batch size, as served; on a GPU without graphs too."""
    peaks = Peaks.measured(device, precision)
    policy = built(device, model, "expert" if model.name == "pi0" else "head", precision).eval()
    policy.requires_grad_(False)
    hold(policy, precision, masters=False)
    policy.fuse_for_serving()

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        prefix = policy.encode_prepared({k: x for k, x in inputs.items() if k != "noise"}, features=False)
        return sample(policy, prefix, inputs["noise"], model.flow_steps)

    graphs = GraphRunner(forward) if device.type == "cuda" else None

    @torch.inference_mode()
    def answer(observation: PolicyInput, run: Callable) -> Tensor:
        shape = (len(observation), policy.action_horizon, policy.action_dim)
        inputs = policy.prepare(observation) | {"noise": torch.randn(shape, device=device)}
        return policy.physical_actions(run(inputs)).float().cpu()

    for batch in batches:
        name, observation = f"{model.name}/inference/batch{batch}", observe(model.spec, batch)
        cost = Cost(flops_of(policy, partial(answer, observation, forward)), served_bytes(policy, model.flow_steps))
        if graphs is not None:
            answer(observation, graphs)
            yield from timed(device, f"{name}/eager", partial(answer, observation, forward), cost, peaks, rounds)
        yield from timed(device, name, partial(answer, observation, graphs or forward), cost, peaks, rounds)
    if graphs is not None:
        yield Row.of(f"policy/{model.name}/inference/graphs", graphs.captured, "buckets captured")
        yield memory_row(f"policy/{model.name}/inference")


def training_rows(device: Any, model: Model, mode: str, batch: int, rounds: int, precision: str) -> Iterator[Row]:
    """Forward, backward and optimizer; the full step checkpoints its layers."""
    peaks = Peaks.measured(device, precision)
    policy = built(device, model, mode, precision).train()
    policy.checkpointing = mode == "full"
    optimizer = torch.optim.AdamW(trainable(policy).values(), lr=1e-5, fused=device.type == "cuda")
    work = Work.of(policy, model.spec, batch, device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        work.loss(policy).backward()
        optimizer.step()

    name = f"{model.name}/{mode}_step/batch{batch}"
    cost = Cost(flops_of(policy, step), 0)
    yield from timed(device, name, step, cost, peaks, rounds)
    if device.type == "cuda":  # whether compiling the layers pays in training
        policy.compile_layers("on")
        yield from timed(device, f"{name}/compiled", step, cost, peaks, rounds)
        yield memory_row(f"policy/{name}")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call needs at least."""

    flops: int
    bytes: int  # of weights that it reads


def flops_of(policy: nn.Module, work: Callable) -> int:
    """Counted without torch.compile, whose kernels the counter does not see; compiled from here on where it pays."""
    policy.compile_layers("off")
    with FlopCounterMode(display=False) as counter:
        work()
    policy.compile_layers("auto")
    return counter.get_total_flops()


def timed(device: Any, name: str, work: Callable, cost: Cost, peaks: Peaks, rounds: int) -> Iterator[Row]:
    """Median time in ms against its floor, its share of the peak, and the goals that are set for it."""
    work()
    median = float(np.median([seconds(device, work) for _ in range(rounds)]))
    floor = max(cost.flops / peaks.flops, cost.bytes / peaks.bytes)
    yield Row.of(f"policy/{name}", median * 1e3, "ms", floor * 1e3)
    yield Row.of(f"policy/{name}/fraction_of_peak", cost.flops / median / peaks.flops, "of the measured FLOP/s")
    goals = GOALS.get(name, (None, None)) if device.type == "cuda" else (None, None)
    for label, goal in zip(("goal", "first_step"), goals, strict=True):
        if goal is not None:
            yield Row.of(f"policy/{name}/{label}", median * 1e3, "ms", goal, "<= 1.0")


def built(device: Any, model: Model, mode: str, precision: str) -> nn.Module:
    """A policy with random weights, made on the device; and the process is made as those of the product are."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kernels.pin_kernels(device)
    with torch.device(device):
        return model.build(mode, precision).to(device)


def observe(spec: TaskSpec, batch: int) -> PolicyInput:
    """Random pictures and states."""
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (batch, h, w, 3), dtype=np.uint8) for c, (h, w) in spec.cameras.items()}
    state = rng.uniform(-1, 1, (batch, len(spec.state_names))).astype(np.float32)
    return PolicyInput(images, state, [spec.prompt] * batch)


@dataclass(frozen=True, slots=True)
class Work:
    """One training batch, and the noise that every path gets."""

    observation: PolicyInput
    chunk: Tensor  # float32[b, ah, ad]
    noise: Tensor  # float32[b, ah, ad]
    t: Tensor  # float32[b]

    @classmethod
    def of(cls, policy: nn.Module, spec: TaskSpec, batch: int, device: Any) -> Work:
        """A random one."""
        shape = (batch, policy.action_horizon, policy.action_dim)
        chunk, noise = (torch.randn(shape, device=device) for _ in range(2))
        return cls(observe(spec, batch), chunk, noise, torch.rand(batch, device=device))

    def loss(self, policy: nn.Module) -> Tensor:
        """Mean flow loss by our path."""
        keep = torch.zeros(self.chunk.shape[:2], dtype=torch.bool, device=self.t.device)
        prefix, ones = policy.encode(self.observation), torch.ones_like(self.t)
        return flow_loss(policy, prefix, self.chunk, keep, ones, self.noise, self.t).mean()


def served_bytes(policy: nn.Module, steps: int) -> int:
    """Weights that one answer reads: the backbone once, what runs at every flow step as often; tables are looked up."""
    backbone = {id(p) for p in policy.backbone.parameters()}
    dead, total = policy.dead_parameters(), 0
    for name, p in policy.named_parameters():
        if name in dead or "embed_tokens" in name:
            continue
        once = id(p) in backbone or ".vl" in name or "state_encoder" in name
        share = getattr(policy.core.config, "max_num_embodiments", 1) if name.endswith((".W", ".b")) else 1
        total += p.numel() * p.element_size() * (1 if once else steps) // share
    return total


def memory_row(name: str) -> Row:
    """The most that was allocated since the last model."""
    return Row.of(f"{name}/memory", torch.cuda.max_memory_allocated() / 1e9, "GB")


def matmul_rate(device: Any, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of five."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return max(2 * n**3 / seconds(device, lambda: a @ b) for _ in range(5))


def copy_rate(device: Any) -> float:
    """Bytes read and written a second by a large copy, the best of five."""
    n = 2**30 if device.type == "cuda" else 2**26
    a = torch.zeros(n, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return max(2 * n / seconds(device, lambda: b.copy_(a)) for _ in range(5))


def seconds(device: Any, work: Callable) -> float:
    """Wall time of a call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
