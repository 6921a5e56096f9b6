"""Milliseconds of what was counted, at stated rates of a card: kernel by kernel, without having run.

    a kernel       the longer of bytes ÷ bandwidth and FLOPs ÷ rate, and GAP to begin and to end; without a graph at
                   least LAUNCH, since the host hands over each
    compiled       inside a layer that the head compiles, what lies between two matrix products or attentions is one
                   kernel, which reads what comes from before it and writes what is read after it
    the host       its own kernels at LAUNCH, copies at the bus's rate with SYNC each, and one wait for the answer

Activations of a batch of one fit into the card's 50 MB of L2, so that their bytes at the rate of memory are an upper
bound; matrix products of 50 to 900 rows leave part of the card idle, which SHARE stands for. An attention has no more
of the card than its blocks of queries fill.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from card.count import Counts, Kernel

GAP, LAUNCH, SYNC = 1.75e-6, 5e-6, 10e-6  # seconds
BUS = 50e9  # bytes/s from pinned memory
MULTIPROCESSORS = 132
SHARE = 0.65  # of the dense rate, in matrix products of an answer's shapes
UNFUSED = ("matmul", "attention", "gather", "random", "optimizer")


@dataclass(frozen=True, slots=True)
class Card:
    """Rates of a card, as large kernels reach them."""

    name: str
    memory: float  # bytes/s, 0.9 of the data sheet's
    half: float  # FLOP/s in bf16
    single: float  # FLOP/s in TF32


CARDS = (Card("H100", 0.9 * 3.35e12, 800e12, 400e12), Card("H200", 0.9 * 4.8e12, 800e12, 400e12))


def milliseconds(kernels: Iterable[Kernel], card: Card, least: float = 0.0) -> float:
    """Time of kernels that run one after another. least: seconds that the host takes to hand one over."""
    return 1e3 * sum(max(least, GAP + roof(kernel, card)) for kernel in kernels)


def roof(kernel: Kernel, card: Card) -> float:
    """Seconds that bytes and FLOPs take at the least."""
    rate = SHARE * (card.half if kernel.half else card.single)
    if kernel.blocks:
        rate *= min(1.0, kernel.blocks / MULTIPROCESSORS)
    return max(kernel.bytes / card.memory, kernel.flops / rate)


def by_part(counts: Mapping[str, Counts]) -> dict[str, list[Kernel]]:
    """The kernels of a captured answer by part: vision, language, flow."""
    parts: dict[str, list[Kernel]] = {}
    for name in ("encode", "sample"):
        for kernel in counts[name].kernels:
            part = "flow" if name == "sample" else "vision" if kernel.part in ("host", "vision") else "language"
            parts.setdefault(part, []).append(kernel)
    return parts


def host_milliseconds(counts: Mapping[str, Counts]) -> float:
    """Of `prepare` and of handing the answer over."""
    prepare = counts["prepare"]
    copies = sum(prepare.crossings.values()) + 1
    return 1e3 * (LAUNCH * (prepare.operations + 3) + copies * SYNC + prepare.crossed_bytes / BUS)


def fused(kernels: list[Kernel]) -> list[Kernel]:
    """The kernels as a compiler of the layers would leave them."""
    last = {storage: k for k, kernel in enumerate(kernels) for storage, _ in kernel.reads}
    return list(_fused(kernels, last))


def _fused(kernels: list[Kernel], last: Mapping[int, int]) -> Iterator[Kernel]:
    group: list[Kernel] = []
    for k, kernel in enumerate(kernels):
        joins = kernel.layer and kernel.kind not in UNFUSED
        if group and (not joins or kernel.layer != group[0].layer):
            yield _joined(group, k, last)
            group = []
        if joins:
            group.append(kernel)
        else:
            yield kernel
    if group:
        yield _joined(group, len(kernels), last)


def _joined(group: list[Kernel], end: int, last: Mapping[int, int]) -> Kernel:
    """One kernel in the place of several that end before `end`."""
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for kernel in group:
        reads |= {storage: n for storage, n in kernel.reads if storage not in writes}
        writes |= dict(kernel.writes)
    kept = {storage: n for storage, n in writes.items() if last.get(storage, end) >= end}
    first = group[0]
    flops, half = sum(kernel.flops for kernel in group), any(kernel.half for kernel in group)
    return Kernel("fused", "fused", first.part, first.layer, flops, half, list(reads.items()), list(kept.items()))
