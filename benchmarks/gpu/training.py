"""A training step at released size: time, waits for the device, memory. Stages `*_step` call `train`."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
from gpu.cases import Bench
from gpu.device import waits
from gpu.record import Record

ROUNDS = {"released": 8, "tiny": 2}
GOALS_MS = {"pi0": 270.0, "pi0_full": 1100.0}
ROOT = Path(__file__).resolve().parents[2]


def train(bench: Bench, record: Record, case: str, compile: tuple[str, ...] = ("off",)) -> None:
    """Steps of the learner on one batch, whose losses must be finite and move."""
    _, learner, batch = bench.learner(case)
    bench.device.forget_peak()
    losses = [float(learner.step(batch, 1.0)["losses/flow"]) for _ in range(2)]
    for mode in compile:
        name = f"{case}_step" + ("/compiled" if mode == "on" else "")
        with record.part(name):
            if mode == "on":
                learner.agent.policy.compile_layers(mode, bench.device.compiler)
            seconds = []
            for _ in range(ROUNDS[bench.size] + 1):
                bench.device.wait()
                began = time.perf_counter()
                metrics = learner.step(batch, 1.0)
                bench.device.wait()
                seconds.append(time.perf_counter() - began)
            known = bench.goal(GOALS_MS, case) | dict(
                case=case, work="train", batch=len(batch), first=round(seconds[0], 2)
            )
            record.figure(name, float(np.median(seconds[1:])) * 1e3, "ms", **known)
            losses.append(float(metrics["losses/flow"]))
        if mode == "off":
            bench.record_memory(record, f"{name}/memory", case, "train")
            with record.part(f"{name}/waits"):
                count_waits(bench, record, learner, batch, name)
    record.figure(f"{case}_step/losses", [round(loss, 5) for loss in losses])
    if not np.isfinite(losses).all() or losses[0] == losses[-1]:
        raise RuntimeError(f"{case}: losses {losses} are not finite, or do not move")


def count_waits(bench: Bench, record: Record, learner, batch, name: str) -> None:
    """Where a step waits for the device, by torch's own watch."""
    with waits(bench.device) as found:
        learner.step(batch, 1.0)
    places = Counter(place.removeprefix(f"{ROOT}/") for place in found)
    record.figure(f"{name}/waits", len(found), "a step", places=dict(places.most_common(8)))
