"""Fill a model from a checkpoint, strictly: every tensor matched, or an error that names those that are not.

The heads' builders call `load_core` with a model of shapes alone; tensors are read, cast and put into place one by one,
so that weights are in memory once. Nothing stays at random: a tensor that the checkpoint lacks, of another shape, or
with a NaN, is an error; a tensor that the model does not know is one too. The report says what matched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from serl_launcher.policies.checkpoint import Checkpoint, CheckpointError
from serl_launcher.policies.precision import stays_float32
from serl_launcher.tensor_files import is_finite

SHOWN = 8  # names of each kind of problem


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of a checkpoint's tensors."""

    source: str
    matched: int  # tensors copied into the model
    parameters: int  # numbers in them
    tied: tuple[str, ...]  # filled from another name that the file keeps for the same tensor
    dropped: tuple[str, ...]  # in the file, never read by a flow policy, not held in memory
    dropped_parameters: int

    def __str__(self) -> str:
        lines = f"loaded {self.source}: {self.matched} tensors, {self.parameters / 1e6:,.1f}M parameters, all matched"
        if self.tied:
            lines += f"; tied: {', '.join(self.tied)}"
        if self.dropped:
            lines += f"; dropped as never read: {', '.join(self.dropped)} ({self.dropped_parameters / 1e6:,.1f}M)"
        return lines


def load_core(
    policy: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    aliases: dict[str, str],
    precision: str,
    unread: tuple[str, ...] = (),
) -> LoadReport:
    """Fill every parameter and buffer of `policy.core`, built on the meta device; language heads are never read.

    prefix: of the names in the file; aliases: name -> another name that the file may use for the same tensor;
    precision: what matrices that do not train are held in; unread: what names of tensors begin with that the file may
    have and no action depends on. Raises CheckpointError naming what does not fit.
    """
    wanted = policy.core.state_dict()
    trains = {name.removeprefix("core."): p.requires_grad for name, p in policy.named_parameters()}
    stored = {name.removeprefix(prefix): name for name in checkpoint.files}
    source = {name: name if name in stored else aliases.get(name, name) for name in wanted}
    spare = [name for name in stored if name not in source.values()]
    dropped = [name for name in spare if name.endswith("lm_head.weight") or name.startswith(unread)]
    problems = [f"missing {name}" for name in wanted if source[name] not in stored]
    problems += [f"unknown {name}" for name in spare if name not in dropped]
    by_stored: dict[str, list[str]] = {}
    for name, theirs in source.items():
        if theirs in stored:
            by_stored.setdefault(stored[theirs], []).append(name)
    filled: dict[str, Tensor] = {}
    # The largest first: what comes and goes with it is in memory while little else is.
    order = sorted(by_stored, key=lambda theirs: -wanted[by_stored[theirs][0]].numel())
    for theirs, tensor in checkpoint.tensors(order):
        for name in by_stored[theirs]:
            if problem := _value_problem(name, wanted[name], tensor):
                problems.append(problem)
                continue
            half = precision == "bfloat16" and not trains.get(name) and not stays_float32(name, tensor.ndim)
            dtype = torch.bfloat16 if half else torch.float32
            filled[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        del tensor  # the next one is read before the loop gives this name away
    if problems:
        raise CheckpointError(f"{checkpoint.folder} does not fit this policy: " + "; ".join(_short(problems)))
    _assign(policy.core, filled)
    materialise_buffers(policy.core)
    return LoadReport(
        str(checkpoint.folder),
        len(filled),
        sum(t.numel() for t in filled.values()),
        tuple(name for name, theirs in source.items() if name != theirs),
        tuple(dropped),
        sum(math.prod(checkpoint.pending(stored[name]).shape) for name in dropped),
    )


def _value_problem(name: str, mine: Tensor, theirs: Tensor) -> str | None:
    if mine.shape != theirs.shape:
        return f"{name}: expected shape {tuple(mine.shape)}, got {tuple(theirs.shape)}"
    if not is_finite(theirs):
        return f"{name}: holds NaN or Inf"
    return None


def _short(problems: list[str]) -> list[str]:
    return problems if len(problems) <= SHOWN else [*problems[:SHOWN], f"and {len(problems) - SHOWN} more"]


def _assign(core: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in place of parameters and buffers, keeping ties and requires_grad."""
    homes = dict(core.named_modules())
    replaced: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        home, leaf = homes[name.rpartition(".")[0]], name.rpartition(".")[2]
        old = getattr(home, leaf)
        if isinstance(old, nn.Parameter):
            if id(old) not in replaced:
                replaced[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad)
            setattr(home, leaf, replaced[id(old)])
        else:
            home.register_buffer(leaf, tensor)


def materialise_buffers(core: nn.Module) -> None:
    """Recompute the non-persistent buffers of a model built on the meta device (rotary frequencies, position ids).

    Raises CheckpointError naming a buffer that no rule knows: it would hold garbage.
    """
    for path, module in core.named_modules():
        pending = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not pending:
            continue
        if "inv_freq" in pending and hasattr(module, "config"):
            fresh = type(module)(module.config)
        elif pending == ["inv_freq"] and hasattr(module, "dim") and hasattr(module, "theta"):
            fresh = type(module)(module.dim, module.theta)
        elif pending == ["embed_scale"]:
            module.register_buffer("embed_scale", torch.tensor(module.scalar_embed_scale), persistent=False)
            continue
        elif pending == ["position_ids"]:
            shape = module.position_ids.shape
            module.register_buffer("position_ids", torch.arange(shape[-1]).expand(shape), persistent=False)
            continue
        else:
            raise CheckpointError(f"{path}: no rule to compute the buffers {pending} of {type(module).__name__}")
        for name in pending:
            module.register_buffer(name, getattr(fresh, name), persistent=False)
    left = [name for name, parameter in core.named_parameters() if parameter.is_meta]
    if left:
        raise CheckpointError(f"nothing filled {_short(left)}")
