"""The policy server role: questions forwarded by the gateway in, chunks of actions out, in dynamic batches.

Started by the supervisor as `python -m serl_launcher.serving <run_dir>`.

    gateway ──infer──▶ PolicyLink ─▶ [ batch: first request, then company for ≤ max_wait_ms ] ─▶ engine ─▶ replies
                                                    params/latest.json ─▶ engine.refresh, between two batches

Blocks on: the next question, at most `POLL_S`, so that new parameters are noticed when nobody asks.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from serl_launcher.gateway.internal import InferRequest, PolicyLink
from serl_launcher.paths import RunPaths
from serl_launcher.serving.engine import PolicyEngine, query_from_body
from serl_transport.errors import BadFrame, NotReady, SchemaMismatch

log = logging.getLogger("policy")

POLL_S = 0.05
REPORT_S = 1.0


class PolicyServer:
    """Answers until the process is ended; one thread."""

    def __init__(self, cfg: DictConfig, paths: RunPaths) -> None:
        self._engine = PolicyEngine(cfg, paths.params)
        self._link = PolicyLink(paths.root)
        self._max_batch, self._max_wait_s = cfg.serving.max_batch, cfg.serving.max_wait_ms / 1e3
        self._answered = 0
        self._batches: deque[int] = deque(maxlen=200)
        self._latencies: deque[float] = deque(maxlen=200)
        self._reported = 0.0

    def run(self) -> None:
        """Serve for ever."""
        while True:
            if self._engine.refresh():
                log.info("serving policy version %d", self._engine.version)
            self._report()
            if batch := self._collect():
                self._answer(batch)

    def _collect(self) -> list[InferRequest]:
        """The first question within POLL_S and whatever joins it within max_wait_ms, at most max_batch."""
        first = self._link.receive(POLL_S)
        if first is None:
            return []
        batch, deadline = [first], time.monotonic() + self._max_wait_s
        while len(batch) < self._max_batch:
            request = self._link.receive(max(0.0, deadline - time.monotonic()))
            if request is None:
                break
            batch.append(request)
        return batch

    def _answer(self, batch: list[InferRequest]) -> None:
        started = time.perf_counter()
        ready = [(request, query) for request in batch if (query := self._admit(request)) is not None]
        if not ready:
            return
        chunks = self._engine.act([query for _, query in ready])
        elapsed_ms = (time.perf_counter() - started) * 1e3
        for (request, _), actions in zip(ready, chunks, strict=True):
            reply = {"actions": actions, "policy_version": self._engine.version, "server_ms": elapsed_ms}
            self._link.reply(request.token, reply)
        self._answered += len(ready)
        self._batches.append(len(ready))
        self._latencies.append(elapsed_ms)

    def _admit(self, request: InferRequest):
        """The validated question, or None after a typed refusal was sent."""
        try:
            wanted = int(request.body.get("min_version") or 0)
            if self._engine.version < wanted:
                self._engine.refresh()
            if self._engine.version < wanted:
                raise NotReady(f"policy version {wanted} was asked for, {self._engine.version} is served: ask again")
            return query_from_body(request.body, self._engine.spec)
        except (NotReady, BadFrame) as refusal:
            self._link.reply(request.token, refusal)
        except (ValueError, TypeError) as mistake:
            self._link.reply(request.token, SchemaMismatch(str(mistake)))
        return None

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported < REPORT_S:
            return
        self._reported = now
        self._link.serving(
            version=self._engine.version,
            requests=self._answered,
            batch_mean=statistics.fmean(self._batches) if self._batches else 0.0,
            p50_ms=statistics.median(self._latencies) if self._latencies else None,
        )


def main(run_dir: str) -> int:
    """Entry of the role. Returns 2 on a mistake in the config, said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    paths = RunPaths(Path(run_dir))
    try:
        server = PolicyServer(OmegaConf.load(paths.config), paths)
    except ValueError as mistake:
        log.error("%s", mistake)
        return 2
    server.run()
    return 0
