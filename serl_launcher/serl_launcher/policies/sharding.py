"""Parameters of which every rank holds a part: torch's `fully_shard` (FSDP2) over the layers that a policy names.

learner.engines calls `shard` once, and `together` where a policy is called beside a training step; agents.reference
calls `together`, since it puts other values in the parameters' place. A layer's parameters are whole while it runs:
policies.compiling's `run_layer`, through which all of our own layers run, calls the layer's RUN, which torch puts its
hooks around. What belongs to no layer is whole from the beginning of the agent's `forward`.

Without `reshard` a layer stays whole from its first pass to its gradients' (ZeRO-2 in substance), with it only in its
passes (ZeRO-3). Gradients are averaged over ranks.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from serl_launcher.policies.compiling import RUN


def shard(
    root: nn.Module, layers: Collection[nn.Module], parted: Collection[nn.Parameter], mesh: DeviceMesh, reshard: bool
) -> None:
    """Hold `parted`, of the root's parameters, in parts, along their first axis; those of `layers` layer by layer.

    The parameters of the module are others afterwards.
    """
    whole = {p for p in root.parameters() if p not in set(parted)}
    for layer in layers:
        if all(p in whole for p in layer.parameters()):
            continue
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, ignored_params=whole)
        setattr(layer, RUN, MethodType(_run, layer))
        register_fsdp_forward_method(layer, RUN)
    fully_shard(root, mesh=mesh, reshard_after_forward=False, ignored_params=whole)
    fully_shard.state(root)._lazy_init()  # or the first layer to run before the root's forward would become a root


def _run(layer: nn.Module, run: Any, *rest: Any) -> Any:
    return run(layer, *rest)


@contextmanager
def together(root: nn.Module) -> Iterator[None]:
    """Everything whole inside, whatever is called; in parts again afterwards what was before. All ranks together."""
    held = [m for m in root.modules() if isinstance(m, FSDPModule) and _in_parts(m)]
    reshards = [bool(fully_shard.state(m)._fsdp_param_group._reshard_after_forward) for m in held]
    for module in held:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module, reshard in zip(held, reshards, strict=True):
            module.set_reshard_after_forward(reshard, recurse=False)
            module.reshard()


def _in_parts(module: nn.Module) -> bool:
    group = fully_shard.state(module)._fsdp_param_group
    return group is not None and group.is_sharded


def rows_of(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """The rows that a rank holds, as `fully_shard` deals them: ⌈n / ranks⌉ each from the first rank on."""
    each = -(-len(whole) // ranks)
    return whole[rank * each : (rank + 1) * each]


def local(parameter: Tensor) -> Tensor:
    """This rank's rows of a parameter or gradient that is held in parts, in its own memory."""
    if not isinstance(parameter, DTensor):
        raise RuntimeError(f"expected a parameter that is held in parts, got {type(parameter).__name__}")
    return parameter.detach().to_local()


def whole_copy(parameter: Tensor) -> Tensor:
    """All of a parameter, without gradient, in memory of its own. All ranks together where it is held in parts."""
    parameter = parameter.detach()
    return parameter.full_tensor().clone() if isinstance(parameter, DTensor) else parameter.clone()
