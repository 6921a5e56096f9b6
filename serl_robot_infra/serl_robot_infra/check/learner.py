"""Is the learner there, and how long does it take to answer? Round trips as the actor's loop makes them.

Called by `robot.check`. The client is the actor's own, name, keys and spool included: what an earlier actor left in the
spool is delivered. Nothing is recorded: the bytes of a step batch go as a question, so the learner's disk is not in it.
"""

import time
from collections.abc import Callable
from threading import Timer
from typing import Any, TextIO

import numpy as np
from omegaconf import DictConfig

from serl_robot_infra.check.report import Report
from serl_robot_infra.connect import StoppedError, connect_learner
from serl_robot_infra.link import LearnerLink
from serl_robot_infra.operators import control_rate
from serl_robot_infra.pacing import StopSignal
from serl_robot_infra.policy_client import infer_body
from serl_transport.client import TrainerClient
from serl_transport.contract.errors import NotReady, SpoolError, WireError
from serl_transport.contract.schema import Observation
from serl_transport.contract.specs import TaskSpec

WAIT_S = 8.0
_ASKED = 10  # times
_TIMEOUT_MS = 3000.0


def find_learner(report: Report, cfg: DictConfig, spec: TaskSpec, stream: TextIO) -> TrainerClient | None:
    """The link, or None with a finding that says why there is none."""
    where = f"{cfg.ip}:{cfg.port}"
    stop = StopSignal()
    timer = Timer(WAIT_S, stop.set)
    timer.start()
    try:
        link = connect_learner(cfg, spec, stream, stop)
    except StoppedError:
        report.fail("learner", f"nobody answers at {where} for {WAIT_S:g} s",
                    "start it (run_learner.sh), its bind_host=, a firewall between; here ip= and port=")  # fmt: skip
        return None
    except (WireError, SpoolError, ValueError, OSError) as problem:
        report.fail("learner", f"{where}: {problem}", "the words before say what to change")
        return None
    finally:
        timer.cancel()
    report.ok("learner", f"{where} takes {cfg.unique_identifier} of run {cfg.run}, task {spec.name}")
    if link.backlog:
        report.warn("spool", f"{link.backlog} step batches of an earlier actor are being delivered",
                    "nothing: the figures below are those of a busy link")  # fmt: skip
    return link


def check_latency(report: Report, cfg: DictConfig, spec: TaskSpec, link: LearnerLink, seen: Observation | None) -> None:
    """Round trips of a short question, of a step batch's bytes, and of a question to the policy."""
    nothing: dict[str, Any] = {}
    _measure(report, "round trip", lambda: link.request("status", nothing, timeout_ms=_TIMEOUT_MS))
    if seen is None:
        report.skip("policy's answer", "no observation to ask it with")
        return
    frames = [*seen.images.values(), seen.state]
    batch = {"data": [np.concatenate([f.reshape(-1).view(np.uint8) for f in frames])] * cfg.rollout.batch_ticks}
    size = sum(part.nbytes for part in batch["data"]) / 1e6
    took = _measure(report, f"{size:.1f} MB of data", lambda: link.request("status", batch, timeout_ms=_TIMEOUT_MS))
    period_ms = 1e3 * cfg.rollout.batch_ticks / spec.control_hz
    if took is not None and took > period_ms:
        report.warn("link", f"a step batch takes {took:.0f} ms and comes every {period_ms:.0f} ms: the spool will grow",
                    "a cable in place of the radio, smaller task.spec.cameras")  # fmt: skip
    if cfg.rollout.policy == "remote":
        _check_policy(report, cfg, spec, link, seen)


def _check_policy(report: Report, cfg: DictConfig, spec: TaskSpec, link: LearnerLink, seen: Observation) -> None:
    body = {**infer_body(seen, spec.prompt, 0, 0, "eval"), "deadline_ms": _TIMEOUT_MS}
    try:
        took = _measure(report, "policy's answer", lambda: link.infer(body, timeout_ms=_TIMEOUT_MS))
    except NotReady as problem:
        report.warn("policy's answer", f"not yet: {problem}", "a stage that needs a policy waits until it is there")
        return
    rate = control_rate(cfg, spec) or spec.control_hz
    chunk_ms = 1e3 * cfg.rollout.execute_horizon / rate
    stop_ms = (cfg.rollout.get("watchdog") or {}).get("stop_ms", 500.0)
    if took is None:
        return
    if took > stop_ms:
        report.fail("policy's answer", f"{took:.0f} ms: the watchdog stops the robot after {stop_ms:g} ms",
                    "a faster policy or link, or rollout.realtime=async; rollout.watchdog.stop_ms")  # fmt: skip
    elif took > 2e3 / rate and cfg.rollout.realtime in ("off", False):
        report.warn("policy's answer", f"{took:.0f} ms, a chunk is {chunk_ms:.0f} ms: the robot holds at each question",
                    "rollout.realtime=async or rtc, a longer rollout.execute_horizon")  # fmt: skip


def _measure(report: Report, check: str, ask: Callable[[], Any]) -> float | None:
    """Median ms of some calls, reported; None: they failed. NotReady goes on to the caller."""
    took = []
    try:
        for _ in range(_ASKED):
            began = time.monotonic()
            ask()
            took.append((time.monotonic() - began) * 1e3)
    except NotReady:
        raise
    except WireError as problem:
        report.fail(check, f"{problem}", "the learner's screen and logs/gateway.log, logs/policy.log of its run")
        return None
    median, worst = float(np.median(took)), max(took)
    report.figures |= {f"{check}, median ms": median, f"{check}, worst ms": worst}
    report.ok(check, f"median {median:.1f} ms, worst of {_ASKED} {worst:.1f} ms")
    return median
