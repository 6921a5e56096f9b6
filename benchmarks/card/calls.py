"""The calls of a policy server, counted: what of an answer is on the host, encode, sample, and the guided sample.

`served(card, name)` builds a head of the released size, holds it as the policy server does (serving.engine) and makes
one answer; `Served.counts` has what each part of it ran. The parts in `CAPTURED` are what a CUDA graph holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from suites._policy_table import observe, task
from torch import nn

from card.count import Counts
from card.fake import DEVICE, FakeCard
from serl_launcher.agents.choosing import add_chooser, served_chunks
from serl_launcher.policies.base import FlowPolicy, Prefix
from serl_launcher.policies.groot.build import build_groot
from serl_launcher.policies.groot.full import FullGrootSize
from serl_launcher.policies.groot_n1_5.build import build_groot_n1_5
from serl_launcher.policies.groot_n1_5.sizes import FullN15Size
from serl_launcher.policies.pi0.build import build_pi0, build_pi05
from serl_launcher.policies.pi0.full import FullSize
from serl_launcher.policies.precision import hold
from serl_launcher.policies.realtime import sample_realtime

CAPTURED = ("encode", "sample")
EXECUTED, CRITICS, WIDTHS = 4, 4, (256, 256)  # ticks of a chunk that critics judge, members, hidden layers
SPEC = task(224)
BUILDERS: dict[str, Callable[..., FlowPolicy]] = {  # (train) -> the released size with random weights, on torch.device
    "pi0": lambda train: _built(build_pi0, 50, FullSize("pi0"), train),
    "pi05": lambda train: _built(build_pi05, 50, FullSize("pi05"), train),
    "groot_n1_7": lambda train: _built(build_groot, 40, FullGrootSize(), train),
    "groot_n1_5": lambda train: _built(build_groot_n1_5, 16, FullN15Size(), train),
}


@dataclass(slots=True)
class Served:
    """One answer to `batch` questions."""

    policy: FlowPolicy
    batch: int
    counts: dict[str, Counts]  # prepare, encode, sample, guided
    once: Counts  # a sample in one flow step, the first after the start


def build(name: str, train: str = "expert") -> FlowPolicy:
    """A head on the meta device. train: full or expert."""
    with torch.device("meta"):
        return BUILDERS[name](train)


def _built(builder: Callable[..., FlowPolicy], ticks: int, size: Any, train: str) -> FlowPolicy:
    options = dict(train=train, attention="sdpa", precision="bfloat16", compile="on")
    return builder("card", SPEC, "random", 0, ticks, size, **options)


def served(
    card: FakeCard, name: str, batch: int = 1, guided: bool = False, flow_steps: int | None = None, candidates: int = 1
) -> Served:
    """Build, hold and ask. guided: real-time chunking's sample too; flow_steps: the release's where None; candidates:
    of best of n, whose critics are of config/algo's size."""
    policy = on_card(card, build(name))
    if candidates > 1:
        features = features_of(policy)
        with torch.device("meta"):
            add_chooser(policy, features, EXECUTED, candidates, CRITICS, WIDTHS)
        card.place(policy.chooser)
    counts: dict[str, Counts] = {}
    ask, steps = partial(_counted, card, policy, counts), flow_steps or policy.released_flow_steps
    noise = torch.zeros(batch * candidates, policy.action_horizon, policy.action_dim, device=DEVICE)
    with torch.no_grad():
        inputs = ask("prepare", policy.prepare, observe(SPEC, batch))
        if name.startswith("groot"):  # its first answer makes tables that the later ones find
            policy.encode_prepared(inputs)
        prefix = ask("encode", policy.encode_prepared, inputs, candidates > 1)
        with card.counting(policy) as once:
            served_chunks(policy, prefix, noise, 1)
        ask("sample", served_chunks, policy, prefix, noise, steps, prefix=prefix)
        if guided:
            mask = torch.ones_like(noise)
            ask("guided", sample_realtime, policy, prefix, noise, steps, noise, mask, prefix=prefix)
    return Served(policy, batch, counts, once)


def on_card(card: FakeCard, policy: FlowPolicy) -> FlowPolicy:
    """A policy as the server holds it: bf16 where it may be, nothing trains."""
    policy.requires_grad_(False)
    hold(policy, policy.precision, masters=False)
    card.place(policy)
    fuse = getattr(policy, "fuse_for_serving", None)
    if fuse is not None:
        fuse()
    return policy.eval()


def features_of(policy: FlowPolicy) -> int:
    """Width of what critics see."""
    with torch.no_grad():
        return policy.features(policy.encode(observe(SPEC, 1))).shape[-1]


def _counted(
    card: FakeCard, policy: nn.Module, counts: dict[str, Counts], name: str, work: Callable, *given: Any,
    prefix: Prefix | None = None,
) -> Any:  # fmt: skip
    with card.counting(policy) as counts[name]:
        if prefix is not None and prefix.keys_values is not None:
            counts[name].watch(keys_values(prefix.keys_values))
        return work(*given)


def keys_values(tree: Any) -> list[torch.Tensor]:
    """The tensors of a prefix's keys and values, however they are nested."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [x for item in tree for x in keys_values(item)]
