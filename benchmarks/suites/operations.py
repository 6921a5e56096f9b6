"""Operations: what an answer and a training step of the released sizes run on a card, counted without one.

card/ runs heads and learner on a fake `cuda:0`. Rows of an answer at batch 1: kernels that are launched, casts, what is
done with the prefix's keys and values, copies between host and card, values that the host waits for, FLOPs and bytes;
then milliseconds as card.forecast works them out; the same where critics choose among 16 chunks. Rows of a training
step: the same counts, and the bytes that its forward pass keeps. Stderr has them as a table. `--quick` leaves out all
but PI0's answer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from card.calls import BUILDERS, CAPTURED, Served, served
from card.count import Counts, Kernel
from card.fake import FakeCard
from card.forecast import CARDS, LAUNCH, by_part, fused, host_milliseconds, milliseconds
from card.steps import STEPS, trained
from rows import Row

BATCH = 32
BEST_OF_N, CANDIDATES = ("pi0", "groot_n1_7"), 16  # heads, chunks that critics choose among (algo=best_of_n_*)
MOST = {"pi0/sample": 4500}  # kernels


def rows(quick: bool) -> Iterator[Row]:
    """Every figure of the suite."""
    torch.set_num_threads(1)
    table: list[str] = []
    for name in ["pi0"] if quick else BUILDERS:
        with FakeCard() as card:
            answer = served(card, name, guided=not quick)
        for call, counts in answer.counts.items():
            yield from count_rows(f"{name}/{call}", counts, table)
        yield from time_rows(name, answer, table)
    for name in [] if quick else BEST_OF_N:
        with FakeCard() as card:
            answer = served(card, name, candidates=CANDIDATES)
        for call, counts in answer.counts.items():
            yield from count_rows(f"{name}_best{CANDIDATES}/{call}", counts, table)
        yield from time_rows(f"{name}_best{CANDIDATES}", answer, table)
    for name in [] if quick else STEPS:
        with FakeCard() as card:
            step = trained(card, name, BATCH)
        yield from count_rows(f"{name}/batch{BATCH}", step.counts, table)
        yield Row.of(f"operations/{name}/batch{BATCH}/kept", step.kept / 1e9, "GB")
    print("\n".join(table), file=sys.stderr)


def count_rows(name: str, counts: Counts, table: list[str]) -> Iterator[Row]:
    """Figures of one call."""
    kinds = counts.kinds()
    goal = f"<= {MOST[name]}" if name in MOST else None
    captured = "<= 0" if name.rpartition("/")[2] in CAPTURED else None
    crossings, reads = sum(counts.crossings.values()), sum(counts.reads.values())
    yield Row.of(f"operations/{name}", counts.operations, "kernels", goal=goal)
    for kind, number in kinds.items():
        yield Row.of(f"operations/{name}/{kind}", number, "kernels")
    for kind, number in counts.on_prefix.items():
        yield Row.of(f"operations/{name}/prefix_keys_values/{kind}", number, "kernels")
    yield Row.of(f"operations/{name}/crossings", crossings, "copies between host and card", goal=captured)
    yield Row.of(f"operations/{name}/reads", reads, "values the host waits for", goal=captured)
    flops, moved = sum(k.flops for k in counts.kernels), sum(k.bytes for k in counts.kernels)
    yield Row.of(f"operations/{name}/flops", flops / 1e12, "TFLOP")
    yield Row.of(f"operations/{name}/bytes", moved / 1e9, "GB read and written")
    cats = counts.on_prefix["concatenation"]
    table.append(
        f"{name:30} {counts.operations:6d} kernels {kinds.get('cast', 0):5d} casts {cats:4d} prefix concatenations "
        f"{crossings:3d} crossings {reads:3d} reads {flops / 1e12:8.3f} TFLOP {moved / 1e9:7.2f} GB"
    )


def time_rows(name: str, answer: Served, table: list[str]) -> Iterator[Row]:
    """Milliseconds as forecast, by part: through a graph with and without compiled layers, and without a graph; by kind
    of kernel, too, through a graph."""
    parts, host = by_part(answer.counts), host_milliseconds(answer.counts)
    compiled = {part: fused(kernels) for part, kernels in parts.items()}
    for card in CARDS:
        for way, ran, least in (("compiled", compiled, 0.0), ("graph", parts, 0.0), ("eager", parts, LAUNCH)):
            where = f"operations/{name}/forecast/{card.name}/{way}"
            found = {part: milliseconds(kernels, card, least) for part, kernels in ran.items()} | {"host": host}
            for part, value in found.items():
                yield Row.of(f"{where}/{part}", value, "ms")
            for (part, kind), kernels in ({} if least else by_kind(ran)).items():
                yield Row.of(f"{where}/{part}/{kind}", milliseconds(kernels, card), f"ms of {len(kernels)} kernels")
            yield Row.of(where, sum(found.values()), "ms")
            shown = "  ".join(f"{part} {value:.2f}" for part, value in found.items())
            table.append(f"{name:12} {card.name} {way:9} {sum(found.values()):6.2f} ms: {shown}")


def by_kind(parts: dict[str, list[Kernel]]) -> dict[tuple[str, str], list[Kernel]]:
    """Kernels of each part by matmul, attention and all that only moves numbers."""
    found: dict[tuple[str, str], list[Kernel]] = {}
    for part, kernels in parts.items():
        for kernel in kernels:
            kind = kernel.kind if kernel.kind in ("matmul", "attention") else "other"
            found.setdefault((part, kind), []).append(kernel)
    return found
