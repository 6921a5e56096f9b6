"""One optimisation step after another: owns the optimizers, the learning-rate schedule, clipping and the average.

The trainer (learner.trainer) calls `step` with a batch and reads `averaged` when it publishes. The agent only returns
losses, one a parameter group (agents.base); everything that persists between steps is here.

Of several ranks each has a learner, which is given its share of every batch: the rows of rank 0 first, then those of
rank 1, all shares of one size. What an engine (learner.engines) holds in parts, `averaged`, `tensors` and
`optimizer_state` put together: every rank asks for them at the same place, and only rank 0 gets them.
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
from serl_launcher.agents.shares import sharing
from serl_launcher.learner.checkpoint import RAW
from serl_launcher.learner.copies import Copies
from serl_launcher.learner.engines import Engine, Part
from serl_launcher.learner.optimizers import for_device, move
from serl_launcher.learner.profile import timed
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

    optimizer: makes the optimizer of every group that `optimizers` does not name. engine: how several ranks hold the
    agent; None: this one alone.
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
        engine: Engine | None = None,
    ) -> None:
        device = accelerator.device
        pin_kernels(device)
        optimizer = for_device(optimizer, device)
        optimizers = {name: for_device(factory, device) for name, factory in (optimizers or {}).items()}
        self.agent, self._engine = agent, engine or Engine(accelerator)
        groups = agent.groups()
        unknown = [name for name in optimizers if name not in groups]
        if unknown:
            raise ValueError(f"algo.optimizers: expected groups of {', '.join(groups)}, got {', '.join(unknown)}")
        self._hold(optimizer, optimizers)
        self._base_lr = {name: [g["lr"] for g in opt.param_groups] for name, opt in self._optimizers.items()}
        self._limits: Mapping[str, Limit] = getattr(agent, "limits", {})
        self._max_grad_norm, self._ema_decay = max_grad_norm, ema_decay
        self._averaged = {name: part.share.detach().clone() for name, part in self._state.items()}
        self.copies: list[Copies] = []  # of this learner's state; a step changes nothing before they are whole
        self.step_count = 0
        self._average_age = 0
        self.call_the_others: Callable[[str], Any] = lambda what: None
        """Of rank 0, where parts are put together: has the other ranks ask for the same."""

    def _hold(self, optimizer: OptimizerFactory, optimizers: Mapping[str, OptimizerFactory]) -> None:
        """Give the agent to the engine, and what this rank has of each group to the group's optimizer."""
        agent, engine = self.agent, self._engine
        trained = [p for group in agent.groups().values() for p in group.tensors.values()]
        engine.hold(agent, {id(p): p for p in [*agent.trainable_state().values(), *trained]}.values())
        self._groups, parts = agent.groups(), {}  # what is held in parts is another parameter now

        def part(p: nn.Parameter) -> Part:
            return parts.setdefault(id(p), engine.part(p))

        self._parts = {name: {n: part(p) for n, p in group.tensors.items()} for name, group in self._groups.items()}
        self._state = {name: part(p) for name, p in agent.trainable_state().items()}
        self._optimizers = {
            name: optimizers.get(name, optimizer)([part.share for part in mine.values()])
            for name, mine in self._parts.items()
        }
        for mine in self._optimizers.values():
            engine.check(mine)

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
        engine = self._engine
        engine.clear(part for mine in self._parts.values() for part in mine.values())
        with sharing(engine.rank, engine.ranks):
            losses, metrics = _mean([self._backward(part, share) for part, share in _parts(batch)])
        moved = {name: list(self._parts[name].values()) for name in losses}
        with timed("gradients"):
            engine.average([part for mine in moved.values() for part in mine])
            norms = {name: engine.clip(mine, self._max_grad_norm) for name, mine in moved.items()}
            losses, metrics = engine.of_all(losses, ()), engine.of_all(metrics, self._largest(metrics))
            taken = engine.agreed(self._taken([*losses.values(), *norms.values()], metrics))
        with timed("optimizer"):
            for copies in self.copies:
                copies.hold_changes()
            for name in losses:
                self._set_rate(name, self._groups[name], lr_scale)
                move(self._optimizers[name], taken)
        with timed("average"):
            self.agent.after_step(taken)
            self.step_count += 1
            self._average(taken)
        first = next(iter(self._groups))
        by_group = {f"optim/grad_norm_{name}": norm for name, norm in norms.items()} if len(self._groups) > 1 else {}
        largest = self._gathered(norms.values()).max()
        rate = {"optim/lr": self._base_lr[first][0] * lr_scale}
        return {**metrics, **by_group, "optim/grad_norm": largest, **rate, REFUSED: 1 - taken}

    def _largest(self, metrics: Iterable[str]) -> set[str]:
        """Metrics whose value for the batch is the largest of its shares: what a limit bounds, and what says so."""
        return {name for name in metrics if name in self._limits or name.endswith("_max")}

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
        with timed("forward"):
            losses, metrics = self.agent(batch, self.step_count)
        with timed("backward"):
            self._engine.backward(reduce(torch.add, losses.values()) * share)
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
        return torch.stack([x.detach().float().to(self.device) for x in scalars])

    @torch.no_grad()
    def _average(self, taken: Tensor) -> None:
        self._average_age += 1
        decay = min(self._ema_decay, (1 + self._average_age) / (10 + self._average_age))
        follow(self._averaged.values(), (part.share for part in self._state.values()), (1 - decay) * taken)

    @property
    def averaged(self) -> dict[str, Tensor]:
        """The average, by the policy's names; where it is held in parts, put together: on the host of rank 0 alone."""
        self.call_the_others("averaged")
        return self._together({name: (self._averaged[name], part) for name, part in self._state.items()})

    @property
    def names(self) -> set[str]:
        """Of what `averaged` holds."""
        return set(self._averaged)

    @contextmanager
    def averaged_in_place(self) -> Iterator[Agent]:
        """The agent with the averaged parameters in place of the raw ones, which come back. Where they are held in
        parts, every rank calls the agent together, as in a step."""
        self._exchange()
        try:
            with self._engine.calling(self.agent):
                yield self.agent
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, part in self._state.items():
            self._averaged[name] = self._engine.exchange(part, self._averaged[name])

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold, under flat names: parameters, their average, targets and the like."""
        self.call_the_others("tensors")
        return self._together(self._held())

    def _held(self) -> dict[str, tuple[Tensor, Part | None]]:
        """What this rank has of `tensors`, and of which parameter it is a part; None: every rank has all of it."""
        raw = {f"{RAW}{name}": (part.share.detach(), part) for name, part in self._state.items()}
        average = {f"{AVERAGED}{name}": (self._averaged[name], part) for name, part in self._state.items()}
        published = set(map(id, self._state.values()))
        further = {
            f"{group}.{name}": (part.share.detach(), part)
            for group, members in self._parts.items()
            for name, part in members.items()
            if id(part) not in published
        }
        auxiliary = {f"{AUXILIARY}{name}": (p, None) for name, p in self.agent.auxiliary_state().items()}
        return raw | average | further | auxiliary

    def _together(self, held: Mapping[str, tuple[Tensor, Part | None]]) -> dict[str, Tensor]:
        whole = ((name, self._engine.whole(mine, part)) for name, (mine, part) in held.items())
        return {name: tensor for name, tensor in whole if tensor is not None}

    @property
    def in_parts(self) -> bool:
        """Do ranks hold parts, which `averaged`, `tensors` and `optimizer_state` put together?"""
        return self._engine.sharded

    @property
    def device(self) -> torch.device:
        return self._engine.device

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
        self.call_the_others("optimizer_state")
        return {
            name: self._each(name, optimizer.state_dict(), whole=True) for name, optimizer in self._optimizers.items()
        }

    def _each(self, group: str, state: dict[str, Any], whole: bool) -> dict[str, Any]:
        """An optimizer's state with its tensors put together, or cut to what this rank holds."""
        change = self._engine.whole if whole else self._engine.cut
        parts = list(self._parts[group].values())
        rows = {
            k: {key: change(x, parts[k]) if isinstance(x, Tensor) and x.ndim else x for key, x in row.items()}
            for k, row in state["state"].items()
        }
        return {**state, "state": rows}

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
            optimizer.load_state_dict(self._each(name, state[name], whole=False))

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Strict inverse of `tensors`. Raises ValueError naming what is missing, unknown or of another shape."""
        mine = self._held()
        problems = describe_mismatch({name: _shaped(*held) for name, held in mine.items()}, tensors)
        if problems:
            raise ValueError("checkpoint does not fit this policy: " + "; ".join(problems))
        for name, (target, part) in mine.items():
            self._fill(target, part, tensors[name])

    def _fill(self, target: Tensor, part: Part | None, whole: Tensor) -> None:
        target.copy_(whole if part is None else self._engine.cut(whole, part))

    @torch.no_grad()
    def start_from(self, published: Mapping[str, Tensor]) -> None:
        """Begin at published parameters (checkpoint_path): both the raw weights and their average.

        What the agent adds to a plain policy (`added_to_policy`) may be absent and keeps its initial values.
        """
        for mine in (self._raw(), self._averaged):
            self._take(mine, published, "checkpoint_path")

    @torch.no_grad()
    def continue_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin at the policy in another algorithm's `tensors`: raw weights and their average.

        What an algorithm adds to a policy is left out. Raises ValueError as `load_tensors` does for the rest.
        """
        for prefix, mine in ((RAW, self._raw()), (AVERAGED, self._averaged)):
            theirs = {n.removeprefix(prefix): n for n in tensors if n.startswith(prefix)}
            theirs = {short: n for short, n in theirs.items() if short in mine}
            self._take(mine, Renamed(tensors, theirs), "checkpoint")

    def _raw(self) -> dict[str, Tensor]:
        return {name: part.share for name, part in self._state.items()}

    def _take(self, mine: dict[str, Tensor], theirs: Mapping[str, Tensor], what: str) -> None:
        """Copy all of theirs; only what the agent adds to a plain policy may be missing. ValueError names `what`."""
        added = tuple(getattr(self.agent, "added_to_policy", ()))
        want = {n: p for n, p in mine.items() if n in theirs or not (added and n.startswith(added))}
        if problems := describe_mismatch({n: _shaped(p, self._state[n]) for n, p in want.items()}, theirs):
            raise ValueError(f"{what} does not fit this policy: " + "; ".join(problems))
        for name, p in want.items():
            self._fill(p, self._state[name], theirs[name])

    def counters(self) -> dict[str, int]:
        return {"step": self.step_count, "average_age": self._average_age}

    def load_counters(self, counters: dict[str, int]) -> None:
        self.step_count, self._average_age = counters["step"], counters["average_age"]


def _shaped(held: Tensor, part: Part | None) -> Tensor:
    """Something of the shape of the whole."""
    return held if part is None or part.whole is None else torch.empty(part.whole, device="meta")


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
