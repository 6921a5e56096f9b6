"""What one call ran on the device: kernels counted and grouped, the time between them. Called by the serving stages."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from gpu.device import Card, Host
from torch.profiler import profile

TOP = 12  # kernels that are named
# The first that is found in a kernel's name counts.
GROUPS = {
    "copies": r"memcpy|memset",
    "attention": r"flash|fmha|attention|mha",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitk|cublas|gemv|mm\b|matmul|linear",
    "compiled": r"triton",
    "conversions and copies by kernels": r"copy|catarray|cat$|cast|clone",
}


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel, or on a CPU one operation."""

    name: str
    start: float  # microseconds
    end: float


def traced(device: Card | Host, call: Callable[[], Any]) -> list[Span]:
    """What `call` ran, in the order of its start."""
    call()
    with profile(activities=list(device.activities)) as found:
        call()
        device.wait()
    events = [e for e in found.events() if e.device_type == device.profiled]
    return sorted((Span(e.name, e.time_range.start, e.time_range.end) for e in events), key=lambda s: s.start)


def summary(spans: Iterable[Span]) -> dict[str, Any]:
    """Counts and microseconds by group, the share of the time in which nothing ran, and the kernels that took most."""
    spans = list(spans)
    by_group: dict[str, list[float]] = defaultdict(list)
    by_name: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        by_group[group_of(span.name)].append(span.end - span.start)
        by_name[span.name].append(span.end - span.start)
    gaps = gaps_of(spans)
    length = max(s.end for s in spans) - spans[0].start if spans else 0.0
    most = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:TOP]
    return {
        "kernels": len(spans),
        "span_us": round(length, 1),
        "gaps_us": round(sum(gaps), 1),
        "longest_gaps_us": [round(gap, 1) for gap in sorted(gaps, reverse=True)[:3]],
        "groups": {name: [len(us), round(sum(us), 1)] for name, us in by_group.items()},
        "most": [[name[:100], len(us), round(sum(us), 1)] for name, us in most],
        "attention": sorted({s.name[:100] for s in spans if group_of(s.name) == "attention"}),
    }


def group_of(name: str) -> str:
    """Of GROUPS, or `other`."""
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def gaps_of(spans: list[Span]) -> list[float]:
    """Microseconds between the end of all that came before and the next start; `spans` in the order of their start."""
    found, end = [], spans[0].end if spans else 0.0
    for span in spans:
        if span.start > end:
            found.append(span.start - end)
        end = max(end, span.end)
    return found
