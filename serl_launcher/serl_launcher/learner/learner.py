"""One optimisation step after another: owns the optimizer, the learning-rate schedule, clipping and the average.

The trainer (learner.trainer) calls `step` with a batch and reads `averaged` when it publishes. The agent only returns
losses; everything that persists between steps is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from serl_launcher.agents.flow_matching import FlowMatchingAgent
from serl_launcher.learner.parameters import describe_mismatch
from serl_launcher.replay.views import ChunkBatch


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate of a training stage: linear warm-up, then a cosine to `final` of the peak."""

    peak: float = 1.0  # against the optimizer's lr
    steps: int = 1000  # of the stage
    warmup: int = 100
    final: float = 0.1  # share of the peak at the end

    def scale(self, step: int) -> float:
        """Factor on the optimizer's lr at this step of the stage."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        progress = min(1.0, step / max(1, self.steps))
        return self.peak * warm * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress)))


class Learner:
    """Trains an agent; `averaged` is the exponential moving average that is served."""

    def __init__(
        self,
        agent: FlowMatchingAgent,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        accelerator: Accelerator,
        *,
        max_grad_norm: float,
        ema_decay: float,
    ) -> None:
        self._accelerator = accelerator
        self._state = agent.trainable_state()
        built = optimizer(self._state.values())
        self._base_lr = [group["lr"] for group in built.param_groups]
        self.agent = agent
        self._prepared, self.optimizer = accelerator.prepare(agent, built)
        self._max_grad_norm, self._ema_decay = max_grad_norm, ema_decay
        self.averaged = {name: p.detach().clone() for name, p in self._state.items()}
        self.step_count = 0
        self._average_age = 0

    def begin_stage(self) -> None:
        """Let the average forget faster for a while: the loss landscape of a new stage differs."""
        self._average_age = min(self._average_age, 50)

    def step(self, batch: ChunkBatch, lr_scale: float) -> dict[str, float]:
        """One optimizer step; returns its metrics. Raises FloatingPointError when loss or gradient is not finite."""
        for group, base in zip(self.optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * lr_scale
        loss, metrics = self._prepared(batch, self.step_count)
        self.optimizer.zero_grad()
        self._accelerator.backward(loss)
        norm = self._accelerator.clip_grad_norm_(self._state.values(), self._max_grad_norm)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            figures = f"loss {loss.item():.3g}, gradient norm {norm.item():.3g}"
            raise FloatingPointError(f"step {self.step_count}: {figures}; the step was not taken")
        self.optimizer.step()
        self.step_count += 1
        self._average()
        return {
            **{k: float(v) for k, v in metrics.items()},
            "optim/grad_norm": float(norm),
            "optim/lr": self._base_lr[0] * lr_scale,
        }

    @torch.no_grad()
    def _average(self) -> None:
        self._average_age += 1
        decay = min(self._ema_decay, (1 + self._average_age) / (10 + self._average_age))
        torch._foreach_lerp_(list(self.averaged.values()), [p.detach() for p in self._state.values()], 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold, under flat names: parameters and their average."""
        raw = {f"raw.{name}": p.detach() for name, p in self._state.items()}
        return raw | {f"averaged.{name}": p for name, p in self.averaged.items()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Strict inverse of `tensors`. Raises ValueError naming what is missing, unknown or of another shape."""
        mine = self.tensors()
        problems = describe_mismatch(mine, tensors)
        if problems:
            raise ValueError("checkpoint does not fit this policy: " + "; ".join(problems))
        for name, target in mine.items():
            target.copy_(tensors[name])

    @torch.no_grad()
    def start_from(self, published: dict[str, Tensor]) -> None:
        """Begin at published parameters (checkpoint_path): both the raw weights and their average."""
        problems = describe_mismatch(self._state, published)
        if problems:
            raise ValueError("checkpoint_path does not fit this policy: " + "; ".join(problems))
        for name, p in self._state.items():
            p.copy_(published[name])
            self.averaged[name].copy_(published[name])

    def counters(self) -> dict[str, int]:
        return {"step": self.step_count, "average_age": self._average_age}

    def load_counters(self, counters: dict[str, int]) -> None:
        self.step_count, self._average_age = counters["step"], counters["average_age"]
