"""The actor's link to its learner, from opening it to emptying its spool. Called by `main` and `wiring`.

connect_learner ─▶ TrainerClient (step batches, into the spool) ─▶ flush (at the end)
standalone      ─▶ StandaloneLink, where there is no learner (ip=null)
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig, OmegaConf

from serl_robot_infra.link import LearnerLink
from serl_robot_infra.observers.base import Observer
from serl_robot_infra.pacing import StopSignal
from serl_robot_infra.standalone import StandaloneLink
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.contract.errors import WireError
from serl_transport.contract.specs import TaskSpec
from serl_transport.wire.pictures import LOSSLESS, check_pictures

log = logging.getLogger(__name__)

_GOODBYE_MS = 1000
_WAIT_LINE_S = 5.0


class StoppedError(Exception):
    """A signal came while a server was waited for."""


def connect_learner(cfg: DictConfig, spec: TaskSpec, stream: TextIO, stop: StopSignal) -> TrainerClient:
    """The link to the learner at ip:port, once that is there; its spool lies in the run's folder.

    Raises StoppedError on a signal while waiting, WireError when the learner refuses (another run, task or version).
    """
    run_dir = Path(cfg.runs_dir) / cfg.run
    return TrainerClient(
        cfg.unique_identifier,
        cfg.ip,
        TrainerConfig(
            port_number=cfg.port, broadcast_port=cfg.broadcast_port, keys_dir=OmegaConf.select(cfg, "security.keys_dir")
        ),
        spec=spec,
        spool_dir=run_dir / "spool" / cfg.unique_identifier,
        spool_bytes=cfg.rollout.spool_mb << 20,
        pictures=check_pictures("rollout.pictures", cfg.rollout.get("pictures", LOSSLESS)),
        ledger_path=run_dir / "spool" / f"{cfg.unique_identifier}.acknowledged.jsonl" if cfg.rollout.ledger else None,
        on_wait=waiting(stream, stop),
        run=cfg.run,
    )


def standalone(cfg: DictConfig) -> StandaloneLink:
    """The link of ip=null; ValueError unless the config asks for what works without a learner."""
    rollout = cfg.rollout
    if rollout.mode != "eval" or rollout.policy not in ("local", "openpi", "groot") or rollout.episodes is None:
        raise ValueError(
            "ip=null runs without a learner: it needs rollout.mode=eval, rollout.policy=local, openpi or groot, and "
            f"rollout.episodes, got {rollout.mode}, {rollout.policy} and {rollout.episodes}"
        )
    return StandaloneLink()


def waiting(stream: TextIO, stop: StopSignal) -> Callable[[str], None]:
    """What a client calls while it waits for its server: a line now and then; raises StoppedError on a signal."""
    next_line = 0.0

    def on_wait(message: str) -> None:
        nonlocal next_line
        if stop:
            raise StoppedError
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + _WAIT_LINE_S
            print(message, file=stream, flush=True)

    return on_wait


def flush(link: LearnerLink, timeout_s: float, observer: Observer) -> None:
    """Deliver what the spool holds, for at most so long; people are told what stays."""
    if link.backlog:
        observer.message(f"delivering the last {link.backlog} step batches, at most {timeout_s:g} s")
    if not link.flush(timeout_s):
        observer.message(f"{link.backlog} step batches stay in the spool; the next start of this actor delivers them")


def leave(link: LearnerLink, reason: str) -> None:
    """Tell the learner that this actor leaves, and why; one that does not answer finds out by the silence."""
    try:
        link.request("leave", {"reason": reason}, timeout_ms=_GOODBYE_MS)
    except WireError as error:
        log.debug("the learner was not told that this actor leaves: %s", error)
