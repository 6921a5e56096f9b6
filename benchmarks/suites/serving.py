"""The policy server under eight actors, its hot swap, and what real-time chunking costs. Tiny policy on CPU.

    8 actor processes ─▶ gateway process ─▶ policy server process      against the same with max_batch=1
    engine, in this process: a guided sample                            against a plain one

Everything is what a run starts, on free ports; the actors ask without pausing, so the server is the bottleneck.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rows import Row, alternate

ACTORS, SETTLE_S = 8, 1.0


def rows(quick: bool) -> Iterator[Row]:
    """Every figure of the suite."""
    seconds, rounds = (3.0, 1) if quick else (10.0, 3)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        together = Lab(Path(folder) / "together")
        alone = Lab(Path(folder) / "alone", max_batch=1)
        with together.running(), alone.running():
            yield from under_load(together, alone, seconds, rounds)
            yield from hot_swap(together, seconds)
        yield from guidance(together.config, rounds)


def under_load(together: Lab, alone: Lab, seconds: float, rounds: int) -> Iterator[Row]:
    """Throughput of batches against one at a time, and how evenly the actors get their answers."""
    shares: list[float] = []

    def batched() -> float:
        answers = together.load(seconds)
        counts = [len(answer["ms"]) for answer in answers]
        shares.append(min(counts) / statistics.fmean(counts))
        return sum(counts) / seconds

    def single() -> float:
        return sum(len(answer["ms"]) for answer in alone.load(seconds)) / seconds

    rates = alternate({"together": batched, "alone": single}, rounds)
    name = f"serving/{ACTORS} actors"
    yield Row.of(f"{name}/one at a time", rates["alone"], "requests/s")
    yield Row.of(f"{name}/batched", rates["together"], "requests/s", rates["alone"], ">= 2.5")
    yield Row.of(f"{name}/slowest actor against the mean", min(shares), "share", 1.0, ">= 0.8")


def hot_swap(lab: Lab, seconds: float) -> Iterator[Row]:
    """A new version every half second under load: errors, and the tail of the latencies with and without."""
    calm = [ms for answer in lab.load(seconds) for ms in answer["ms"]]
    before = lab.version
    answers = lab.load(seconds, publish_every_s=0.5)
    swapping = [ms for answer in answers for ms in answer["ms"]]
    errors = sum(len(answer["errors"]) for answer in answers)
    served = {version for answer in answers for version in answer["versions"]}
    backwards = sum(a > b for x in answers for a, b in zip(x["versions"], x["versions"][1:], strict=False))
    yield Row("serving/hot swap/errors", errors + backwards, "errors", 0, None, "<= 0", errors + backwards == 0)
    yield Row.of("serving/hot swap/versions served", len(served), "versions", lab.version - before, None)
    p99, floor = np.percentile(swapping, 99), np.percentile(calm, 99)
    yield Row.of("serving/hot swap/p99", float(p99), "ms", float(floor), "<= 2.0")


def guidance(cfg: DictConfig, rounds: int) -> Iterator[Row]:
    """A sample that a running chunk guides, against a plain one."""
    from serl_launcher.serving.engine import PolicyEngine
    from serl_launcher.serving.query import Query

    cfg = OmegaConf.merge(cfg, {"serving": {"device": "cpu", "threads": 1}})
    engine = PolicyEngine(cfg, Path(cfg.runs_dir) / cfg.run / "params")
    spec, rng = engine.spec, np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for camera, size in spec.cameras.items()}
    running = np.zeros((engine.policy.action_horizon, len(spec.action_names)), np.float32)
    plain = Query(images, np.asarray(spec.state_low, np.float32), spec.prompt, seed=0)
    guided = replace(plain, prefix_actions=running, inference_delay=2)

    def timed(query: Query) -> float:
        started = time.perf_counter()
        for _ in range(5):
            engine.act([query])
        return (time.perf_counter() - started) / 5 * 1e3

    work = {"plain": partial(timed, plain), "guided": partial(timed, guided)}
    alternate(work, 1)  # the first calls are slower
    ms = alternate(work, max(3, rounds))
    yield Row.of("serving/real-time chunking/guided sample", ms["guided"], "ms", ms["plain"])


class Lab:
    """A run folder with a published policy, its gateway, its policy server and eight actors."""

    def __init__(self, run_dir: Path, **serving: Any) -> None:
        from flowserl_cli.compose import load_config

        with socket.socket() as first, socket.socket() as second:
            for free in (first, second):
                free.bind(("127.0.0.1", 0))
            self.ports = [free.getsockname()[1] for free in (first, second)]
        port, broadcast = self.ports
        words = [f"port={port}", f"broadcast_port={broadcast}", f"run={run_dir.name}", "schedule=eval"]
        words += [f"runs_dir={run_dir.parent}", *(f"serving.{key}={value}" for key, value in serving.items())]
        self.run_dir, self.config, self.version = run_dir, load_config(words), 0
        (run_dir / "logs").mkdir(parents=True)
        OmegaConf.save(self.config, run_dir / "config.yaml")
        self._tensors, self._base = self._policy()
        self._actors: list[subprocess.Popen] = []

    def _policy(self) -> tuple[dict, str]:
        from serl_launcher.agents.build import build_policy
        from serl_launcher.policies.base import trainable
        from serl_launcher.run.parameters import base_sha256
        from serl_transport.contract.specs import TaskSpec

        spec = TaskSpec.from_dict(OmegaConf.to_container(self.config.task.spec, resolve=True))
        policy = build_policy(self.config, spec)
        return {name: p.detach() for name, p in trainable(policy).items()}, base_sha256(policy)

    def publish(self) -> None:
        """The next version, as the trainer does it."""
        from serl_launcher.run.parameters import publish

        self.version += 1
        publish(
            self.run_dir / "params", self._tensors, version=self.version, step=0, base=self._base, policy="bench",
            now=time.time(), keep=5,
        )  # fmt: skip

    @contextmanager
    def running(self) -> Iterator[None]:
        """Gateway, policy server and actors, until they have all answered once."""
        self.publish()
        with ExitStack() as stack:
            for module in ("serl_launcher.gateway", "serl_launcher.serving"):
                log = stack.enter_context((self.run_dir / "logs" / f"{module}.log").open("wb"))
                argv = [sys.executable, "-m", module, str(self.run_dir)]
                stack.callback(_end, subprocess.Popen(argv, stdout=log, stderr=log))
            script = str(Path(__file__).with_name("_serving_actor.py"))
            for k in range(ACTORS):
                argv = [sys.executable, script, str(self.run_dir), *map(str, self.ports), f"actor-{k}"]
                actor = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                stack.callback(_end, actor)
                self._actors.append(actor)
            for actor in self._actors:
                if actor.stdout.readline().strip() != "ready":
                    raise RuntimeError(f"an actor did not start; see {self.run_dir}/logs")
            self._await_policy()
            yield

    def _await_policy(self) -> None:
        deadline = time.monotonic() + 120
        while not any(answer["ms"] for answer in self.load(0.5)):
            if time.monotonic() > deadline:
                raise RuntimeError("the policy server did not answer within 120 s")

    def load(self, seconds: float, publish_every_s: float | None = None) -> list[dict]:
        """All actors ask for `seconds`, after settling; what each of them saw."""
        begin = time.monotonic() + SETTLE_S
        for actor in self._actors:
            actor.stdin.write(f"{begin} {begin + seconds}\n")
            actor.stdin.flush()
        while publish_every_s and time.monotonic() < begin + seconds - publish_every_s:
            time.sleep(publish_every_s)
            self.publish()
        return [json.loads(actor.stdout.readline()) for actor in self._actors]


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


os.environ.setdefault("HF_HUB_OFFLINE", "1")
