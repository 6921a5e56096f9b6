"""Serving at released size: an answer's time through a graph, compiled, in batches, and while parameters are swapped.

Stages `pi0`, `groot`, `pi05`, `batch32` call `serve`, stage `swap` calls `swap`. An answer is what the policy server
gives: pictures and state on the host to physical actions on the host, by its engine.
"""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
from gpu.cases import Bench, published, questions
from gpu.record import Record
from gpu.trace import summary, traced
from suites._policy_table import served_bytes

from serl_launcher.run.parameters import publish
from serl_launcher.run.versions import file_path
from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.query import Query

ROUNDS = {"released": 40, "tiny": 3}
ALIKE = 0.02  # of the action range, between paths in bf16
SWAPS = 3
GOALS_MS = {"pi0": 12.0, "groot": 10.0, "pi0_batch32": 300.0}  # of the compiled path


def serve(bench: Bench, record: Record, case: str, modes: tuple[str, ...] = ("graph", "compiled")) -> None:
    """Times, a profile and memory of a case, first by the graph alone, then with compiled layers too."""
    began = time.perf_counter()
    engine = bench.engine(case)
    bench.device.wait()
    record.figure(f"{case}/ready", time.perf_counter() - began, "s")
    asked = questions(engine.spec, bench.case(case).questions)
    engine._say_kernels(asked[0])
    engine._graphs = None
    eager = record_answers(bench, record, engine, asked, case, "eager", rounds=3)
    for mode in modes:
        with record.part(f"{case}/{mode}"):
            engine._graphs = None  # what the last one held goes
            bench.device.forget_peak()
            began = time.perf_counter()
            engine.policy.compile_layers("on" if mode == "compiled" else "off", bench.device.compiler)
            engine._graphs = bench.device.graphs(engine)
            engine.act(asked)
            record.figure(f"{case}/{mode}/first", time.perf_counter() - began, "s")
            made = record_answers(bench, record, engine, asked, case, mode, ROUNDS[bench.size])
            bench.record_memory(record, f"{case}/{mode}/memory", case, "serve")
            check(record, engine, f"{case}/{mode}", eager, made)
        with record.part(f"{case}/{mode}/profile"):
            found = summary(traced(bench.device, partial(engine.act, asked)))
            record.figure(f"{case}/{mode}/profile", found["kernels"], "kernels", **found)


def record_answers(
    bench: Bench, record: Record, engine: PolicyEngine, asked: list[Query], case: str, mode: str, rounds: int
) -> np.ndarray:
    """Times of `rounds` answers to the same questions; the chunks of the last."""
    chunks, seconds = engine.act(asked), []
    for _ in range(rounds):
        began = time.perf_counter()
        chunks = engine.act(asked)
        seconds.append(time.perf_counter() - began)
    known = dict(case=case, work="serve", batch=len(asked), bytes=served_bytes(engine.policy, engine._steps))
    goal = bench.goal(GOALS_MS, case) if mode == "compiled" else {}
    worst = float(np.max(seconds)) * 1e3
    record.figure(f"{case}/{mode}", float(np.median(seconds)) * 1e3, "ms", worst=round(worst, 2), **known, **goal)
    return np.stack(chunks)


def check(record: Record, engine: PolicyEngine, name: str, wanted: np.ndarray, made: np.ndarray) -> None:
    """Chunks of two paths are alike and a graph was replayed. RuntimeError where one is not so: the times say nothing
    then."""
    reach = np.subtract(engine.spec.action_high, engine.spec.action_low)
    apart = float((np.abs(made - wanted) / reach).max())
    record.figure(f"{name}/against_eager", apart, "of the range")
    if apart > ALIKE:
        raise RuntimeError(f"{name}: chunks differ from the eager path's by {apart:.3g} of the action range")
    if engine._graphs.captured != 1 or engine._graphs.plain:
        graphs = engine._graphs
        raise RuntimeError(f"{name}: {graphs.captured} graphs captured, {graphs.plain} batches without one")


def swap(bench: Bench, record: Record, case: str = "pi0") -> None:
    """Answers alone and while versions are read, staged and swapped in; whether each swap took."""
    engine = bench.engine(case)
    engine._graphs = bench.device.graphs(engine)
    asked, folder = questions(engine.spec, 1), bench.folder / "params"
    kept = dict(step=0, base=engine._base, policy="bench", now=0.0, keep=2)
    for version in (1, 2):
        publish(folder, published(engine, 1 + 0.02 * version), version=version, **kept)
    size = file_path(folder, 1).stat().st_size / 1e9
    bench.device.forget_peak()
    alone = answer_while(engine, asked, rounds=ROUNDS[bench.size])
    record.figure("swap/alone", float(np.median(alone)) * 1e3, "ms", worst=round(float(np.max(alone)) * 1e3, 2))
    beside: list[float] = []
    for number in range(SWAPS):
        version, before = 1 + number % 2, engine.act(asked)[0]
        began = time.perf_counter()
        loader = threading.Thread(target=engine.stage_file, args=(file_path(folder, version), version))
        loader.start()
        beside += answer_while(engine, asked, until=loader)
        record.figure(f"swap/staged/{number}", time.perf_counter() - began, "s", file_gb=round(size, 2))
        began = time.perf_counter()
        took = engine.swap()
        bench.device.wait()
        record.figure(f"swap/swapped/{number}", (time.perf_counter() - began) * 1e3, "ms")
        if not took or engine.version != version or np.array_equal(before, engine.act(asked)[0]):
            raise RuntimeError(f"swap: version {version} is not served, {engine.version} is")
    worst = round(float(np.max(beside)) * 1e3, 2)
    record.figure("swap/beside", float(np.median(beside)) * 1e3, "ms", worst=worst, answers=len(beside))
    bench.record_memory(record, "swap/memory", case, "swap")


def answer_while(
    engine: PolicyEngine, asked: list[Query], rounds: int = 1, until: threading.Thread | None = None
) -> list[float]:
    """Seconds of answers one after another, at least `rounds`, and as long as the thread lives."""
    engine.act(asked)
    seconds: list[float] = []
    while len(seconds) < rounds or (until is not None and until.is_alive()):
        began = time.perf_counter()
        engine.act(asked)
        seconds.append(time.perf_counter() - began)
    return seconds
