"""What a policy will cost before any of it is loaded: parameters, bytes and FLOPs from the real classes on no device.

tools/preflight.py calls `meta_policy` and `estimate`. The model is built on torch's meta device, which holds shapes and
no numbers; one forward and backward pass there counts the FLOPs and the bytes that autograd keeps, from the very code
that will run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from serl_launcher.policies.base import PolicyInput, flow_loss, ready, sample, trainable
from serl_launcher.policies.precision import stays_float32
from serl_transport.contract.specs import TaskSpec

MASTER, GRADIENT, ADAM, AVERAGE = 4, 4, 8, 4  # bytes a trained parameter


@dataclass(frozen=True, slots=True)
class Estimate:
    """Costs of one policy in one configuration; bytes and FLOPs."""

    trainable: int  # parameters
    frozen: int
    training_fixed: int  # bytes: weights, gradients, Adam's moments, the served average
    activations: int  # bytes of one more sample in a training batch
    serving_fixed: int  # bytes: weights, and a second copy of what is published for the hot swap
    serving_sample: int  # bytes of one more observation in a served batch: its prefix
    train_flops: int  # of one more sample in a training step
    serve_flops: int  # of one more observation at `flow_steps`


def meta_policy(cfg: Mapping[str, Any], spec: TaskSpec, size: Any) -> tuple[nn.Module, str]:
    """The policy of a config on the meta device, and its mode of normalisation: what data must have statistics for.

    `meta_<name>(cfg, spec, size)` makes it, which stands beside the `build_<name>` that `_target_` names. Raises
    ValueError in the user's words, for a head that has none too.
    """
    module, _, build = cfg["_target_"].rpartition(".")
    meta = build.replace("build_", "meta_", 1)
    try:
        found = getattr(import_module(module), meta, None)
    except ImportError as error:
        raise ValueError(f"policy._target_={cfg['_target_']}: {error}") from None
    if found is None or meta == build:
        raise ValueError(
            f"policy._target_={cfg['_target_']}: its costs cannot be counted, {module} has no {meta}(cfg, spec, size) "
            "that makes it without weights; see docs/policies.md"
        )
    return found(cfg, spec, size)


def estimate(policy: nn.Module, spec: TaskSpec, precision: str, flow_steps: int, noise_samples: int) -> Estimate:
    """Costs of a policy whose parameters are on the meta device. `precision`: what it will be held in."""
    moved = sum(p.numel() for p in trainable(policy).values())
    total = sum(p.numel() for p in policy.parameters())
    held = [(p.requires_grad, _held(name, p, precision)) for name, p in policy.named_parameters()]
    served, frozen = (sum(size for trains, size in held if trains == which) for which in (True, False))
    one, two = (_training(policy, spec, b, noise_samples) for b in (1, 2))
    prefix, serve = _serving(policy, spec, flow_steps)
    half = 2 if precision == "bfloat16" else 1
    return Estimate(
        trainable=moved,
        frozen=total - moved,
        training_fixed=frozen + moved * (MASTER + GRADIENT + ADAM + AVERAGE),
        activations=(two[1] - one[1]) // half,
        serving_fixed=frozen + 2 * served,
        serving_sample=prefix // half,
        train_flops=two[0] - one[0],
        serve_flops=serve,
    )


def _held(name: str, parameter: Tensor, precision: str) -> int:
    half = precision == "bfloat16" and not stays_float32(name, parameter.ndim)
    return parameter.numel() * (2 if half else 4)


def blank(spec: TaskSpec, b: int) -> PolicyInput:
    """Observations of zeros."""
    images = {camera: np.zeros((b, h, w, 3), np.uint8) for camera, (h, w) in spec.cameras.items()}
    return PolicyInput(images, np.zeros((b, len(spec.state_names)), np.float32), [spec.prompt] * b)


def _training(policy: nn.Module, spec: TaskSpec, b: int, noise_samples: int) -> tuple[int, int]:
    """FLOPs of forward and backward, and the bytes that autograd keeps in between, parameters not counted."""
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other storage gets its place
    weights = {p.untyped_storage()._cdata for p in policy.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    shape = (b * noise_samples, policy.action_horizon, policy.action_dim)
    chunk, noise = (torch.zeros(shape, device="meta") for _ in range(2))
    pad, weight = torch.zeros(shape[:2], dtype=torch.bool, device="meta"), torch.zeros(shape[0], device="meta")
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prefix = policy.encode(blank(spec, b)).repeat(noise_samples)
            loss = flow_loss(policy, prefix, chunk, pad, weight, noise, weight).mean()
        loss.backward()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


@torch.no_grad()
def _serving(policy: nn.Module, spec: TaskSpec, flow_steps: int) -> tuple[int, int]:
    """Bytes of one observation's prefix, FLOPs of its chunk."""
    noise = torch.zeros(1, policy.action_horizon, policy.action_dim, device="meta")
    with FlopCounterMode(display=False) as counter:
        prefix = policy.encode(blank(spec, 1))
        sample(policy, prefix, noise, flow_steps)
    held = [getattr(ready(policy, prefix), field.name) for field in fields(prefix)]
    return sum(x.numel() * x.element_size() for x in _tensors(held)), counter.get_total_flops()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists."""
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for item in value:
            yield from _tensors(item)
