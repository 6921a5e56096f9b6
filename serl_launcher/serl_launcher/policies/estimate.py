"""What a policy will cost before any of it is loaded: parameters, bytes and FLOPs from the real classes on no device.

tools/preflight.py calls `meta_policy` and `estimate`. The model is built on torch's meta device, which holds shapes and
no numbers; a training step and an answer there count the FLOPs and the bytes that are alive at every moment, from the
very code that will run (policies.shapes_only).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from serl_launcher.policies.base import PolicyInput, flow_loss, for_samples, sample, trainable
from serl_launcher.policies.precision import hold
from serl_launcher.policies.shapes_only import FUSED, FUSED_BACKWARD, LiveBytes
from serl_transport.contract.specs import TaskSpec

ADAM, AVERAGE = 8, 4  # bytes a trained parameter
STORED = 4  # bytes a number in a checkpoint's file, at most
BUFFERS = 40_000_000  # bytes of the mathematics' and the allocator's own, as measured on a CPU
ATTENTION_FLOPS = {
    FUSED: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    FUSED_BACKWARD: lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v),
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Costs of one policy in one configuration; bytes at their highest, and FLOPs."""

    trainable: int  # parameters
    frozen: int
    weights: int  # bytes, as the trainer holds them
    loading: int  # of the policy that is loaded: the largest tensor comes first, and while it is cast it is there twice
    optimizer: int  # Adam's moments, and the average that is served
    step: int  # gradients, activations and what comes and goes, in a step of the batch
    sample: int  # more of it for one more sample
    served: int  # weights as the policy server holds them
    staged: int  # what is published, made ready beside them
    answer: int  # activations of a full batch of questions
    train_flops: int  # of one sample in a training step
    serve_flops: int  # of one observation at `flow_steps`
    gradients: int  # bytes, in `step`
    kept: int  # of `step`, what the forward pass leaves to the backward pass
    layer: int  # bytes of what trains in the largest layer that several ranks may hold in parts
    loose: int  # the same, in no such layer

    @property
    def resting(self) -> int:
        """Bytes of a trainer between two steps."""
        return BUFFERS + self.weights + self.optimizer

    @property
    def training(self) -> int:
        """Bytes of a training run, at their highest."""
        return max(self.loading, self.resting + self.step)

    @property
    def serving(self) -> int:
        """Bytes of a policy server, at their highest; it casts what trains only once it is loaded."""
        return max(self.loading, BUFFERS + self.served + self.staged + self.answer)

    def of_rank(self, engine: str, ranks: int) -> Estimate:
        """What one of several ranks holds (learner.engines), where this is what a rank's share of the batch takes.

        zero2 and fsdp2: of what trains, weights between two steps, gradients, optimizer and average are a rank's part.
        In a step all of the weights are whole (zero2), or what is in no layer, a layer and the next one (fsdp2); one
        layer's gradients, or those of what is in none, are whole twice, until they are averaged.
        """
        if engine not in ("zero2", "fsdp2") or ranks == 1:
            return self
        trained = self.trainable * STORED
        whole = trained if engine == "zero2" else self.loose + 2 * self.layer
        gradients = self.gradients // ranks + 2 * max(self.layer, self.loose)
        return replace(
            self,
            weights=self.weights - trained + trained // ranks,
            optimizer=self.optimizer // ranks,
            step=max(self.step - self.gradients, self.kept) + whole + gradients,
            gradients=gradients,
        )


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


def estimate(
    policy: nn.Module,
    spec: TaskSpec,
    flow_steps: int,
    *,
    batch: int,
    noise_samples: int,
    questions: int,
    candidates: int = 1,
) -> Estimate:
    """Costs of a policy on the meta device, held as its `precision` says; it is held as the policy server's afterwards.

    batch: samples of a training step; noise_samples: noises and flow times for each; questions: answered together;
    candidates: chunks that are made for each answer (best of n).
    """
    precision = getattr(policy, "precision", "float32")
    hold(policy, precision, masters=True)
    trained = trainable(policy)
    moved, total = (sum(p.numel() for p in some) for some in (trained.values(), policy.parameters()))
    weights, largest = _bytes(policy.parameters()), max(policy.parameters(), key=Tensor.numel)
    (flops, step, gradients, kept), (_, more, *_) = (
        _training(policy, spec, b, noise_samples) for b in (batch, 2 * batch)
    )
    layers = [[p for p in layer.parameters() if p.requires_grad] for layer in policy.layers()]
    sizes = [_bytes(layer) for layer in layers]
    hold(policy, precision, masters=False)
    policy.fuse_for_serving()
    serve_flops, answer = _serving(policy, spec, questions, flow_steps, candidates)
    return Estimate(
        trainable=moved,
        frozen=total - moved,
        weights=weights,
        loading=BUFFERS + max(weights, largest.numel() * (STORED + largest.element_size())),
        optimizer=moved * (ADAM + AVERAGE),
        step=step,
        sample=(more - step) // batch,
        served=_bytes(policy.parameters()),
        staged=_bytes(trained.values()),
        answer=answer,
        train_flops=flops // batch,
        serve_flops=serve_flops // questions,
        gradients=gradients,
        kept=kept,
        layer=max(sizes, default=0),
        loose=moved * STORED - sum(sizes),
    )


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def blank(spec: TaskSpec, b: int) -> PolicyInput:
    """Observations of zeros."""
    images = {camera: np.zeros((b, h, w, 3), np.uint8) for camera, (h, w) in spec.cameras.items()}
    return PolicyInput(images, np.zeros((b, len(spec.state_names)), np.float32), [spec.prompt] * b)


def _training(policy: nn.Module, spec: TaskSpec, b: int, noise_samples: int) -> tuple[int, int, int, int]:
    """FLOPs of forward and backward of a step, the bytes beside weights and optimizer that it takes, and of them those
    of gradients and of what the forward pass keeps."""
    shape = (b * noise_samples, policy.action_horizon, policy.action_dim)
    chunk, noise = (torch.zeros(shape, device="meta") for _ in range(2))
    pad, weight = torch.zeros(shape[:2], dtype=torch.bool, device="meta"), torch.zeros(shape[0], device="meta")
    with (
        FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter,
        LiveBytes(policy.state_dict(keep_vars=True).values()) as alive,
    ):
        prefix = for_samples(policy, policy.encode(blank(spec, b)), noise_samples)
        loss = flow_loss(policy, prefix, chunk, pad, weight, noise, weight).mean()
        kept = alive.now
        loss.backward()
    gradients = _bytes(p.grad for p in policy.parameters() if p.grad is not None)
    largest = max((p.numel() * p.element_size() for p in policy.parameters() if p.grad is not None), default=0)
    policy.zero_grad()
    # Adam's own root and quotient, one tensor at a time; what activations had, the allocator keeps for the next step.
    return counter.get_total_flops(), max(alive.peak, kept + gradients + 2 * largest), gradients, kept


@torch.no_grad()
def _serving(policy: nn.Module, spec: TaskSpec, b: int, flow_steps: int, n: int) -> tuple[int, int]:
    """FLOPs of b answers from n chunks each, and the bytes beside the weights that they take; what chooses among the
    chunks is too small to count."""
    noise = torch.zeros(b * n, policy.action_horizon, policy.action_dim, device="meta")
    with (
        FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter,
        LiveBytes(policy.state_dict(keep_vars=True).values()) as alive,
    ):
        sample(policy, policy.encode(blank(spec, b), features=n > 1), noise, flow_steps, n)
    return counter.get_total_flops(), alive.peak
