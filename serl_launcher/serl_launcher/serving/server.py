"""The policy server role: questions forwarded by the gateway in, chunks of actions out, in dynamic batches.

Started by the supervisor as `python -m serl_launcher.serving <run_dir>`.

    gateway ──infer──▶ PolicyLink ─▶ admit ─▶ [ BatchQueue ≤ max_queue ] ─▶ engine.act ─▶ replies
                                       └ typed refusal     └ deadline_missed      └ internal, to the culprit alone
    loader thread: params/latest.json ─▶ engine.stage ─────────────────▶ engine.swap, between two batches

Blocks on: the next question, at most `POLL_S`, so that new parameters are noticed when nobody asks. The loader thread
looks for them as often.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path

from hydra.errors import InstantiationException
from omegaconf import DictConfig

from serl_config.mistakes import is_config_mistake, mistake_message
from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.alive import Pace, beat
from serl_launcher.run.config import read_config
from serl_launcher.run.internal import InferRequest, PolicyLink
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.ready import say_ready
from serl_launcher.serving.batching import BatchQueue, Waiting
from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.figures import ServingFigures
from serl_launcher.serving.query import query_from_body
from serl_transport.contract.bounds import INT32, check_whole, shown
from serl_transport.contract.errors import DeadlineMissed, Internal, NotReady, SchemaMismatch, WireError

log = logging.getLogger("policy")

POLL_S = 0.05
REPORT_S = 1.0


class PolicyServer:
    """Answers until `stop`; one thread, and the loader's."""

    def __init__(self, cfg: DictConfig, paths: RunPaths) -> None:
        serving = cfg.serving
        self._queue = BatchQueue(
            serving.max_batch, serving.max_wait_ms / 1e3, serving.max_queue, serving.evaluation_patience_ms / 1e3
        )
        acts = ActsLedger(paths.root)  # the loader thread's, once it runs
        self._engine = PolicyEngine(cfg, paths.params, pinned=lambda: acts.state.served)
        self._engine.refresh()
        self._engine.warm_up()
        self._link = PolicyLink(paths.root)
        self._loader = threading.Thread(target=self._load, name="parameter-loader", daemon=True)
        self._parked: list[InferRequest] = []  # they want a version that is on its way
        self._max_parked: int = serving.max_queue
        self._figures = ServingFigures()
        self._pace = Pace("a forward pass")
        self._reported = -math.inf
        self._stopping = threading.Event()

    def run(self) -> None:
        """Serve until `stop`."""
        self._loader.start()
        say_ready()
        try:
            while not self._stopping.is_set():
                beat()
                self._take_over()
                self._report()
                self._receive()
                self._refuse_late()
                if self._queue.wait_s(time.monotonic()) == 0.0:
                    self._answer(self._queue.take())
        finally:
            self._stopping.set()
            self._loader.join()
            self._link.close()

    def stop(self) -> None:
        """Make `run` return; from any thread."""
        self._stopping.set()

    def _load(self) -> None:
        """The loader thread: new parameters are made ready; after a failure the next version is tried."""
        while not self._stopping.wait(POLL_S):
            try:
                self._engine.stage()
            except Exception:
                log.exception("looking for new parameters failed; serving version %d on", self._engine.version)

    def _take_over(self) -> None:
        """A batch boundary: the staged version, if there is one, serves from here on."""
        if self._engine.swap():
            log.info("serving policy version %d", self._engine.version)
            self._figures.swaps += 1
        parked, self._parked = self._parked, []
        for request in parked:
            self._admit(request)

    def _receive(self) -> None:
        """Wait for the next question as long as the batch in hand may, then take whatever is there."""
        wait = self._queue.wait_s(time.monotonic())
        timeout = POLL_S if wait is None else min(wait, POLL_S)
        if self._parked:
            timeout = min(timeout, 0.005)
        request = self._link.receive(timeout)
        while request is not None:
            self._admit(request)
            request = self._link.receive(0)

    def _admit(self, request: InferRequest) -> None:
        """Queue the question, park it, or send its typed refusal."""
        try:
            waiting = self._waiting(request)
        except WireError as refusal:
            self._refuse(request, refusal)
            return
        except (ValueError, TypeError) as mistake:
            self._refuse(request, SchemaMismatch(str(mistake)))
            return
        if waiting is None:
            self._parked.append(request)
        elif (crowded := self._queue.offer(waiting)) is not None:
            self._refuse(crowded.request, NotReady(f"the policy server is busy: {len(self._queue)} wait; ask again"))

    def _waiting(self, request: InferRequest) -> Waiting | None:
        """The validated question; None while a version that it wants is on its way."""
        body, version = request.body, self._engine.version
        wanted = check_whole("infer: min_version", body.get("min_version") or 0, -1, INT32)
        if self._engine.pin is not None:  # an actor may hold a ticket from before
            wanted = min(wanted, self._engine.pin)
        if version < wanted:
            if self._engine.will_serve(wanted) and len(self._parked) < self._max_parked:
                return None
            why = f" ({self._engine.trouble})" if self._engine.trouble else ""
            raise NotReady(f"policy version {wanted} was asked for, {version} is served{why}: ask again")
        query = query_from_body(body, self._engine.spec)
        deadline, evaluation = request.arrived + _deadline_s(body), body.get("mode") == "eval"
        return Waiting(request, query, request.actor, request.arrived, deadline, evaluation)

    def _refuse_late(self) -> None:
        now = time.monotonic()
        for late in self._queue.expire(now):
            waited = (now - late.arrived) * 1e3
            self._refuse(late.request, DeadlineMissed(f"not executed: waited {waited:.0f} ms, past its deadline_ms"))

    def _refuse(self, request: InferRequest, refusal: WireError) -> None:
        self._figures.refused[refusal.code] += 1
        self._link.reply(request.token, refusal)

    def _answer(self, batch: list[Waiting]) -> None:
        started = time.monotonic()
        try:
            with self._pace.timed():
                chunks = self._engine.act([item.query for item in batch])
        except Exception:
            log.exception("a batch of %d failed on version %d", len(batch), self._engine.version)
            self._engine.check_device()  # ends this process where it is broken; the supervisor starts another
            self._answer_one_by_one(batch)
            return
        done = time.monotonic()
        for item, actions in zip(batch, chunks, strict=True):
            body = {"actions": actions, "policy_version": self._engine.version, "server_ms": (done - started) * 1e3}
            self._link.reply(item.request.token, body)
        self._queue.served(batch, done - started, time.monotonic())
        self._figures.answered(len(batch), [(done - item.arrived) * 1e3 for item in batch])

    def _answer_one_by_one(self, batch: list[Waiting]) -> None:
        """After a failure: whoever caused it gets the error, the others their actions."""
        if len(batch) > 1:
            for item in batch:
                self._answer([item])
            return
        message = f"the policy failed on this question (version {self._engine.version}); see the policy server's log"
        self._refuse(batch[0].request, Internal(message))

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported >= REPORT_S:
            self._reported = now
            engine, figures = self._engine, self._figures.to_body(len(self._queue))
            chunk = engine.policy.valid_horizon  # ticks; the GR00T server tells its clients
            self._link.serving(version=engine.version, chunk=chunk, trouble=engine.trouble, **figures)


def _deadline_s(body: dict) -> float:
    """Seconds after arrival within which an answer is of use."""
    value = body.get("deadline_ms")
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"infer: deadline_ms: expected a number above 0, got {shown(value)}")
    return value / 1e3


def main(run_dir: str) -> int:
    """Entry of the role. Returns 2 on a mistake in the config, said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    paths = RunPaths(Path(run_dir))
    try:
        server = PolicyServer(read_config(paths.config), paths)
    except (ValueError, FileNotFoundError, InstantiationException) as mistake:
        if not is_config_mistake(mistake):
            raise
        log.debug("where it came from", exc_info=True)
        log.error("%s", mistake_message(mistake))
        return 2
    server.run()
    return 0
