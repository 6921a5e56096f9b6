"""One optimisation step after another: owns the optimizers, the learning-rate schedule, clipping and the average.

The trainer (learner.trainer) calls `step` with a batch and reads `averaged` when it publishes. The agent only returns
losses, one a parameter group (agents.base); everything that persists between steps is here.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from serl_launcher.agents.base import Agent, Limit, ParameterGroup, follow
from serl_launcher.learner.checkpoint import RAW
from serl_launcher.learner.copies import Copies
from serl_launcher.learner.optimizers import for_device, move
from serl_launcher.policies.kernels import pin_kernels
from serl_launcher.run.parameters import AVERAGED, Renamed, describe_mismatch

AUXILIARY = "carried."
"""Prefix in a checkpoint of what the agent's `auxiliary_state` holds; named by the first checkpoints."""
REFUSED = "optim/refused"
"""Metric: 1 where the device left the step out, else 0."""
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


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
    """Trains an agent; `averaged` is the exponential moving average that is served.

    optimizer: makes the optimizer of every group that `optimizers` does not name.
    """

    def __init__(
        self,
        agent: Agent,
        optimizer: OptimizerFactory,
        accelerator: Accelerator,
        *,
        max_grad_norm: float,
        ema_decay: float,
        optimizers: Mapping[str, OptimizerFactory] | None = None,
    ) -> None:
        device = accelerator.device
        pin_kernels(device)
        optimizer = for_device(optimizer, device)
        optimizers = {name: for_device(factory, device) for name, factory in (optimizers or {}).items()}
        self.agent = agent
        self._accelerator = accelerator
        self._groups = agent.groups()
        unknown = [name for name in optimizers if name not in self._groups]
        if unknown:
            raise ValueError(f"algo.optimizers: expected groups of {', '.join(self._groups)}, got {', '.join(unknown)}")
        built = {name: optimizers.get(name, optimizer)(group.tensors.values()) for name, group in self._groups.items()}
        self._base_lr = {name: [g["lr"] for g in opt.param_groups] for name, opt in built.items()}
        self._prepared, *prepared = accelerator.prepare(agent, *built.values())
        self._optimizers = dict(zip(built, prepared, strict=True))
        self._state = agent.trainable_state()
        self._limits: Mapping[str, Limit] = getattr(agent, "limits", {})
        self._max_grad_norm, self._ema_decay = max_grad_norm, ema_decay
        self.averaged = {name: p.detach().clone() for name, p in self._state.items()}
        self.copies: list[Copies] = []  # of this learner's state; a step changes nothing before they are whole
        self.step_count = 0
        self._average_age = 0

    def begin_stage(self, mode: str) -> None:
        """Let the average forget faster for a while: the loss landscape of a new stage differs."""
        self._average_age = min(self._average_age, 50)
        self.agent.begin_stage(mode)

    def step(self, batch: Any, lr_scale: float) -> dict[str, Tensor | float]:
        """One optimizer step; returns its metrics, which stay on the device (learner.step_log reads them when due).

        batch: what the agent takes, or a list of such batches of one size whose gradients are averaged.

        The device refuses the step when a loss, a gradient or one of the agent's `limits` is not what it may be.
        Nothing but counters has changed then: neither parameters nor optimizers, average or targets. The host, which
        reads nothing back here, learns of it from the metric REFUSED (`fault`).
        """
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()
        losses, metrics = _mean([self._backward(part, share) for part, share in _parts(batch)])
        norms = {
            name: self._accelerator.clip_grad_norm_(self._groups[name].tensors.values(), self._max_grad_norm)
            for name in losses
        }
        taken = self._taken([*losses.values(), *norms.values()], metrics)
        for copies in self.copies:
            copies.hold_changes()
        for name in losses:
            self._set_rate(name, self._groups[name], lr_scale)
            move(self._optimizers[name], taken)
        self.agent.after_step(taken)
        self.step_count += 1
        self._average(taken)
        first = next(iter(self._groups))
        by_group = {f"optim/grad_norm_{name}": norm for name, norm in norms.items()} if len(self._groups) > 1 else {}
        largest = self._gathered(norms.values()).max()
        rate = {"optim/lr": self._base_lr[first][0] * lr_scale}
        return {**metrics, **by_group, "optim/grad_norm": largest, **rate, REFUSED: 1 - taken}

    def fault(self, step: int, row: Mapping[str, float]) -> FloatingPointError | None:
        """Why the device refused this step, from its metrics as they were read back; None where it was taken."""
        if not row.get(REFUSED):
            return None
        passed = {name: limit for name, limit in self._limits.items() if name in row and not row[name] <= limit.most}
        told = [limit.told.format(row[name]) for name, limit in passed.items()]
        told += [
            f"{name} {value:.3g}"
            for name, value in row.items()
            if name.startswith(("losses/", "optim/")) and not math.isfinite(value)
        ]
        return FloatingPointError(f"step {step}: {', '.join(told)}; the step was not taken")

    def _set_rate(self, name: str, group: ParameterGroup, lr_scale: float) -> None:
        scale = lr_scale if group.scheduled else 1.0
        for param_group, base in zip(self._optimizers[name].param_groups, self._base_lr[name], strict=True):
            param_group["lr"] = base * scale

    def _backward(self, batch: Any, share: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and metrics of a batch, whose gradients are added, times `share`, to those that are there."""
        losses, metrics = self._prepared(batch, self.step_count)
        self._accelerator.backward(reduce(torch.add, losses.values()) * share)
        return {name: loss.detach() for name, loss in losses.items()}, metrics

    def _taken(self, finite: Iterable[Tensor], metrics: Mapping[str, Tensor]) -> Tensor:
        """1 where everything is finite and within the agent's limits, else 0: a float32 scalar on the device."""
        sound = torch.isfinite(self._gathered(finite)).all()
        for name, limit in self._limits.items():
            if name in metrics:
                sound = sound & (metrics[name] <= limit.most)
        return sound.float()

    def _gathered(self, scalars: Iterable[Tensor]) -> Tensor:
        """Scalars in one tensor on the device; the norm of a group without gradients is on the host."""
        return torch.stack([x.detach().float().to(self._accelerator.device) for x in scalars])

    @torch.no_grad()
    def _average(self, taken: Tensor) -> None:
        self._average_age += 1
        decay = min(self._ema_decay, (1 + self._average_age) / (10 + self._average_age))
        follow(self.averaged.values(), self._state.values(), (1 - decay) * taken)

    @contextmanager
    def averaged_in_place(self) -> Iterator[Agent]:
        """The agent with the averaged parameters in place of the raw ones, which come back; nothing is copied."""
        self._exchange()
        try:
            yield self.agent
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, p in self._state.items():
            p.data, self.averaged[name] = self.averaged[name], p.data

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold, under flat names: parameters, their average, targets and the like."""
        raw = {f"{RAW}{name}": p.detach() for name, p in self._state.items()}
        published = {id(p) for p in self._state.values()}
        further = {
            f"{group}.{name}": p.detach()
            for group, members in self._groups.items()
            for name, p in members.tensors.items()
            if id(p) not in published
        }
        auxiliary = {f"{AUXILIARY}{name}": p for name, p in self.agent.auxiliary_state().items()}
        return raw | {f"{AVERAGED}{name}": p for name, p in self.averaged.items()} | further | auxiliary

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def on_card(self) -> bool:
        """Is the state of the optimizers on another device than the host?"""
        return self.device.type != "cpu"

    def prepare(self, batch: Any) -> Any:
        """The batch with all made that needs no step to be over; called while one runs, in another thread."""
        prepare = getattr(self.agent, "prepare", None)
        return batch if prepare is None else prepare(batch)

    def optimizer_state(self) -> dict[str, Any]:
        """State of every optimizer, by group."""
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `optimizer_state`. Raises ValueError when the groups are others."""
        if set(state) != set(self._optimizers):
            raise ValueError(
                f"checkpoint is of another algorithm: expected optimizers of {', '.join(self._optimizers)}, "
                f"got {', '.join(map(str, state))}"
            )
        for name, optimizer in self._optimizers.items():
            for group, mine in zip(state[name]["param_groups"], optimizer.param_groups, strict=True):
                group |= {key: mine[key] for key in ("fused", "foreach") if key in mine}  # how, not what
            for row in state[name]["state"].values():  # step counts, which stay on the host: not in a mapped file
                row |= {key: x.clone() for key, x in row.items() if isinstance(x, Tensor) and x.ndim == 0}
            optimizer.state.clear()  # or both would be there for a moment
            optimizer.load_state_dict(state[name])

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Strict inverse of `tensors`. Raises ValueError naming what is missing, unknown or of another shape."""
        mine = self.tensors()
        problems = describe_mismatch(mine, tensors)
        if problems:
            raise ValueError("checkpoint does not fit this policy: " + "; ".join(problems))
        for name, target in mine.items():
            target.copy_(tensors[name])

    @torch.no_grad()
    def start_from(self, published: Mapping[str, Tensor]) -> None:
        """Begin at published parameters (checkpoint_path): both the raw weights and their average.

        What the agent adds to a plain policy (`added_to_policy`) may be absent and keeps its initial values.
        """
        for mine in (self._state, self.averaged):
            self._take(mine, published, "checkpoint_path")

    @torch.no_grad()
    def continue_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin at the policy in another algorithm's `tensors`: raw weights and their average.

        What an algorithm adds to a policy is left out. Raises ValueError as `load_tensors` does for the rest.
        """
        for prefix, mine in ((RAW, self._state), (AVERAGED, self.averaged)):
            theirs = {n.removeprefix(prefix): n for n in tensors if n.startswith(prefix)}
            theirs = {short: n for short, n in theirs.items() if short in mine}
            self._take(mine, Renamed(tensors, theirs), "checkpoint")

    def _take(self, mine: dict[str, Tensor], theirs: Mapping[str, Tensor], what: str) -> None:
        """Copy all of theirs; only what the agent adds to a plain policy may be missing. ValueError names `what`."""
        added = tuple(getattr(self.agent, "added_to_policy", ()))
        want = {n: p for n, p in mine.items() if n in theirs or not (added and n.startswith(added))}
        if problems := describe_mismatch(want, theirs):
            raise ValueError(f"{what} does not fit this policy: " + "; ".join(problems))
        for name, p in want.items():
            p.copy_(theirs[name])

    def counters(self) -> dict[str, int]:
        return {"step": self.step_count, "average_age": self._average_age}

    def load_counters(self, counters: dict[str, int]) -> None:
        self.step_count, self._average_age = counters["step"], counters["average_age"]


def _parts(batch: Any) -> list[tuple[Any, float]]:
    """The batches of a step, each with its share of the gradient."""
    parts = batch if isinstance(batch, list) else [batch]
    return [(part, 1 / len(parts)) for part in parts]


def _mean(found: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and metrics of a step, from those of its batches."""
    if len(found) == 1:
        return found[0]
    losses, metrics = zip(*found, strict=True)
    return tuple({name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} for rows in (losses, metrics))
