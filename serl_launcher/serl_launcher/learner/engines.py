"""How the ranks of a training job hold one agent between them (`launch.engine`); the learner steps through it.

    plain   one rank
    ddp     parameters, gradients and optimizer state are whole on every rank; gradients are averaged
    zero2   gradients, optimizer state and the served average are held in parts, one a rank; parameters are whole from
            the first layer that reads them to the end of the backward pass (torch's FSDP2 without resharding)
    fsdp2   so are the parameters, but for the layer that runs

What is held in parts is what the policy trains, its vectors and matrices along their first axis (policies.sharding);
critics, temperatures, targets and what is frozen are whole everywhere, their gradients averaged as in ddp. Optimizers
move a rank's part as a plain tensor: what is elementwise is as in one process, and several optimizers, groups that rest
and a step that the device leaves out need nothing of their own. Numbers are those of `policy.precision`: no engine
casts.

learner.wiring makes the engine. Methods that say "all together" exchange tensors between ranks: every rank calls them,
in one order.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from serl_launcher.policies.sharding import local, rows_of, shard, together

ENGINES = ("plain", "ddp", "zero2", "fsdp2")
ELEMENTWISE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam)
"""Optimizers that move a row of a matrix whatever its other rows are."""
BUCKET = 64_000_000  # bytes of gradients that one message averages; a larger tensor goes alone


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A parameter as this rank's optimizer moves it."""

    parameter: nn.Parameter  # of the module
    share: nn.Parameter  # the rows that this rank holds, in the same memory; the parameter itself where it is whole
    whole: torch.Size | None = None  # shape over all ranks; None where every rank holds all of it


class Engine:
    """Every rank holds everything (`plain`, `ddp`)."""

    sharded = False  # is anything held in parts?

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @torch.no_grad()
    def hold(self, agent: nn.Module, trained: Collection[nn.Parameter]) -> None:
        """Before anything of the agent is asked for: what trains is rank 0's, all together."""
        if self.ranks > 1:
            for parameter in trained:
                dist.broadcast(parameter.data, 0)

    def part(self, parameter: nn.Parameter) -> Part:
        """The parameter as this rank moves it."""
        return Part(parameter, parameter)

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """ValueError where it cannot move what this engine holds."""

    def backward(self, loss: Tensor) -> None:
        """Gradients are added to those that are there."""
        self.accelerator.backward(loss)

    def clear(self, parts: Iterable[Part]) -> None:
        """No gradients."""
        for part in parts:
            part.parameter.grad = part.share.grad = None

    def average(self, parts: Sequence[Part]) -> None:
        """The gradients of each share become their mean over the ranks, all together; those that are none stay so."""
        if self.ranks > 1:
            self._average([part.share.grad for part in parts if part.whole is None and part.share.grad is not None])

    def _average(self, gradients: Sequence[Tensor]) -> None:
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            pieces = (flat / self.ranks).split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(pieces, bucket, strict=True)])

    def clip(self, parts: Sequence[Part], most: float) -> Tensor:
        """Scale averaged gradients down to a norm of at most `most`; their norm before, a scalar. All together."""
        norm = self._norm(parts)
        clip_grads_with_norm_([part.share for part in parts], most, norm)
        return norm

    def _norm(self, parts: Sequence[Part]) -> Tensor:
        return get_total_norm([part.share.grad for part in parts if part.share.grad is not None])

    def of_all(self, scalars: Mapping[str, Tensor], largest: Collection[str]) -> Mapping[str, Tensor]:
        """Scalars of the ranks' shares as those of the whole batch: means, of the names in `largest` the largest.
        With one rank they are what they were. All together."""
        if self.ranks == 1:
            return scalars
        found = [torch.empty(len(scalars), device=self.device) for _ in range(self.ranks)]
        dist.all_gather(found, torch.stack([x.detach().float().to(self.device) for x in scalars.values()]))
        rows = torch.stack(found)
        most, mean = rows.max(0).values.unbind(), rows.mean(0).unbind()
        return {name: most[k] if name in largest else mean[k] for k, name in enumerate(scalars)}

    def agreed(self, taken: Tensor) -> Tensor:
        """1 where every rank says 1, else 0: float32 scalar on the device. All together."""
        if self.ranks > 1:
            dist.all_reduce(taken, dist.ReduceOp.MIN)
        return taken

    def whole(self, held: Tensor, part: Part | None) -> Tensor | None:
        """The whole of a tensor of which ranks hold what they hold of `part`: on the host, of rank 0 alone, where that
        is not all of it on each. All together."""
        return held

    def cut(self, whole: Tensor, part: Part) -> Tensor:
        """What this rank holds of a whole tensor."""
        return whole

    def calling(self, agent: nn.Module) -> AbstractContextManager:
        """Inside, methods of the agent and its policy may be called beside a step. All together."""
        return nullcontext()

    def exchange(self, part: Part, other: Tensor) -> Tensor:
        """Put another share's values in the parameter's place; returns those that were there."""
        before, part.parameter.data = part.parameter.data, other
        return before


class Sharded(Engine):
    """What the policy trains is held in parts (`zero2`, `fsdp2`). reshard: are layers whole only while they run?"""

    sharded = True

    def __init__(self, accelerator: Accelerator, reshard: bool) -> None:
        super().__init__(accelerator)
        self._reshard = reshard

    def hold(self, agent: nn.Module, trained: Collection[nn.Parameter]) -> None:
        super().hold(agent, trained)
        policy, added = getattr(agent, "policy", agent), tuple(getattr(agent, "added_to_policy", ()))
        layers, outside = (getattr(policy, name, list)() for name in ("layers", "read_outside"))
        whole = set(outside)
        parted = [
            p for n, p in agent.trainable_state().items() if p.ndim and p not in whole and not n.startswith(added)
        ]
        shard(agent, layers, parted, init_device_mesh(self.device.type, (self.ranks,)), self._reshard)

    def part(self, parameter: nn.Parameter) -> Part:
        if not isinstance(parameter, DTensor):
            return super().part(parameter)
        return Part(parameter, nn.Parameter(local(parameter)), parameter.shape)

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        if type(optimizer) not in ELEMENTWISE:
            raise ValueError(
                f"trainer.optimizer: {type(optimizer).__name__} is not known to move each number by itself, and "
                "launch.engine=zero2 and fsdp2 hold a matrix in rows, one part a rank: expected one of "
                f"{', '.join(kind.__name__ for kind in ELEMENTWISE)}, or launch.engine=ddp"
            )

    def average(self, parts: Sequence[Part]) -> None:
        super().average(parts)
        for part in parts:
            if part.whole is not None and part.parameter.grad is not None:
                part.share.grad = local(part.parameter.grad)  # the hooks of the backward pass have averaged it

    def _norm(self, parts: Sequence[Part]) -> Tensor:
        held = [part for part in parts if part.whole is not None]
        if not held:
            return super()._norm(parts)
        squares = super()._norm(held).to(self.device).square()
        dist.all_reduce(squares)
        alike = super()._norm([part for part in parts if part.whole is None])
        return (squares + alike.to(self.device).square()).sqrt()

    def whole(self, held: Tensor, part: Part | None) -> Tensor | None:
        if part is None or part.whole is None:
            return held if self.rank == 0 else None
        rows = -(-part.whole[0] // self.ranks)
        sent = held.new_zeros(rows, *part.whole[1:])
        sent[: len(held)] = held
        found = [torch.empty_like(sent) for _ in range(self.ranks)] if self.rank == 0 else None
        dist.gather(sent, found)
        return None if found is None else torch.cat(found)[: part.whole[0]].cpu()

    def cut(self, whole: Tensor, part: Part) -> Tensor:
        return whole if part.whole is None else rows_of(whole, self.rank, self.ranks)

    def calling(self, agent: nn.Module) -> AbstractContextManager:
        return together(agent)

    @torch.no_grad()
    def exchange(self, part: Part, other: Tensor) -> Tensor:
        if part.whole is None:
            return super().exchange(part, other)
        before = part.share.detach().clone()
        part.share.copy_(other)
        return before


def make_accelerator(cfg: DictConfig) -> Accelerator:
    """What knows the device, and of several ranks which one this is (supervisor.several)."""
    return Accelerator(cpu=cfg.trainer.device == "cpu")


def make_engine(cfg: DictConfig, accelerator: Accelerator) -> Engine:
    """Of `launch.engine`; where it is null, plain for one rank and ddp for several. One rank holds everything.

    ValueError names the key where it cannot be.
    """
    ranks = accelerator.num_processes
    name = OmegaConf.select(cfg, "launch.engine") or ("plain" if ranks == 1 else "ddp")
    if name not in ENGINES:
        raise ValueError(f"launch.engine: expected one of {', '.join(ENGINES)}, got {name!r}")
    if name == "plain" and ranks > 1:
        raise ValueError(f"launch.engine=plain: expected one process, got {ranks}; take ddp, zero2 or fsdp2")
    if name == "plain" or ranks == 1:
        return Engine(accelerator)
    return Engine(accelerator) if name == "ddp" else Sharded(accelerator, reshard=name == "fsdp2")


def _buckets(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
